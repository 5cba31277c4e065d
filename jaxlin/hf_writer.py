"""Writing Hugging Face checkpoint folders: tensors one at a time into safetensors files, and all or nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from jaxlin.config import UserError
from jaxlin.hf_files import SAFETENSORS_DTYPES
from jaxlin.hf_table import Entry

SHARD_BYTES = 5_000_000_000
HOW_LOADED = ("is_local", "local_files_only", "name_or_path", "_commit_hash")
"""What transformers writes of where a tokenizer came from, beside what it is."""


def require_new(path: Path) -> None:
    """Raise UserError where `path` is something else than an empty folder, or nothing."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out {path}: exists already; give a folder that does not")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end, and is deleted where anything goes wrong."""
    require_new(path)
    temporary = path.parent / f".{path.name}-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); give another folder") from None
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tensors(
    params: dict[str, Any], entries: list[Entry], folder: Path, *, dtype: Any, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write parameters as model.safetensors, or as several files with an index.

    Besides `params`, one stacked parameter and one tensor are in host memory.

    Args:
        params: the tree that `entries` describe, each leaf addressable by this process.
        entries: every parameter.
        folder: where to.
        dtype: of the tensors written.
        shard_bytes: the largest file; a tensor larger than that has a file of its own.
    """
    flat: dict[tuple[str, ...], Any] = dict(flax.traverse_util.flatten_dict(params))
    dtype = np.dtype(dtype)
    shards = list(_shards(entries, dtype.itemsize, shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        shapes = {entry.names[row]: entry.hf_shape for entry, row in shard}
        _write_safetensors(folder / file, shapes, dtype, _tensors(flat, shard))
        weight_map |= dict.fromkeys(shapes, file)
    if len(shards) > 1:
        total = sum(dtype.itemsize * prod(e.stacked_shape) for e in entries)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _tensors(flat: dict[tuple[str, ...], Any], shard: list[tuple[Entry, int]]) -> Iterator[np.ndarray]:
    """The tensors of a file in HF's layout; each stacked parameter is fetched from its device once."""
    for entry, rows in itertools.groupby(shard, key=lambda pair: pair[0]):
        host = np.asarray(flat[entry.path])
        for _, row in rows:
            yield entry.to_hf(host[row] if entry.layers else host)


def _write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Write a safetensors file as its tensors come; safetensors' own function wants all of them at once.

    Source: the format, https://github.com/huggingface/safetensors#format.
    """
    kind = next(name for name, ours in SAFETENSORS_DTYPES.items() if ours == dtype.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8).data)


def _shards(entries: Sequence[Entry], itemsize: int, limit: int) -> Iterator[list[tuple[Entry, int]]]:
    """(entry, row of its stack) of each tensor, in groups of at most `limit` bytes (or one tensor)."""
    shard, size = [], 0
    for entry in entries:
        for row in range(len(entry.layers) or 1):
            nbytes = itemsize * prod(entry.shape)
            if shard and size + nbytes > limit:
                yield shard
                shard, size = [], 0
            shard.append((entry, row))
            size += nbytes
    yield shard


def write_json(path: Path, value: Any) -> None:
    """Write `value` as people read it."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write a tokenizer's files; what config.json has to say of it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    write_json(path, {key: value for key, value in saved.items() if key not in HOW_LOADED})
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
