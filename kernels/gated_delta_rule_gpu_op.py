"""Family B on Hopper: what surrounds the kernels, and their derivative (DeltaNet, Gated DeltaNet)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk, gates_gpu, recurrent_gpu_step, recurrent_step
from jaxlin.kernels import gated_delta_rule_gpu_split as split
from jaxlin.kernels.gated_delta_rule_gpu_bwd import BETA, COLUMNS, ROWS, WRITES, backward
from jaxlin.kernels.gated_delta_rule_gpu_channel_op import delta_rule as delta_rule_by_channel
from jaxlin.kernels.gated_delta_rule_gpu_fwd import forward
from jaxlin.kernels.gated_delta_rule_gpu_intra import intra
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs
from jaxlin.kernels.gated_linear_attention_gpu_op import (
    check,
    fill,
    present_cotangents,
    segment_codes,
    sum_group,
    values_of,
)
from jaxlin.kernels.gated_linear_attention_gpu_split import join, parts_of
from jaxlin.kernels.gates_gpu import Decays, Gates
from jaxlin.kernels.mosaic_gpu_registers import CHUNK


def pallas(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None,
    *,
    scale: float,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, Array]:
    """`gated_delta_rule.chunked` by kernels; initial_state None is zero, and is then not read.

    q, k [B, T, H, K <= 128]; v [B, T, HV, V <= 256], all bfloat16; beta [B, T, HV]; g None | [B, T, HV] |
    [B, T, HV, K]. Raises NotImplementedError for what the kernels do not serve.
    """
    if q.shape[1] == 1:
        return recurrent_step.gated_delta_rule(
            recurrent_gpu_step.step, q, k, v, beta, g, initial_state, segment_ids, scale
        )
    check(scale, q, k, v)
    if g is not None and g.ndim == 4:
        return delta_rule_by_channel(scale, q, k, v, beta, g, initial_state, segment_ids)
    time, key_dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    tile = 64 if key_dim <= 64 else 128  # of values: the backward pass wants whole programs of them
    q, k, v = (fill(x, (0, -time % CHUNK, 0, -x.shape[3] % size)) for x, size in ((q, 64), (k, 64), (v, tile)))
    s0 = None
    if initial_state is not None:
        s0 = fill(initial_state.astype(jnp.float32), (0, 0, -key_dim % 64, -value_dim % tile))
    codes = None if segment_ids is None else segment_codes(segment_ids)
    form = Form(scale, g is not None, codes is not None, beta=True)
    o, s = _delta_rule(form, q, k, v, Gates(g, beta=beta).whole_chunks(), s0, codes)
    return o[:, :time, :, :value_dim], s[:, :, :key_dim, :value_dim]


@chunk.custom_vjp
def _delta_rule(form: Form, q, k, v, gates: Gates, s0, codes):
    vectors, _ = gates_gpu.vectors(form, gates, codes, parts_of(v))
    return _forward(form, Inputs(q, k, v, vectors, codes), s0, save=False)[:2]


def _delta_rule_fwd(form: Form, *primals):
    gate = form.gated and primals[3].decay.perturbed
    q, k, v, gates, s0, codes = values_of(primals)
    vectors, _ = gates_gpu.vectors(form, gates, codes, parts_of(v))
    x = Inputs(q, k, v, vectors, codes)
    o, s, states, t, maps = _forward(form, x, s0, save=True)
    states, t, maps = checkpoint_name((states, t, maps), "chunk_states")
    return (o, s), (x, states, t, maps, s0 is None, gate)


def _delta_rule_bwd(form: Form, residuals, cotangents):
    x, states, t, maps, fresh, gate = residuals
    heads, codes = x.q.shape[2], x.codes
    do, ds = present_cotangents(cotangents, x.v)
    parts = parts_of(x.v)
    if parts > 1:
        x, do = split.cut_inputs(x, parts), split.cut(do, parts, 1)
        ds = split.ends(maps, split.adjoints(form, x, t, do), ds, parts)
    d = backward(form, x, states, t, do, ds, gate)
    if parts > 1:
        d = split.join_gradients(d, parts)
    dq, dk = (sum_group(x, heads) for x in (d.q, d.k))
    decays = Decays(ROWS, COLUMNS, WRITES) if gate else None
    *d_decay, d_beta = gates_gpu.gradients(d.vectors, parts, codes, decays, (BETA,))
    return dq, dk, d.v, Gates(*d_decay, beta=d_beta), None if fresh else d.s, None


def _forward(form: Form, x: Inputs, s0: Array | None, save: bool):
    """`forward`, over parts of the sequence where there are too few sequences; T - I; the maps of parts, or None."""
    parts = parts_of(x.v)
    if parts == 1:
        t = intra(form, x)
        return *forward(form, x, t, s0, save), t, None
    x = split.cut_inputs(x, parts)
    t = intra(form, x)
    maps = split.maps(form, x, t)
    o, s, states = forward(form, x, t, split.starts(maps, s0, parts), save)
    return join(o, parts, 1), s[parts - 1 :: parts], states, t, maps


_delta_rule.defvjp(_delta_rule_fwd, _delta_rule_bwd, symbolic_zeros=True)
