"""Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692)."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from flax import linen as nn

from jaxlin import ops
from jaxlin.mixers.common import TokenMixer, memory_of, next_state
from jaxlin.mixers.gated_deltanet import FLA, GatedDeltaNet, beta, decay_parameters, is_random, unit_keys

KDA_FLA = replace(FLA, gate_activation="sigmoid", decay_range=(1.0, 16.0), decay_rank=-1)


class KimiDeltaAttention(TokenMixer):
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T;  o_t = S_t^T q_t,  g_t a vector a head.

    g = -A softplus(f_proj x + dt_bias) with f_proj of low rank. decay_rank and gate_rank of -1 mean the head size.
    """

    GATE_BIAS = True
    PRESETS = {
        "recommended": replace(
            GatedDeltaNet.PRESETS["recommended"], gate_activation="sigmoid", gate_rank=-1, decay_rank=-1
        ),
        "paper": replace(KDA_FLA, gate_rank=-1),
        "paper_code": replace(KDA_FLA, out_gate="added"),
    }

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        q, k, v, tails = self.qkv(x, positions, segment_ids, state)
        q, k = unit_keys(self, q, "q"), unit_keys(self, k, "k")
        strength, g = beta(self, x, q.shape[2]), self._decay(x, q.shape[2:])
        self.record(k=k, beta=strength, g=g)
        o, memory = ops.gated_delta_rule(q, k, v, strength, g, initial_state=memory_of(state), segment_ids=segment_ids)
        return self.output(o, x), next_state(state, memory, tails)

    def _decay(self, x, shape):
        rank = self.rank(self.options.decay_rank)
        a_log, dt_bias = decay_parameters(self, shape[:1], shape)
        step = self.gate_projection(x, shape, "f_proj", rank=rank, random=is_random(self))
        return -jnp.exp(a_log)[:, None] * nn.softplus(step + dt_bias)
