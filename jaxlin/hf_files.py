"""Finding and reading Hugging Face checkpoint folders: config.json, and safetensors or PyTorch files, whole or sharded.

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

from jaxlin.config import ModelConfig, RopeScaling, UserError

FLOATS = ("float64", "float32", "float16", "bfloat16")
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# ---- configuration ---------------------------------------------------------------------------------------------------


def config_from_hf(hf: dict[str, Any], where: str, model_type: str = "llama") -> ModelConfig:
    """The `ModelConfig` of an HF Llama config, in the spellings of transformers 4 and 5; mixers are not looked at.

    Args:
        hf: the contents of config.json.
        where: what error messages call it.
        model_type: what it has to be.

    Raises:
        UserError: another architecture, a feature this decoder lacks, a missing or senseless value.
    """

    def integer(key: str, default: int | None = None) -> int:
        value = hf.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{where} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(f"{where}: {key}={value!r} should be a positive integer")
        return value

    def number(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{where}: {key}={value!r} should be a positive number")
        return float(value)

    if (kind := hf.get("model_type")) != model_type:
        raise UserError(f"{where}: model_type={kind!r} is not supported; teachers are of the Llama family (llama)")
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{where}: hidden_act={activation!r} is not supported, only silu")
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: quantized HF checkpoints are not supported; give the original weights or a .gguf file"
        )

    heads, width = integer("num_attention_heads"), integer("hidden_size")
    if hf.get("head_dim") is None and width % heads:
        raise UserError(f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
    # transformers 5 has one dictionary for what 4 keeps in rope_theta and rope_scaling.
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(given := hf.get(key) or {}, dict):
            raise UserError(f"{where}: {key}={given!r} should be an object")
        rope |= given
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported, only default and llama3")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported, only whole heads are rotated")
    scaling = None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if lacking := [n for n in names if n not in rope]:
            raise UserError(f"{where}: rope type llama3 lacks {', '.join(lacking)}")
        values: dict[str, Any] = {n: number(n, rope[n]) for n in names}
        scaling = RopeScaling(**{**values, names[-1]: int(values[names[-1]])})

    fields: dict[str, Any] = dict(
        vocab_size=integer("vocab_size"),
        hidden_size=width,
        intermediate_size=integer("intermediate_size"),
        num_hidden_layers=integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", width // heads),
        rope_theta=number("rope_theta", rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        rope_scaling=scaling,
        rms_norm_eps=number("rms_norm_eps", hf.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=integer("max_position_embeddings", 2048),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        attention_bias=bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a softmax model, in transformers 4's spelling, which 5 reads too."""
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rope_theta rms_norm_eps max_position_embeddings tie_word_embeddings attention_bias mlp_bias"
    )
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in same.split()},
        "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling else None,
        "torch_dtype": dtype,
    }


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
        raise UserError(f"{path} is missing") from error
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
