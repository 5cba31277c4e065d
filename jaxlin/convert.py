"""Hugging Face Llama checkpoints to parameters and back: one table of names serves both directions."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np

from jaxlin import gguf_teacher, hf_files
from jaxlin.config import ModelConfig, UserError

# Left in some old checkpoints; computed from the config instead.
_IGNORED = ("rotary_emb.inv_freq",)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SHARD_BYTES = 5_000_000_000


# ---- the table of names ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One parameter: where it is in the tree, what Hugging Face calls it, and its shape in both (of one layer)."""

    path: tuple[str, ...]
    name: str
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layers: int
    """Layers stacked on a leading axis; 0 for a parameter outside the layers."""

    @property
    def names(self) -> list[str]:
        """The HF tensors of this parameter, one a layer."""
        return [self.name.format(layer=i) for i in range(self.layers)] if self.layers else [self.name]

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in the tree."""
        return (self.layers, *self.shape) if self.layers else self.shape

    @property
    def transposed(self) -> bool:
        """HF keeps linear maps as [out, in]; kernels are [in, out]."""
        return self.path[-1] == "kernel"

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """HF's layout to ours, one layer."""
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """Our layout to HF's, one layer."""
        return leaf.reshape(self.hf_shape[::-1]).T if self.transposed else leaf.reshape(self.hf_shape)


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter of a softmax model, in the order of the forward pass."""
    d, f, v, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    h, kv, k = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    entries = [Entry(("embed_tokens", "embedding"), "model.embed_tokens.weight", (v, d), (v, d), 0)]

    def add(path: str, name: str, hf_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
        where = ("layers", "block_0", *path.split("."))
        entries.append(Entry(where, f"model.layers.{{layer}}.{name}", hf_shape, shape, layers))

    def linear(group: str, hf_group: str, name: str, into: tuple[int, ...], out: tuple[int, ...], bias: bool) -> None:
        n_in, n_out = math.prod(into), math.prod(out)
        add(f"{group}.{name}.kernel", f"{hf_group}.{name}.weight", (n_out, n_in), (*into, *out))
        if bias:
            add(f"{group}.{name}.bias", f"{hf_group}.{name}.bias", (n_out,), out)

    add("input_layernorm.weight", "input_layernorm.weight", (d,), (d,))
    for name, n in (("q_proj", h), ("k_proj", kv), ("v_proj", kv)):
        linear("mixer", "self_attn", name, (d,), (n, k), config.attention_bias)
    linear("mixer", "self_attn", "o_proj", (h, k), (d,), config.attention_bias)
    add("post_attention_layernorm.weight", "post_attention_layernorm.weight", (d,), (d,))
    for name, n_in, n_out in (("gate_proj", d, f), ("up_proj", d, f), ("down_proj", f, d)):
        linear("mlp", "mlp", name, (n_in,), (n_out,), config.mlp_bias)
    entries.append(Entry(("norm", "weight"), "model.norm.weight", (d,), (d,), 0))
    if not config.tie_word_embeddings:
        entries.append(Entry(("lm_head", "kernel"), "lm_head.weight", (v, d), (d, v), 0))
    return entries


# ---- tensors to parameters -------------------------------------------------------------------------------------------


def params_from_tensors(
    reader: hf_files.Reader, config: ModelConfig, *, dtype: Any = None, shardings: Any = None
) -> dict[str, Any]:
    """The parameters of a softmax model, read one tensor at a time.

    Besides the result, at most one stacked parameter and one tensor are in host memory.

    Args:
        reader: the tensors, by their HF names.
        config: the architecture that they must have.
        dtype: of the parameters; None is bfloat16 where every tensor is stored so, otherwise float32.
        shardings: a tree like the parameters' of `jax.sharding.Sharding`, or None for the default device.

    Returns:
        The tree of parameters, those of the layers stacked on a leading axis.

    Raises:
        UserError: tensors missing, left over, or of another shape or kind; all of them in one message.
        ValueError: `shardings` is not a tree like the parameters.
    """
    entries = table(config)
    stored = _check_tensors(reader, config, entries)
    if dtype is None:
        dtype = "bfloat16" if stored == {"bfloat16"} else "float32"
    dtype = np.dtype(dtype)
    places: dict[tuple[str, ...], Any] = {e.path: None for e in entries}
    if shardings is not None:
        places = dict(flax.traverse_util.flatten_dict(shardings))
        _check_tree("shardings", places, entries)

    flat = {}
    for entry in entries:
        host = np.empty(entry.stacked_shape, dtype)
        for row, name in zip(host if entry.layers else host[None], entry.names, strict=True):
            row[...] = entry.from_hf(reader.get(name))
        flat[entry.path] = _place(host, places[entry.path])
    return flax.traverse_util.unflatten_dict(flat)


def _check_tree(argument: str, flat: dict[tuple[str, ...], Any], entries: list[Entry]) -> None:
    """Raise unless a flattened tree has exactly the parameters' paths."""
    if wrong := set(flat) ^ {entry.path for entry in entries}:
        path = min(wrong)
        problem = "has too many leaves" if path in flat else "lacks leaves"
        raise ValueError(f"{argument} {problem} for this config, for one {'/'.join(path)}")


def _place(host: np.ndarray, sharding: Any) -> jax.Array:
    """Put `host` on devices; each process of several sends the parts of its own devices."""
    if sharding is None:
        array = jax.device_put(host)
    else:
        array = jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
    return array.block_until_ready()  # so that `host` is free before the next one is made


def _check_tensors(reader: hf_files.Reader, config: ModelConfig, entries: list[Entry]) -> set[str]:
    """Compare a file's tensors with the table, before any is read; the dtypes they are stored in."""
    names = reader.names()
    expected = {name: entry.hf_shape for entry in entries for name in entry.names}
    problems = []
    if missing := [n for n in expected if n not in names]:
        problems.append(f"missing tensors: {hf_files.listing(missing)}")
    stored = set()
    for name in (n for n in expected if n in names):
        shape, dtype = reader.spec(name)
        stored.add(dtype)
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, but the config makes it {expected[name]}")
        if dtype not in hf_files.FLOATS:
            problems.append(f"{name} is stored as {dtype}, but expected one of {', '.join(hf_files.FLOATS)}")
    left = [n for n in sorted(names - set(expected)) if not n.endswith(_IGNORED)]
    if config.tie_word_embeddings and "lm_head.weight" in left:
        left.remove("lm_head.weight")
        if not np.array_equal(reader.get("lm_head.weight"), reader.get("model.embed_tokens.weight")):
            problems.append("lm_head.weight differs from the embedding, but the config has tie_word_embeddings=true")
    if left:
        problems.append(f"tensors that the config does not account for: {hf_files.listing(left)}")
    if problems:
        raise UserError(f"{reader.label} does not fit its config: {hf_files.listing(problems, limit=4)}")
    return stored


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_config(source: str) -> ModelConfig:
    """The architecture of a teacher; see `load_teacher` for `source` and errors."""
    return _open(source)[0]


def load_teacher(source: str, *, dtype: Any = None, shardings: Any = None) -> tuple[ModelConfig, dict[str, Any], Any]:
    """A pretrained Llama-family model.

    Args:
        source: a local HF folder, "org/name" on the hub, a .gguf file, or "demo" (SmolLM2-135M-Instruct, fetched once).
        dtype: of the parameters; None is bfloat16 where every tensor is stored so, otherwise float32.
        shardings: a tree like the parameters' of `jax.sharding.Sharding`, or a function that makes one from the
            config; None for the default device.

    Returns:
        The config (its compute dtype is left at the default), the parameters, and the tokenizer.

    Raises:
        UserError: whatever is wrong with the files, naming the file or tensor, what was expected and what was found.
    """
    config, reader, path = _open(source)
    tokenizer = _tokenizer(path, reader)
    _check_vocabulary(tokenizer, config, str(path))
    if callable(shardings):
        shardings = shardings(config)
    return config, params_from_tensors(reader, config, dtype=dtype, shardings=shardings), tokenizer


def _open(source: str) -> tuple[ModelConfig, hf_files.Reader, Path]:
    """The config, the tensors and the path (a folder or a .gguf file) of a teacher."""
    if _in_gguf(source := os.fspath(source)):
        path = gguf_teacher.demo_file() if source == "demo" else Path(source).expanduser()
        reader = gguf_teacher.GGUFTensors(path)
        return hf_files.config_from_hf(reader.hf_config(), str(path)), reader, path
    path = hf_files.locate(source)
    file = path / "config.json"
    return hf_files.config_from_hf(hf_files.read_json(file), str(file)), hf_files.open_folder(path), path


def _in_gguf(source: str) -> bool:
    return source == "demo" or source.endswith(".gguf")


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a teacher (a transformers tokenizer); see `load_teacher` for `source`."""
    if _in_gguf(source := os.fspath(source)):
        _, reader, path = _open(source)
        return _tokenizer(path, reader)
    return _tokenizer(hf_files.locate(source), None)  # an HF folder may hold a tokenizer only


def _tokenizer(path: Path, reader: hf_files.Reader | None) -> Any:
    if isinstance(reader, gguf_teacher.GGUFTensors):
        return reader.tokenizer()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((path / f).is_file() for f in _TOKENIZER_FILES):
        raise UserError(f"{path} holds no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")
    # transformers 5 lets the class named in tokenizer_config.json replace the pre-tokenizer of tokenizer.json
    # (SmolLM2 says GPT2Tokenizer and loses its digit split): tokenizer.json is what the model was trained with.
    cls = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return cls.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise UserError(f"{path}: the tokenizer cannot be read ({hf_files.first_line(error)})") from error


def _check_vocabulary(tokenizer: Any, config: ModelConfig, where: str) -> None:
    """Refuse a tokenizer of another model; a model's vocabulary may be padded to a round number."""
    size = max(tokenizer.get_vocab().values()) + 1
    if not 0.9 * config.vocab_size <= size <= config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {size} tokens but the model's vocab_size is {config.vocab_size}: "
            "they belong to different models"
        )


def end_of_text_id(tokenizer: Any) -> int:
    """The token that separates documents: <|endoftext|> where the vocabulary has it, else the end-of-sequence token."""
    token = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if token is None:
        raise UserError("the tokenizer has neither <|endoftext|> nor an end-of-sequence token to put between documents")
    return int(token)


# ---- export ----------------------------------------------------------------------------------------------------------


def export_hf(
    params: dict[str, Any],
    config: ModelConfig,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a softmax model as an HF folder that `LlamaForCausalLM.from_pretrained` loads.

    Args:
        params: the parameters, each addressable by this process.
        config: their architecture; its mixer must be softmax.
        path: a folder to make; it appears only when complete.
        tokenizer: written beside the weights, if given.
        shard_bytes: the largest weights file; a larger model becomes several, with an index.

    Raises:
        UserError: another mixer, or `path` exists already.
        ValueError: `params` is not what `config` describes.
    """
    from safetensors.numpy import save_file

    if config.mixer != ("softmax",):
        raise UserError(f"mixer={'+'.join(config.mixer)} cannot be written as an HF Llama folder, only softmax")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: give a folder that does not")
    flat: dict[tuple[str, ...], Any] = dict(flax.traverse_util.flatten_dict(params))
    entries = table(config)
    _check_tree("params", flat, entries)
    for entry in entries:
        if (found := flat[entry.path].shape) != entry.stacked_shape:
            raise ValueError(f"params: {'/'.join(entry.path)} has shape {found}, expected {entry.stacked_shape}")
    dtype = flat[entries[0].path].dtype

    temporary = path.parent / f".{path.name}-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        shards = list(_shards(entries, dtype.itemsize, shard_bytes))
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {}
            for entry, layer in shard:
                leaf = flat[entry.path]
                name = entry.names[layer]
                tensors[name] = np.ascontiguousarray(entry.to_hf(np.asarray(leaf[layer] if entry.layers else leaf)))
                weight_map[name] = file
            save_file(tensors, temporary / file, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(dtype.itemsize * math.prod(e.stacked_shape) for e in entries)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        hf = hf_files.config_to_hf(config, dtype.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
            hf |= {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (temporary / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _shards(entries: list[Entry], itemsize: int, limit: int) -> Iterator[list[tuple[Entry, int]]]:
    """(entry, layer) of each tensor, in groups of at most `limit` bytes (or one tensor)."""
    shard, size = [], 0
    for entry in entries:
        for layer in range(entry.layers or 1):
            nbytes = itemsize * math.prod(entry.shape)
            if shard and size + nbytes > limit:
                yield shard
                shard, size = [], 0
            shard.append((entry, layer))
            size += nbytes
    yield shard


def byte_tokenizer() -> Any:
    """A tokenizer that needs no files: one token a byte, then `<|endoftext|>`; for random teachers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
