"""What a student's gates are on a text, layer by layer, and how long they let its states remember."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlin.config import ModelConfig
from jaxlin.inspect import memory
from jaxlin.model import LanguageModel, apply
from jaxlin.pattern import layers_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
STARTS = 16  # tokens of a sequence whose writes are followed

Gates = dict[str, jax.Array]


def linear_layers(config: ModelConfig) -> list[int]:
    """The layers that have a state of constant size."""
    return [i for i, mixer in enumerate(layers_of(config.mixer, config.num_hidden_layers)) if mixer != "softmax"]


@jax.jit(static_argnums=0)
def captured(config: ModelConfig, params: Any, tokens: jax.Array) -> dict[str, Gates]:
    """What the recurrences of linear-time blocks are given on tokens [B, T], stacked over the block's layers [R].

    Of each block: k [R, B, T, H, K] (the keys after feature maps and norms), and those that the mixer has of g
    ([R, B, T, H] or [R, B, T, H, K], the log decay <= 0), beta and input_gate [R, B, T, H].
    """
    call = dict(logits=False, mutable=["intermediates"])
    _, seen = apply(LanguageModel(config), params, tokens, **call)
    layers = seen["intermediates"]["layers"]
    return {
        f"block_{i}": _named({name: kept[0] for name, kept in layers[f"block_{i}"]["mixer"].items()})
        for i, mixer in enumerate(config.mixer)
        if mixer != "softmax"
    }


def _named(given: Gates) -> Gates:
    found = {name: a.astype(jnp.float32) for name, a in given.items()}
    if "f" in found:  # the mLSTM's pre-activations
        found["g"] = nn.log_sigmoid(found.pop("f"))
        found["input_gate"] = jnp.exp(found.pop("i"))
    if "g" in found and found["g"].ndim == 2:  # a constant a head
        found["g"] = jnp.broadcast_to(found["g"][:, None, None], found["k"].shape[:-1])
    return found


def measure(
    config: ModelConfig, params: Any, sequences: np.ndarray, done: Callable[[int], Any] = lambda n: None
) -> list[dict[str, Any]]:
    """Gates and memory of each linear-time layer on sequences [N, T], which are read one by one.

    Of each layer, in order: gates {decay, beta, input_gate as far as it has them: {quantiles, by_head}}, over all
    tokens, heads and channels; memory {gates, writes: {quantiles, by_head: medians, outlasting: the share that outlasts
    the window}}, in tokens, see `memory`; infinity where nothing is ever forgotten.
    """
    horizon = sequences.shape[1] // 2
    starts = np.unique(np.linspace(0, sequences.shape[1] - horizon - 1, STARTS).astype(np.int32))
    seen = []
    for tokens in sequences:
        given = captured(config, params, jnp.asarray(tokens[None]))
        seen.append({block: _arrays(found, jnp.asarray(starts), horizon) for block, found in given.items()})
        done(1)
    joined = jax.tree.map(lambda *a: np.concatenate(a, axis=1), *seen)
    rows = ((i // config.period, joined[f"block_{i % config.period}"]) for i in linear_layers(config))
    return [_layer(jax.tree.map(lambda a, row=row: a[row], arrays), horizon) for row, arrays in rows]


def _arrays(found: Gates, starts: jax.Array, horizon: int) -> dict[str, dict[str, np.ndarray]]:
    """What is measured of a block's gates and memory, [R, B, T or starts, H, ...]."""
    lengths = memory.lengths(found["k"], found.get("g"), found.get("beta"), starts, horizon)
    shown = {name: found[name] for name in ("beta", "input_gate") if name in found}
    shown |= {"decay": jnp.exp(found["g"])} if "g" in found else {}
    return {
        "gates": {name: np.asarray(a) for name, a in shown.items()},
        "memory": {name: np.moveaxis(np.asarray(a), 0, 2) for name, a in lengths.items()},
    }


def _layer(arrays: dict[str, dict[str, np.ndarray]], horizon: int) -> dict[str, Any]:
    """One layer's report, from arrays [N, T or starts, H, ...]."""
    lengths = {
        name: {
            "quantiles": quantiles(a),
            "by_head": [quantiles(head, (0.5,))[0] for head in np.moveaxis(a, 2, 0)],
            "outlasting": float(np.mean(a > horizon)),
        }
        for name, a in arrays["memory"].items()
    }
    return {"gates": {name: distribution(a) for name, a in arrays["gates"].items()}, "memory": lengths}


def distribution(a: np.ndarray) -> dict[str, Any]:
    """QUANTILES of a gate [N, T, H, ...], over all and of each head."""
    return {"quantiles": quantiles(a), "by_head": [quantiles(head) for head in np.moveaxis(a, 2, 0)]}


def quantiles(a: np.ndarray, at: Sequence[float] = QUANTILES) -> list[float]:
    """Quantiles as members of `a`, which may hold infinities."""
    return np.quantile(a, at, method="inverted_cdf").astype(float).tolist()
