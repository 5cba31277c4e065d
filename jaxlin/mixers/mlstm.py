"""xLSTM's matrix memory cell, mLSTM (Beck et al. 2024, arXiv 2405.04517, equations 19 to 27)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from jaxlin import ops
from jaxlin.config import MixerOptions
from jaxlin.mixers.common import TokenMixer, memory_of, next_state

CODE = MixerOptions(
    heads="teacher", expand_kv=False, gqa_bug_compat=False, rope="none", conv_size=0, conv_init="random",
    conv_activation="none", out_norm="layernorm", out_gate="random", gate_activation="sigmoid", gate_rank=0,
    decay_range=(0.0, 0.0), input_bias=-0.6931472, gate_soft_cap=15.0,
)  # fmt: skip


class MLSTM(TokenMixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T;  n_t = f_t n_{t-1} + i_t k_t;  h_t = C_t^T q_t / max(|n_t . q_t|, 1).

    f_t = sigmoid, i_t = exp of their pre-activations, stabilised by m_t (appendix A.2 of the paper).
    """

    PRESETS = {
        "recommended": MixerOptions(
            heads="teacher", expand_kv=False, gqa_bug_compat=False, rope="teacher", conv_size=4, conv_init="identity",
            conv_activation="none", out_norm="calibrated", out_gate="neutral", gate_activation="sigmoid", gate_rank=0,
            decay_range=(3.0, 6.0), input_bias=-2.0, gate_soft_cap=15.0,
        ),
        "paper": CODE,
        "paper_code": CODE,
    }  # fmt: skip

    @classmethod
    def init_memory(cls, config, options, batch, heads, size):
        """(C [B, H, K, V], n [B, H, K], m [B, H])."""
        wide = jnp.promote_types(config.dtype, jnp.float32)
        shapes = (batch, heads, size, size), (batch, heads, size), (batch, heads)
        return tuple(jnp.zeros(shape, wide) for shape in shapes)

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        q, k, v, tails = self.qkv(x, positions, segment_ids, state)
        heads, (low, high) = q.shape[2], self.options.decay_range
        i = self._gate_input(x, heads, "igate_proj", lambda key, shape, dtype: jnp.full(shape, self.options.input_bias))
        f = self._gate_input(x, heads, "fgate_proj", lambda key, shape, dtype: jnp.linspace(low, high, heads))
        self.record(k=k, i=i, f=f)
        h, memory = ops.mlstm(q, k, v, i, f, initial_state=memory_of(state), segment_ids=segment_ids)
        return self.output(h, x), next_state(state, memory, tails)

    def _gate_input(self, x, heads, name, bias_init):
        random = self.options.out_gate == "random"
        gate = self.gate_projection(x, (heads,), name, random=random, use_bias=True, bias_init=bias_init)
        cap = self.options.gate_soft_cap
        return cap * jnp.tanh(gate / cap) if cap else gate
