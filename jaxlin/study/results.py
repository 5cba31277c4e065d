"""What run folders say, and in which files: the report knows of nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxlin.command_line import from_dict
from jaxlin.config import UserError
from jaxlin.evaluation.task import Result
from jaxlin.runs import write_text
from jaxlin.study.design import Study, Trial


@dataclass(frozen=True)
class KeptResult:
    """A finished task of eval.py, by what decided it, and its file."""

    result: Result
    key: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class TrialResults:
    """A trial's run folder. Missing files are empty here."""

    trial: Trial
    folder: Path

    @cached_property
    def card(self) -> dict[str, Any]:
        """What was run: sizes, versions, hardware."""
        return _read(self.folder / "card.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its settings."""
        return _read(self.folder / "config.json")

    @cached_property
    def fidelity(self) -> dict[str, Any]:
        """Against the teacher before training: kl, perplexity, agreement, teacher_perplexity."""
        return _read(self.folder / "fidelity.json")

    @cached_property
    def held_out(self) -> dict[str, Any]:
        """Against the teacher at the end: kl, perplexity, agreement; nothing before the end."""
        return _read(self.folder / "evaluation.json").get("results", {}).get("held_out", {}).get("student", {})

    @cached_property
    def held_out_sums(self) -> list[dict[str, float]]:
        """What `held_out` is made of, batch by batch; empty where one was not finite."""
        sums = _read(self.folder / "evaluation.json").get("held_out_sums", [])
        return [] if any(value is None for batch in sums for value in batch.values()) else sums

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """What was measured at the end of each stage."""
        return held_out_lines(self.folder)

    @cached_property
    def milestones(self) -> dict[int, TrialResults]:
        """What was measured of milestones, as if each were the run's end, by tokens trained on."""
        found = {}
        for path in self.folder.glob("milestones/*/evaluation.json"):
            if tokens := _read(path).get("tokens"):
                found[tokens] = TrialResults(self.trial, path.parent)
        return dict(sorted(found.items()))

    @cached_property
    def kept(self) -> dict[str, dict[str, KeptResult]]:
        """Results of benchmarks: {model: {task: kept}}."""
        return {model: kept_results(self.folder, model) for model in ("student", "teacher")}

    def results(self, model: str) -> dict[str, Result]:
        """Results of benchmarks of "student" or "teacher", by task."""
        return {task: kept.result for task, kept in self.kept[model].items()}


@dataclass(frozen=True)
class StudyResults:
    """A study and the run folders that are there."""

    study: Study
    out: Path
    trials: list[TrialResults] = field(default_factory=list)

    def source(self, path: Path) -> str:
        """A file's name relative to the study's folder."""
        return path.relative_to(self.out).as_posix()


def write_design(study: Study, out: Path) -> None:
    """study.json: what the report knows of runs that are not there."""
    write_text(out / "study.json", json.dumps(asdict(study), indent=1))


def read_study(out: Path) -> StudyResults:
    """The study in the folder `out`. Raises UserError where there is none."""
    try:
        study = from_dict(Study, json.loads((out / "study.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--out {out}: no study there (study.json is missing); run python -m jaxlin.study") from None
    except ValueError as error:
        raise UserError(f"--out {out}: study.json is damaged ({error}); run python -m jaxlin.study again") from None
    found = [TrialResults(trial, out / trial.name) for trial in study.trials()]
    return StudyResults(study, out, [trial for trial in found if (trial.folder / "config.json").exists()])


def held_out_lines(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, the line at the end of each stage: stage, step, tokens, kl, perplexity, agreement."""
    found: dict[int, dict[str, Any]] = {}
    tokens = 0
    for line in _lines(folder / "metrics.jsonl"):
        tokens = line.get("tokens", tokens)
        if "heldout_kl" in line:
            measured = {name: line[f"heldout_{name}"] for name in ("kl", "perplexity", "agreement")}
            found[line["stage"]] = {"stage": line["stage"], "step": line["step"], "tokens": tokens, **measured}
    return list(found.values())


def kept_results(folder: Path, model: str) -> dict[str, KeptResult]:
    """Results of benchmarks of `model` ("student" or "teacher") by task; of several, what was measured last."""
    paths = (folder / "evaluation").glob(f"*-{model}-*.json")
    found = {}
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name)):
        try:
            content = json.loads(path.read_text())
            kept = KeptResult(Result(**content["result"]), content["key"], path)
        except (ValueError, KeyError, TypeError):
            continue  # damaged: eval.py measures it again
        found[kept.result.task] = kept
    return found


def number(value: Any) -> float:
    """A JSON value as a number; NaN where it is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run the study again") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a .jsonl file: a kill may have cut the last one."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)
