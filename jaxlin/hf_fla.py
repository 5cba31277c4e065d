"""Students as folders that flash-linear-attention's own classes load (`--format fla`; its version 0.6.0).

Its DeltaNet, Gated DeltaNet, GLA, RetNet and KDA compute what ours do with the right options, under other names. Where
a student's option has no counterpart there, export is refused: better no folder than one that computes otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from jaxlin.config import MixerOptions, ModelConfig, UserError
from jaxlin.hf_table import Entry, table
from jaxlin.mixers import MIXERS
from jaxlin.mixers.common import heads_of_kv
from jaxlin.pattern import pattern_of

LARGEST_RETNET_HEAD = 256  # its rotary kernel's


@dataclass(frozen=True)
class Counterpart:
    """FLA's class for a mixer: what config.json says of it, and the option values that it computes."""

    model_type: str
    architecture: str
    norm: str
    """What the output norm is called."""
    settings: dict[str, Any]
    """Fields of its config beside those that all have."""
    options: dict[str, tuple[Any, ...]]
    """Of each option that decides what is computed."""


_SHARED = dict(rope=("none",), conv_activation=("silu",), out_norm=("rms",), gate_rank=(0,))
_DELTA = {**_SHARED, "qk_rmsnorm": (False,)}
COUNTERPARTS = {
    "deltanet": Counterpart(
        "delta_net", "DeltaNetForCausalLM", "o_norm", dict(qk_norm="l2", qk_activation="silu", use_beta=True),
        {**_DELTA, "out_gate": ("none", "random"), "gate_activation": ("silu",)},
    ),
    "gated_deltanet": Counterpart(
        "gated_deltanet", "GatedDeltaNetForCausalLM", "o_norm", {},
        {**_DELTA, "out_gate": ("none", "random"), "gate_activation": ("silu", "sigmoid")},
    ),
    "gla": Counterpart(
        "gla", "GLAForCausalLM", "g_norm_swish_gate", {},
        {**_SHARED, "out_gate": ("random",), "gate_activation": ("silu",), "decay_rank": (16,)},
    ),
    "retnet": Counterpart(
        "retnet", "RetNetForCausalLM", "g_norm_swish_gate", {},
        {**_SHARED, "rope": ("own",), "conv_size": (0,), "out_gate": ("random",), "gate_activation": ("silu",)},
    ),
    "kda": Counterpart(
        "kda", "KDAForCausalLM", "o_norm", {},
        {"out_gate": ("random",), **_DELTA, "gate_activation": ("sigmoid",), "gate_rank": (-1,), "decay_rank": (-1,)},
    ),
}  # fmt: skip
_RENAMED = {
    "embed_tokens": "embeddings",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "mixer": "attn",
}


def check(config: ModelConfig) -> None:
    """Raise UserError naming the first setting of the student that no class of FLA's has."""
    if problem := next(_problems(config), None):
        raise UserError(f"--format fla: {problem}; leave --format out")


def _problems(config: ModelConfig) -> Iterator[str]:
    mixer, options = config.mixer[0], config.options[0]
    if len(config.mixer) > 1 or mixer not in COUNTERPARTS:
        yield f"mixer={pattern_of(config.mixer)} has no counterpart there, only {', '.join(COUNTERPARTS)} alone"
        return
    for name, values in COUNTERPARTS[mixer].options.items():
        if name == "conv_activation" and not options.conv_size:
            continue
        if name == "gate_rank" and options.out_gate == "none":
            continue
        if getattr(options, name) not in values:
            known = " or ".join(map(str, values))
            yield f"{mixer} with {name}={getattr(options, name)} has no counterpart there, only {known}"
    if not options.conv_size and mixer in ("deltanet", "gated_deltanet", "kda"):
        yield f"{mixer} with conv_size=0 has no counterpart there, where SiLU is applied to q, k and v"
    if heads_of_kv(config, options) != config.num_attention_heads:
        yield f"{mixer} with expand_kv=False has no counterpart there: keys and values need a head for each query head"
    heads, size = MIXERS[mixer].head_layout(config, options)
    if mixer == "retnet" and heads > 8:
        yield f"retnet with {heads} heads has no counterpart there: decays of more than 8 are others"
    if mixer == "retnet" and size > LARGEST_RETNET_HEAD:
        yield f"retnet with heads of {size} has no counterpart there, only up to {LARGEST_RETNET_HEAD}"
    for name in ("attention_bias", "mlp_bias", "qk_norm"):
        if getattr(config, name):
            yield f"{name}=true has no counterpart there"


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of FLA's class for a student that passed `check`, its tensors stored in `dtype`."""
    mixer, options = config.mixer[0], config.options[0]
    theirs = COUNTERPARTS[mixer]
    heads, size = MIXERS[mixer].head_layout(config, options)
    expand = heads * size / config.hidden_size
    return {
        "architectures": [theirs.architecture],
        "model_type": theirs.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": heads,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "hidden_act": "swish",
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        **(_sizes_by_head(size) if mixer in ("gated_deltanet", "kda") else {"expand_k": expand, "expand_v": expand}),
        **theirs.settings,
        **dict(_from_options(mixer, options)),
    }


def _sizes_by_head(size: int) -> dict[str, Any]:
    return {"head_dim": size, "expand_v": 1.0}


def _from_options(mixer: str, options: MixerOptions) -> Iterator[tuple[str, Any]]:
    yield "use_short_conv", bool(options.conv_size)
    if options.conv_size:
        yield "conv_size", options.conv_size
    if mixer in ("deltanet", "gated_deltanet", "kda"):
        yield "allow_neg_eigval", options.allow_neg_eigval
    if mixer in ("deltanet", "gated_deltanet"):
        yield "use_gate", options.out_gate != "none"
    if mixer == "gated_deltanet":
        yield "output_gate_activation", {"silu": "swish", "sigmoid": "sigmoid"}[str(options.gate_activation)]


def fla_table(config: ModelConfig) -> list[Entry]:
    """Every parameter by FLA's names, for a student that passed `check`."""
    entries = table(config)
    renamed = _RENAMED | {"o_norm": COUNTERPARTS[config.mixer[0]].norm}
    for low_rank in {e.path[-2] for e in entries if e.path[-2].endswith("_down")}:  # there one module of two
        name = low_rank.removesuffix("_down")
        renamed |= {low_rank: f"{name}.0", name: f"{name}.1"}
    return [_with_names(entry, renamed) for entry in entries]


def _with_names(entry: Entry, renamed: dict[str, str]) -> Entry:
    name = ".".join(renamed.get(part, part) for part in entry.name.split("."))
    flat = entry.path[-1] == "dt_bias"  # a vector there, also where ours is one a head
    return replace(entry, name=name, hf_shape=(prod(entry.shape),) if flat else entry.hf_shape)
