"""Softmax attention: the teacher's mixer, and an option in hybrids (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxlin import ops, sharding
from jaxlin.config import MixerOptions, ModelConfig
from jaxlin.mixers.common import Dense, State, first_of_segment, precision, repeat_heads, rope_frequencies, rotate

FLASH_TOKENS = 64
"""Queries from which flash attention is worth its launch."""


class SoftmaxAttention(nn.Module):
    """Causal grouped-query attention; its state is a cache of keys and values with room for max_len tokens."""

    config: ModelConfig
    options: MixerOptions
    packed: bool = False
    """Of no use here."""

    PRESETS = dict.fromkeys(("recommended", "paper", "paper_code"), MixerOptions())

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state: State | None = None):
        c = self.config
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        q, k, v = (
            Dense(c, (n, c.head_dim), ("embed", "heads", "head_dim"), c.attention_bias, name=f"{name}_proj")(x)
            for name, n in zip("qkv", heads, strict=True)
        )
        frequencies = rope_frequencies(c, c.head_dim, "teacher")
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        k, v = sharding.whole_sequences(k), sharding.whole_sequences(v)  # queries stay on the devices of their tokens
        if state is None:
            y = attend(q, k, v, _causal(x.shape[1], segment_ids), c.dtype)
        else:
            y, state = self._with_cache(q, k, v, positions, segment_ids, state)
        self.sow("intermediates", "heads", y)
        out = Dense(c, (c.hidden_size,), ("heads", "head_dim", "embed"), c.attention_bias, inputs=2, name="o_proj")(y)
        return out, state

    def _with_cache(self, q, k, v, positions, segment_ids, state):
        """Attend to the cache (as far as it is the same segment) and to this call; then cache its last segment."""
        batch, length = q.shape[:2]
        ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
        number = jnp.cumsum(first_of_segment(ids), axis=1)  # 1 for the segment that continues the cache
        slots = jnp.arange(state["k"].shape[1])
        cached = (slots < state["length"][:, None])[:, None, :] & (number == 1)[:, :, None]
        causal = _causal(length, ids)
        mask = jnp.concatenate([cached[:, None], jnp.broadcast_to(causal, (batch, 1, length, length))], axis=-1)
        keys, values = (jnp.concatenate([state[n].astype(a.dtype), a], axis=1) for n, a in (("k", k), ("v", v)))
        y = attend(q, keys, values, mask, self.config.dtype)
        y = jnp.where((ids != 0)[:, :, None, None], y, 0)

        keep = (ids != 0) & (number == number[:, -1:])
        rows = jnp.arange(batch)[:, None]
        target = jnp.where(keep, positions, slots.size)  # out of range: dropped
        new = {n: state[n].at[rows, target].set(a.astype(state[n].dtype), mode="drop") for n, a in (("k", k), ("v", v))}
        end = jnp.max(jnp.where(keep, positions + 1, 0), axis=1)
        return y, {**new, "length": jnp.where(jnp.any(keep, axis=1), end, state["length"])}

    @staticmethod
    def init_state(config: ModelConfig, options: MixerOptions, batch: int, max_len: int) -> State:
        """An empty cache, [B, max_len, KV, d] for keys and values."""
        shape = (batch, max_len, config.num_key_value_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.dtype)
        return {"k": zeros, "v": zeros, "length": jnp.zeros(batch, jnp.int32)}


def _causal(length: int, segment_ids):
    """Who may see whom, [B or 1, 1, T, T]: the past of one's own segment; padding sees itself, to stay finite."""
    t = jnp.arange(length)
    causal = (t[:, None] >= t)[None]
    if segment_ids is not None:
        causal = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return causal[:, None]


def _has_flash_attention(q, k, dtype: str) -> bool:
    """Whether cuDNN's flash attention (Dao et al. 2022, arXiv 2205.14135) takes these, as GPUs since Ampere have it.

    Its backward pass wants even lengths where there is a mask; for a token or few it is no faster. It refuses sequences
    that are cut over devices.
    """
    length, major = q.shape[1], ops.compute_capability().split(".")[0]
    return (
        dtype == "bfloat16"
        and ops.platform() == "gpu"
        and (major.isdigit() and int(major) >= 8)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and length >= FLASH_TOKENS
        and length % 2 == k.shape[1] % 2 == 0
        and sharding.time_axis(length) is None
    )


def attend(q, k, v, mask, dtype: str):
    """softmax(q k^T / sqrt(d)) v, scores and softmax in float32. q [B, T, H, d], k and v [B, S, KV, d].

    `mask` [B or 1, 1, T, S] says who may see whom. Where S is T it hides the future: cuDNN skips that.
    """
    if _has_flash_attention(q, k, dtype):
        causal = q.shape[1] == k.shape[1]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
    if dtype == "bfloat16" and ops.platform() == "gpu":
        k, v = (repeat_heads(a, q.shape[2]) for a in (k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, length, heads, d = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], d)
    scores = jnp.einsum(
        "btkgd,bskd->bkgts", grouped, k, precision=precision(dtype), preferred_element_type=wide
    ) * jnp.asarray(d**-0.5, wide)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=precision(dtype))
    return lax.reshape(y, (batch, length, heads, d))
