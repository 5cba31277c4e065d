"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2025, arXiv 2412.06464)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlin import ops
from jaxlin.config import MixerOptions
from jaxlin.mixers.common import RMSNorm, TokenMixer, l2_normalize, memory_of, next_state, partitioned

FLA = MixerOptions(
    heads="fla", expand_kv=True, gqa_bug_compat=False, rope="none", conv_size=4, conv_init="random",
    conv_activation="silu", qk_rmsnorm=False, out_norm="rms", out_gate="random", gate_activation="silu", gate_rank=0,
    decay_range=(0.0, 16.0), allow_neg_eigval=False,
)  # fmt: skip


class GatedDeltaNet(TokenMixer):
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;  o_t = S_t^T q_t,  g_t one scalar a head."""

    PRESETS = {
        "recommended": MixerOptions(
            heads="teacher", expand_kv=False, gqa_bug_compat=False, rope="teacher", conv_size=4, conv_init="identity",
            conv_activation="none", qk_rmsnorm=False, out_norm="calibrated", out_gate="neutral",
            gate_activation="silu", gate_rank=0, decay_range=(1.0, 4.0), allow_neg_eigval=False,
        ),
        "paper": FLA,
        "paper_code": FLA,
    }  # fmt: skip

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        q, k, v, tails = self.qkv(x, positions, segment_ids, state)
        q, k = unit_keys(self, q, "q"), unit_keys(self, k, "k")
        strength, g = beta(self, x, q.shape[2]), scalar_decay(self, x, q.shape[2])
        self.record(k=k, beta=strength, g=g)
        o, memory = ops.gated_delta_rule(q, k, v, strength, g, initial_state=memory_of(state), segment_ids=segment_ids)
        return self.output(o, x), next_state(state, memory, tails)


def unit_keys(mixer: TokenMixer, x, name: str):
    """x with unit L2 norm per head, RMS-normalised with a learned weight before where asked for."""
    if mixer.options.qk_rmsnorm:
        x = RMSNorm(mixer.config, x.shape[-1:], ("head_dim",), name=f"{name}_rmsnorm")(x)
    return l2_normalize(x)


def beta(mixer: TokenMixer, x, heads: int):
    """The write strength in (0, 1), [B, T, H]; up to 2 with allow_neg_eigval (Grazzi et al. 2024, arXiv 2411.12537)."""
    strength = nn.sigmoid(mixer.gate_projection(x, (heads,), "b_proj", random=is_random(mixer)))
    return 2 * strength if mixer.options.allow_neg_eigval else strength


def scalar_decay(mixer: TokenMixer, x, heads: int):
    """g = -A softplus(a_proj x + dt_bias), [B, T, H]: the log decay (arXiv 2412.06464, section 3; from Mamba 2)."""
    a_log, dt_bias = decay_parameters(mixer, (heads,), (heads,))
    step = mixer.gate_projection(x, (heads,), "a_proj", random=is_random(mixer))
    return -jnp.exp(a_log) * nn.softplus(step + dt_bias)


def decay_parameters(mixer: TokenMixer, a_shape: tuple[int, ...], dt_shape: tuple[int, ...]):
    """A_log with A uniform in decay_range, and dt_bias with softplus(dt_bias) log-uniform in [0.001, 0.1]."""
    low, high = mixer.options.decay_range

    def a_log(key, shape, dtype=jnp.float32):
        return jnp.log(jnp.maximum(jax.random.uniform(key, shape, dtype, low, high), 1e-4))

    def dt_bias(key, shape, dtype=jnp.float32):
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1)))
        return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus

    axes = ("heads", "head_dim")
    return (
        mixer.param("A_log", partitioned(a_log, axes[: len(a_shape)]), a_shape),
        mixer.param("dt_bias", partitioned(dt_bias, axes[: len(dt_shape)]), dt_shape),
    )


def is_random(mixer: TokenMixer) -> bool:
    """Presets that start new parameters at random start the gates so too; otherwise gates start at their bias."""
    return mixer.options.out_gate in ("random", "added") or mixer.options.conv_init == "random"
