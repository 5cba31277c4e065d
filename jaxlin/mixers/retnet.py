"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxlin import ops
from jaxlin.mixers.common import TokenMixer, memory_of, next_state
from jaxlin.mixers.gla import FLA, GatedLinearAttention

NO_DECAY: dict[str, Any] = dict(decay_rank=None, decay_range=None)  # what RetNet forgets is fixed


class RetNet(TokenMixer):
    """S_t = gamma_h S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t,  gamma_h = 1 - 2^(-5 - h) (arXiv 2307.08621, equation 8)."""

    FLA_HEADS = 8
    PRESETS = {
        "recommended": replace(GatedLinearAttention.PRESETS["recommended"], **NO_DECAY),
        "paper": replace(FLA, rope="own", **NO_DECAY),
        "paper_code": replace(FLA, rope="own", **NO_DECAY),
    }

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        q, k, v, tails = self.qkv(x, positions, segment_ids, state)
        g = retention_decay(q.shape[2])
        self.record(k=k, g=g)
        o, memory = ops.gated_linear_attention(q, k, v, g, initial_state=memory_of(state), segment_ids=segment_ids)
        return self.output(o, x), next_state(state, memory, tails)


def retention_decay(heads: int):
    """log gamma_h, [H]. With more than 8 heads the exponents span the same range, -5 to -12: float32 holds no more."""
    exponent = jnp.arange(heads) if heads <= 8 else jnp.linspace(0.0, 7.0, heads)
    return jnp.log1p(-(2.0 ** (-5.0 - exponent)))
