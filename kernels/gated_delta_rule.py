"""Family B, the gated delta rule (DeltaNet, Gated DeltaNet, KDA), in chunks, forward and backward.

    S_t = (I - beta_t k_t k_t^T) e^{g_t} S_{t-1} + beta_t k_t v_t^T ;   o_t = scale S_t^T q_t

Inside a chunk, with D_ij the decay from row j to row i (inside the sum over channels when gates are per channel),
Qe and Kb the rows decayed from the chunk's start, Ke those decayed to its end, and B = diag(beta):

    P_ij = q_i.k_j D_ij, i >= j ;   A_ij = k_i.k_j D_ij, i > j ;   T = (I + B A)^-1
    U = T B (V - Kb S) ;   O = scale (Qe S + P U) ;   S' = keep S + Ke^T U

T, W = T B Kb and U0 = T B V need no state: all chunks are prepared at once, and the serial part is two products a
chunk, U = U0 - W S and S'. The backward pass solves the adjoint system, Y = T^T dU, and never differentiates T:

    dU = scale P^T dO + Ke dS' ;   dP = scale dO U^T ;   dA = -B Y U^T ;   dV = B Y ;   dbeta_i = y_i.(V - Kb S - A U)_i
    dS = keep dS' + scale Qe^T dO - Kb^T B Y = keep dS' + scale Qe^T dO - W^T dU

The recurrences are those of Yang et al. 2024 (arXiv 2406.06484; gated 2412.06464) and Kimi Linear (2510.26692).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels.blocks import Walk, recurrence
from jaxlin.kernels.chunk import (
    Decays,
    Segments,
    channel_decays,
    channel_products,
    channel_products_vjp,
    chunk_length,
    crossing_sums,
    cumsum_before,
    mask_padding,
    product,
    repeat_heads,
    reverse_cumsum,
    scalar_decays,
    sum_heads,
)
from jaxlin.kernels.triangular import unit_lower_inverse


def chunked(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None,
    *,
    scale: float,
    initial_state: Array,
    segment_ids: Array | None,
    chunk_size: int | None = None,
    by_block: bool = False,
) -> tuple[Array, Array]:
    """The gated delta rule over chunks; differentiable in every array and through the final state.

    q, k [B, T, H, K]; v [B, T, HV, V]; beta [B, T, HV]; g None | [B, T, HV] | [B, T, HV, K], log decays <= 0;
    initial_state [B, HV, K, V], at least float32; segment_ids [B, T] or None, 0 is padding. Keys must have norm <= 1
    for beta in [0, 2]: longer ones make the recurrence itself diverge. `by_block`: see `jaxlin.kernels.blocks`. Returns
    o [B, T, HV, V] in the dtype of v, and the final state.
    """
    inputs = mask_padding(segment_ids, q, k, v, beta, g)
    walk = Walk(scale, chunk_length(q.shape[1], chunk_size), by_block)
    return _delta_rule(walk, inputs, initial_state, segment_ids)


def _forward(scale, inputs, state, segments):
    """(o [N, B, HV, C, V], final state, (states, T))."""
    q, k, v, beta, g = inputs
    c = _prepare(q, k, v, beta, g, segments)
    t = unit_lower_inverse(c.beta * c.a)
    (qe, q_weight), (kb, kb_weight), (ke, ke_weight) = _decayed_rows(c)
    w = c.exact("...ij,...jk->...ik", _by_column(t, c.beta * kb_weight), kb)
    u0 = c.exact("...ij,...jv->...iv", _by_column(t, c.beta), c.v)

    def chunk(s, xs):
        w, u0, ke, weight, keep = xs
        u = u0 - c.state_dot("...ik,...kv->...iv", w, s)
        return keep * s + c.state_dot("...ik,...iv->...kv", ke, weight * u), (s, u)

    xs = (c.operand(w), u0, c.operand(ke), ke_weight, c.decays.keep)
    final_state, (states, u) = lax.scan(chunk, state, xs)
    o = q_weight * c.state_dot("...ik,...kv->...iv", qe, states) + c.exact("...ij,...jv->...iv", c.p, u)
    return (scale * o).astype(v.dtype), final_state, (states, t)


def _backward(scale, inputs, saved, segments, do, d_final):
    (q, k, v, beta, g), (states, t) = inputs, saved
    c = _prepare(q, k, v, beta, g, segments)
    enter, leave, keep, *_ = c.decays
    (qe, q_weight), (kb, kb_weight), (ke, ke_weight) = _decayed_rows(c)

    z = c.v - kb_weight * c.state_dot("...ik,...kv->...iv", kb, states)
    u = c.exact("...ij,...jv->...iv", _by_column(t, c.beta), z)
    w = c.exact("...ij,...jk->...ik", _by_column(t, c.beta * kb_weight), kb)
    du_local = scale * c.dot("...ij,...iv->...jv", c.p, do)
    ds_local = scale * c.state_dot("...ik,...iv->...kv", qe, q_weight * do)

    def chunk(ds, xs):
        w, ke, weight, keep, du_local, ds_local = xs
        du = du_local + weight * c.state_dot("...ik,...kv->...iv", ke, ds)
        return keep * ds + ds_local - c.state_dot("...ik,...iv->...kv", w, du), (ds, du)

    xs = (c.operand(w), c.operand(ke), ke_weight, keep, du_local, ds_local)
    d_state, (ds, du) = lax.scan(chunk, d_final, xs, reverse=True)

    y = c.exact("...ij,...iv->...jv", t, du)
    dv = c.beta * y
    dp = scale * c.dot("...iv,...jv->...ij", do, u)
    dl = -jnp.tril(c.dot("...iv,...jv->...ij", y, u), -1)
    # y.(V - Kb S - A U): U = B (...) row by row, but dividing by beta would lose the real tokens with beta = 0
    dbeta = jnp.sum(y * z, axis=-1) + jnp.sum(dl * c.a, axis=-1)

    pairs = _pair_gradients(c, dp, c.beta * dl, segments, needs_gate=g is not None)
    dq_enter = scale * enter * c.dot("...iv,...kv->...ik", do, states)
    dk_enter = -enter * c.dot("...iv,...kv->...ik", dv, states)
    dk_leave = leave * c.dot("...iv,...kv->...ik", u, ds)
    dq, dk = pairs.dq + dq_enter, pairs.dk + dk_enter + dk_leave

    dg = None
    if pairs.crossing is not None:
        # g_t lies on the paths from a row before t or the state to row t or later, or on to the next state
        reads, writes = c.q * dq_enter + c.k * dk_enter, c.k * dk_leave
        across = keep[..., 0] * jnp.sum(states * ds, axis=-1)
        if g.ndim == 4:
            reads, writes, across = (jnp.sum(x, axis=-1, keepdims=True) for x in (reads, writes, across))
        dg = pairs.crossing + reverse_cumsum(reads) + cumsum_before(writes) + across[..., None, :]
        dg = dg.reshape(g.shape).astype(g.dtype)
    dq, dk = sum_heads(dq, q.shape[2]).astype(q.dtype), sum_heads(dk, k.shape[2]).astype(k.dtype)
    return (dq, dk, dv.astype(v.dtype), dbeta.astype(beta.dtype), dg), d_state


_delta_rule = recurrence(_forward, _backward)


class _Chunks(NamedTuple):
    """What the forward and the backward pass both need, in the accumulation dtype, heads repeated to HV."""

    q: Array  # [N, B, HV, C, K]
    k: Array
    v: Array  # [N, B, HV, C, V]
    beta: Array  # [N, B, HV, C, 1]
    decays: Decays
    p: Array  # [N, B, HV, C, C], i >= j
    a: Array  # [N, B, HV, C, C], i > j
    dtype: jnp.dtype  # of the inputs
    precision: lax.Precision  # of products whose operands are never rounded to `dtype`: with T, with channel gates

    def operand(self, x: Array) -> Array:
        """Decayed rows as products with the state read them: in the dtype of the inputs, where the decay is a weight.

        With channel gates they stay as they are: what tells keys apart that are nearly alike would be rounded off.
        """
        return x if self.decays.pair is None else x.astype(self.dtype)

    def state_dot(self, spec: str, x: Array, y: Array) -> Array:
        """A product of decayed rows with the state, or with what is written to it."""
        return self.exact(spec, x, y) if self.decays.pair is None else self.dot(spec, x, y)

    def dot(self, spec: str, x: Array, y: Array) -> Array:
        """Operands in the dtype of the inputs, sums in that of accumulation."""
        return product(spec, x, y, self.dtype)

    def exact(self, spec: str, x: Array, y: Array) -> Array:
        """Operands in the accumulation dtype, for 16-bit inputs with at least about 16 bits of them (bf16 x 3)."""
        return jnp.einsum(spec, x, y, precision=self.precision)


def _prepare(q, k, v, beta, g, segments) -> _Chunks:
    dtype = jnp.result_type(q, k, v)
    acc = jnp.promote_types(dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if dtype == acc else lax.Precision.HIGH
    heads = v.shape[2]
    qa, ka = (repeat_heads(x.astype(acc), heads) for x in (q, k))
    if g is not None and g.ndim == 5:
        decays = channel_decays(g.astype(acc), segments)
    else:
        decays = scalar_decays(None if g is None else g.astype(acc), segments, q.shape[3], acc)
    if decays.pair is not None:
        p, a = (repeat_heads(product("...ik,...jk->...ij", x, k, dtype), heads) * decays.pair for x in (q, k))
        a = jnp.tril(a, -1)
    else:
        p, a = (channel_products(x, ka, decays.levels, precision) for x in (qa, ka))
        if segments is not None:
            p, a = (jnp.where(segments.same, x, 0) for x in (p, a))
        p = p + _diagonal(jnp.sum(qa * ka, axis=-1))
    keep = jnp.broadcast_to(decays.keep, (q.shape[0], *decays.keep.shape[1:]))  # the state scan runs over chunks
    decays = decays._replace(keep=keep)
    return _Chunks(qa, ka, v.astype(acc), beta.astype(acc)[..., None], decays, p, a, dtype, precision)


def _decayed_rows(c: _Chunks) -> list[tuple[Array, Array]]:
    """Qe, Kb and Ke, each as rows and weights: row i of a product with them is weight_i times that with the rows.

    A decay per head stays a weight: the product then reads q or k itself, exact in any dtype and no copy.
    """
    rows = ((c.q, c.decays.enter), (c.k, c.decays.enter), (c.k, c.decays.leave))
    if c.decays.pair is None:
        rows = [(decay * x, jnp.ones((1, 1, 1, 1, 1), x.dtype)) for x, decay in rows]
    chunks = c.k.shape[0]  # the state scan runs over this axis
    return [(x, jnp.broadcast_to(weight, (chunks, *weight.shape[1:]))) for x, weight in rows]


def _by_column(t: Array, weight: Array) -> Array:
    """T diag(weight) for weights [..., C, 1]."""
    return t * weight.swapaxes(-1, -2)


class _PairGradients(NamedTuple):
    """Gradients through P and A."""

    dq: Array
    dk: Array
    crossing: Array | None  # what g_t gets from the pairs of rows i >= t > j


def _pair_gradients(c: _Chunks, dp: Array, da: Array, segments: Segments | None, needs_gate: bool) -> _PairGradients:
    pair = c.decays.pair
    if pair is not None:
        # One matrix gives the gate's gradient: sums of it lose far less than q.dq - k.dk.
        crossing = crossing_sums(dp * c.p + da * c.a) if needs_gate else None
        dp, da = dp * pair, da * pair
        dq = c.dot("...ij,...jk->...ik", dp, c.k)
        dk = (
            c.dot("...ij,...jk->...ik", da, c.k)
            + c.dot("...ij,...ik->...jk", dp, c.q)
            + c.dot("...ij,...ik->...jk", da, c.k)
        )
        return _PairGradients(dq, dk, crossing)
    own = jnp.diagonal(dp, axis1=-2, axis2=-1)[..., None]  # no decay on the diagonal, so no gate gradient
    if segments is not None:
        dp, da = (jnp.where(segments.same, x, 0) for x in (dp, da))
    dq, dk_p = channel_products_vjp(dp, c.q, c.k, c.decays.levels, c.precision)
    dk_row, dk_a = channel_products_vjp(da, c.k, c.k, c.decays.levels, c.precision)
    crossing = reverse_cumsum(c.q * dq + c.k * (dk_row - dk_p - dk_a))
    return _PairGradients(dq + own * c.k, dk_row + dk_p + dk_a + own * c.q, crossing)


def _diagonal(x: Array) -> Array:
    """[..., C] -> [..., C, C] with x on the diagonal."""
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)
