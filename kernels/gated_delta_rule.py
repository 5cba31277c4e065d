"""Family B, the gated delta rule (DeltaNet, Gated DeltaNet, KDA), in chunks, forward and backward.

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T ;  o_t = scale S_t^T q_t

Inside a chunk, with b the inclusive cumulative gate, Kb = K e^b and Ke = K e^(b_C - b):

    A_ij = sum_k K_ik K_jk e^(b_i - b_j), i > j ;   P_ij = scale sum_k Q_ik K_jk e^(b_i - b_j), i >= j
    U = (I + beta A)^-1 beta (V - Kb S) ;           O = scale (Q e^b) S + P U ;   S' = e^(b_C) S + Ke^T U

The triangular inverse T, W = T beta Kb and U0 = T beta V need no state, so all chunks are prepared at once and the
serial part is two products a chunk: U = U0 - W S and S'. The backward pass uses the adjoint solve Y = T^T dU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

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
    chunk_size: int = 64,
) -> tuple[Array, Array]:
    """The gated delta rule over chunks; differentiable in every array, through `final_state` too.

    q, k [B, T, H, K]; v [B, T, HV, V]; beta [B, T, HV]; g None | [B, T, HV] | [B, T, HV, K], log decays <= 0;
    initial_state [B, HV, K, V] in at least float32; segment_ids [B, T] or None, 0 is padding. Keys of norm at most 1
    (with beta <= 2): longer ones make the recurrence itself diverge. Returns o [B, T, HV, V] in the dtype of v and
    the final state.
    """
    steps, size = q.shape[1], min(chunk_size, q.shape[1])
    inputs = (q, k, v, beta, g)
    if segment_ids is not None:
        inputs = jax.tree.map(lambda x: jnp.where(_expand(segment_ids != 0, x), x, 0), inputs)
    chunks = jax.tree.map(functools.partial(_to_chunks, size=size), inputs)
    masks = _segment_masks(segment_ids, size)
    o, final_state = _delta_rule(scale, *chunks, initial_state, masks)
    return _from_chunks(o, steps), final_state


def _expand(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))

def _to_chunks(x: Array, size: int) -> Array:
    """[B, T, H, ...] -> [N, B, H, C, ...], zero padded."""
    pad = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

def _from_chunks(x, steps):
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 2, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :steps]

def _segment_masks(ids, size):
    if ids is None: return None
    idx = jnp.arange(ids.shape[1])
    last = lax.cummax(jnp.where(ids != 0, idx, -1), axis=1)
    prev = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], 1)
    starts = (ids != 0) & (prev >= 0) & (jnp.take_along_axis(ids, jnp.maximum(prev, 0), 1) != ids)
    run = jnp.cumsum(starts, 1)
    pad = -ids.shape[1] % size
    run = jnp.pad(run, [(0, 0), (0, pad)], mode="edge")
    run = jnp.moveaxis(run.reshape(run.shape[0], -1, size), 1, 0)[:, :, None]  # N B 1 C
    carry = jnp.concatenate([jnp.zeros_like(run[:1, ..., -1:]), run[:-1, ..., -1:]])
    last = run[..., -1:]
    return run[..., :, None] == run[..., None, :], run == carry, run == last, last == carry

class _Gates(NamedTuple):
    """The decays of every chunk, segment masks included: what differs between none, scalar and channel gates."""

    pair: Array  # e^(b_i - b_j), i >= j [..., C, C]
    enter: Array  # e^b: from the state at the chunk's start to row i [..., C, 1 | K]
    leave: Array  # e^(b_C - b): from row j to the state at the chunk's end [..., C, 1 | K]
    keep: Array  # e^(b_C): across the chunk [..., 1 | K, 1]

def _gates(g, masks, like):
    """like: v chunks"""
    size = like.shape[3]
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    if g is None:
        g = jnp.zeros((1, 1, 1, size), dtype)
    g = g.astype(dtype)
    coarse = jnp.round(g * 256) / 256
    hi, lo = jnp.cumsum(coarse, 3), jnp.cumsum(g - coarse, 3)
    tril = jnp.tril(jnp.ones((size, size), bool))
    same, enters, leaves, keeps = masks or (True, True, True, True)
    inf = -jnp.inf
    diff = (hi[..., :, None] - hi[..., None, :]) + (lo[..., :, None] - lo[..., None, :])
    pair = jnp.exp(jnp.where(tril & same, diff, inf))
    enter = jnp.exp(jnp.where(enters, hi + lo, inf))[..., None]
    leave = jnp.exp(jnp.where(leaves, (hi[..., -1:] - hi) + (lo[..., -1:] - lo), inf))[..., None]
    keep = jnp.exp(jnp.where(keeps, hi[..., -1:] + lo[..., -1:], inf))[..., None]
    keep = jnp.broadcast_to(keep, (like.shape[0], *keep.shape[1:]))
    return _Gates(pair, enter, leave, keep)

@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(scale, q, k, v, beta, g, state, masks):
    return _forward(scale, q, k, v, beta, g, state, masks)[0]

def _mm(spec, a, b, precision):
    if precision is not None:
        a, b = a.astype(precision), b.astype(precision)
    left, right = spec.split(",")
    right, out = right.split("->")
    return jnp.einsum(f"...{left},...{right}->...{out}", a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))

def _setup(q, k, v, beta, g, masks):
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    group = v.shape[2] // k.shape[2]
    low = jnp.result_type(q, k, v)
    gates = _gates(g, masks, v)
    mm = functools.partial(_mm, precision=low)
    exact = functools.partial(_mm, precision=dtype)
    kk, qk = jnp.repeat(mm("ik,jk->ij", k, k), group, 2), jnp.repeat(mm("ik,jk->ij", q, k), group, 2)
    a = jnp.tril(kk * gates.pair, -1)
    p = qk * gates.pair
    q, k, v = jnp.repeat(q.astype(dtype), group, 2), jnp.repeat(k.astype(dtype), group, 2), v.astype(dtype)
    return q, k, v, beta.astype(dtype)[..., None], gates, a, p, mm, exact, low

def _forward(scale, *inputs):
    q, k, v, beta, g, state, masks = inputs
    q, k, v, beta, gates, a, p, mm, exact, low = _setup(q, k, v, beta, g, masks)
    t = unit_lower_inverse(beta * a)
    w = exact("ij,jk->ik", t, beta * k * gates.enter)
    u0 = exact("ij,jv->iv", t, beta * v)
    def step(s, x):
        w, u0, ke, keep = x
        u = u0 - mm("ik,kv->iv", w, s)
        return keep * s + mm("ik,iv->kv", ke, u), (s, u)
    final, (states, u) = lax.scan(step, state, (w.astype(low), u0, (k * gates.leave).astype(low), gates.keep))
    states = checkpoint_name(states, "chunk_states")
    o = scale * (mm("ik,kv->iv", q * gates.enter, states) + mm("ij,jv->iv", p, u))
    return (o.astype(inputs[2].dtype), final), (inputs, states, t)

def _backward(scale, residuals, grads):
    do, d_final = grads
    inputs, states, t = residuals
    _, _, _, _, g, s0, masks = inputs
    q, k, v, beta, gates, a, p, mm, exact, low = _setup(*inputs[:5], masks)
    do = scale * do.astype(v.dtype)
    z = v - mm("ik,kv->iv", k * gates.enter, states)
    u = exact("ij,jv->iv", t, beta * z)
    w = exact("ij,jk->ik", t, beta * k * gates.enter)
    du0 = mm("ij,iv->jv", p, do)
    f = mm("ik,iv->kv", q * gates.enter, do)
    def step(ds, x):
        w, ke, du, f, keep = x
        du = du + mm("ik,kv->iv", ke, ds)
        return keep * ds + f - mm("ik,iv->kv", w, du), (ds, du)
    ds0, (ds, du) = lax.scan(step, d_final, (w.astype(low), (k * gates.leave).astype(low), du0, f, gates.keep), reverse=True)
    y = exact("ij,iv->jv", t, du)
    dv = beta * y
    dp = mm("iv,jv->ij", do, u)
    dl = -jnp.tril(mm("iv,jv->ij", y, u), -1)
    dla = dl * a
    dbeta = jnp.sum(y * z, -1) + jnp.sum(dla, -1)
    dpd = dp * gates.pair
    dld = beta * dl * gates.pair
    dq_in = gates.enter * mm("iv,kv->ik", do, states)
    dk_in = -gates.enter * mm("iv,kv->ik", dv, states)
    dk_out = gates.leave * mm("iv,kv->ik", u, ds)
    dq = dq_in + mm("ij,jk->ik", dpd, k)
    dk = dk_in + dk_out + mm("ij,jk->ik", dld, k) + mm("ij,ik->jk", dpd, q) + mm("ij,ik->jk", dld, k)
    dg = None
    if g is not None:
        e = jnp.tril(dp * p, -1) + beta * dla
        r = jnp.sum(k * dk_out, -1)
        db = jnp.sum(e, -1) - jnp.sum(e, -2) + jnp.sum(q * dq_in + k * dk_in, -1) - r
        end = jnp.sum(r, -1) + jnp.sum(gates.keep * states * ds, (-1, -2))
        db = db.at[..., -1].add(end)
        dg = lax.cumsum(db, axis=3, reverse=True).astype(g.dtype)
    group = v.shape[2] // inputs[0].shape[2]
    total = lambda x: jnp.sum(x.reshape(*x.shape[:2], -1, group, *x.shape[3:]), 3)
    dq, dk = total(dq).astype(inputs[0].dtype), total(dk).astype(inputs[1].dtype)
    return dq, dk, dv.astype(inputs[2].dtype), dbeta.astype(inputs[3].dtype), dg, ds0.astype(s0.dtype), None

_delta_rule.defvjp(_forward, _backward)
