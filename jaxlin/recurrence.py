"""The definitions: each recurrence as one `lax.scan` over time, accumulated in at least float32, with no tricks.

Every other implementation is tested against this file. Shapes: B batch, T time, H query/key heads, HV value heads
(HV % H == 0, value head j reads key head j // (HV // H)), K key dim, V value dim. Log decays g are <= 0.

Segments: `segment_ids` [B, T], 0 is padding. A padding row has o = 0, leaves the state untouched and gets no gradient.
A token whose id differs from the last non-zero id starts from the zero state, so padding never resets; `initial_state`
belongs to the first non-padding segment, and the final state is the one after the last non-padding token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

NORMALIZER_EPS = 1e-10
"""Added to the normaliser z.q of linear attention (the value flash-linear-attention uses)."""

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype of gates, states and sums: that of the inputs, but at least float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def gated_linear_attention_step(
    q: Array, k: Array, v: Array, g: Array | None, state: Any, *, scale: float | None = None, normalize: bool = False
) -> tuple[Array, Any]:
    """One token: S = e^g S + k v^T, o = scale S^T q, with `normalize` divided by scale z.q + eps, z = sum of k.

    q, k [B, H, K]; v [B, HV, V]; g None | [HV] | [B, HV] | [B, HV, K]; state S [B, HV, K, V] or (S, z [B, HV, K]).
    """
    q, k, v = _per_value_head(q, k, v)
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    s, z = state if normalize else (state, None)
    decay = _decay(g, s)
    s = decay * s + k[..., :, None] * v[..., None, :]
    o = _einsum("bhkv,bhk->bhv", s, q)
    if z is None:
        return o, s
    z = decay[..., 0] * z + k
    return o / (_einsum("bhk,bhk->bh", z, q) + NORMALIZER_EPS)[..., None], (s, z)


def gated_delta_rule_step(
    q: Array, k: Array, v: Array, beta: Array, g: Array | None, state: Array, *, scale: float | None = None
) -> tuple[Array, Array]:
    """One token: S = (I - beta k k^T) e^g S + beta k v^T, o = scale S^T q (decay first, then the delta rule).

    q, k [B, H, K]; v [B, HV, V]; beta [B, HV]; g None | [HV] | [B, HV] | [B, HV, K]; state [B, HV, K, V].
    """
    q, k, v = _per_value_head(q, k, v)
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    s = _decay(g, state) * state
    u = beta.astype(s.dtype)[..., None] * (v - _einsum("bhkv,bhk->bhv", s, k))
    s = s + k[..., :, None] * u[..., None, :]
    return _einsum("bhkv,bhk->bhv", s, q), s


def mlstm_step(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: tuple[Array, Array, Array], *, scale: float | None = None
) -> tuple[Array, tuple[Array, Array, Array]]:
    """One token of the mLSTM (Beck et al. 2024, eq. 19-27), stabilised; gradients stop at the new m.

    m' = max(log f + m, i);  C = e^{log f + m - m'} C + e^{i - m'} k v^T, n likewise with k;
    h = scale C^T q / max(|scale n.q|, e^{-m'}).
    q, k [B, H, K]; v [B, HV, V]; i, f [B, HV] pre-activations; state C [B, HV, K, V], n [B, HV, K], m [B, HV].
    """
    q, k, v = _per_value_head(q, k, v)
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    c, n, m = state
    log_f, i = jax.nn.log_sigmoid(f.astype(m.dtype)), i.astype(m.dtype)
    m_new = lax.stop_gradient(jnp.maximum(log_f + m, i))
    forget, write = jnp.exp(log_f + m - m_new)[..., None], jnp.exp(i - m_new)[..., None]
    c = forget[..., None] * c + (write * k)[..., :, None] * v[..., None, :]
    n = forget * n + write * k
    denominator = jnp.maximum(jnp.abs(_einsum("bhk,bhk->bh", n, q)), jnp.exp(-m_new))
    return _einsum("bhkv,bhk->bhv", c, q) / denominator[..., None], (c, n, m_new)


def gated_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Any,
    segment_ids: Array | None = None,
) -> tuple[Array, Any]:
    """S_t = e^{g_t} S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; see `gated_linear_attention_step`.

    q, k [B, T, H, K]; v [B, T, HV, V]; g None | [HV] | [B, T, HV] | [B, T, HV, K]. Returns (o, state).
    """
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, v.shape[:3])
    step = functools.partial(gated_linear_attention_step, scale=scale, normalize=normalize)
    return _scan(step, (q, k, v, g), initial_state, segment_ids)


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    scale: float | None = None,
    initial_state: Array,
    segment_ids: Array | None = None,
) -> tuple[Array, Array]:
    """S_t = (I - beta_t k_t k_t^T) e^{g_t} S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    q, k [B, T, H, K]; v [B, T, HV, V]; beta [B, T, HV]; g None | [B, T, HV] | [B, T, HV, K].
    """
    return _scan(functools.partial(gated_delta_rule_step, scale=scale), (q, k, v, beta, g), initial_state, segment_ids)


def mlstm(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    *,
    scale: float | None = None,
    initial_state: tuple[Array, Array, Array],
    segment_ids: Array | None = None,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """The mLSTM over time; q, k [B, T, H, K]; v [B, T, HV, V]; i, f [B, T, HV]. See `mlstm_step`."""
    return _scan(functools.partial(mlstm_step, scale=scale), (q, k, v, i, f), initial_state, segment_ids)


def _per_value_head(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Repeat the key heads to the value heads and cast to the accumulation dtype."""
    dtype, group = accumulation_dtype(q, k, v), v.shape[-2] // k.shape[-2]
    q, k = (jnp.repeat(x.astype(dtype), group, axis=-2) for x in (q, k))
    return q, k, v.astype(dtype)


def _decay(g: Array | None, state: Array) -> Array:
    """e^g, shaped to multiply a state [B, HV, K, V]."""
    if g is None:
        return jnp.ones((1, 1, 1, 1), state.dtype)
    decay = jnp.exp(g.astype(state.dtype))
    return decay[..., None] if g.ndim == 3 else decay[..., None, None]


def _scan(step: Callable, inputs: tuple, state: Any, segment_ids: Array | None) -> tuple[Array, Any]:
    """Run `step(*inputs_t, state) -> (o_t, state)` over axis 1 of the inputs, observing segments and padding."""
    out_dtype = inputs[2].dtype
    if segment_ids is not None:  # the gradient of a masked input is exactly 0, whatever it holds
        valid = segment_ids != 0
        inputs = jax.tree.map(lambda x: jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0), inputs)

    def body(carry, xs):
        state, last = carry
        x, segment = xs
        if segment is None:
            o, state = step(*x, state)
            return (state, last), o
        valid, starts = segment != 0, (segment != 0) & (last != 0) & (segment != last)
        o, new = step(*x, jax.tree.map(lambda s: _where(starts, jnp.zeros_like(s), s), state))
        state = jax.tree.map(lambda n, s: _where(valid, n, s), new, state)
        return (state, jnp.where(valid, segment, last)), _where(valid, o, jnp.zeros_like(o))

    last = None if segment_ids is None else jnp.zeros_like(segment_ids[:, 0])
    time_major = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, segment_ids))
    (state, _), o = lax.scan(body, (state, last), time_major)
    return jnp.moveaxis(o, 0, 1).astype(out_dtype), state


def _where(mask: Array, x: Array, y: Array) -> Array:
    """`jnp.where` with a mask [B] against arrays [B, ...]."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y)
