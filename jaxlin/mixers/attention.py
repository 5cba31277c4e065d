"""Softmax attention: flash kernels of others where they serve (cuDNN on GPUs, splash on TPUs), else products of XLA."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxlin import ops, sharding
from jaxlin.mixers.common import precision, repeat_heads

FLASH_TOKENS = 64
"""Queries from which flash attention is worth its launch."""
TPU_BLOCK = 128
"""Splash attention's blocks are multiples of this many tokens."""
QUERY_BLOCK = 128
"""Queries of a device's piece whose scores exist at a time, where sequences are cut over devices."""
CUDNN_QUERY_BLOCK = 1024
"""The same where cuDNN attends, and a mask, not scores, is in memory: one for all heads, with segments one a row."""


def attend_within(
    q: Float[Array, "B T H d"], k: Float[Array, "B T KV d"], v: Float[Array, "B T KV d"],
    segment_ids: Int[Array, "B T"] | None, dtype: str,
) -> Float[Array, "B T H d"]:  # fmt: skip
    """Every token attends to the past of its own segment; padding (id 0) to padding, to stay finite."""
    if _has_splash_attention(q, dtype):
        return _splash(q, k, v, segment_ids)
    if sharding.time_axis(q.shape[1]) is not None:
        return _in_blocks(q, k, v, segment_ids, dtype)
    if segment_ids is None and _has_cudnn_attention(q, k, dtype):  # a mask would be read, T x T
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return attend(q, k, v, causal_mask(q.shape[1], segment_ids), dtype)


def causal_mask(length: int, segment_ids: Int[Array, "B T"] | None) -> Bool[Array, "b 1 T T"]:
    """Who may see whom, [B or 1, 1, T, T]: the past of one's own segment; padding sees itself, to stay finite."""
    t = jnp.arange(length)
    return _visible(t, t, segment_ids, segment_ids)


def _visible(t, s, ids_t, ids_s):
    """Whether queries at `t` [T], of segments `ids_t` [B, T], see keys at `s` [S]: [B or 1, 1, T, S]."""
    causal = (t[:, None] >= s)[None]
    if ids_t is not None:
        causal = causal & (ids_t[:, :, None] == ids_s[:, None, :])
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
    that are cut over devices: `_in_blocks` gives it pieces.
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
    """Whether jax's splash attention takes these: on TPUs, in bfloat16, sequences or their pieces of whole blocks."""
    piece = q.shape[1] // sharding.pieces(q.shape[1])
    on_tpu = "tpu" in (ops.platform(), ops.interpreted())
    return on_tpu and dtype == "bfloat16" and piece % TPU_BLOCK == 0


def _splash(q, k, v, segment_ids):
    """jax.experimental.pallas.ops.tpu.splash_attention, each device with its rows, heads and queries.

    The kernel's mask is an argument, cut like the queries, so that each piece walks over the blocks that it sees.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, d = q.shape[1], q.shape[-1]
    shards = sharding.pieces(length)
    block = next(size for size in (512, 256, 128) if length // shards % size == 0)
    sizes = splash.BlockSizes(**dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
         "block_kv_dq"), block,
    ))  # fmt: skip
    one_for_all_heads = masks.MultiHeadMask([masks.CausalMask((length, length))])
    kernel = splash.make_splash_mha(
        one_for_all_heads, block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=ops.interpreted() == "tpu"
    )

    def local(kernel, q, k, v, ids_q, ids_k):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * jnp.asarray(d**-0.5, q.dtype), k, v))
        ids = None if ids_q is None else splash.SegmentIds(ids_q, ids_k)
        y: Any = jax.vmap(kernel)(q, k, v, ids)
        return jnp.swapaxes(y, 1, 2)

    mesh, cut = sharding.kernel_mesh(), PartitionSpec(None, sharding.time_axis(length))
    spec = None if mesh is None else kernel.manual_sharding_spec(NamedSharding(mesh, cut))
    return _by_device(local, kernel, spec, q, k, v, segment_ids)


def _in_blocks(q, k, v, segment_ids, dtype: str):
    """`attend_within` where sequences are cut over devices: block after block of queries, the scores of one at a time.

    Each query sees all of its keys at once, so that, unlike with blocks of keys (Rabe & Staats 2021, arXiv 2112.05682),
    nothing has to be merged: what attends to a block is `attend`. The backward pass recomputes a block's scores. Keys
    after a block are masked, not skipped: the device with the last piece, for which others wait, has next to none.
    cuDNN could do without a mask in two calls, over the pieces before and a query's own, but jax rounds the
    log-sum-exps that would merge them to bfloat16 and drops their gradients.
    """

    def local(t, q, k, v, ids_q, ids_k):
        batch, length, *_ = q.shape
        flash = _has_cudnn_attention(q[:, :CUDNN_QUERY_BLOCK], k, dtype)
        block = min(CUDNN_QUERY_BLOCK if flash else QUERY_BLOCK, length)
        s = jnp.arange(k.shape[1])
        wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (k, v)]  # blocks' gradients add up in it

        def blocks(x):  # [B, L, ...] -> [L / block, B, block, ...], the last one filled up
            x = jnp.pad(x, ((0, 0), (0, -length % block), *((0, 0),) * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

        @partial(jax.checkpoint, prevent_cse=False)
        def attend_block(of_block):
            t, q, ids_q = of_block
            keys, values = (a.astype(k.dtype) for a in wide)
            return attend(q, keys, values, _visible(t[0], s, ids_q, ids_k), dtype)

        y = lax.map(attend_block, jax.tree.map(blocks, (t[None], q, ids_q)))
        return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *y.shape[3:])[:, :length]

    length = q.shape[1]
    return _by_device(local, jnp.arange(length), PartitionSpec(sharding.time_axis(length)), q, k, v, segment_ids)


def _by_device(local, own, spec, q, k, v, segment_ids):
    """local(own, q, k, v, ids of q, ids of k) -> y, on each device of its rows, heads and queries, and all their keys.

    `spec` says how `own`, what differs between pieces, is cut.
    """
    layout = sharding.layout(*q.shape[:3])
    if layout is None:
        return local(own, q, k, v, segment_ids, segment_ids)
    if sharding.layout(*k.shape[:3]) != layout:  # too few key heads for the mesh
        k, v = (repeat_heads(a, q.shape[2]) for a in (k, v))
    whole = layout._replace(time=None)
    queries, keys = (cut.by_token(layout.heads) for cut in (layout, whole))
    ids_q, ids_k = (None if segment_ids is None else cut.by_token() for cut in (layout, whole))
    in_specs = (spec, queries, keys, keys, ids_q, ids_k)
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)
    return mapped(own, q, k, v, segment_ids, segment_ids)
