"""Family A on Hopper with a gate per channel (GLA): what surrounds the kernels, and their derivative."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk
from jaxlin.kernels import gated_linear_attention_gpu_channel_split as split
from jaxlin.kernels.gated_linear_attention_gpu_channel_bwd import backward
from jaxlin.kernels.gated_linear_attention_gpu_channel_intra import intra
from jaxlin.kernels.gated_linear_attention_gpu_channel_walk import walk
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs
from jaxlin.kernels.gated_linear_attention_gpu_op import (
    fill,
    present_cotangents,
    segment_codes,
    sum_group,
    values_of,
)
from jaxlin.kernels.gated_linear_attention_gpu_split import cut, join, parts_of
from jaxlin.kernels.mosaic_gpu_registers import CHUNK


def attend(
    scale: float, q: Array, k: Array, v: Array, g: Array, s0: Array | None, segment_ids: Array | None
) -> tuple[Array, Array]:
    """(o [B, T, HV, V], final S [B, HV, K, V]) for any T, K <= 128 and V <= 256; g [B, T, HV, K]."""
    time, key_dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    q, k, v, g = (fill(x, (0, -time % CHUNK, 0, -x.shape[3] % 64)) for x in (q, k, v, g.astype(jnp.float32)))
    s0 = None if s0 is None else fill(s0.astype(jnp.float32), (0, 0, -key_dim % 64, -value_dim % 64))
    codes = None if segment_ids is None else segment_codes(segment_ids)
    form = Form(scale, gated=False, segments=codes is not None)
    o, s = _attend(form, q, k, v, g, s0, codes)
    return o[:, :time, :, :value_dim], s[:, :, :key_dim, :value_dim]


@chunk.custom_vjp
def _attend(form: Form, q, k, v, g, s0, codes):
    return _forward(form, Inputs(q, k, v, None, codes), g, s0, save=False)[:2]


def _attend_fwd(form: Form, *primals):
    q, k, v, g, s0, codes = values_of(primals)
    o, s, saved = _forward(form, Inputs(q, k, v, None, codes), g, s0, save=True)
    return (o, s), (q, k, v, g, codes, checkpoint_name(saved, "chunk_states"), s0 is None)


def _attend_bwd(form: Form, residuals, cotangents):
    q, k, v, g, codes, (chunks, states), fresh = residuals
    do, ds = present_cotangents(cotangents, v)
    x, gates, parts = Inputs(q, k, v, None, codes), g, parts_of(v)
    if parts > 1:
        x, gates = split.cut_inputs(x, g, parts)
        do = cut(do, parts, 1)
        _, first, _ = walk(chunks.q, do, chunks.keep, x.codes, None, reverse=True)
        ds = split.at_parts(chunks.keep, first, ds, parts, reverse=True)
    dv, ds, d_states = walk(
        chunks.q, do, chunks.keep, x.codes, ds, reading=chunks.k, p=chunks.p, reverse=True, save=True
    )
    dq, dk, dg = backward(form, x, gates, states, d_states, do)
    if parts > 1:
        dq, dk, dv, dg = (join(y, parts, 1) for y in (dq, dk, dv, dg))
    dq, dk = (sum_group(y, q.shape[2]) for y in (dq, dk))
    return dq, dk, dv, dg, None if fresh else ds[::parts], None


def _forward(form: Form, x: Inputs, g: Array, s0: Array | None, save: bool):
    """(o, final S, (chunks, their states)), over parts where there are too few sequences; the last stay in parts."""
    parts = parts_of(x.v)
    if parts > 1:
        x, g = split.cut_inputs(x, g, parts)
    chunks = intra(form, x, g)
    if parts > 1:
        _, first, _ = walk(chunks.k, x.v, chunks.keep, x.codes, None)
        s0 = split.at_parts(chunks.keep, first, s0, parts)
    o, s, states = walk(chunks.k, x.v, chunks.keep, x.codes, s0, reading=chunks.q, p=chunks.p, save=save)
    return join(o, parts, 1), s[parts - 1 :: parts], (chunks, states)


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
