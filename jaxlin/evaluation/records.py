"""Rows of a benchmark from a file or from the hub, whose fields are what the task needs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlin.config import UserError
from jaxlin.evaluation.task import read_jsonl

Fields = Mapping[str, type | tuple[type, ...]]


def rows(path: Path | None, hub: tuple[str, str | None, str], fields: Fields) -> list[dict[str, Any]]:
    """The rows of the .jsonl file `path`, or, where it is None, of `hub`: a dataset, its configuration and its split.

    Raises UserError naming the row where one cannot be read, or lacks one of `fields`, or has another type there.
    """
    found, where = (from_hub(*hub), hub[0]) if path is None else (read_jsonl(path, fields), str(path))
    for number, row in enumerate(found, 1):
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise UserError(f"{where}, row {number}: {name!r} is {type(row.get(name)).__name__}, which cannot be")
    return found


def from_hub(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a Hugging Face dataset. Raises UserError where it cannot be had."""
    import datasets

    try:
        with quiet_hub():
            return [dict(row) for row in datasets.load_dataset(name, config, split=split)]
    except Exception as error:  # the hub's clients raise many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: not to be had from the hub ({reason}); give local files by --data DIR") from error


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the lines about each attempt to reach the hub: what cannot be had is said once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
