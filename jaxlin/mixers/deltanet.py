"""DeltaNet (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484)."""

from __future__ import annotations

from dataclasses import replace

from flax import linen as nn

from jaxlin import ops
from jaxlin.mixers.common import TokenMixer, memory_of, next_state
from jaxlin.mixers.gated_deltanet import FLA, GatedDeltaNet, beta, unit_keys


class DeltaNet(TokenMixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;  o_t = S_t^T q_t."""

    FLA_HEADS = 16
    PRESETS = {
        "recommended": replace(GatedDeltaNet.PRESETS["recommended"], decay_range=None),
        "paper": replace(FLA, out_gate="none", decay_range=None),
        "paper_code": replace(FLA, out_gate="none", decay_range=None),
    }

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        q, k, v, tails = self.qkv(x, positions, segment_ids, state)
        q, k = unit_keys(self, q, "q"), unit_keys(self, k, "k")
        strength = beta(self, x, q.shape[2])
        self.record(k=k, beta=strength)
        o, memory = ops.gated_delta_rule(q, k, v, strength, initial_state=memory_of(state), segment_ids=segment_ids)
        return self.output(o, x), next_state(state, memory, tails)
