"""Checkpoints of others, and exported students, to parameters; and softmax models back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np

from jaxlin import gguf_teacher, hf_config, hf_files, hf_student, hf_writer
from jaxlin.config import ModelConfig, UserError
from jaxlin.hf_table import Entry, table
from jaxlin.pattern import pattern_of

# Left in some old checkpoints; computed from the config instead.
_IGNORED = ("rotary_emb.inv_freq",)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


# ---- tensors to parameters -------------------------------------------------------------------------------------------


def params_from_tensors(
    reader: hf_files.Reader, config: ModelConfig, *, dtype: Any = None, shardings: Any = None
) -> dict[str, Any]:
    """The parameters of a model, read one tensor at a time.

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
    """A pretrained Llama-family model, or a student that was exported.

    Args:
        source: a local HF folder, "org/name" on the hub, a .gguf file, or "demo" (SmolLM2-135M-Instruct, fetched once).
        dtype: of the parameters; None is bfloat16 where every tensor is stored so, otherwise float32. Or a function
            that gives either for the config.
        shardings: a tree like the parameters' of `jax.sharding.Sharding`, or a function that makes one from the
            config; None for the default device.

    Returns:
        The config (with the default compute dtype, but a student's with its own), the parameters, and the tokenizer.

    Raises:
        UserError: whatever is wrong with the files, naming the file or tensor, what was expected and what was found.
    """
    config, reader, path = _open(source)
    tokenizer = _tokenizer(path, reader)
    _check_vocabulary(tokenizer, config, str(path))
    shardings = shardings(config) if callable(shardings) else shardings
    dtype = dtype(config) if callable(dtype) else dtype
    return config, params_from_tensors(reader, config, dtype=dtype, shardings=shardings), tokenizer


def _open(source: str) -> tuple[ModelConfig, hf_files.Reader, Path]:
    """The config, the tensors and the path (a folder or a .gguf file) of a teacher."""
    if _in_gguf(source := os.fspath(source)):
        path = gguf_teacher.demo_file() if source == "demo" else Path(source).expanduser()
        reader = gguf_teacher.GGUFTensors(path)
        return hf_config.config_from_hf(reader.hf_config(), str(path)), reader, path
    path = hf_files.locate(source)
    file = path / "config.json"
    hf = hf_files.read_json(file)
    if "model_type" not in hf and "mixer" in hf:
        raise UserError(f"{source} is the folder of a run: give it as --run, or export it (python -m jaxlin.export)")
    read = hf_student.config_from_hf if hf.get("model_type") == hf_student.MODEL_TYPE else hf_config.config_from_hf
    return read(hf, str(file)), hf_files.open_folder(path), path


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


def begin_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, and teachers were trained to see there: a token, or none."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


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
    shard_bytes: int = hf_writer.SHARD_BYTES,
) -> None:
    """Write a softmax model as an HF folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        params: the parameters, each addressable by this process.
        config: their architecture; its mixer must be softmax.
        path: a folder to make; it appears only when complete.
        tokenizer: written beside the weights, if given.
        shard_bytes: the largest weights file; a larger model becomes several, with an index.

    Raises:
        UserError: another mixer, attention that no class of transformers has, or `path` exists already.
        ValueError: `params` is not what `config` describes.
    """
    if config.mixer != ("softmax",):
        raise UserError(
            f"mixer={pattern_of(config.mixer)} cannot be written with a class of transformers' own, only softmax"
        )
    entries = table(config)
    check_params(params, entries)
    dtype = params["embed_tokens"]["embedding"].dtype
    with hf_writer.new_folder(Path(path)) as folder:
        hf_writer.write_tensors(params, entries, folder, dtype=dtype, shard_bytes=shard_bytes)
        hf = hf_config.config_to_hf(config, dtype.name)
        if tokenizer is not None:
            hf |= hf_writer.write_tokenizer(tokenizer, folder)
        hf_writer.write_json(folder / "config.json", hf)


def check_params(params: dict[str, Any], entries: list[Entry]) -> None:
    """Raise ValueError where a tree of parameters is not what `entries` describe."""
    flat: dict[tuple[str, ...], Any] = dict(flax.traverse_util.flatten_dict(params))
    _check_tree("params", flat, entries)
    for entry in entries:
        if (found := flat[entry.path].shape) != entry.stacked_shape:
            raise ValueError(f"params: {'/'.join(entry.path)} has shape {found}, expected {entry.stacked_shape}")


def byte_tokenizer() -> Any:
    """A tokenizer that needs no files: one token a byte, then `<|endoftext|>`; for random teachers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
