"""Finding and reading Hugging Face checkpoint folders: safetensors or PyTorch files, whole or sharded.

A reader is anything with `label`, `names()`, `spec(name)` and `get(name)`; tensors are read one at a time.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxlin.config import UserError

FLOATS = ("float64", "float32", "float16", "bfloat16")
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# ---- tensors ---------------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Tensors by their Hugging Face names, read lazily."""

    label: str
    """What error messages call this source."""

    def names(self) -> set[str]:
        """Names of the tensors."""
        ...

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (one of FLOATS, or the format's own word) of a tensor, without reading it."""
        ...

    def get(self, name: str) -> np.ndarray:
        """The tensor, in its stored dtype (float32 if quantized)."""
        ...


class SafetensorsReader:
    """The tensors of one .safetensors file."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.label = str(path)
        try:
            self._file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error
        self._names = set(self._file.keys())

    def names(self) -> set[str]:
        return self._names

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        view = self._file.get_slice(name)
        dtype = str(view.get_dtype())
        return tuple(view.get_shape()), SAFETENSORS_DTYPES.get(dtype, dtype)

    def get(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)


class TorchReader:
    """The tensors of one pytorch_model*.bin file; needs torch, runs no code of the file."""

    def __init__(self, path: Path) -> None:
        try:
            import torch  # pyright: ignore[reportMissingImports] -- optional: only .bin files need it
        except ImportError as error:
            raise UserError(
                f"{path} can only be read with torch: pip install torch, or convert the model to safetensors"
            ) from error

        self.label = str(path)
        try:
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):  # files in PyTorch's format from before 1.6 cannot be mapped
                    raise
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise unreadable(path, error) from error
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise UserError(f"{path} does not hold a state dict (a dictionary of tensors)")
        self._tensors: dict[str, Any] = tensors
        self._bfloat16, self._bits = torch.bfloat16, torch.int16

    def names(self) -> set[str]:
        return set(self._tensors)

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        tensor = self._tensors[name]
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def get(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if tensor.dtype == self._bfloat16:  # numpy has no bfloat16 of its own, so torch hands over the bits
            return tensor.contiguous().view(self._bits).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class ShardedReader:
    """The tensors of several files, by the index.json that says which file holds which tensor."""

    def __init__(self, index: Path) -> None:
        self.label = str(index)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index} has no weight_map of tensors to files: the index is damaged, fetch it again")
        files = sorted(set(weight_map.values()))
        if absent := [f for f in files if not (index.parent / f).is_file()]:
            raise UserError(f"{index} names files that are absent: {listing(absent)}; fetch the model again")
        readers = {f: _open_file(index.parent / f) for f in files}
        if lost := sorted(n for n, f in weight_map.items() if n not in readers[f].names()):
            raise UserError(f"{index} places tensors in files that do not hold them: {listing(lost)}")
        self._reader_of = {name: readers[f] for name, f in weight_map.items()}

    def names(self) -> set[str]:
        return set(self._reader_of)

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        return self._reader_of[name].spec(name)

    def get(self, name: str) -> np.ndarray:
        return self._reader_of[name].get(name)


def _open_file(path: Path) -> Reader:
    return SafetensorsReader(path) if path.suffix == ".safetensors" else TorchReader(path)


def open_folder(folder: Path) -> Reader:
    """A reader of the weights in an HF folder; safetensors are preferred to .bin, one file to shards."""
    for name in _WEIGHTS:
        path = folder / name
        if path.is_file():
            return ShardedReader(path) if path.suffix == ".json" else _open_file(path)
    raise UserError(f"{folder} holds no weights: expected one of {', '.join(_WEIGHTS)}")


# ---- files -----------------------------------------------------------------------------------------------------------


def locate(source: str) -> Path:
    """The local folder of an HF model: `source` itself, or the hub's "org/name", downloaded to its cache."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"teacher {source} is a file: give the folder that holds it, or a .gguf file")
    if not HUB_NAME.fullmatch(source):
        raise UserError(f'teacher {source}: no such folder, and not "demo", a .gguf file or a hub name "org/name"')
    return _download(source)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    small = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "pytorch_model*.bin"]))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"teacher {name}: no such folder here and no such model on the hub (or it is private or gated)"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"teacher {name}: no such folder here, and it cannot be had from the hub ({first_line(error)}); "
            'give a local folder, a .gguf file or "demo"'
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; give the folder of a Hugging Face model") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a weights file that is cut short or is something else."""
    return UserError(f"{path} is truncated or not what its name says ({first_line(error)}); fetch it again")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listing(items: Iterable[str], limit: int = 6) -> str:
    """The first few of `items`, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
