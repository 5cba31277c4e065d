"""One token of every recurrence: what the TPU and the GPU step share. In XLA; its derivative serves both.

    S <- diag(decay) S + k (v - erase^T S)^T ;   o = scale S^T q

with v and erase = k already times beta for the delta rule, and no erase for gated linear attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import chunk
from jaxlin.kernels import mlstm as _mlstm
from jaxlin.kernels.gated_linear_attention import LEAST_LOG_DENOMINATOR, NORMALIZER_EPS


class Token(NamedTuple):
    """The inputs of one step; padding is zeros. Log gates as in `ops`: g is the decay, w what k is written with."""

    q: Array  # [B, H, K]
    k: Array  # [B, H, K]
    v: Array  # [B, HV, V]
    g: Array | None = None  # [HV] | [B, HV] | [B, HV, K]
    beta: Array | None = None  # [B, HV]
    w: Array | None = None  # [B, HV]
    floor: Array | None = None  # [B, HV], the least denominator |scale z.q|; without it, that is scale z.q + eps


Step = Callable[[float, Token, Array, Any], tuple[Array, Array, Any]]
"""(scale, token, S [B, HV, K, V], z [B, HV, K] or None) -> (o [B, HV, V] in the dtype of v, S, z)."""


def compose(core: Callable, scale: float, x: Token, s: Array, z: Array | None) -> tuple[Array, Array, Any]:
    """A `Step` around `core`: `definition` or a kernel with its arguments, which is what touches S."""
    dtype, heads = x.v.dtype, x.v.shape[1]
    q, k, v = (a.astype(jnp.float32) for a in (x.q, x.k, x.v))
    g, beta, w = (None if a is None else a.astype(jnp.float32) for a in (x.g, x.beta, x.w))
    if w is not None or z is not None:
        q, k = (per_value_head(a, heads) for a in (q, k))
    if w is not None:
        k = jnp.exp(w)[..., None] * k
    decay = jnp.ones((*v.shape[:2], 1))
    if g is not None:
        decay = jnp.exp(g if g.ndim == 3 else jnp.broadcast_to(g, v.shape[:2])[..., None])
    erase = None
    if beta is not None:
        k, beta = per_value_head(k, heads), beta[..., None]
        v, erase = beta * v, beta * k
    o, s = core(scale, q, k, v, decay, erase, s)
    if z is not None:
        z = decay * z + k
        l = scale * jnp.sum(q * z, axis=-1)  # noqa: E741
        o = o / (l + NORMALIZER_EPS if x.floor is None else jnp.maximum(jnp.abs(l), x.floor))[..., None]
    return o.astype(dtype), s, z


def definition(scale: float, q: Any, k: Any, v: Array, decay: Array, erase: Any, s: Array) -> tuple[Array, Array]:
    """(o [B, HV, V], s) in float32.

    q, k, erase [B, H or HV, K]; v [B, HV, V]; decay [B, HV, 1 or K]; s [B, HV, K, V].
    """
    q, k, erase = (None if x is None else per_value_head(x, s.shape[1]) for x in (q, k, erase))
    s = decay[..., None] * s
    if erase is not None:
        v = v - jnp.einsum("bhk,bhkv->bhv", erase, s, precision=lax.Precision.HIGHEST)
    s = s + k[..., None] * v[..., None, :]
    return scale * jnp.einsum("bhk,bhkv->bhv", q, s, precision=lax.Precision.HIGHEST), s


def per_value_head(x: Array, heads: int) -> Array:
    """[B, H, ...] -> [B, HV, ...]: value head j uses key head j // (HV // H)."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


# ---- the ops for T = 1, with the arguments of their kernels ----


def gated_linear_attention(
    step: Step, q: Any, k: Any, v: Any, g: Any, normalize: bool, state: Any, segment_ids: Any, scale: float
) -> tuple[Array, Any]:
    """(o [B, 1, HV, V], S or (S, z)); state None is zero."""
    if g is not None and g.ndim == 1 and segment_ids is not None:
        g = jnp.broadcast_to(g, v.shape[:3])
    if state is None:
        s = _zeros(q, v)
        state = (s, s[..., 0]) if normalize else s
    s, z = state if normalize else (state, None)
    o, s, z = step(scale, _token(segment_ids, q=q, k=k, v=v, g=g), s, z)
    return o[:, None], (s, z) if normalize else s


def gated_delta_rule(
    step: Step, q: Any, k: Any, v: Any, beta: Any, g: Any, state: Any, segment_ids: Any, scale: float
) -> tuple[Array, Array]:
    """(o [B, 1, HV, V], S); state None is zero."""
    s = _zeros(q, v) if state is None else state
    o, s, _ = step(scale, _token(segment_ids, q=q, k=k, v=v, beta=beta, g=g), s, None)
    return o[:, None], s


def mlstm(
    step: Step, q: Any, k: Any, v: Any, i: Any, f: Any, state: Any, segment_ids: Any, scale: float
) -> tuple[Array, tuple[Array, Array, Array]]:
    """(h [B, 1, HV, V], (C, n, m)); state None is zero."""
    if state is None:
        c = _zeros(q, v)
        state = (c, c[..., 0], c[..., 0, 0])
    g, w, m, (c, n, final_m) = _mlstm.gates(i, f, state, segment_ids)
    floor = jnp.exp(jnp.maximum(-m[:, 0], LEAST_LOG_DENOMINATOR))
    x = _token(segment_ids, q=q, k=k, v=v, g=g, w=w)._replace(floor=floor)
    h, c, n = step(scale, x, c, n)
    return h[:, None], (c, n, final_m)


def _token(segment_ids: Array | None, **arrays: Array | None) -> Token:
    """Arrays [B, 1, ...], or a constant g, with zeros in padding."""
    masked: dict[str, Any] = dict(zip(arrays, chunk.mask_padding(segment_ids, *arrays.values()), strict=True))
    first: dict[str, Any] = {n: x if x is None or x.ndim == 1 else x[:, 0] for n, x in masked.items()}
    return Token(**first)


def _zeros(q: Array, v: Array) -> Array:
    return jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), jnp.float32)
