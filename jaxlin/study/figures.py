"""The paper's figures from a study: scores, learning against tokens, speed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlin.config import UserError
from jaxlin.evaluation import paper
from jaxlin.study.chart import Line, Point, Row, lines_chart, rows_chart
from jaxlin.study.design import Cell
from jaxlin.study.estimates import TEACHER, Estimate, Estimates
from jaxlin.study.tables import TITLES, spread

SCORES = ("average", "average without bear", "niah")
HELD_OUT = {"kl": "KL to the teacher", "perplexity": "perplexity of held-out text"}
SPEEDS = {
    "prefill_tokens_per_second": "reading, tokens/s",
    "decode_tokens_per_second": "writing, tokens/s",
}


@dataclass(frozen=True)
class Figure:
    """A chart, as SVG, what must be known of it, and the files that it is drawn from."""

    title: str
    svg: str
    note: str
    sources: tuple[str, ...]


def figures(estimates: Estimates, speed: Path | None) -> list[Figure]:
    """Those that there are results for."""
    return [*_scores(estimates), *_against_tokens(estimates), *_by_budget(estimates), *_speed(speed)]


def _scores(estimates: Estimates) -> list[Figure]:
    """Figure 1: scores, with intervals; the paper's as circles."""
    drawn = []
    parameters = next((run.card.get("teacher_parameters") for run in estimates.found.trials if run.card), None)
    for metric in (*SCORES, "kl"):
        cells = (TEACHER, *estimates.found.study.cells())
        found = {cell: one for cell in cells if (one := estimates.of(cell, metric)) is not None}
        if not found:
            continue
        rows = []
        for cell, one in found.items():
            cited = None if metric == "kl" or not parameters else paper.reference(metric, cell.mixer, parameters)
            name = cell.mixer if cell == TEACHER else cell.name
            rows.append(Row(name, _point(0, one, metric, across=True), cited and cited.value))
        note = _note(found.values(), metric)
        if any(row.other is not None for row in rows):
            note += " Circles: the paper's (arXiv 2504.14366)."
        title = f"Figure 1: {_name(metric)}"
        drawn.append(Figure(title, rows_chart(title, _label(metric), rows), note, _files(row.point for row in rows)))
    return drawn


def _against_tokens(estimates: Estimates) -> list[Figure]:
    """Figure 2: what the milestones and the end were measured by; without milestones, the ends of the stages."""
    drawn = []
    cells = estimates.found.study.cells()
    for metric in (*HELD_OUT, *SCORES):
        along = {cell: points for cell in cells if (points := estimates.along(cell, metric))}
        if any(len(points) > 1 for points in along.values()):
            lines = [
                Line(cell.name, tuple(_point(tokens, one, metric) for tokens, one in points.items()))
                for cell, points in along.items()
            ]
            note = _note([one for points in along.values() for one in points.values()], metric)
            note = f"At milestones and the end. {note}"
        elif metric in HELD_OUT:
            learned = {cell: points for cell in cells if (points := _learning(estimates, cell, metric))}
            lines = [Line(cell.name, points) for cell, points in learned.items()]
            note = "At the end of each stage. Bars: from the lowest to the highest seed."
        else:
            continue
        drawn += _lines(f"Figure 2: {_name(metric)} against tokens", metric, lines, note)
    return drawn


def _by_budget(estimates: Estimates) -> list[Figure]:
    """Figure 2: scores of students that were trained with several budgets, by budget."""
    drawn = []
    for metric in SCORES:
        budgets: dict[str, list[tuple[int, Estimate]]] = {}
        for cell in estimates.found.study.cells():
            if found := estimates.of(cell, metric):
                variant = f"{cell.preset}-{cell.variant}" if cell.variant else cell.preset
                budgets.setdefault(f"{variant}/{cell.mixer}", []).append((cell.tokens, found))
        several = {name: sorted(points, key=lambda p: p[0]) for name, points in budgets.items() if len(points) > 1}
        lines = [Line(name, tuple(_point(*point, metric) for point in points)) for name, points in several.items()]
        note = _note([one for points in several.values() for _, one in points], metric) if several else ""
        drawn += _lines(f"Figure 2: {_name(metric)} by budget", metric, lines, note)
    return drawn


def _lines(title: str, metric: str, lines: Sequence[Line], note: str) -> list[Figure]:
    """The lines over tokens, where there are any."""
    if not lines:
        return []
    svg = lines_chart(title, "tokens trained on", _label(metric), lines, log=metric in HELD_OUT)
    return [Figure(title, svg, note, _files(point for line in lines for point in line.points))]


def _learning(estimates: Estimates, cell: Cell, metric: str) -> tuple[Point, ...]:
    """Means over seeds, at the ends of the stages that all of them have; bars from the lowest to the highest seed."""
    runs = [run for run in estimates.found.trials if run.trial.cell == cell and run.lines]
    points = []
    for lines in zip(*(run.lines for run in runs), strict=False):
        values = [line[metric] for line in lines]
        files = tuple(estimates.found.source(run.folder / "metrics.jsonl") for run in runs)
        spread = (min(values), max(values)) if len(values) > 1 else None
        points.append(Point(lines[0]["tokens"], float(np.mean(values)), spread, files))
    return tuple(points)


def _name(metric: str) -> str:
    return HELD_OUT.get(metric) or ("needles found, all lengths" if metric == "niah" else TITLES[metric])


def _label(metric: str) -> str:
    """With the unit."""
    return _name(metric) + {"kl": ", nats a token", "perplexity": ""}.get(metric, ", %")


def _point(x: float, found: Estimate, metric: str, *, across: bool = False) -> Point:
    """An estimate at `x`, or, for charts of rows, as x itself; scores in per cent."""
    scale = 1 if metric in HELD_OUT else 100
    value, limits = scale * found.value, found.interval and (scale * found.interval[0], scale * found.interval[1])
    return Point(value, 0, limits, found.sources) if across else Point(x, value, limits, found.sources)


def _note(found: Iterable[Estimate], metric: str) -> str:
    """What the estimates are over, and what their bars are."""
    found = list(found)
    seeds = {len(one.seeds) for one in found}
    over = "batches of held-out text" if metric in HELD_OUT else "examples"
    bars = f"bars: 95 % over {over} (bootstrap)" + (" and, of several seeds, seeds (Student's t)" * (max(seeds) > 1))
    without = "; none of one seed with few batches" * any(one.interval is None for one in found)
    return f"n: {spread({one.examples for one in found})} ({over}); seeds: {spread(seeds)}; {bars}{without}."


def _files(points: Iterable[Point]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(file for point in points for file in point.sources))


def _speed(path: Path | None) -> list[Figure]:
    """Figure 3: reading and writing by length, of one sequence, from the file of `benchmarks.generation_speed`."""
    if path is None:
        return []
    try:
        content = json.loads(path.read_text())
        cells = [cell for cell in content["cells"] if cell["status"] == "measured"]
        drawn = [_speeds(cells, name, label, path.name) for name, label in SPEEDS.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--speed {path}: not a file of benchmarks.generation_speed ({error!r})") from None
    return [figure for figure in drawn if figure.svg]


def _speeds(cells: Sequence[dict], name: str, label: str, source: str) -> Figure:
    smallest = min((cell["batch"] for cell in cells), default=1)
    lines: dict[str, list[Point]] = {}
    for cell in cells:
        if cell["batch"] == smallest:
            lines.setdefault(cell["mixer"], []).append(Point(cell["length"], cell[name], None, (source,)))
    named = [Line(mixer, tuple(sorted(points, key=lambda p: p.x))) for mixer, points in lines.items()]
    title, note = f"Figure 3: {label}", f"Batch of {smallest}; one measurement a point, hence no bars."
    return Figure(title, lines_chart(title, "tokens of the prompt", label, named, log=True), note, (source,))
