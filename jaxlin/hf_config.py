"""config.json of Hugging Face models to a `ModelConfig` and back: Llama's family, and what its members differ in."""

from __future__ import annotations

from typing import Any

from jaxlin.config import ModelConfig, RopeScaling, UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_theta", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
ATTENTION = ("attention_bias", "attention_out_bias", "qk_norm", "mlp_bias")
"""What only some of the family have, by the names that an exported student's config.json has for them."""


def config_from_hf(hf: dict[str, Any], where: str, student: str = "") -> ModelConfig:
    """The `ModelConfig` of an HF config, in the spellings of transformers 4 and 5; mixers are not looked at.

    Args:
        hf: the contents of config.json.
        where: what error messages call it.
        student: the `model_type` of exported students, if it has to be one; otherwise it is one of `ARCHITECTURES`.

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

    family = hf.get("model_type")
    if family not in ([student] if student else ARCHITECTURES):
        raise UserError(
            f"{where}: model_type={family!r} is not supported; teachers are of the Llama family "
            f"({', '.join(ARCHITECTURES)})"
        )
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{where}: hidden_act={activation!r} is not supported, only silu")
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: quantized HF checkpoints are not supported; give the original weights or a .gguf file"
        )
    _refuse_windows(hf, where)

    heads, width = integer("num_attention_heads"), integer("hidden_size")
    head_dim = hf.get("head_dim") or (128 if family == "qwen3" else None)
    if head_dim is None and width % heads:
        raise UserError(f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
    theta, scaling = _rope(hf, where)
    fields: dict[str, Any] = dict(
        vocab_size=integer("vocab_size"),
        hidden_size=width,
        intermediate_size=integer("intermediate_size"),
        num_hidden_layers=integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=integer("num_key_value_heads", heads if family in ("llama", student) else None),
        head_dim=integer("head_dim", head_dim or width // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_number("rms_norm_eps", hf.get("rms_norm_eps", 1e-6), where),
        max_position_embeddings=integer("max_position_embeddings", 2048),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        **_attention(hf),
    )
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _attention(hf: dict[str, Any]) -> dict[str, bool]:
    """Biases, and norms of queries and keys: what transformers' classes have, whatever config.json says beside it."""
    family = hf["model_type"]
    if family == "mistral":
        return {}
    if family == "qwen2":
        return {"attention_bias": True, "attention_out_bias": False}
    if family == "qwen3":
        return {"attention_bias": bool(hf.get("attention_bias", False)), "qk_norm": True}
    names = ("attention_bias", "mlp_bias") if family == "llama" else ATTENTION
    return {key: bool(hf[key]) for key in names if hf.get(key) is not None}


def _refuse_windows(hf: dict[str, Any], where: str) -> None:
    """Raise UserError where some layer attends to a window."""
    family = hf["model_type"]
    window = hf.get("sliding_window", 4096 if family == "mistral" else None)
    if family in ("qwen2", "qwen3") and not hf.get("use_sliding_window", False):
        window = None  # it is written all the same
    if window is not None or any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        raise UserError(
            f"{where}: sliding_window={window} is not supported, only teachers that attend to the whole past"
        )


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
    family = _family(config)
    scaling = config.rope_scaling
    own = {"llama": ("attention_bias", "mlp_bias"), "qwen2": (), "qwen3": ("attention_bias",)}[family]
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in SHARED},
        **{key: getattr(config, key) for key in own},
        "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling else None,
        "torch_dtype": dtype,
    }


def _family(config: ModelConfig) -> str:
    """Whose class computes a softmax model; Mistral's, without windows, is Llama's."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias != config.out_bias else "llama"
    if (config.qk_norm and config.attention_bias != config.out_bias) or (config.mlp_bias and family != "llama"):
        given = ", ".join(f"{key}={getattr(config, key)}" for key in ATTENTION)
        raise UserError(f"no class of transformers has {given} together")
    return family
