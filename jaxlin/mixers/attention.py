"""Softmax attention: flash kernels of others where they serve (cuDNN on GPUs, splash on TPUs), else products of XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlin import ops, sharding
from jaxlin.mixers.common import precision, repeat_heads

FLASH_TOKENS = 64
"""Queries from which flash attention is worth its launch."""
TPU_BLOCK = 128
"""Splash attention's blocks are multiples of this many tokens."""


def attend_within(
    q: Float[Array, "B T H d"], k: Float[Array, "B T KV d"], v: Float[Array, "B T KV d"],
    segment_ids: Int[Array, "B T"] | None, dtype: str,
) -> Float[Array, "B T H d"]:  # fmt: skip
    """Every token attends to the past of its own segment; padding (id 0) to padding, to stay finite."""
    if _has_splash_attention(q, dtype):
        return _splash(q, k, v, segment_ids)
    if segment_ids is None and _has_cudnn_attention(q, k, dtype):  # a mask would be read, T x T
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return attend(q, k, v, causal_mask(q.shape[1], segment_ids), dtype)


def causal_mask(length: int, segment_ids: Int[Array, "B T"] | None) -> Bool[Array, "b 1 T T"]:
    """Who may see whom, [B or 1, 1, T, T]: the past of one's own segment; padding sees itself, to stay finite."""
    t = jnp.arange(length)
    causal = (t[:, None] >= t)[None]
    if segment_ids is not None:
        causal = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return causal[:, None]


def attend(
    q: Float[Array, "B T H d"], k: Float[Array, "B S KV d"], v: Float[Array, "B S KV d"],
    mask: Bool[Array, "b 1 T S"], dtype: str,
) -> Float[Array, "B T H d"]:  # fmt: skip
    """softmax(q k^T / sqrt(d)) v, scores and softmax in float32.

    `mask` [B or 1, 1, T, S] says who may see whom. Where S is T it hides the future: cuDNN skips that.
    """
    if _has_cudnn_attention(q, k, dtype):
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


def attend_to_cache(
    q: Float[Array, "B 1 H d"], k: Float[Array, "B S KV d"], v: Float[Array, "B S KV d"], length: Int[Array, " B"],
    dtype: str,
) -> Float[Array, "B 1 H d"]:  # fmt: skip
    """One query a row to the first `length` entries of its cache; scores, softmax and sums in float32.

    On accelerators products and sums of vectors, not of matrices: a query is too little for those, which want another
    layout, and a copy of the cache with it. So the cache is read once, in its own dtype, at the speed of memory. CPUs
    would write the products down.
    """
    valid = jnp.arange(k.shape[1]) < length[:, None]
    if ops.platform() == "cpu":
        return attend(q, k, v, valid[:, None, None], dtype)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, _, heads, d = q.shape
    grouped = q.reshape(batch, 1, k.shape[2], heads // k.shape[2], d).astype(wide) * jnp.asarray(d**-0.5, wide)
    scores = jnp.sum(grouped * k[:, :, :, None].astype(wide), axis=-1)  # [B, S, KV, H / KV]
    scores = jnp.where(valid[:, :, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=1)
    y = jnp.sum(weights[..., None] * v[:, :, :, None].astype(wide), axis=1)
    return y.reshape(q.shape).astype(v.dtype)


def _has_cudnn_attention(q, k, dtype: str) -> bool:
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


def _has_splash_attention(q, dtype: str) -> bool:
    """Whether jax's splash attention takes these: on TPUs, whole sequences of whole blocks, in bfloat16."""
    length = q.shape[1]
    on_tpu = "tpu" in (ops.platform(), ops.interpreted())
    return on_tpu and dtype == "bfloat16" and length % TPU_BLOCK == 0 and sharding.time_axis(length) is None


def _splash(q, k, v, segment_ids):
    """jax.experimental.pallas.ops.tpu.splash_attention, each device with its rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, length, heads, d = q.shape
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = splash.BlockSizes(**dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
         "block_kv_dq"), block,
    ))  # fmt: skip

    def local(q, k, v, segment_ids):
        heads = q.shape[2]
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
        kernel = splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=ops.interpreted() == "tpu"
        )
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * jnp.asarray(d**-0.5, q.dtype), k, v))
        ids = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
        y: Any = jax.vmap(kernel)(q, k, v, ids)
        return jnp.swapaxes(y, 1, 2)

    layout = sharding.layout(batch, length, heads)
    if layout is None:
        return local(q, k, v, segment_ids)
    if sharding.layout(batch, length, k.shape[2]) != layout:  # too few key heads for the mesh
        k, v = (repeat_heads(a, heads) for a in (k, v))
    tokens = layout.by_token(layout.heads)
    ids = None if segment_ids is None else layout.by_token()
    mapped = jax.shard_map(local, in_specs=(tokens, tokens, tokens, ids), out_specs=tokens, check_vma=False)
    return mapped(q, k, v, segment_ids)
