"""The paper's figures from a study: scores, learning against tokens, speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlin.config import UserError
from jaxlin.evaluation import paper
from jaxlin.study.chart import Line, Point, Row, lines_chart, rows_chart
from jaxlin.study.design import Cell
from jaxlin.study.estimates import TEACHER, Estimates

SCORES = ("average", "average without bear", "niah")
HELD_OUT = {"kl": "KL to the teacher, nats a token", "perplexity": "held-out perplexity"}
SPEEDS = {
    "prefill_tokens_per_second": "reading, tokens/s",
    "decode_tokens_per_second": "writing, tokens/s",
}


@dataclass(frozen=True)
class Figure:
    """A chart, as SVG, and the files that it is drawn from."""

    title: str
    svg: str
    sources: tuple[str, ...]


def figures(estimates: Estimates, speed: Path | None) -> list[Figure]:
    """Those that there are results for."""
    return [*_scores(estimates), *_against_tokens(estimates), *_scores_against_tokens(estimates), *_speed(speed)]


def _scores(estimates: Estimates) -> list[Figure]:
    """Figure 1: scores, with intervals; the paper's as circles."""
    drawn = []
    parameters = next((run.card.get("teacher_parameters") for run in estimates.found.trials if run.card), None)
    for metric in (*SCORES, "kl"):
        rows, sources = [], {}
        for cell in (TEACHER, *estimates.found.study.cells()):
            if (found := estimates.of(cell, metric)) is None:
                continue
            scale = 1 if metric == "kl" else 100
            limits = (scale * found.interval[0], scale * found.interval[1]) if found.interval else None
            cited = None if metric == "kl" or not parameters else paper.reference(metric, cell.mixer, parameters)
            name = cell.mixer if cell == TEACHER else cell.name
            rows.append(Row(name, Point(scale * found.value, 0, limits, found.sources), cited and cited.value))
            sources |= dict.fromkeys(found.sources)
        if rows:
            label = HELD_OUT["kl"] if metric == "kl" else f"{metric}, %"
            title = f"Figure 1: {label}; bars are 95 %" + ("" if metric == "kl" else ", circles the paper's")
            drawn.append(Figure(title, rows_chart(title, label, rows), tuple(sources)))
    return drawn


def _against_tokens(estimates: Estimates) -> list[Figure]:
    """Figure 2: held-out KL and perplexity at the end of each stage, by tokens."""
    drawn = []
    for metric, label in HELD_OUT.items():
        lines, sources = [], {}
        for cell in estimates.found.study.cells():
            points = _learning(estimates, cell, metric)
            if points:
                lines.append(Line(cell.name, points))
            sources |= dict.fromkeys(file for point in points for file in point.sources)
        if lines:
            title = f"Figure 2: {label}, at the end of each stage"
            drawn.append(Figure(title, lines_chart(title, "tokens", label, lines, log=True), tuple(sources)))
    return drawn


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


def _scores_against_tokens(estimates: Estimates) -> list[Figure]:
    """Figure 2: scores by budget, where a student was trained with several."""
    drawn = []
    for metric in SCORES:
        lines: dict[str, list[Point]] = {}
        for cell in estimates.found.study.cells():
            if found := estimates.of(cell, metric):
                limits = (100 * found.interval[0], 100 * found.interval[1]) if found.interval else None
                point = Point(cell.tokens, 100 * found.value, limits, found.sources)
                variant = f"{cell.preset}-{cell.variant}" if cell.variant else cell.preset
                lines.setdefault(f"{variant}/{cell.mixer}", []).append(point)
        several = [Line(name, tuple(sorted(p, key=lambda q: q.x))) for name, p in lines.items() if len(p) > 1]
        if several:
            title = f"Figure 2: {metric} by budget"
            sources = dict.fromkeys(file for line in several for point in line.points for file in point.sources)
            drawn.append(Figure(title, lines_chart(title, "tokens", f"{metric}, %", several), tuple(sources)))
    return drawn


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
    title = f"Figure 3: {label}, {smallest} at a time"
    return Figure(title, lines_chart(title, "tokens of the prompt", label, named, log=True), (source,))
