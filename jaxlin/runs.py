"""The run folder: what a run writes there, and how everything else reads it.

config.json (settings), model.json (the student), card.json (what was run), metrics.jsonl, tensorboard/,
checkpoints/ (rotating, for resuming, and milestones), fidelity.json and evaluation.json (what was measured),
evaluation/ (benchmarks), milestones/STEP/ (the last two, of a milestone); conversations/ (tokenized) and
conversations.json (how many were kept, cut and left out).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxlin import convert, processes
from jaxlin.checkpoint import Checkpoints, load_params
from jaxlin.command_line import from_dict, is_exported, to_json
from jaxlin.config import ModelConfig, RunConfig, StageConfig, UserError
from jaxlin.drafts import draft
from jaxlin.mixers import MIXERS, own_options
from jaxlin.model import init_params
from jaxlin.sharding import param_shardings
from jaxlin.student import abstract_params, restored_layers, student_config

T = TypeVar("T")

# Settings that may differ when a run is continued: they change no number of it.
FREE = (
    "run_dir", "stage", "log_every", "save_every", "keep", "milestone_tokens", "mesh", "distributed", "plan", "profile",
    "wandb",
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
    """The run's teacher, in the run's compute dtype, sharded over `mesh`; an exported student keeps its own dtypes.

    Raises UserError where its architecture is not the config file's.
    """
    if run.teacher == "random":
        return _random_teacher(run, mesh)

    def place(config: ModelConfig) -> Any:
        if run.teacher_config is not None:
            _require_same(run, config)
        return None if mesh is None else param_shardings(abstract_params(config), mesh)

    def dtype(config: ModelConfig) -> str | None:
        return run.dtype if config.mixer == ("softmax",) else None

    config, params, tokenizer = convert.load_teacher(run.teacher, dtype=dtype, shardings=place)
    return Teacher(replace(config, dtype=dtype(config) or config.dtype), params, tokenizer)


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
        if run.folder.exists() and (not run.folder.is_dir() or any(map(_is_foreign, run.folder.iterdir()))):
            raise UserError(f"--run-dir {run.folder}: not empty and not a run folder; choose another")
        return
    # Settings that are newer than the folder count as their defaults.
    old = json.loads(to_json(_settings(RunConfig, path, "--run-dir")))
    new = json.loads(to_json(run))
    if different := [key for key in new if key not in FREE and old.get(key) != new[key]]:
        raise UserError(
            f"--run-dir {run.folder}: holds a run with another {_first_difference(different[0], old, new)}; "
            "choose another folder, or delete it to start over"
        )


def _is_foreign(path: Path) -> bool:
    """Whether a folder that holds this is not that of a run which was stopped before it began."""
    return not path.name.startswith("conversations")


def _first_difference(key: str, old: Any, new: Any) -> str:
    old = old.get(key) if isinstance(old, dict) else old
    new = new[key]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and isinstance(new[0], dict):
        key, (old, new) = "", next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next(k for k in new if old.get(k) != new[k])
        return (f"{key}." if key else "") + _first_difference(inner, old, new)
    return f"{key} ({old}, now {new})"


def check_init(run: RunConfig, teacher: ModelConfig) -> None:
    """Refuse an `init_from` without parameters, or with a student of another architecture than the run's, which may
    have softmax attention in more layers.

    And none at all for fine-tuning, cross-entropy on conversations alone, which makes no student of untrained mixers.
    """
    if run.stage3.loss_on != "all" and not run.conversations:
        raise UserError(f"--stage3.loss-on {run.stage3.loss_on}: tells turns of --conversations apart: give some")
    if not run.init_from:
        fine_tuning = set(run.stages()) == {3} and run.conversations and not run.stage3.kl_weight
        if fine_tuning and set(run.period) != {"softmax"}:
            raise UserError(
                f"--init-from: give the run folder of the student to fine-tune ({run.mixer} is untrained); "
                "or, for the teacher itself, --mixer softmax"
            )
        return
    before = open_run(run.init_from, "--init-from")

    def read(student: ModelConfig) -> ModelConfig:
        options = tuple(own_options(*each) for each in zip(student.mixer, student.options, strict=True))
        return replace(student, dtype="float32", options=options)

    was, now = read(before.student), read(student_config(run, teacher))
    if restored_layers(was, now) is None or replace(now, mixer=was.mixer, options=was.options) != was:
        old, new = (json.loads(to_json(config)) for config in (was, now))
        different = next(key for key in new if old.get(key) != new[key])
        raise UserError(
            f"--init-from {run.init_from}: its student has another {_first_difference(different, old, new)}; "
            "leave out the setting that changes it, or give some of its layers softmax attention by --mixer"
        )
    if Checkpoints(before.folder / "checkpoints", keep=1).newest() is None:
        raise UserError(f"--init-from {run.init_from}: there is no whole checkpoint in it")


def milestone_folder(folder: Path, step: int) -> Path:
    """Where what was measured of a milestone is kept, as it is in the run folder `folder` of the end."""
    return folder / "milestones" / str(step)


@dataclass(frozen=True)
class Run:
    """A run folder, opened for reading."""

    folder: Path
    config: RunConfig
    student: ModelConfig

    def params(self, step: int | None = None) -> Any:
        """The student's parameters at `step`, by default at the newest checkpoint."""
        return load_params(self.folder / "checkpoints", step)

    def milestones(self) -> dict[int, int]:
        """The tokens that each milestone was trained on, by step; the newest checkpoint is the run's student itself."""
        checkpoints = Checkpoints(self.folder / "checkpoints", keep=1)
        steps = [step for step in checkpoints.milestones() if step != checkpoints.steps()[-1]]
        return {step: checkpoints.extra(step)["progress"]["tokens"] for step in steps}

    def tokenizer(self) -> Any:
        """The teacher's tokenizer, which is the student's."""
        name = self.config.teacher
        return convert.byte_tokenizer() if name == "random" else convert.load_tokenizer(name)

    def write(self, name: str, value: Any) -> None:
        """Write `value` as JSON into the folder."""
        write_text(self.folder / name, json.dumps(value, indent=1))

    def read(self, name: str) -> Any:
        """The JSON file `name` of the folder, or None."""
        path = self.folder / name
        return _parsed(path, path.read_text()) if path.exists() else None

    def stages(self) -> dict[int, StageConfig]:
        """The stages with the budgets that they were trained for."""
        rows = (self.read("conversations.json") or {}).get("rows", 0)
        return self.config.stages(rows * self.config.data.seq_len)

    def stage_losses(self) -> dict[str, dict[str, float]]:
        """Each stage's loss on held-out text, where the stage starts and where it ends."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a crash leaves half a line
        lines = [_parsed(path, line) for line in whole.splitlines()]
        losses: dict[str, list[float]] = {}
        for line in lines:
            if "heldout_loss" in line:
                losses.setdefault(f"stage{line['stage']}", []).append(line["heldout_loss"])
        return {name: {"start": values[0], "end": values[-1]} for name, values in losses.items()}


def _settings(kind: type[T], path: Path, flag: str) -> T:
    """What a file of a run folder, which the setting `flag` names, holds. Raises UserError where it is damaged."""
    try:
        return from_dict(kind, json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        why = f"its {path.name} is damaged ({error})"
        raise UserError(f"{flag} {path.parent}: {why}; restore it, or choose another folder") from None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); restore it, or delete it and what it says is lost") from None


def open_run(folder: str | Path, flag: str = "--run") -> Run:
    """The run in `folder`, which the setting `flag` names. Raises UserError where there is none."""
    folder = Path(folder)
    if is_exported(folder):
        raise UserError(
            f"{flag} {folder}: an exported student, not a run; generate, chat and eval.py take it as --teacher"
        )
    try:
        config = _settings(RunConfig, folder / "config.json", flag)
        student = _settings(ModelConfig, folder / "model.json", flag)
    except (FileNotFoundError, NotADirectoryError) as error:
        lost = Path(error.filename).name
        raise UserError(f"{flag} {folder}: no run there ({lost} is missing); train.py makes one") from None
    if unknown := [name for name in student.mixer if name not in MIXERS]:
        raise UserError(
            f"{flag} {folder}: its mixer {unknown[0]} is none of {', '.join(MIXERS)}; "
            "import what adds it to jaxlin.mixers.MIXERS before the run is opened"
        )
    return Run(folder, config, student)


@contextlib.contextmanager
def alone(run: RunConfig) -> Iterator[None]:
    """No other `train.py` trains into the run's folders meanwhile: each would replace the other's checkpoints.

    Raises UserError where one does. The system's locks on the folders end with the process, however it ends. Folders
    made for them and left empty are removed.
    """
    open_folders, made = list[int](), list[Path]()

    def lock() -> None:
        for folder in (own.folder for own in run.students()):
            made.extend(path for path in (folder, *folder.parents) if not path.exists())
            _make(folder)
            open_folders.append(os.open(folder, os.O_RDONLY))
            try:
                fcntl.flock(open_folders[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--run-dir {folder}: another train.py works there; choose another folder") from None
            except OSError:
                pass  # a file system without locks

    try:
        processes.from_first(lock)
        yield
    finally:
        for descriptor in open_folders:
            os.close(descriptor)
        for folder in sorted(made, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {folder}: cannot be made ({error.strerror}); choose another folder") from error


def new_run(run: RunConfig, teacher: ModelConfig) -> Run:
    """The folder of a run that starts or continues; writes config.json and model.json."""
    student = student_config(run, teacher)
    if processes.is_first():
        _make(run.folder)
    write_text(run.folder / "config.json", to_json(run))
    write_text(run.folder / "model.json", json.dumps(asdict(student), indent=1))
    return Run(run.folder, run, student)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else writes it. Of a run's several processes the first writes."""
    if not processes.is_first():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft(path) as part:
            part.write_text(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def without_local_paths(value: Any) -> Any:
    """The same JSON, with the last part of local paths only: whoever reads it has another disk."""
    if isinstance(value, dict):
        return {key: without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_local_paths(inner) for inner in value]
    if isinstance(value, str):
        return " ".join(Path(word).name if word.startswith(("/", "~")) else word for word in value.split(" "))
    return value


def git_commit() -> str | None:
    """The commit of jaxlin's own checkout, or None where it is not one."""
    where = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", where, "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return out.stdout.strip() or None
