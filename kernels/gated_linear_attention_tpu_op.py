"""Family A on the TPU: the differentiable call around the forward and the backward kernel."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk, recurrent_step
from jaxlin.kernels import tile_tpu_layout as tiles
from jaxlin.kernels.gated_linear_attention_tpu_bwd import backward
from jaxlin.kernels.gated_linear_attention_tpu_fwd import Inputs, Options, forward
from jaxlin.kernels.recurrent_tpu_step import step
from jaxlin.kernels.tile_tpu_layout import Layout


def pallas(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    *,
    scale: float,
    normalize: bool = False,
    initial_state: Any,
    segment_ids: Array | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Any]:
    """`gated_linear_attention.chunked` as TPU kernels: same arguments, same results.

    The chunk is what fills a tile of 128 rows, so `chunk_size` changes nothing.
    """
    del chunk_size
    if q.shape[1] == 1:
        return recurrent_step.gated_linear_attention(step, q, k, v, g, normalize, initial_state, segment_ids, scale)
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, v.shape[:3])
    s, z = initial_state if normalize else (initial_state, None)
    o, s, z, _ = attend(
        q, k, v, g, None, None, s, z, segment_ids, scale=scale, denominator="sum" if normalize else None
    )
    return o, (s, z) if normalize else s


def attend(
    q: Array, k: Array, v: Array, g: Array | None, w: Array | None, m: Array | None, s: Array, z: Array | None,
    segment_ids: Array | None, *, scale: float, denominator: Literal["sum", "max"] | None,
) -> tuple[Array, Array, Any, Any]:  # fmt: skip
    """(o, final s, final z, final m), differentiable in all but m; see `gated_linear_attention_tpu_fwd`.

    q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV] or [B, T, HV, K]; w [B, T, HV]; m [B, HV]; s [B, HV, K, V];
    z [B, HV, K]. With m (the mLSTM), g is log f and w is i. Padding may hold anything.
    """
    batch, time, heads, value = v.shape
    key = q.shape[-1]
    layout = tiles.make_layout(batch, time, heads, key, value, tiles.operand_dtype(q, k, v))
    inputs = Inputs(
        **tiles.token_arrays(layout, q, k, v), **tiles.gate_arrays(layout, segment_ids, g),
        w=None if w is None else tiles.to_rows(layout, *chunk.mask_padding(segment_ids, w)),
        m=None if m is None else tiles.to_packs(layout, jnp.broadcast_to(m[..., None], (*m.shape, layout.chunk))),
        segments=tiles.segment_rows(layout, segment_ids),
    )  # fmt: skip
    z = None if z is None else tiles.to_packs(layout, tiles.pad_last(z, layout.key))
    options = Options(scale, denominator, q.shape[2])
    o, s, z, m = _attend((layout, options), inputs, tiles.pad_state(layout, s), z)
    o = o.reshape(batch, time, heads, layout.value)[..., :value].astype(v.dtype)
    z = None if z is None else tiles.from_packs(layout, z)[..., :key]
    m = None if m is None else tiles.from_packs(layout, m)[..., 0]
    return o, s[..., :key, :value], z, m


@chunk.custom_vjp
def _attend(static: tuple[Layout, Options], x: Inputs, s: Array, z: Array | None):
    layout, options = static
    out = forward(layout, options, tiles.per_value_head(layout, options.heads, x), s, z, save=False)
    return out["o"], out["s"], out.get("z"), out.get("m_end")


def _forward(static, x, s, z):
    layout, options = static
    out = forward(layout, options, tiles.per_value_head(layout, options.heads, x), s, z, save=True)
    kept = ("states", "normalizers", "before")
    received = {n: checkpoint_name(out[n], "chunk_states") for n in kept if n in out}
    return (out["o"], out["s"], out.get("z"), out.get("m_end")), (x, received)


def _backward(static, residuals, cotangents):
    layout, options = static
    x, received = residuals
    do, ds, dz, _ = cotangents
    out = backward(layout, options, tiles.per_value_head(layout, options.heads, x), received, do, ds, dz)
    dq, dk = (tiles.sum_value_heads(layout, options.heads, out[n]).astype(layout.dtype) for n in ("dq", "dk"))
    dm, dsegments = jax.tree.map(jnp.zeros_like, (x.m, x.segments))
    dx = Inputs(dq, dk, out["dv"], out.get("dg"), out.get("dg_channel"), out.get("dw"), dm, dsegments)
    return dx, out["ds"], out.get("dz")


_attend.defvjp(_forward, _backward)
