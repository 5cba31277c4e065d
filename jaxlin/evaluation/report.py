"""Measure a run or a teacher, show the results and keep them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxlin import processes
from jaxlin.config import MeshConfig, UserError
from jaxlin.evaluation import bear, benchmarks, longbench, quick, ruler, suite, swde
from jaxlin.evaluation.subject import Subject, open_subject, params_sha256
from jaxlin.evaluation.task import Kept, Options, Task, made_with
from jaxlin.runs import write_text
from jaxlin.sharding import make_mesh

BENCHMARKS: dict[str, dict[str, Task]] = {
    "zero_shot": benchmarks.ZERO_SHOT,
    "ifeval": benchmarks.IFEVAL,
    "gsm8k": benchmarks.GSM8K,
    "bear": bear.TASKS,
    "niah": ruler.TASKS,
    "swde": swde.TASKS,
    "longbench": longbench.TASKS,
}
SUITES: dict[str, Mapping[str, Any]] = {
    "quick": quick.TASKS,
    **BENCHMARKS,
    "niah_short": ruler.SHORT_TASKS,  # shorter, and longer, than what the paper ran
    "niah_long": ruler.LONG_TASKS,
    "all": {name: task for tasks in BENCHMARKS.values() for name, task in tasks.items()},
}
TIMES = ("speed",)  # tasks whose results differ from one time to the next


def choose_tasks(name: str, tasks: Sequence[str]) -> list[str]:
    """The tasks of suite `name`, or those of them that `tasks` names. Raises UserError for names that do not exist."""
    if name not in SUITES:
        raise UserError(f"--suite {name}: choose one of {', '.join(SUITES)}")
    if unknown := [task for task in tasks if task not in SUITES[name]]:
        raise UserError(f"--tasks {unknown[0]}: the tasks of --suite {name} are {', '.join(SUITES[name])}")
    return [task for task in SUITES[name] if not tasks or task in tasks]


def evaluate(subject: Subject, *, tasks: Sequence[str] = (), limit: int | None = None) -> dict[str, Any]:
    """Measure `subject` with the quick suite; what is found of a run is kept in its evaluation.json as well, beside
    what other tasks gave of the same parameters, unless it is of another text than the run's own.

    Returns what was measured (suite, teacher, and for a run preset and mixer), params_sha256, limit, for a run
    stage_losses ({stage: {start, end}}), kl ({initialisation, now}) and held_out_sums (of each batch, for intervals),
    for a milestone, which is not measured twice, step and tokens instead of the losses, and results
    ({task: {model: {metric: value}}}).
    Values that are not finite numbers are None.
    """
    chosen = choose_tasks("quick", tasks)
    samples = quick.SAMPLES if limit is None else limit
    run = subject.run
    found = _what(subject, "quick") | {"limit": samples}
    if (kept := _kept(subject, found, chosen)) is not None:
        return kept
    results = {task: quick.TASKS[task](subject, samples) for task in chosen}
    if run is not None:
        held_out = results.get("held_out") or quick.held_out(subject, samples)
        initial = run.read("fidelity.json") or {}
        kind = subject.config.kind(max(subject.config.stages()))
        if subject.other_text or initial.get("measured_on", "text") != kind:
            initial = {}  # nothing to compare with
        if subject.step is None:
            found["stage_losses"] = run.stage_losses()
        else:
            found["tokens"] = run.milestones()[subject.step]
        found["kl"] = {"initialisation": initial.get("kl"), "now": held_out["student"]["kl"]}
        found["held_out_sums"] = subject.held_out_sums
    found["results"] = results
    found = _finite(found)
    if run is not None and not subject.other_text:
        path = subject.folder / "evaluation.json"
        before = _recorded(path, found, "limit") or dict(results={})
        together = found | dict(results=before["results"] | found["results"])
        write_text(path, json.dumps(together, indent=1))
    return found


def _kept(subject: Subject, what: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any] | None:
    """What was measured of a milestone, which nobody trains further; None where a task of it is missing."""
    if subject.step is None or subject.other_text:
        return None
    found = _recorded(subject.folder / "evaluation.json", what, "limit")
    return found if found is not None and set(tasks) <= set(found["results"]) else None


def _recorded(path: Path, what: dict[str, Any], *same: str) -> dict[str, Any] | None:
    """What a file of results holds of the same parameters, and the `same`; None where it is of others, or damaged."""

    def find() -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_text())
            is_same = all(found[name] == what[name] for name in ("params_sha256", *same))
            return found if is_same and isinstance(found["results"], dict) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    return processes.from_first(find)


def check_data(name: str, tasks: Sequence[str], options: Options) -> None:
    """Raises UserError, before anything is loaded, where none of the benchmarks has what it needs."""
    chosen = {task: SUITES[name][task] for task in choose_tasks(name, tasks)}
    missing = suite.missing(chosen, options)
    if len(missing) == len(chosen):
        raise UserError(failure(missing))


def benchmark(
    subject: Subject, name: str, options: Options, *, tasks: Sequence[str] = (), folder: Path | None = None
) -> dict[str, Any]:
    """Measure `subject` with the suite `name`; finished tasks are kept in `folder`, and taken from there.

    The suite's file there also keeps what other tasks gave of the same parameters. Returns what `evaluate` does,
    without stage_losses and kl, and with the seeds, hashes and versions of each result (details, {task: {model:
    {...}}}), the versions and hardware of now (made_with), and what failed ({task: why}).
    """
    chosen = {task: SUITES[name][task] for task in choose_tasks(name, tasks)}
    outcome = suite.run(subject, chosen, options, Kept(folder))
    found = _what(subject, name) | {"results": _with_averages(outcome.metrics)}
    found |= {"details": suite.details(outcome.results), "made_with": made_with(), "failed": outcome.failed}
    found = _finite(found)
    if folder is not None:
        path = folder / f"{name}.json"
        before = _recorded(path, found) or {}
        together = {part: before.get(part, {}) | found[part] for part in ("results", "details", "failed")}
        together["results"] = _finite(_with_averages(together["results"]))
        together["failed"] = {task: why for task, why in together["failed"].items() if task not in found["results"]}
        write_text(path, json.dumps(found | together, indent=1))
    return found


def _with_averages(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results of tasks, and the paper's averages over them of the models that have all."""
    results = {task: by_model for task, by_model in results.items() if task != "average"}
    models = dict.fromkeys(model for by_model in results.values() for model in by_model)
    of_each = {model: benchmarks.average({t: by.get(model, {}) for t, by in results.items()}) for model in models}
    found = {model: averages for model, averages in of_each.items() if averages}
    return results | ({"average": found} if found else {})


def failure(failed: Mapping[str, str]) -> str:
    """What failed, in one line; tasks that failed for one reason, or one that differs in their names only, together."""
    reasons: dict[str, list[str]] = {}
    for task, why in failed.items():
        pattern, times = re.subn(rf"(?<![\w/.-]){re.escape(task)}(?![\w/.-])", "\0", why)
        reasons.setdefault(pattern if times == 1 else why, []).append(task)
    lines = []
    for why, tasks in reasons.items():
        names = ", ".join(tasks)
        lines.append(why.replace("\0", names) if "\0" in why or len(reasons) == 1 else f"{names}: {why}")
    return "; ".join(lines)


def _what(subject: Subject, name: str) -> dict[str, Any]:
    """What is measured, and with which suite."""
    found: dict[str, Any] = {"suite": name, "teacher": subject.config.teacher}
    if subject.run is not None:
        found |= {"preset": subject.config.preset, "mixer": subject.config.mixer}
    if subject.step is not None:
        found["step"] = subject.step
    return found | {"params_sha256": params_sha256(subject.measured.params)}


def report_run(folder: str | Path, mesh: MeshConfig) -> dict[str, Any]:
    """Measure the run in `folder` with the quick suite, over all devices, and print the table."""
    found = evaluate(open_subject(run=str(folder), mesh=make_mesh(mesh)))
    print_results(found)
    return found


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    """The results that two evaluations of the same parameters share."""
    return found | {"results": {task: value for task, value in found["results"].items() if task not in TIMES}}


def as_line(found: dict[str, Any]) -> str:
    """One line of JSON, without times."""
    return json.dumps(without_times(found), allow_nan=False)


def print_results(found: dict[str, Any], console: Console | None = None) -> None:
    """Results as a table, one row for each metric, one column for each model."""
    console = console or Console(quiet=not processes.is_first())
    at = f", step {found['step']}" if "step" in found else ""
    models = list(dict.fromkeys(model for task in found["results"].values() for model in task))
    what = f"{found['mixer']} ({found['preset']}) and its teacher" if "mixer" in found else "teacher"
    table = Table(title=f"{what} {found['teacher']}{at}, suite {found['suite']}")
    examples = {task: n for task in found["results"] if (n := examples_of(found, task))}
    for heading in ("task", "metric", *(["examples"] if examples else [])):
        table.add_column(heading)
    for model in models:
        table.add_column(model, justify="right")
    for task, by_model in found["results"].items():
        metrics = list(dict.fromkeys(metric for values in by_model.values() for metric in values))
        for metric in metrics:
            cells = (_cell(by_model.get(model, {}), metric) for model in models)
            count = [f"{examples[task]:,}" if task in examples else ""] if examples else []
            table.add_row(task, metric.replace("_", " "), *count, *cells)
    console.print(table)
    if "stage_losses" in found:
        losses = [f"{n} {number(v['start'])} -> {number(v['end'])}" for n, v in found["stage_losses"].items()]
        changes = [*losses, f"KL {number(found['kl']['initialisation'])} -> {number(found['kl']['now'])}"]
        console.print("start -> end: " + ", ".join(changes), highlight=False)


def examples_of(found: Mapping[str, Any], task: str) -> int | None:
    """Of how many examples a result is, where that was kept: not with the quick suite and with averages."""
    return next((by["n"] for by in found.get("details", {}).get(task, {}).values() if "n" in by), None)


def _cell(values: dict[str, Any], metric: str) -> str:
    return number(values[metric]) if metric in values else ""


def number(value: float | None) -> str:
    """A measured value as people read it."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
