"""Family A, gated linear attention, in chunks, forward and backward (linear attention, RetNet, GLA; the mLSTM on top).

    S_t = diag(e^{g_t}) S_{t-1} + e^{w_t} k_t v_t^T ;  n_t = scale S_t^T q_t ;  l_t = scale z_t.q_t, z like S with v = 1

The work inside chunks is done for all chunks at once; only the state is scanned. kernels/README.md has the derivation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import chunk
from jaxlin.kernels.blocks import Walk, recurrence
from jaxlin.kernels.chunk import Decays, Segments, product

NORMALIZER_EPS = 1e-10
LEAST_LOG_DENOMINATOR = -83.0
"""In kernels, of the mLSTM's least denominator e^-m: e^-88 is 0 in float32, and padding, whose sums are 0, is divided
by it too."""


def chunked(
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
    by_block: bool = False,
) -> tuple[Array, Array | tuple[Array, Array]]:
    """Gated linear attention over chunks; differentiable in every array, through the final state too.

    q, k [B, T, H, K]; v [B, T, HV, V]; g None | [HV] | [B, T, HV] | [B, T, HV, K], log decays <= 0; initial_state
    [B, HV, K, V], with `normalize` (S, z [B, HV, K]); segment_ids [B, T] or None, 0 is padding. `chunk_size` is rounded
    up to a power of two; `by_block` see `jaxlin.kernels.blocks`. Returns o [B, T, HV, V] in the dtype of v, and the
    final state.
    """
    time = q.shape[1]
    if g is not None and g.ndim == 1:  # a constant decay needs one row of chunks, whatever the batch
        g = jnp.broadcast_to(g, (1 if segment_ids is None else q.shape[0], time, g.shape[0]))
    q, k, v, g = chunk.mask_padding(segment_ids, q, k, v, g)
    state = State(*initial_state) if normalize else State(initial_state, None)
    gates = Gates(None if g is None else g.astype(state.s.dtype))
    walk = Walk(scale, chunk.chunk_length(time, chunk_size), by_block)
    (n, l), state = attend(walk, (q, k, v, gates), state, segment_ids)  # noqa: E741
    o = n if l is None else n / (l + NORMALIZER_EPS)[..., None]
    return o.astype(v.dtype), tuple(state) if normalize else state.s


class Gates(NamedTuple):
    """What weighs a token: its log decay and (per head, with a gate per head or none) its log input gate."""

    g: Array | None  # [1|B, T, HV] | [B, T, HV, K]
    w: Array | None = None  # [B, T, HV]


class State(NamedTuple):
    """The recurrent state; z is None where no normaliser is wanted."""

    s: Array  # [..., K, V]
    z: Array | None  # [..., K]


def _forward(scale, inputs, state, segments):
    """((numerators n [N, B, HV, C, V], denominators l [N, B, HV, C] or None), final state, (states, ()))."""
    q, k, v, gates = inputs
    decays, dtype = _decays(gates, segments, q.shape[-2], state.s.dtype), q.dtype
    q, k = (chunk.repeat_heads(x, v.shape[2]) for x in (q, k))
    p = _scores(scale, q, k, decays, segments)
    k_leave = decays.leave * k
    received, final = _scan_states(decays.keep, State(
        product("nbhjk,nbhjv->nbhkv", k_leave, v, dtype), None if state.z is None else k_leave.sum(-2)
    ), state)  # fmt: skip
    n = scale * _scaled("nbhik,nbhkv->nbhiv", q, decays.enter, received.s, dtype)
    n += product("nbhij,nbhjv->nbhiv", p, v, dtype)
    l = None  # noqa: E741
    if received.z is not None:
        l = scale * jnp.sum(decays.enter * q * received.z[..., None, :], -1) + p.sum(-1)  # noqa: E741
    return (n, l), final, (received, ())


def _backward(scale, inputs, saved, segments, d_outputs, dfinal):
    (q, k, v, gates), (received, _), (dn, dl) = inputs, saved, d_outputs
    heads, dtype = k.shape[2], q.dtype
    decays = _decays(gates, segments, q.shape[-2], received.s.dtype)
    q, k = (chunk.repeat_heads(x, v.shape[2]) for x in (q, k))

    # The adjoint of the state: d is what arrives at the end of each chunk.
    q_enter = scale * decays.enter * q
    update = State(
        product("nbhik,nbhiv->nbhkv", q_enter, dn, dtype),
        None if dl is None else jnp.sum(q_enter * dl[..., None], -2),
    )
    d, dinitial = _scan_states(decays.keep, update, dfinal, reverse=True)

    # Through the state: rows reading it (dq), rows written to it (dk, dv).
    dq_state = product("nbhiv,nbhkv->nbhik", dn, received.s, dtype)
    dk_state = product("nbhjv,nbhkv->nbhjk", v, d.s, dtype)
    dp = product("nbhiv,nbhjv->nbhij", dn, v, dtype)
    if dl is not None:
        assert d.z is not None  # it starts from dl
        dq_state += dl[..., None] * received.z[..., None, :]
        dk_state += d.z[..., None, :]
        dp += dl[..., None]
    dq_state, dk_state = scale * decays.enter * dq_state, decays.leave * dk_state
    dv = _scaled("nbhjk,nbhkv->nbhjv", k, decays.leave, d.s, dtype)

    # Inside the chunk; `crossing` is what g_t gets from the pairs of rows i >= t > j.
    p = _scores(scale, q, k, decays, segments)
    dv += product("nbhij,nbhiv->nbhjv", p, dn, dtype)
    if decays.pair is not None:
        dpd = scale * dp * decays.pair
        dq = product("nbhij,nbhjk->nbhik", dpd, k, dtype)
        dk = product("nbhij,nbhik->nbhjk", dpd, q, dtype)
        e = dp * p
        crossing = chunk.crossing_sums(e)
        dw = None if gates.w is None else e.sum(-2) + jnp.sum(k * dk_state, -1)
        reads, writes = (jnp.sum(x, -1, keepdims=True) for x in (q * dq_state, k * dk_state))
    else:
        dp = scale * dp if segments is None else scale * jnp.where(segments.same, dp, 0)
        q32, k32 = q.astype(dp.dtype), k.astype(dp.dtype)
        dq, dk = chunk.channel_products_vjp(dp, q32, k32, decays.levels, _precision(dtype))
        crossing, dw = chunk.reverse_cumsum(q * dq - k * dk), None
        diagonal = jnp.diagonal(dp, axis1=-2, axis2=-1)[..., None]
        dq, dk = dq + diagonal * k, dk + diagonal * q
        reads, writes = q * dq_state, k * dk_state
    dq, dk = (chunk.sum_heads(x, heads) for x in (dq + dq_state, dk + dk_state))

    dg = None
    if gates.g is not None:  # g_t lies on every path from a row before t, or the state, to row t or later, or the end
        through = jnp.sum(received.s * d.s, -1)
        if dl is not None:
            through += received.z * d.z
        through = decays.keep[..., 0] * through
        through = through if decays.pair is None else through.sum(-1, keepdims=True)
        dg = crossing + chunk.reverse_cumsum(reads) + chunk.cumsum_before(writes) + through[..., None, :]
        dg = dg.reshape(*dg.shape[:3], *gates.g.shape[3:])
        dg = dg.sum(1, keepdims=True) if gates.g.shape[1] < dg.shape[1] else dg
    dq, dk, dv = (x.astype(y.dtype) for x, y in zip((dq, dk, dv), inputs[:3], strict=True))
    return (dq, dk, dv, Gates(dg, dw)), dinitial


attend = recurrence(_forward, _backward)
"""(walk, (q, k, v, gates), state, segment_ids) -> ((n [B, T, HV, V], l [B, T, HV] or None), final state)."""


def _decays(gates: Gates, segments: Segments | None, length: int, dtype: jnp.dtype) -> Decays:
    """The decays of a chunk, the input gate folded into what leaves row j."""
    if gates.g is not None and gates.g.ndim == 5:
        return chunk.channel_decays(gates.g, segments)
    decays = chunk.scalar_decays(gates.g, segments, length, dtype)
    if gates.w is None:
        return decays
    assert decays.pair is not None  # input gates go with decays per head
    write = jnp.exp(gates.w)
    return decays._replace(leave=decays.leave * write[..., None], pair=decays.pair * write[..., None, :])


def _scores(scale: float, q: Array, k: Array, decays: Decays, segments: Segments | None) -> Array:
    """P_ij = scale sum_k q_ik k_jk e^{b_ik - b_jk + w_j} for j <= i in the same segment, else 0; at least float32."""
    if decays.pair is not None:
        return product("nbhik,nbhjk->nbhij", q, k, q.dtype) * (scale * decays.pair)
    precision, dtype = _precision(q.dtype), decays.enter.dtype
    q, k = q.astype(dtype), k.astype(dtype)
    p = chunk.channel_products(q, k, decays.levels, precision)
    p += jnp.eye(q.shape[-2], dtype=dtype) * jnp.sum(q * k, -1)[..., None]
    return scale * (p if segments is None else jnp.where(segments.same, p, 0))


def _precision(dtype: jnp.dtype) -> lax.Precision:
    """Of products with channel gates inside: operands stay float32, for bfloat16 inputs with about 16 bits of them."""
    return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else lax.Precision.HIGH


def _scaled(spec: str, x: Array, decay: Array, y: Array, dtype: jnp.dtype) -> Array:
    """(decay * x) y, a decay per row applied after the product: exact, and one pass less over x."""
    return decay * product(spec, x, y, dtype) if decay.shape[-1] == 1 else product(spec, decay * x, y, dtype)


def _scan_states(keep: Array, update: State, state: State, reverse: bool = False) -> tuple[State, State]:
    """`chunk.scan_states` of S and, where there is one, of z."""
    received, final = chunk.scan_states(keep, update.s, state.s, reverse)
    if state.z is None or update.z is None:
        return State(received, None), State(final, None)
    z, final_z = chunk.scan_states(keep[..., 0], update.z, state.z, reverse)
    return State(received, z), State(final, final_z)
