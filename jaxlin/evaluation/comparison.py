"""Models beside their teacher, each other and the paper: recovery, ranks and intervals, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxlin import runs
from jaxlin.config import UserError
from jaxlin.evaluation import paper
from jaxlin.evaluation.bootstrap import DRAWS, Draws, Mean, ranks, resample
from jaxlin.evaluation.columns import COLUMNS, Column, Results, series
from jaxlin.evaluation.task import Kept, Result
from jaxlin.student import abstract_params

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Model:
    """One model and what was measured of it."""

    label: str
    name: str
    """What the paper's tables know it by: "teacher" or a mixer."""
    results: Results
    teacher: Model | None = None
    parameters: float | None = None
    """Of the student, which has about as many as its teacher."""
    tokens: int | None = None
    """That the student was trained on."""


@dataclass(frozen=True)
class Line:
    """One model in one column. Scores are shares, recoveries ratios; intervals are None without scores of examples,
    and with too few of them."""

    column: str
    label: str
    n: int
    score: float
    interval: Interval | None = None
    recovery: float | None = None
    recovery_interval: Interval | None = None
    rank: tuple[int, int] | None = None
    """Best and worst that it may be among the students; None where it cannot be said."""
    paper: paper.Reference | None = None
    paper_recovery: float | None = None


def read(folder: Path) -> Model:
    """The student of a run folder, with its teacher; or the model that a folder of results (`eval.py --out`) is about.

    Raises UserError where nothing was measured.
    """
    run = runs.open_run(folder) if (folder / "config.json").exists() else None
    kept: dict[str, dict[str, Result]] = {}
    for task, by_model in Kept(folder / "evaluation" if run else folder).latest().items():
        for name, result in by_model.items():
            if result.metrics:
                kept.setdefault(name, {})[task] = result
    label = folder.resolve().name
    parameters = _size(run) if run else None
    teacher = Model(f"teacher of {label}", "teacher", kept.get("teacher", {}), parameters=parameters)
    if "student" in kept:
        name = run.config.mixer if run else ""
        tokens = sum(stage.tokens for stage in run.stages().values()) if run else None
        return Model(label, name, kept["student"], teacher if teacher.results else None, parameters, tokens)
    if teacher.results:
        return teacher
    raise UserError(f"{folder}: no results of benchmarks; first run eval.py --run {folder} --suite zero_shot")


def _size(run: runs.Run) -> float:
    return float(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(run.student))))


def split(models: Sequence[Model]) -> tuple[list[Model], list[Model]]:
    """Teachers, those with equal results once, and students."""
    teachers: list[Model] = []
    for model in models:
        teacher = model if model.name == "teacher" else model.teacher
        if teacher and all(teacher.results != other.results for other in teachers):
            teachers.append(teacher)
    return teachers, [model for model in models if model.name != "teacher"]


def compare(models: Sequence[Model], *, draws: int = DRAWS, confidence: float = 0.95, seed: int = 0) -> list[Line]:
    """Every model in every column that it was measured in: teachers first, then students, the best one first."""
    teachers, students = split(models)
    means = _resampled([*teachers, *students, *(s.teacher for s in students if s.teacher)], draws, seed)
    lines = []
    for column in COLUMNS:
        scores = {
            model: value for model in (*teachers, *students) if (value := column.value(model.results)) is not None
        }
        drawn = {model: column.draws(of_model) for model, of_model in means.items()}
        ranked = _ranked([model for model in students if model in scores], drawn, confidence)
        for model in sorted(scores, key=lambda model: (model in students, -scores[model])):
            lines.append(_line(column, model, drawn, ranked.get(model), confidence))
    return lines


Drawn = Mapping[Model, Draws | None]


def _resampled(models: Sequence[Model], draws: int, seed: int) -> dict[Model, dict[tuple[str, str], Mean]]:
    """For each model and (task, metric), the mean over resamples; of the same prompts, the same resamples."""
    every = {(model, *key): one for model in models for key, one in series(model.results).items()}
    found: dict[Model, dict[tuple[str, str], Mean]] = {model: {} for model in models}
    for (model, task, metric), values in resample(every, draws=draws, seed=seed).items():
        found[model][task, metric] = values
    return found


def _ranked(students: Sequence[Model], drawn: Drawn, confidence: float) -> dict[Model, tuple[int, int]]:
    known = [values for model in students if (values := drawn[model]) is not None]
    if len(students) < 2 or len(known) < len(students):
        return {}
    return dict(zip(students, ranks(known, confidence), strict=True))


def _line(column: Column, model: Model, drawn: Drawn, rank: tuple[int, int] | None, confidence: float) -> Line:
    score, own = column.value(model.results), drawn[model]
    assert score is not None
    recovery = recovery_interval = None
    if model.teacher and (base := column.value(model.teacher.results)):
        recovery, above = score / base, drawn[model.teacher]
        if own is not None and above is not None and above.low.all():
            recovery_interval = (own / above).interval(confidence)
    cited, cited_recovery = _cited(column.name, model)
    return Line(
        column.name,
        model.label,
        sum(model.results[task].n for task, _, _ in column.parts),
        score,
        None if own is None else own.interval(confidence),
        recovery,
        recovery_interval,
        rank,
        cited,
        cited_recovery,
    )


def _cited(column: str, model: Model) -> tuple[paper.Reference | None, float | None]:
    """The paper's number, and its ratio to the paper's teacher where the same table has it."""
    if model.parameters is None:
        return None, None
    own = paper.reference(column, model.name, model.parameters)
    teacher = paper.reference(column, "teacher", model.parameters)
    if own is None or teacher is None or model.name == "teacher" or own.table != teacher.table:
        return own, None
    return own, own.value / teacher.value
