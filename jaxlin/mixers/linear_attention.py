"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) with learned feature maps."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from jaxlin import ops
from jaxlin.config import MixerOptions
from jaxlin.mixers.common import Dense, ResolvedOptions, TokenMixer, memory_of, next_state, partitioned, precision

CODE = MixerOptions(
    heads="fla", expand_kv=True, gqa_bug_compat=False, rope="none", conv_size=4, conv_init="random",
    conv_activation="silu", feature_map="hadamard", feature_dim=0, normalize=False, out_norm="none", out_gate="none",
    gate_activation="silu", gate_rank=0,
)  # fmt: skip


class LinearAttention(TokenMixer):
    """S_t = S_{t-1} + f(k_t) v_t^T;  o_t = S_t^T f(q_t), divided by f(q_t) . sum f(k) with `normalize`."""

    PRESETS = {
        "recommended": MixerOptions(
            heads="teacher", expand_kv=False, gqa_bug_compat=False, rope="teacher", conv_size=4, conv_init="identity",
            conv_activation="none", feature_map="hedgehog", feature_dim=0, normalize=True, out_norm="none",
            out_gate="neutral", gate_activation="silu", gate_rank=0,
        ),
        "paper": CODE,
        "paper_code": CODE,
    }  # fmt: skip

    @classmethod
    def init_memory(cls, config, options, batch, heads, size):
        """S [B, H, K, V], and the normaliser z [B, H, K] with `normalize`."""
        wide = jnp.promote_types(config.dtype, jnp.float32)
        features = 2 * half_features(options, size) if options.feature_map == "hedgehog" else size
        memory = jnp.zeros((batch, heads, features, size), wide)
        return (memory, jnp.zeros((batch, heads, features), wide)) if options.normalize else memory

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        q, k, v, tails = self.qkv(x, positions, segment_ids, state)
        q, k = self._features(q, "q_feature_map"), self._features(k, "k_feature_map")
        self.record(k=k)
        # Hedgehog's features are probabilities whose products need no scale; it would cancel in the quotient anyway.
        scale = 1.0 if self.options.normalize else None
        o, memory = ops.gated_linear_attention(
            q, k, v, scale=scale, normalize=self.options.normalize,
            initial_state=memory_of(state), segment_ids=segment_ids,
        )  # fmt: skip
        return self.output(o, x), next_state(state, memory, tails)

    def _features(self, x, name):
        kind = self.options.feature_map
        if kind == "hedgehog":
            return hedgehog(self, x, name)
        if kind == "hadamard":  # (W1 x + b1) * (W2 x + b2), one map a layer, shared by its heads
            size = x.shape[-1]
            a, b = (Dense(self.config, (size,), ("head_dim", None), True, name=f"{name}_{i}")(x) for i in (1, 2))
            return a * b
        return {"elu": lambda y: nn.elu(y) + 1, "relu": nn.relu, "identity": lambda y: y}[kind](x)


def half_features(options: ResolvedOptions, size: int) -> int:
    """Hedgehog features of one sign: half the head size keeps the state as large as the other mixers'."""
    return options.feature_dim or size // 2


def hedgehog(mixer: TokenMixer, x, name: str):
    """[softmax(W x), softmax(-W x)], W one matrix a head (Zhang et al. 2024, arXiv 2402.04347), softmax in float32."""
    heads, size = x.shape[2:]

    def identity(key, shape, dtype=jnp.float32):
        return jnp.broadcast_to(jnp.eye(*shape[1:], dtype=dtype), shape)

    shape = (heads, size, half_features(mixer.options, size))
    kernel = mixer.param(name, partitioned(identity, ("heads", "head_dim", None)), shape)
    y = jnp.einsum("bthd,hdf->bthf", x, kernel.astype(x.dtype), precision=precision(mixer.config.dtype))
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    return jnp.concatenate([nn.softmax(y), nn.softmax(-y)], axis=-1).astype(x.dtype)
