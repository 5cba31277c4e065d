"""The run folder: what a run writes there, and how everything else reads it.

config.json (settings), model.json (the student), card.json (what was run), metrics.jsonl, tensorboard/,
checkpoints/ (rotating, for resuming, and milestones), fidelity.json and evaluation.json (what was measured).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from jaxlin import convert, processes
from jaxlin.checkpoint import load_params
from jaxlin.config import ModelConfig, RunConfig, UserError
from jaxlin.model import init_params
from jaxlin.sharding import param_shardings
from jaxlin.student import abstract_params, student_config

# Settings that may differ when a run is continued: they change no number of it.
FREE = (
    "run_dir", "stage", "log_every", "save_every", "keep", "milestone_tokens", "mesh", "distributed", "plan", "profile",
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher."""

    config: ModelConfig
    params: Any
    tokenizer: Any


def teacher_config(run: RunConfig) -> ModelConfig:
    """The architecture of the run's teacher, whose parameters are not looked at; see `load_teacher`."""
    if run.teacher_config is None and run.teacher == "random":
        raise UserError("--teacher random: the config file gives no teacher_config to draw it from")
    config = run.teacher_config or convert.load_config(run.teacher)
    return replace(config, dtype=run.dtype)


def load_teacher(run: RunConfig, mesh: jax.sharding.Mesh | None = None) -> Teacher:
    """The run's teacher, in the run's compute dtype, sharded over `mesh`.

    Raises UserError where its architecture is not the config file's.
    """
    if run.teacher == "random":
        return _random_teacher(run, mesh)

    def place(config: ModelConfig) -> Any:
        if run.teacher_config is not None:
            _require_same(run, config)
        return None if mesh is None else param_shardings(abstract_params(config), mesh)

    config, params, tokenizer = convert.load_teacher(run.teacher, dtype=run.dtype, shardings=place)
    return Teacher(replace(config, dtype=run.dtype), params, tokenizer)


def _random_teacher(run: RunConfig, mesh: jax.sharding.Mesh | None) -> Teacher:
    config = teacher_config(run)
    abstract = abstract_params(config)
    out = None if mesh is None else param_shardings(abstract, mesh)

    def init(key):
        return jax.tree.map(lambda a: a.astype(config.dtype), init_params(config, key))

    return Teacher(config, jax.jit(init, out_shardings=out)(jax.random.key(1)), convert.byte_tokenizer())


def _require_same(run: RunConfig, found: ModelConfig) -> None:
    assert run.teacher_config is not None
    for field in fields(ModelConfig):
        expected = getattr(run.teacher_config, field.name)
        if field.name not in ("dtype", "max_position_embeddings") and getattr(found, field.name) != expected:
            raise UserError(
                f"--teacher {run.teacher}: {field.name} is {getattr(found, field.name)}, "
                f"but --config {run.config} is for {expected}; choose the config of this teacher"
            )


def check_folder(run: RunConfig) -> None:
    """Refuse a run folder that holds something else, or a run with other settings. Writes nothing."""
    path = run.folder / "config.json"
    if not path.exists():
        if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            raise UserError(f"--run-dir {run.folder}: not empty and not a run folder; choose another")
        return
    old, new = json.loads(path.read_text()), json.loads(to_json(run))
    if different := [key for key in new if key not in FREE and old.get(key) != new[key]]:
        raise UserError(
            f"--run-dir {run.folder}: holds a run with another {_first_difference(different[0], old, new)}; "
            "choose another folder, or delete it to start over"
        )


def _first_difference(key: str, old: Any, new: Any) -> str:
    old = old.get(key) if isinstance(old, dict) else old
    new = new[key]
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next(k for k in new if old.get(k) != new[k])
        return f"{key}.{_first_difference(inner, old, new)}"
    return f"{key} ({old}, now {new})"


@dataclass(frozen=True)
class Run:
    """A run folder, opened for reading."""

    folder: Path
    config: RunConfig
    student: ModelConfig

    def params(self, step: int | None = None) -> Any:
        """The student's parameters at `step`, by default at the newest checkpoint."""
        return load_params(self.folder / "checkpoints", step)

    def write(self, name: str, value: Any) -> None:
        """Write `value` as JSON into the folder."""
        write_text(self.folder / name, json.dumps(value, indent=1))

    def read(self, name: str) -> Any:
        """The JSON file `name` of the folder, or None."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def stage_losses(self) -> dict[str, dict[str, float]]:
        """Each stage's loss on held-out text, where the stage starts and where it ends."""
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        losses: dict[str, list[float]] = {}
        for line in lines:
            if "heldout_loss" in line:
                losses.setdefault(f"stage{line['stage']}", []).append(line["heldout_loss"])
        return {name: {"start": values[0], "end": values[-1]} for name, values in losses.items()}


def open_run(folder: str | Path) -> Run:
    """The run in `folder`. Raises UserError where there is none."""
    folder = Path(folder)
    try:
        config = from_dict(RunConfig, json.loads((folder / "config.json").read_text()))
        student = from_dict(ModelConfig, json.loads((folder / "model.json").read_text()))
    except FileNotFoundError as error:
        raise UserError(f"--run {folder}: no run there ({Path(error.filename).name} is missing)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--run {folder}: config.json or model.json is damaged ({error})") from None
    return Run(folder, config, student)


def new_run(run: RunConfig, teacher: ModelConfig) -> Run:
    """The folder of a run that starts or continues; writes config.json and model.json."""
    student = student_config(run, teacher)
    write_text(run.folder / "config.json", to_json(run))
    write_text(run.folder / "model.json", json.dumps(asdict(student), indent=1))
    return Run(run.folder, run, student)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Of several processes the first writes."""
    if not processes.is_first():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def git_commit() -> str | None:
    """The commit of jaxlin's own checkout, or None where it is not one."""
    where = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", where, "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return out.stdout.strip() or None


def to_json(config: Any) -> str:
    """A config dataclass as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_dict(cls: Any, data: Any) -> Any:
    """The inverse of `dataclasses.asdict` for the types used here; unknown fields are refused."""
    if data is None or (not isinstance(cls, type) and typing.get_origin(cls) is None):
        return data
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        if unknown := set(data) - set(hints):
            raise UserError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}: another version wrote the file")
        return cls(**{k: from_dict(hints[k], v) for k, v in data.items()})
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        return from_dict(next(a for a in args if a is not type(None)), data)
    if origin is tuple:
        return tuple(from_dict(args[0] if args[-1] is Ellipsis or len(set(args)) == 1 else Any, v) for v in data)
    return data
