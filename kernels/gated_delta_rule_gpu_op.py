"""Family B on Hopper: what surrounds the kernels, and their derivative (DeltaNet, Gated DeltaNet)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk, recurrent_gpu_step, recurrent_step
from jaxlin.kernels import gated_delta_rule_gpu_split as split
from jaxlin.kernels.gated_delta_rule_gpu_bwd import BETA, COLUMNS, ROWS, WRITES, backward
from jaxlin.kernels.gated_delta_rule_gpu_channel_op import delta_rule as delta_rule_by_channel
from jaxlin.kernels.gated_delta_rule_gpu_fwd import forward
from jaxlin.kernels.gated_delta_rule_gpu_intra import intra
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs
from jaxlin.kernels.gated_linear_attention_gpu_op import (
    by_chunk,
    check,
    cumulative,
    fill,
    gradient_of_gate,
    is_primal,
    segment_codes,
    sum_group,
    vector_of,
)
from jaxlin.kernels.gated_linear_attention_gpu_split import parts_of
from jaxlin.kernels.mosaic_gpu import BLOCK
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
    """`gated_delta_rule.chunked` by one kernel each way; initial_state None is zero, and is then not read.

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
    beta, *gates = by_chunk(segment_ids, beta, *([] if g is None else [g]))
    g = gates[0] if gates else None
    codes = None if segment_ids is None else segment_codes(segment_ids)
    form = Form(scale, g is not None, codes is not None, beta=True)
    o, s = _delta_rule(form, q, k, v, beta, g, s0, codes)
    return o[:, :time, :, :value_dim], s[:, :, :key_dim, :value_dim]


@chunk.custom_vjp
def _delta_rule(form: Form, q, k, v, beta, g, s0, codes):
    return _forward(form, Inputs(q, k, v, _vectors(beta, g), codes), s0, save=False)[:2]


def _delta_rule_fwd(form: Form, *primals):
    gate = primals[4] is not None and primals[4].perturbed
    q, k, v, beta, g, s0, codes = jax.tree.map(lambda x: x.value, primals, is_leaf=is_primal)
    o, s, states, t, m = _forward(form, Inputs(q, k, v, _vectors(beta, g), codes), s0, save=True)
    states, t, m = checkpoint_name((states, t, m), "chunk_states")
    return (o, s), (q, k, v, beta, g, codes, states, t, m, s0 is None, gate)


def _delta_rule_bwd(form: Form, residuals, cotangents):
    q, k, v, beta, g, codes, states, t, m, fresh, gate = residuals
    do, ds = (None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in cotangents)
    do = jnp.zeros(v.shape, v.dtype) if do is None else do
    x, parts = Inputs(q, k, v, _vectors(beta, g), codes), _parts(v)
    if parts > 1:
        x, do = split.cut_inputs(x, parts), split.cut(do, parts, 1)
        ds = split.ends(m, split.adjoints(form, x, t, do), ds, parts)
    d = backward(form, x, states, t, do, ds, gate)
    if parts > 1:
        d = split.join_gradients(d, parts)
    dq, dk = (sum_group(x, q.shape[2]) for x in (d.q, d.k))
    vectors = d.vectors.sum(0)
    dg = None if g is None else jnp.zeros_like(g)
    if gate:
        dg = gradient_of_gate(vectors, ROWS, COLUMNS, WRITES)
    return dq, dk, d.v, vector_of(vectors, BETA), dg, None if fresh else d.s, None


def _parts(v: Array) -> int:
    batch, time, heads, value_dim = v.shape
    return parts_of(batch * heads * (value_dim // BLOCK), time // CHUNK)


def _forward(form: Form, x: Inputs, s0: Array | None, save: bool):
    """`forward`, over parts of the sequence where there are too few sequences; T - I; and M of each part, or None."""
    parts = _parts(x.v)
    if parts == 1:
        t = intra(form, x)
        return *forward(form, x, t, s0, save), t, None
    x = split.cut_inputs(x, parts)
    t = intra(form, x)
    m, n = split.maps(form, x, t)
    o, s, states = forward(form, x, t, split.starts(m, n, s0, parts), save)
    return split.join(o, parts, 1), s[parts - 1 :: parts], states, t, m


_delta_rule.defvjp(_delta_rule_fwd, _delta_rule_bwd, symbolic_zeros=True)


def _vectors(beta: Array, g: Array | None) -> Array:
    """b (with gates) and beta of every chunk, [B, HV, N, R, C]."""
    return jnp.stack([beta] if g is None else [cumulative(g), beta], axis=3)
