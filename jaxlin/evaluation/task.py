"""The frame that benchmarks plug into: what a task is, what it gives, and how finished ones are kept.

A task is a `Task`; a suite is a dict of them. Results are kept by content: by everything that decides them, so that an
evaluation that was stopped, repeated or widened measures nothing twice, and nothing stale is ever shown.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxlin.config import UserError
from jaxlin.evaluation.scoring import Budget, Progress
from jaxlin.runs import Teacher, git_commit, write_text

PREDICTIONS = ".predictions.jsonl"


@dataclass(frozen=True)
class Result:
    """What one task found out about one model."""

    task: str
    metrics: dict[str, float | None]
    """The task's own scores, by name; accuracies are shares, not per cent. Empty with --predict-only."""
    per_example: dict[str, list[float]]
    """Scores of single examples in the order of the data, for the metrics that are means of them."""
    n: int
    """Examples measured."""
    note: str = ""
    """What a reader of the number must know."""
    version: str = ""
    """Version of the task's definition."""
    data_sha256: str = ""
    """Hash of the data, where it came from files."""
    prompts_sha256: str = ""
    """Hash of everything that the model was given."""
    seed: int = 0
    """Seed of whatever the task chooses at random."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    """What the model answered, an entry for each example; kept in a file of its own."""


def _no_bar(title: str, total: int) -> Progress:
    return lambda done: None


@dataclass(frozen=True)
class Options:
    """What a task is run with."""

    data: Path | None = None
    """Folder with the tasks' data, in it or in its folder eval; None takes the data from the hub."""
    limit: int | None = None
    """Examples to measure, the first ones; None is what the task measures by default."""
    seed: int = 0
    """Seed of what a task chooses at random."""
    predict_only: bool = False
    """Answer, but do not score."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    budget: Budget = field(default_factory=Budget)
    """Size of batches, for `scoring`."""
    mesh: jax.sharding.Mesh | None = None
    """Where the parameters are."""
    bar: Callable[[str, int], Progress] = _no_bar
    """Starts a progress bar: bar(title, total) gives a function to call with the number of examples just done."""


@dataclass(frozen=True)
class Task:
    """A benchmark: how it is measured, and what its result depends on besides the model and the options."""

    name: str
    measure: Callable[[Teacher, Options], Result]
    fingerprint: Callable[[Options], str]
    """Identifies data and definition (`files_sha256`, versions). Raises UserError where something is missing: it is
    called before a model is loaded."""


def data_folder(options: Options, *names: str) -> Path:
    """The first folder of `names` in --data, or in its folder eval. Raises UserError where there is none."""
    assert options.data is not None
    for name in names:
        for folder in (options.data / name, options.data / "eval" / name):
            if folder.is_dir():
                return folder
    raise UserError(f"--data {options.data}: no folder {' or '.join(names)} in it, nor in its folder eval")


def read_jsonl(path: Path, fields: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The records of a .jsonl file, which must have `fields`. Raises UserError naming file, line and what is wrong."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    records = []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # str.splitlines knows other ends
        for number, line in enumerate(lines, 1):
            record = json.loads(line)
            missing = [name for name in fields if not isinstance(record, dict) or name not in record]
            if missing:
                raise UserError(f"{path}, line {number}: no field {missing[0]!r}")
            records.append(record)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    return records


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and bytes of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sha256_of(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, or of a string's own bytes."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Kept:
    """Results of finished tasks in a folder: NAME-MODEL-KEY.json each, with what was answered beside it.

    KEY is a hash of all that decides a result. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, model: str, key: Mapping[str, Any]) -> Result | None:
        """The result for `key`, or None; a damaged file counts as none."""
        if self.folder is None or not (path := self._path(model, key)).is_file():
            return None
        return _read(path)

    def put(self, model: str, key: Mapping[str, Any], result: Result) -> None:
        """Keep `result`, whole or not at all."""
        if self.folder is None:
            return
        path, content = self._path(model, key), asdict(result)
        lines = [json.dumps(entry, default=str) + "\n" for entry in content.pop("predictions")]
        if lines:
            write_text(path.with_name(path.stem + PREDICTIONS), "".join(lines))
        write_text(path, json.dumps({"model": model, "key": dict(key), "made_with": made_with(), "result": content}))

    def latest(self) -> dict[str, dict[str, Result]]:
        """The newest result of each task and model: {task: {model: result}}, without what was answered."""
        found: dict[str, dict[str, Result]] = {}
        for model, result in self._by_age():
            found.setdefault(result.task, {})[model] = result
        return found

    def _by_age(self) -> Iterator[tuple[str, Result]]:
        paths = [] if self.folder is None else self.folder.glob("*-*-*.json")
        for path in sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name)):
            if (result := _read(path)) is not None:
                yield json.loads(path.read_text())["model"], result

    def _path(self, model: str, key: Mapping[str, Any]) -> Path:
        assert self.folder is not None
        return self.folder / f"{key['task']}-{model}-{sha256_of(dict(key))[:16]}.json"


def _read(path: Path) -> Result | None:
    try:
        return Result(**json.loads(path.read_text())["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def made_with() -> dict[str, Any]:
    """Versions, commit and hardware."""
    packages = ("jax", "flax", "transformers", "datasets", "lm_eval")
    device = jax.devices()[0]
    return {
        "git_commit": git_commit(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
