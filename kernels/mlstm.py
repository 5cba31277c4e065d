"""The mLSTM in chunks: family A with a log input gate, normalised by max(|n.q|, e^{-m}).

With m held fixed (gradients stop there), C and n follow gated linear attention with log decay log f_t + m_{t-1} - m_t
and log input gate i_t - m_t, both <= 0. So the kernel is `attend`; here are m, and the denominator with its gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import chunk
from jaxlin.kernels.blocks import Walk
from jaxlin.kernels.gated_linear_attention import Gates, State, attend


def chunked(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    *,
    scale: float,
    initial_state: tuple[Array, Array, Array],
    segment_ids: Array | None = None,
    chunk_size: int | None = None,
    by_block: bool = False,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """The mLSTM over chunks; differentiable in every array, through the final C and n too.

    q, k [B, T, H, K]; v [B, T, HV, V]; i, f [B, T, HV] pre-activations; initial_state C [B, HV, K, V], n [B, HV, K],
    m [B, HV]; segment_ids [B, T] or None, 0 is padding; `by_block` see `jaxlin.kernels.blocks`. Returns h [B, T, HV, V]
    in the dtype of v, final (C, n, m).
    """
    g, w, m, (c, n, final_m) = gates(i, f, initial_state, segment_ids)
    q, k, v, g, w = chunk.mask_padding(segment_ids, q, k, v, g, w)
    walk = Walk(scale, chunk.chunk_length(q.shape[1], chunk_size), by_block)
    (numerator, l), state = attend(walk, (q, k, v, Gates(g, w)), State(c, n), segment_ids)  # noqa: E741
    h = numerator / jnp.maximum(jnp.abs(l), jnp.exp(-m))[..., None]
    return h.astype(v.dtype), (*state, final_m)


def gates(
    i: Array, f: Array, state: tuple[Array, Array, Array], segment_ids: Array | None
) -> tuple[Array, Array, Array, tuple[Array, Array, Array]]:
    """Log decay g and log input gate w, both <= 0, m [B, T, HV] each; the state C, n to start from and the final m."""
    m0 = state[2]
    i, log_f = i.astype(m0.dtype), jax.nn.log_sigmoid(f.astype(m0.dtype))
    before, m = stabilizer(*lax.stop_gradient((i, log_f, m0)), segment_ids)
    return log_f + before - m, i - m, m, (*start(state, segment_ids), end(m0, m[:, -1], segment_ids))


def start(state: tuple[Array, Array, Array], segment_ids: Array | None) -> tuple[Array, Array]:
    """C and n to start from, which give the initial m its gradient."""
    c, n, m0 = state
    if segment_ids is not None:
        m0 = jnp.where(_empty(segment_ids), lax.stop_gradient(m0), m0)
    return _in_units_of(c, n, m0)


def end(m0: Array, m: Array, segment_ids: Array | None) -> Array:
    """The final m [B, HV]; a row of nothing but padding hands on the initial one."""
    return m if segment_ids is None else jnp.where(_empty(segment_ids), m0, m)


def _empty(segment_ids: Array) -> Array:
    return ~jnp.any(segment_ids != 0, axis=1, keepdims=True)


@jax.custom_vjp
def _in_units_of(c: Array, n: Array, m: Array) -> tuple[Array, Array]:
    """C and n, as they are: they stand for e^m C and e^m n, so the initial m, no constant, gets a gradient."""
    del m
    return c, n


def _in_units_of_bwd(residuals, cotangents):
    (c, n), (dc, dn) = residuals, cotangents
    return dc, dn, jnp.sum(c * dc, axis=(-2, -1)) + jnp.sum(n * dn, axis=-1)


_in_units_of.defvjp(lambda c, n, m: ((c, n), (c, n)), _in_units_of_bwd)


def stabilizer(i: Array, log_f: Array, m0: Array, segment_ids: Array | None) -> tuple[Array, Array]:
    """m_t = max(log f_t + m_{t-1}, i_t) from m_0 = m0, 0 before a new segment: (m_{t-1}, m_t), [B, T, HV] each."""
    decay, least = log_f, i
    start = jnp.zeros_like(m0)[:, None]
    if segment_ids is not None:
        valid, starts = (segment_ids != 0)[..., None], chunk.segment_starts(segment_ids)[..., None]
        decay = jnp.where(starts, -jnp.inf, jnp.where(valid, log_f, 0.0))
        least = jnp.where(starts, jnp.maximum(log_f, i), jnp.where(valid, i, -jnp.inf))

    shift = 1  # m -> max(decay + m, least) over 1, 2, 4 ... tokens: on a TPU, shifts compile faster than strides
    while shift < decay.shape[1]:
        pads = (0, 0), (shift, 0), (0, 0)
        earlier = jnp.pad(least[:, :-shift], pads, constant_values=-jnp.inf)
        least = jnp.maximum(earlier + decay, least)
        decay = decay + jnp.pad(decay[:, :-shift], pads)
        shift *= 2
    m = jnp.maximum(decay + m0[:, None], least)
    before = jnp.concatenate([m0[:, None], m[:, :-1]], axis=1)
    return before if segment_ids is None else jnp.where(starts, start, before), m
