"""config.json of Hugging Face models to a `ModelConfig` and back: Llama's family, and what its members differ in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlin.config import ModelConfig, RopeScaling, UserError


class Family(NamedTuple):
    """What a config.json of transformers means where it leaves something out; see its classes of configurations."""

    architecture: str
    max_position_embeddings: int
    head_dim: int | None = None
    """None: the width over the heads."""
    sliding_window: int | None = None
    key_value_heads: bool = True
    """Whether it has to say how many; or each head has its own."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 2048, key_value_heads=False),
    "mistral": Family("MistralForCausalLM", 131072, sliding_window=4096),
    "qwen2": Family("Qwen2ForCausalLM", 32768, sliding_window=4096),
    "qwen3": Family("Qwen3ForCausalLM", 32768, head_dim=128, sliding_window=4096),
}
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_theta", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
VARIATIONS = ("attention_bias", "attention_out_bias", "qk_norm", "mlp_bias")
"""What only some of the family have, by the names that an exported student's config.json has for them."""


def config_from_hf(hf: dict[str, Any], where: str, student: str = "") -> ModelConfig:
    """The `ModelConfig` of an HF config, in the spellings of transformers 4 and 5; mixers are not looked at.

    Args:
        hf: the contents of config.json.
        where: what error messages call it.
        student: the `model_type` that it has to have; otherwise one of `FAMILIES`.

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

    name = hf.get("model_type")
    if name not in ([student] if student else FAMILIES):
        raise UserError(
            f"{where}: model_type={name!r} is not supported; teachers are of the Llama family ({', '.join(FAMILIES)})"
        )
    family = FAMILIES["llama" if student else str(name)]
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{where}: hidden_act={activation!r} is not supported, only silu")
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: quantized HF checkpoints are not supported; give the original weights or a .gguf file"
        )
    heads, width = integer("num_attention_heads"), integer("hidden_size")
    if hf.get("head_dim") is None and family.head_dim is None and width % heads:
        raise UserError(f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
    shared = None if family.key_value_heads and "num_key_value_heads" not in hf else heads
    theta, scaling = _rope(hf, where)
    fields: dict[str, Any] = dict(
        vocab_size=integer("vocab_size"),
        hidden_size=width,
        intermediate_size=integer("intermediate_size"),
        num_hidden_layers=integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=integer("num_key_value_heads", shared),
        head_dim=integer("head_dim", family.head_dim or width // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_number("rms_norm_eps", hf.get("rms_norm_eps", 1e-6), where),
        max_position_embeddings=integer("max_position_embeddings", family.max_position_embeddings),
        tie_word_embeddings=_boolean("tie_word_embeddings", hf, where),
        **_variations(hf, where),
    )
    _refuse_windows(hf, family, fields["num_hidden_layers"], where)
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _variations(hf: dict[str, Any], where: str) -> dict[str, bool]:
    """Biases, and norms of queries and keys: what transformers' classes have, whatever config.json says beside it."""
    name, bias = hf["model_type"], _boolean("attention_bias", hf, where)
    if name == "mistral":
        return {}
    if name == "qwen2":
        return {"attention_bias": True}
    if name == "qwen3":
        return {"attention_bias": bias, "attention_out_bias": bias, "qk_norm": True}
    found = {"attention_bias": bias, "attention_out_bias": bias, "mlp_bias": _boolean("mlp_bias", hf, where)}
    if name == "llama":
        return found
    return {key: _boolean(key, found | hf, where) for key in VARIATIONS}  # a student of any of them


def _refuse_windows(hf: dict[str, Any], family: Family, layers: int, where: str) -> None:
    """Raise UserError where some layer attends to a window of the past."""
    window, sliding = hf.get("sliding_window", family.sliding_window), "sliding_attention"
    mistral = hf["model_type"] == "mistral"
    if family.sliding_window is None or window is None or not (mistral or _boolean("use_sliding_window", hf, where)):
        return
    first = 0 if mistral else hf.get("max_window_layers", 28)
    if sliding in (hf.get("layer_types") or ["full_attention"] * first + [sliding] * (layers - first)):
        raise UserError(
            f"{where}: sliding_window={window} is not supported; where no sequence will be longer, set it to null in a "
            "copy of the folder"
        )


def _boolean(key: str, hf: dict[str, Any], where: str) -> bool:
    """False where it is left out."""
    if (value := hf.get(key)) not in (None, True, False):
        raise UserError(f"{where}: {key}={value!r} should be true or false")
    return bool(value)


def _number(key: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"{where}: {key}={value!r} should be a positive number")
    return float(value)


def _rope(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and Llama 3's scaling of them."""
    # transformers 5 has one dictionary for what 4 keeps in rope_theta and rope_scaling.
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(given := hf.get(key) or {}, dict):
            raise UserError(f"{where}: {key}={given!r} should be an object")
        rope |= given
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported, only default and llama3")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported, only whole heads are rotated")
    theta = _number("rope_theta", rope.get("rope_theta", hf.get("rope_theta", 10000.0)), where)
    if kind == "default":
        return theta, None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if lacking := [n for n in names if n not in rope]:
        raise UserError(f"{where}: rope type llama3 lacks {', '.join(lacking)}")
    values: dict[str, Any] = {n: _number(n, rope[n], where) for n in names}
    return theta, RopeScaling(**{**values, names[-1]: int(values[names[-1]])})


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a softmax model, in transformers 4's spelling, which 5 reads too.

    Raises UserError where no class of transformers has such attention.
    """
    name = _family(config)
    own = {"llama": ("attention_bias", "mlp_bias"), "qwen2": (), "qwen3": ("attention_bias",)}[name]
    return shared_to_hf(config, dtype, own) | {"architectures": [FAMILIES[name].architecture], "model_type": name}


def shared_to_hf(config: ModelConfig, dtype: str, own: Sequence[str]) -> dict[str, Any]:
    """What every config.json of ours holds, and the fields `own` of `VARIATIONS`."""
    scaling = config.rope_scaling
    return {
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in (*SHARED, *own)},
        "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling else None,
        "torch_dtype": dtype,
    }


def _family(config: ModelConfig) -> str:
    """Whose class computes a softmax model; Mistral's, without windows, is Llama's."""
    alike = config.attention_bias == config.attention_out_bias
    if alike and not config.qk_norm:
        return "llama"
    if alike and not config.mlp_bias:
        return "qwen3"
    if config.attention_bias and not config.qk_norm and not config.mlp_bias:
        return "qwen2"
    given = ", ".join(f"{key}={getattr(config, key)}" for key in VARIATIONS)
    raise UserError(f"no class of transformers has {given} together; a student with linear-time mixers can be written")
