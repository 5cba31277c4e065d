"""Softmax attention: the teacher's mixer, and an option in hybrids (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array

from jaxlin import sharding
from jaxlin.config import MixerOptions, ModelConfig
from jaxlin.mixers.attention import attend, attend_to_cache, attend_within, causal_mask
from jaxlin.mixers.common import Dense, RMSNorm, State, first_of_segment, rope_frequencies, rotate
from jaxlin.mixers.layer_state import LayerState


class SoftmaxAttention(nn.Module):
    """Causal grouped-query attention; its state is a cache of keys and values with room for max_len tokens."""

    config: ModelConfig
    options: MixerOptions
    packed: bool = False
    """Of no use here."""

    PRESETS = dict.fromkeys(("recommended", "paper", "paper_code"), MixerOptions())

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state: LayerState | None = None):
        c = self.config
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        q, k, v = (
            Dense(c, (n, c.head_dim), ("embed", "heads", "head_dim"), c.attention_bias, name=f"{name}_proj")(x)
            for name, n in zip("qkv", heads, strict=True)
        )
        if c.qk_norm:
            q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
        frequencies = rope_frequencies(c, c.head_dim, "teacher")
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        k, v = sharding.whole_sequences(k), sharding.whole_sequences(v)  # queries stay on the devices of their tokens
        if state is None:
            y = attend_within(q, k, v, segment_ids, c.dtype)
        else:
            y, state = self._with_cache(q, k, v, positions, segment_ids, state)
        self.sow("intermediates", "heads", y)
        out = Dense(c, (c.hidden_size,), ("heads", "head_dim", "embed"), c.attention_out_bias, inputs=2, name="o_proj")(
            y
        )
        return out, state

    def _with_cache(self, q, k, v, positions, segment_ids, state: LayerState):
        """Attend to the cache (as far as it is the same segment) and to this call; then cache its last segment."""
        c, (batch, length) = self.config, q.shape[:2]
        if length == 1 and segment_ids is None:  # what a decoding step does: caches are read where they are
            state = state.write(positions, k=_bits(k), v=_bits(v)).replace(length=positions[:, 0] + 1)
            keys, values = (_floats(state[name], q.dtype) for name in ("k", "v"))
            return attend_to_cache(q, keys, values, state["length"], c.dtype), state

        ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
        number = jnp.cumsum(first_of_segment(ids), axis=1)  # 1 for the segment that continues the cache
        if state.fresh:
            y = attend_within(q, k, v, segment_ids, c.dtype)
        else:
            old = [_floats(state[name], q.dtype) for name in ("k", "v")]
            slots = jnp.arange(old[0].shape[1])
            cached = (slots < state["length"][:, None])[:, None, :] & (number == 1)[:, :, None]
            causal = jnp.broadcast_to(causal_mask(length, ids), (batch, 1, length, length))
            mask = jnp.concatenate([cached[:, None], causal], axis=-1)
            keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(old, (k, v), strict=True))
            y = attend(q, keys, values, mask, c.dtype)
        y = jnp.where((ids != 0)[:, :, None, None], y, 0)

        keep = (ids != 0) & (number == number[:, -1:])
        end = jnp.max(jnp.where(keep, positions + 1, 0), axis=1)
        end = jnp.where(jnp.any(keep, axis=1), end, state["length"])
        places = jnp.where(keep, positions, jnp.iinfo(jnp.int32).max)  # out of range: dropped
        return y, state.write(places, k=_bits(k), v=_bits(v)).replace(length=end)

    @staticmethod
    def init_state(config: ModelConfig, options: MixerOptions, batch: int, max_len: int) -> State:
        """An empty cache, [B, max_len, KV, d] for keys and values; bfloat16 as its bits."""
        shape = (batch, max_len, config.num_key_value_heads, config.head_dim)
        zeros = _bits(jnp.zeros(shape, config.dtype))
        return {"k": zeros, "v": zeros, "length": jnp.zeros(batch, jnp.int32)}


def _bits(x: Array) -> Array:
    """bfloat16 as integers: compilers that cannot scatter it would widen a whole cache to write one entry."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _floats(x: Array, dtype: Any) -> Array:
    """The reverse, where `dtype` is bfloat16."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if dtype == jnp.bfloat16 else x
