"""The report's tables: students, fidelity by stage, scores in the paper's layout, questions. Every number has files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from jaxlin.evaluation import longbench, paper, ruler
from jaxlin.evaluation.bootstrap import SHARES, rank_text
from jaxlin.study.design import HELD_OUT, Cell
from jaxlin.study.estimates import COLUMN, LIMITS, TEACHER, Estimate, Estimates, within
from jaxlin.study.results import TrialResults, number

UNDECIDED = "not decidable at this budget"
TITLES = {
    "lambada": "LAMBADA",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "bear": "BEAR",
    "kl": "KL (lower is better)",
    "perplexity": "perplexity (lower is better)",
    "average": "average of seven",
    "average without bear": "average of six",
    "niah": "all lengths",
    "ifeval": "IFEval",
    "gsm8k": "GSM8K",
    "swde": "SWDE",
    "longbench": "LongBench",
}


@dataclass(frozen=True)
class Entry:
    """The text of a table's cell, and the files that its numbers come from."""

    text: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[Entry]]
    note: str = ""


def tables(estimates: Estimates) -> list[Table]:
    """All that the results are enough for."""
    found = [questions(estimates)] if estimates.found.study.contrasts else []
    for title, columns, note in SCORES:
        measured = [column for column in columns if _has(estimates, column)]
        if measured:
            found.append(scores(estimates, title, measured, note))
    return [*found, fidelity(estimates), students(estimates)]


def students(estimates: Estimates) -> Table:
    """Settings and sizes."""
    rows = []
    for run in estimates.found.trials:
        source = estimates.found.source(run.folder / "card.json")
        card, cell = run.card, run.trial.cell
        own, teacher = (card.get(f"{name}_parameters") for name in ("student", "teacher"))
        state = card.get("state_elements_per_layer")
        sizes = [own, None if own is None or teacher is None else own - teacher, sum(state) if state else None]
        rows.append(
            [
                Entry(cell.name),
                Entry(str(run.trial.seed)),
                Entry(" ".join(run.trial.options) or "none"),
                *(Entry("" if size is None else f"{size:,}", (source,)) for size in sizes),
                Entry(card.get("devices", ""), (source,)),
                Entry((card.get("git_commit") or "")[:7], (source,)),
            ]
        )
    headings = ("run", "seed", "options", "parameters", "beyond the teacher's", "state, numbers", "devices", "commit")
    note = "State: numbers of one sequence's recurrent state, all layers together; with softmax layers, a token's."
    return Table("Students", headings, rows, note)


def fidelity(estimates: Estimates) -> Table:
    """KL, perplexity and agreement before training and after each stage."""
    rows, perplexities = [], {}
    for cell in estimates.found.study.cells():
        runs = [run for run in estimates.found.trials if run.trial.cell == cell]
        ends = [estimates.of(cell, metric) for metric in HELD_OUT]
        places = list(_places(runs).items())
        if ends[0] and places and "stage" in places[-1][0] and len(ends[0].seeds) == len(places[-1][1]):
            places.pop()  # the last stage's end is the run's, which more is known of
        for place, values in places:
            files = tuple(estimates.found.source(run.folder / name) for run, name, _ in values)
            found = [[number(measured.get(metric)) for _, _, measured in values] for metric in HELD_OUT]
            tokens = max(int(measured.get("tokens", 0)) for _, _, measured in values) if "stage" in place else 0
            texts = [over_seeds(of_metric, name) for name, of_metric in zip(HELD_OUT, found, strict=True)]
            seeds = ", ".join(str(run.trial.seed) for run, _, _ in values)
            row = [Entry(cell.name), Entry(place), Entry(f"{tokens:,}", files), Entry(seeds)]
            rows.append(row + [Entry(text, files) for text in texts])
        if ends[0]:
            seeds = ", ".join(map(str, ends[0].seeds))
            row = [Entry(cell.name), Entry("the end"), Entry(f"{cell.tokens:,}", ends[0].sources), Entry(seeds)]
            rows.append(row + [_measured(end, _format(name)) for name, end in zip(HELD_OUT, ends, strict=True)])
        for run in runs:
            if "teacher_perplexity" in run.fidelity:
                file = estimates.found.source(run.folder / "fidelity.json")
                perplexities.setdefault(f"{run.fidelity['teacher_perplexity']:.2f}", []).append(file)
    for value, files in perplexities.items():
        rows.append([Entry("teacher"), *[Entry("")] * 4, Entry(value, tuple(files)), Entry("")])
    headings = ("student", "after", "tokens", "seeds", "KL, nats a token", "perplexity", "agreement")
    note = (
        "On held-out text; initialisation is the student before training. Brackets: 95 % over seeds (Student's t), at "
        "the end over batches of text as well (bootstrap); none where one seed or few batches are all there is."
    )
    return Table("Fidelity to the teacher", headings, rows, note)


def _places(runs: Sequence[TrialResults]) -> dict[str, list[tuple[TrialResults, str, dict]]]:
    """Where runs were measured: (run, file, values) at initialisation and after each stage."""
    found: dict[str, list[tuple[TrialResults, str, dict]]] = {}
    for run in runs:
        if "kl" in run.fidelity:
            found.setdefault("initialisation", []).append((run, "fidelity.json", run.fidelity))
    for stage in sorted({line["stage"] for run in runs for line in run.lines}):
        of_stage = [(run, line) for run in runs for line in run.lines if line["stage"] == stage]
        found[f"stage {stage}"] = [(run, "metrics.jsonl", line) for run, line in of_stage]
    return found


def over_seeds(values: Sequence[float], metric: str) -> str:
    """The mean and, of several seeds, Student's interval: the standard normal's tail is far too sure of so few."""
    mean, show = float(np.mean(values)), _format(metric)
    if len(values) < 2:
        return show(mean)
    half = float(stdtrit(len(values) - 1, 0.975)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    low, high = within(LIMITS.get(metric, SHARES), (mean - half, mean + half))
    return f"{show(mean)} [{show(low)}, {show(high)}]"


def scores(estimates: Estimates, title: str, columns: Sequence[str], note: str) -> Table:
    """A row a student: the last of the columns first, with recoveries and ranks by it; all beside the paper's."""
    cells = [cell for cell in estimates.found.study.cells() if any(estimates.of(cell, name) for name in columns)]
    last = columns[-1]
    measured = [cell for cell in cells if estimates.of(cell, last)]
    ranks = estimates.ranks(measured, last) if len(measured) > 1 else {}
    parameters = next((run.card["teacher_parameters"] for run in estimates.found.trials if run.card), None)
    rows = []
    for cell in [TEACHER, *cells]:
        found, rank = estimates.of(cell, last), ranks.get(cell)
        row = [
            Entry(cell.mixer if cell == TEACHER else cell.name),
            *_beside_paper(estimates, cell, last, parameters),
            _measured(estimates.recovery(cell, last) if cell != TEACHER else None, _percent),
            Entry(_cited_recovery(last, cell, parameters)),
            Entry(rank_text(rank) if rank else "", found.sources if found and rank else ()),
            Entry(", ".join(map(str, found.seeds)) if found and cell != TEACHER else ""),
        ]
        for name in columns[:-1]:
            row += _beside_paper(estimates, cell, name, parameters)
        if any(e.sources for e in row):
            rows.append(row)
    title_of_last = title_of(last)
    headings = ["student", title_of_last, "paper", "recovery", "paper's recovery", f"rank by {title_of_last}", "seeds"]
    for name in columns[:-1]:
        headings += [title_of(name), "paper"]
    sizes: dict[str, list[str]] = {}
    for name in columns:
        found = {e.examples for cell in cells if (e := estimates.of(cell, name))}
        sizes.setdefault(spread(found), []).append(title_of(name))
    each = (f"each task {n}" if len(names) > 3 else f"{' and '.join(names)} {n}" for n, names in sizes.items())
    note += f" Examples: {'; '.join(each)}."
    return _without_empty(Table(title, tuple(headings), rows, note))


def _beside_paper(estimates: Estimates, cell: Cell, column: str, parameters: int | None) -> list[Entry]:
    cited = paper.reference(column, cell.mixer, parameters) if parameters else None
    return [entry(estimates.of(cell, column)), Entry(f"{cited.value:.2f}" if cited else "")]


def _without_empty(table: Table) -> Table:
    """The table without columns that nothing stands in."""
    kept = [at for at in range(len(table.headings)) if any(row[at].text for row in table.rows)]
    rows = [[row[at] for at in kept] for row in table.rows]
    return replace(table, headings=tuple(table.headings[at] for at in kept), rows=rows)


def spread(counts: set[int]) -> str:
    """A number, or the range of several."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cited_recovery(metric: str, cell: Cell, parameters: int | None) -> str:
    """The paper's score over its teacher's, where one table has both."""
    own, teacher = (
        paper.reference(metric, name, parameters) if parameters else None for name in (cell.mixer, "teacher")
    )
    if own is None or teacher is None or own.table != teacher.table or cell == TEACHER:
        return ""
    return f"{100 * own.value / teacher.value:.2f}"


def _measured(found: Estimate | None, show: Callable[[float], str]) -> Entry:
    """A number and its interval."""
    if found is None:
        return Entry("")
    limits = f" [{show(found.interval[0])}, {show(found.interval[1])}]" if found.interval else ""
    return Entry(show(found.value) + limits, found.sources)


def entry(found: Estimate | None) -> Entry:
    """A score in percent with its interval; nothing and everything are said as counts."""
    if found and found.interval and found.examples and found.value in (0, 1):
        low, high = found.interval
        limit = f"at most {100 * high:.1f} %" if found.value == 0 else f"at least {100 * low:.1f} %"
        return Entry(f"{found.value * found.examples:,.0f} of {found.examples:,} ({limit})", found.sources)
    return _measured(found, _percent)


def questions(estimates: Estimates) -> Table:
    """The contrasts, answered where the interval of the difference does not hold 0."""
    cells = {cell.name: cell for cell in estimates.found.study.cells()}
    rows = []
    for contrast in estimates.found.study.contrasts:
        found = estimates.difference(cells[contrast.a], cells[contrast.b], contrast.metric)
        shared = found.seeds if found else None
        of_a, of_b = (estimates.of(cells[name], contrast.metric, shared) for name in (contrast.a, contrast.b))
        show = _signed(contrast.metric)
        answer, limits, difference, sources, seeds = "not measured", "", "", (), ""
        if found is not None:
            limits = f"{show(found.interval[0])} to {show(found.interval[1])}" if found.interval else "none"
            difference, sources = show(found.value), found.sources
            seeds = ", ".join(map(str, found.seeds))
            answer = (f"a is {'above' if found.value > 0 else 'below'} b" if found.is_decided else UNDECIDED) + (
                ", of this one seed" if found.is_decided and len(found.seeds) == 1 else ""
            )
        rows.append(
            [
                Entry(contrast.name),
                Entry(contrast.question),
                Entry(contrast.a),
                Entry(contrast.b),
                Entry(title_of(contrast.metric)),
                *(Entry("" if one is None else _plain(contrast.metric)(one.value), one.sources if one else ())
                  for one in (of_a, of_b)),
                Entry(difference, sources),
                Entry(limits, sources),
                Entry(seeds),
                Entry(answer, sources),
            ]
        )  # fmt: skip
    headings = ("question", "in words", "a", "b", "metric", "of a", "of b", "a - b", "95 %", "seeds", "answer")
    note = (
        f'Intervals of differences: paired by prompts and by seeds. "{UNDECIDED}" where the interval holds 0, or there '
        "is none: one seed of what is one number a run."
    )
    return Table("Questions", headings, rows, note)


def _has(estimates: Estimates, column: str) -> bool:
    return any(estimates.of(cell, column) for cell in estimates.found.study.cells())


def title_of(metric: str) -> str:
    """What tables and sentences call a metric."""
    if metric in ruler.EVERY_TASK:
        name, _, length = metric.rpartition("_")
        return f"{name.replace('niah_single_', 'S-NIAH-')} {length}"
    return TITLES.get(metric, metric)


def _format(metric: str) -> Callable[[float], str]:
    if metric == "agreement":
        return lambda value: f"{value:.1%}".replace("%", " %")
    return (lambda value: f"{value:.4f}") if metric == "kl" else (lambda value: f"{value:,.2f}")


def _plain(metric: str) -> Callable[[float], str]:
    return _format(metric) if metric in HELD_OUT else _percent


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _signed(metric: str) -> Callable[[float], str]:
    if metric in HELD_OUT and metric != "agreement":
        return lambda value: f"{value:+.4f}"
    return lambda value: f"{100 * value:+.2f}"


ZERO_SHOT = ("lambada", "winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag")
NOTE = (
    "Per cent; brackets: 95 % over examples (bootstrap, of hits and misses Clopper and Pearson's) and, of several "
    "seeds, over seeds as well. Recovery: the first score over the teacher's. A rank is a range where the intervals of "
    "differences hold 0. Paper: arXiv 2504.14366"
)
SCORES = (
    ("Zero-shot", (*ZERO_SHOT, "average without bear"), f"{NOTE}, table 2 (its averages are over seven tasks)."),
    ("BEAR", ("bear", "average"), f"{NOTE}, tables 2 and 5."),
    (
        "Needles",
        (*(name for name in COLUMN if name in ruler.TASKS), "niah"),
        f"{NOTE}, tables 3 and 7: of 1.7B models.",
    ),
    ("Needles in shorter and longer texts", (*ruler.SHORT_TASKS, *ruler.LONG_TASKS), f"{NOTE} has none of them."),
    ("Instructions", ("ifeval", "gsm8k", "swde"), f"{NOTE}, table 4: of post-trained 1.7B models."),
    ("LongBench", (*longbench.TASKS, "longbench"), f"{NOTE}, table 4: of post-trained 1.7B models."),
)
