"""Benchmark data in files: where it lies under `--data`, and rows whose fields are what a task needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlin.config import UserError

Row = dict[str, Any]


def locate(data: str | Path, name: str) -> Path | None:
    """DATA/name or DATA/eval/name, whichever exists."""
    return next((path for path in (Path(data) / name, Path(data) / "eval" / name) if path.exists()), None)


def read_rows(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> list[Row]:
    """The rows of a .jsonl file, each with the `fields` of these types.

    Raises UserError naming file and line where the file cannot be read, a line is not JSON, or a field is missing or of
    another type.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    rows = [(f"{path}:{i}", _parse(line, f"{path}:{i}")) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: no rows")
    return check_rows(rows, fields)


def check_rows(rows: Iterable[tuple[str, Any]], fields: Mapping[str, type | tuple[type, ...]]) -> list[Row]:
    """The rows of (where, row), once each has the `fields`. Raises UserError as `read_rows` does."""
    checked = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {type(row).__name__}")
        for name, kind in fields.items():
            if name not in row:
                raise UserError(f"{where}: no field {name!r} among {', '.join(map(str, row))}")
            if not isinstance(row[name], kind):
                raise UserError(f"{where}: field {name!r} is {type(row[name]).__name__}, not what the task expects")
        checked.append(row)
    return checked


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from error


def from_hub(name: str, split: str, config: str | None = None) -> list[tuple[str, Row]]:
    """(where, row) of a Hugging Face dataset. Raises UserError where it cannot be had."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's clients raise many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: cannot be loaded from the hub ({reason}); give --data DIR for local files") from error
    return [(f"{name} row {i}", dict(row)) for i, row in enumerate(loaded)]


def files_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of `paths`, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def texts_sha256(texts: Iterable[str]) -> str:
    """SHA-256 over `texts`, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
