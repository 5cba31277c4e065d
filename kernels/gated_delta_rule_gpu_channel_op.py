"""Family B on Hopper with a gate per channel (KDA): what surrounds the kernels, and their derivative."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk, gates_gpu
from jaxlin.kernels import gated_linear_attention_gpu_channel_split as split
from jaxlin.kernels.gated_delta_rule_gpu_channel_bwd import backward
from jaxlin.kernels.gated_delta_rule_gpu_channel_intra import intra
from jaxlin.kernels.gated_delta_rule_gpu_channel_walk import adjoint, forward
from jaxlin.kernels.gated_delta_rule_gpu_split import ends, starts
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs
from jaxlin.kernels.gated_linear_attention_gpu_op import (
    fill,
    present_cotangents,
    segment_codes,
    sum_group,
    values_of,
)
from jaxlin.kernels.gated_linear_attention_gpu_split import cut, join, parts_of
from jaxlin.kernels.gates_gpu import Gates
from jaxlin.kernels.mosaic_gpu_registers import CHUNK


def delta_rule(
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array,
    s0: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    """(o [B, T, HV, V], final S [B, HV, K, V]) for any T, K <= 128 and V <= 256; beta [B, T, HV], g [B, T, HV, K]."""
    time, key_dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    q, k, v, g = (fill(x, (0, -time % CHUNK, 0, -x.shape[3] % 64)) for x in (q, k, v, g.astype(jnp.float32)))
    s0 = None if s0 is None else fill(s0.astype(jnp.float32), (0, 0, -key_dim % 64, -value_dim % 64))
    codes = None if segment_ids is None else segment_codes(segment_ids)
    form = Form(scale, gated=False, segments=codes is not None, beta=True)
    o, s = _delta_rule(form, q, k, v, Gates(beta=beta).whole_chunks(), g, s0, codes)
    return o[:, :time, :, :value_dim], s[:, :, :key_dim, :value_dim]


@chunk.custom_vjp
def _delta_rule(form: Form, q, k, v, gates: Gates, g, s0, codes):
    vectors, _ = gates_gpu.vectors(form, gates, codes, parts_of(v))
    return _forward(form, Inputs(q, k, v, vectors, codes), g, s0, save=False)[:2]


def _delta_rule_fwd(form: Form, *primals):
    q, k, v, gates, g, s0, codes = values_of(primals)
    vectors, _ = gates_gpu.vectors(form, gates, codes, parts_of(v))
    x = Inputs(q, k, v, vectors, codes)
    o, s, saved = _forward(form, x, g, s0, save=True)
    return (o, s), (x, g, checkpoint_name(saved, "chunk_states"), s0 is None)


def _delta_rule_bwd(form: Form, residuals, cotangents):
    x, g, (chunks, states, r, maps), fresh = residuals
    heads, codes, parts = x.q.shape[2], x.codes, parts_of(x.v)
    do, ds = present_cotangents(cotangents, x.v)
    if parts > 1:
        x, g = split.cut_inputs(x, g, parts)
        do = cut(do, parts, 1)
        ds = ends(maps, adjoint(chunks, do, x.vectors, x.codes, None)[0], ds, parts)
    ds, (dv, y, d_states) = adjoint(chunks, do, x.vectors, x.codes, ds, save=True)
    dq, dk, dg, d_beta = backward(form, x, g, states, r, d_states, y, do)
    if parts > 1:
        dq, dk, dv, dg = (join(z, parts, 1) for z in (dq, dk, dv, dg))
    dq, dk = (sum_group(z, heads) for z in (dq, dk))
    d_gates = Gates(beta=gates_gpu.gradients(d_beta[None], parts, codes, None, (0,))[0])
    return dq, dk, dv, d_gates, dg, None if fresh else ds[::parts], None


def _forward(form: Form, x: Inputs, g: Array, s0: Array | None, save: bool):
    """(o, final S, (chunks, their states, R, maps of parts or None)), over parts where there are too few sequences."""
    parts, maps = parts_of(x.v), None
    if parts > 1:
        x, g = split.cut_inputs(x, g, parts)
    chunks = intra(form, x, g)
    if parts > 1:
        # N from a zero state, and behind it M from the identity with v = 0
        key_dim, value_dim = x.q.shape[3], x.v.shape[3]
        zero_and_one = jnp.eye(key_dim, value_dim + key_dim, value_dim)
        both = jnp.broadcast_to(zero_and_one, (x.v.shape[0], x.v.shape[2], *zero_and_one.shape))
        _, maps, _ = forward(chunks, x.v, x.vectors, x.codes, both, read=False)
        s0 = starts(maps, s0, parts)
    o, s, saved = forward(chunks, x.v, x.vectors, x.codes, s0, save=save)
    return join(o, parts, 1), s[parts - 1 :: parts], (chunks, *saved, maps) if save else None


_delta_rule.defvjp(_delta_rule_fwd, _delta_rule_bwd, symbolic_zeros=True)
