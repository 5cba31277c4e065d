"""Run benchmarks on the models of a subject: what is finished is kept, what fails does not stop the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxlin import processes
from jaxlin.config import UserError
from jaxlin.evaluation.subject import Subject, params_sha256
from jaxlin.evaluation.task import Kept, Options, Result, Task, sha256_of
from jaxlin.runs import Teacher


@dataclass
class Outcome:
    """Results, {task: {model: result}}, and for what failed {task: one line}."""

    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """{task: {model: {metric: value}}}."""
        return {task: {m: r.metrics for m, r in by_model.items()} for task, by_model in self.results.items()}


def missing(tasks: Mapping[str, Task], options: Options) -> dict[str, str]:
    """What can be seen to be missing before any model is loaded: {task: one line}."""
    found = {}
    for name, task in tasks.items():
        try:
            task.fingerprint(options)
        except UserError as error:
            found[name] = str(error)
    return found


def run(subject: Subject, tasks: Mapping[str, Task], options: Options, kept: Kept) -> Outcome:
    """Measure every model of `subject` on `tasks`; results that `kept` has are not measured again."""
    outcome = Outcome()
    identities = {name: model_sha256(model) for name, model in subject.models.items()}
    for name, task in tasks.items():
        try:
            definition = task.fingerprint(options)
            for model_name, model in subject.models.items():
                key = {
                    "task": name,
                    "definition": definition,
                    "model_sha256": identities[model_name],
                    **{k: getattr(options, k) for k in ("limit", "seed", "predict_only", "chat")},
                }
                result = _kept(kept, model_name, key)
                if result is None:
                    result = task.measure(model, options)
                    kept.put(model_name, key, result)
                outcome.results.setdefault(name, {})[model_name] = result
        except UserError as error:
            outcome.failed[name] = str(error)
    return outcome


def _kept(kept: Kept, model: str, key: Mapping[str, Any]) -> Result | None:
    """What the first process finds: all of them measure, or none."""

    def find() -> dict[str, Any] | None:
        found = kept.get(model, key)
        return None if found is None else asdict(found)

    found = processes.from_first(find)
    return None if found is None else Result(**found)


def model_sha256(model: Teacher) -> str:
    """Identifies parameters, architecture, compute dtype and tokenizer."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    digest = hashlib.sha256(params_sha256(model.params).encode())
    for part in (
        model.config.described(),
        backend.to_str() if backend else "",
        getattr(model.tokenizer, "chat_template", ""),
    ):
        digest.update(sha256_of(part).encode())
    return digest.hexdigest()


class Bars:
    """Progress bars on a console, one at a time: `bar(title, total)` gives a function to call with what was done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: Progress | None = None

    def __call__(self, title: str, total: int) -> Callable[[int], None]:
        """Replace the bar by a new one."""
        self.close()
        counts = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        progress = Progress(TextColumn("{task.description}"), *counts, console=self._console, transient=True)
        bar = progress.add_task(title, total=total)
        progress.start()
        self._shown = progress
        return lambda done: progress.advance(bar, done)

    def close(self) -> None:
        """Take the bar away."""
        if self._shown is not None:
            self._shown.stop()


def details(results: Mapping[str, Mapping[str, Result]]) -> dict[str, dict[str, Any]]:
    """What a reader must know of each number besides it: {task: {model: {n, note, version, hashes, seed}}}."""
    shown: Sequence[str] = ("n", "note", "version", "data_sha256", "prompts_sha256", "seed")
    return {
        task: {model: {k: getattr(result, k) for k in shown} for model, result in by_model.items()}
        for task, by_model in results.items()
    }
