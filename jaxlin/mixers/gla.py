"""Gated linear attention (Yang et al. 2024, arXiv 2312.06635)."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxlin import ops
from jaxlin.config import MixerOptions
from jaxlin.mixers.common import TokenMixer, memory_of, next_state

GATE_LOGIT_NORMALIZER = 16.0

FLA = MixerOptions(
    heads="fla", expand_kv=True, gqa_bug_compat=False, rope="none", conv_size=4, conv_init="random",
    conv_activation="silu", out_norm="rms", out_gate="random", gate_activation="silu", gate_rank=0, decay_rank=16,
    decay_range=(0.0, 0.0),
)  # fmt: skip


class GatedLinearAttention(TokenMixer):
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t,  g_t = logsigmoid(W2 W1 x_t + b) / 16."""

    FLA_HEADS = 4
    PRESETS = {
        "recommended": MixerOptions(
            heads="teacher", expand_kv=False, gqa_bug_compat=False, rope="teacher", conv_size=4, conv_init="identity",
            conv_activation="none", out_norm="calibrated", out_gate="neutral", gate_activation="silu", gate_rank=0,
            decay_rank=16, decay_range=(1.0, 5.0),
        ),
        "paper": FLA,
        "paper_code": FLA,
    }  # fmt: skip

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        q, k, v, tails = self.qkv(x, positions, segment_ids, state)
        low, high = self.options.decay_range
        gate = self.gate_projection(
            x, q.shape[2:], "gk_proj", rank=self.options.decay_rank, random=self.options.out_gate == "random",
            use_bias=True, bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high),
        )  # fmt: skip
        g = nn.log_sigmoid(gate) / GATE_LOGIT_NORMALIZER
        self.record(k=k, g=g)
        o, memory = ops.gated_linear_attention(q, k, v, g, initial_state=memory_of(state), segment_ids=segment_ids)
        return self.output(o, x), next_state(state, memory, tails)
