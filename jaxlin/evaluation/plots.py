"""The paper's figures 1 and 2 from our runs, and a heat map of needles found. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlin.config import UserError
from jaxlin.evaluation import paper, ruler
from jaxlin.evaluation.columns import COLUMNS
from jaxlin.evaluation.comparison import Model, split

AVERAGE = next(column for column in COLUMNS if column.name == "average")
NEEDLES = ruler.EVERY_TASK
WITHOUT_BEAR = next(column for column in COLUMNS if column.name == "average without bear")


def draw(models: Sequence[Model], folder: Path) -> list[Path]:
    """Write the figures that the results are enough for into `folder`, as PNG; their paths.

    Raises UserError without matplotlib, or where there is nothing to draw.
    """
    new_figure("--plots")  # refused before anything is looked at
    teachers, students = split(models)
    written = []
    for name, plot in (("figure1", by_size), ("figure2", by_tokens), ("niah", needles)):
        figure = new_figure()
        if plot(figure, teachers, students):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    if not written:
        raise UserError("--plots: neither the zero-shot tasks nor the needles were measured on these runs")
    return written


def new_figure(what: str = "drawing") -> Any:
    """An empty figure, which `what` (a flag) asks for. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] -- of the extra eval
    except ImportError:
        raise UserError(f"{what} needs matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained")


def averages(models: Sequence[Model]) -> tuple[dict[Model, float], int]:
    """The zero-shot average of the models that have one, in percent, and over how many of the paper's tasks.

    All seven, or, where one of the models has no BEAR, six for all of them.
    """
    six = {model: 100 * value for model in models if (value := WITHOUT_BEAR.value(model.results)) is not None}
    seven = {model: 100 * value for model in six if (value := AVERAGE.value(model.results)) is not None}
    return (seven, len(paper.TASKS)) if len(seven) == len(six) else (six, len(paper.TASKS) - 1)


def by_size(figure: Any, teachers: Sequence[Model], students: Sequence[Model]) -> bool:
    """Figure 1: the average by size; the paper's as lines, ours as stars. False without anything to show."""
    found, tasks = averages([model for model in (*teachers, *students) if model.parameters])
    if not found:
        return False
    axes = figure.subplots()
    titles = {"teacher": "teacher", **paper.MIXER_TITLES}
    for number, (name, title) in enumerate(titles.items()):
        theirs = [np.mean(rows[name][:tasks]) for rows in paper.ZERO_SHOT.values()]  # BEAR is the last task
        axes.plot(list(paper.SCALES.values()), theirs, color=f"C{number}", alpha=0.6, label=title)
    for model, value in found.items():
        number = list(titles).index(model.name) if model.name in titles else len(titles)
        axes.plot(model.parameters, value, "*", color=f"C{number}", markersize=12)
        axes.annotate("  " + model.label, (model.parameters, value), fontsize="x-small", va="center")
    axes.set(xscale="log", xlabel="parameters", ylabel=f"average of {tasks} zero-shot tasks, %")
    axes.set_xticks(list(paper.SCALES.values()), list(paper.SCALES), minor=False)
    axes.minorticks_off()
    axes.set_title("Lines: the paper. Stars: these runs")
    axes.legend(fontsize="small")
    return True


def by_tokens(figure: Any, teachers: Sequence[Model], students: Sequence[Model]) -> bool:
    """Figure 2: the average by training tokens, a line a mixer. False without anything to show."""
    found, tasks = averages([*teachers, *(model for model in students if model.tokens)])
    lines: dict[str, list[tuple[int, float]]] = {}
    for model, value in found.items():
        if model.tokens:
            lines.setdefault(model.name, []).append((model.tokens, value))
    if not lines:
        return False
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=paper.MIXER_TITLES.get(name, name))
    for model in teachers:
        if model in found:
            axes.axhline(found[model], color="black", linestyle="--", label=model.label)
    axes.set(xscale="log", xlabel="training tokens", ylabel=f"average of {tasks} zero-shot tasks, %")
    axes.legend(fontsize="small")
    return True


def needles(figure: Any, teachers: Sequence[Model], students: Sequence[Model]) -> bool:
    """Share of needles found, by model and prompt length, a map for each variant. False without anything to show."""
    models = [model for model in (*teachers, *students) if any(task in model.results for task in NEEDLES)]
    measured = {
        name: [
            n
            for n in (*ruler.SHORT_LENGTHS, *ruler.LENGTHS, *ruler.LONG_LENGTHS)
            if any(f"{name}_{n}" in m.results for m in models)
        ]
        for name in ruler.VARIANTS
    }
    measured = {name: lengths for name, lengths in measured.items() if lengths}
    if not measured:
        return False
    figure.set_size_inches(2 + 4 * len(measured), 1.5 + 0.4 * len(models))
    maps = figure.subplots(1, len(measured), squeeze=False)[0]
    image = None
    for axes, (name, lengths) in zip(maps, measured.items(), strict=True):
        found = [[_found(model, f"{name}_{n}") for n in lengths] for model in models]
        image = axes.imshow(np.array(found), vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for row, values in enumerate(found):
            for column, value in enumerate(values):
                text, color = "" if np.isnan(value) else f"{value:.0f}", "white" if value < 60 else "black"
                axes.text(column, row, text, ha="center", va="center", color=color)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axes.set_yticks(range(len(models)), [model.label for model in models] if axes is maps[0] else [])
        axes.set_title(name)
        axes.set_xlabel("tokens")
    figure.colorbar(image, ax=list(maps), label="needles found, %")
    return True


def _found(model: Model, task: str) -> float:
    value = model.results[task].metrics.get("acc") if task in model.results else None
    return float("nan") if value is None else 100 * value
