"""Sequences cut into pieces over the devices of one mesh axis: what a piece does to a state, and who starts from what.

A piece maps the state before it to the state after it, and that map is small: its size does not depend on the number of
tokens. Every device finds the map of its own piece from its tokens alone, all devices gather all maps, and each applies
those before its own to the initial state: the state that its piece starts from, exactly. LASP-2 does so for linear
attention (Sun et al. 2025, arXiv 2502.07563); here are the maps of all recurrences, with segments and padding. They are
plain JAX around the ops, so gradients, of which the same maps transposed pass between devices, are autodiff's.

Gated linear attention, g_t its log decay, over a piece of T tokens:

    S' = e^{g_1 + ... + g_T} S + N,   N = sum_j e^{c_j} k_j v_j^T,   c_j = g_{j+1} + ... + g_T;   z likewise, v_j = 1.

The mLSTM's state (C, n, m) stands for e^m C and e^m n, whose log decay g_t is log f_t and which e^{i_t} k_t v_t^T is
added to:

    m' = max(g_1 + ... + g_T + m, a),   a = max_j (c_j + i_j),   C' = e^{g_1 + ... + g_T + m - m'} C + e^{a - m'} N,

with e^{c_j + i_j - a} in N. The gated delta rule: S' = M S + N, M the product of all (I - beta_t k_t k_t^T) e^{g_t}.

Segments (see `jaxlin.recurrence`): where one starts inside a piece, the state before the piece is lost, and N holds the
last segment's tokens alone. A piece of nothing but padding changes no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels.chunk import product, segment_starts

Run = Callable[[dict[str, Array], Any], tuple[Array, Any]]  # (arrays of a piece, its initial state) -> (o, final state)


def states(op: str, run: Run, arrays: dict[str, Array], state: Any, axis: str) -> tuple[Any, Any]:
    """The state before this device's piece, and the one after the last piece; to be called inside a shard_map.

    Args:
        op: name of the op in `ops.py`; `run` is that op.
        arrays: its arrays [B, T, H, ...] for this device's piece; `g` may be [HV].
        state: the state before the first piece, the same on all devices along `axis`.
        axis: the mesh axis that sequences are cut over.
    """
    summarize, after = _MAPS[op]
    segment_ids = arrays.get("segment_ids")
    return hand_over(summarize(run, arrays, segment_ids), after, state, segment_ids, axis)


class _Ends(NamedTuple):
    """A piece's segments, [B] each."""

    first: Array  # id of its first token that is not padding, 0 where there is none
    last: Array  # of its last one
    starts: Array  # bool: a segment starts inside of it


def hand_over(
    summary: Any, after: Callable[[Any, Any], Any], state: Any, segment_ids: Array | None, axis: str
) -> tuple[Any, Any]:
    """The state before this device's piece, and the one after the last piece, of anything that has a state.

    `summary` says what this piece does to a state: after(summary, state) is the state after it. `segment_ids` [B, T]
    are this piece's; a token whose id differs from the last one that is not 0 starts from the zero state.
    """
    ends = None if segment_ids is None else _ends(segment_ids)
    last = None if segment_ids is None else jnp.zeros_like(segment_ids[:, 0])

    def piece(carry, xs):
        state, last = carry
        summary, ends = xs
        if ends is None:
            return (after(summary, state), None), state
        empty = ends.first == 0
        fresh = ~empty & (last != 0) & (ends.first != last)
        before = _zero_where(fresh, state)
        new = after(summary, _zero_where(ends.starts, before))
        state = jax.tree.map(lambda s, n: _where(empty, s, n), state, new)
        return (state, jnp.where(empty, last, ends.last)), before

    (final, _), before = lax.scan(piece, (state, last), lax.all_gather((summary, ends), axis))
    own = lax.axis_index(axis)
    return jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, own, keepdims=False), before), final


def last_segment(segment_ids: Array) -> Array:
    """[B, T] bool: the tokens of each row's last segment, padding left out."""
    number = jnp.cumsum(segment_starts(segment_ids), axis=1)
    return (segment_ids != 0) & (number == number[:, -1:])


def _ends(segment_ids: Array) -> _Ends:
    valid = segment_ids != 0
    first = jnp.argmax(valid, axis=1)
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    first_id, last_id = (jnp.take_along_axis(segment_ids, at[:, None], axis=1)[:, 0] for at in (first, last))
    return _Ends(first_id, last_id, jnp.any(segment_starts(segment_ids), axis=1))


# ---- gated linear attention, mLSTM ----


class _Sums(NamedTuple):
    """What a piece decays and adds: for S or C, and for z or n."""

    decay: Array  # g_1 + ... + g_T, [B, HV, 1|K]
    n: Array  # N [B, HV, K, V]
    z: Array  # [B, HV, K]
    a: Any  # [B, HV], None but for the mLSTM


def _attention_summary(run: Run, arrays: dict[str, Array], segment_ids: Array | None) -> _Sums:
    del run
    return _sums(arrays, arrays.get("g"), None, segment_ids)


def _attention_after(sums: _Sums, state: Any) -> Any:
    decay = jnp.exp(sums.decay)
    if not isinstance(state, tuple):
        return decay[..., None] * state + sums.n
    s, z = state
    return decay[..., None] * s + sums.n, decay * z + sums.z


def _mlstm_summary(run: Run, arrays: dict[str, Array], segment_ids: Array | None) -> _Sums:
    del run
    wide = jnp.promote_types(arrays["f"].dtype, jnp.float32)
    return _sums(arrays, jax.nn.log_sigmoid(arrays["f"].astype(wide)), arrays["i"].astype(wide), segment_ids)


def _mlstm_after(sums: _Sums, state: Any) -> Any:
    c, n, m = state
    kept = sums.decay[..., 0] + m
    m = lax.stop_gradient(jnp.maximum(kept, sums.a))
    keep, write = jnp.exp(kept - m)[..., None], jnp.exp(sums.a - m)[..., None]
    return keep[..., None] * c + write[..., None] * sums.n, keep * n + write * sums.z, m


def _sums(arrays: dict[str, Array], g: Array | None, i: Array | None, segment_ids: Array | None) -> _Sums:
    """Of log decays g None | [HV] | [B, T, HV] | [B, T, HV, K] and log input gates i None | [B, T, HV]."""
    k, v = arrays["k"], arrays["v"]
    wide = jnp.promote_types(jnp.result_type(k, v), jnp.float32)
    g = jnp.zeros((), wide) if g is None else g.astype(wide)
    g = g if g.ndim == 4 else jnp.broadcast_to(g, v.shape[:3])[..., None]
    if segment_ids is not None:
        mask = last_segment(segment_ids)[:, :, None, None]
        g, k, v = (jnp.where(mask, x, jnp.zeros_like(x)) for x in (g, k, v))
        i = None if i is None else jnp.where(mask[..., 0], i, -jnp.inf)
    c = lax.cumsum(jnp.pad(g[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))), axis=1, reverse=True)
    a = None
    if i is not None:
        a = lax.stop_gradient(jnp.max(c[..., 0] + i, axis=1))
        a = jnp.where(jnp.isfinite(a), a, 0)  # of nothing but padding
        c = c + (i - a[:, None])[..., None]
    written = jnp.exp(c) * jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
    n = product("bthk,bthv->bhkv", written, v, jnp.result_type(k, v))
    return _Sums(jnp.sum(g, axis=1), n, jnp.sum(written, axis=1), a)


# ---- gated delta rule ----


class _Affine(NamedTuple):
    """S' = M S + N."""

    m: Array  # [B, HV, K, K]
    n: Array  # [B, HV, K, V]


def _delta_rule_summary(run: Run, arrays: dict[str, Array], segment_ids: Array | None) -> _Affine:
    """N from the zero state; M, column by column, from those of the identity, with values of 0: all in one run."""
    del segment_ids  # the op minds them
    k, v = arrays["k"], arrays["v"]
    batch, _, heads, value_dim = v.shape
    key_dim = k.shape[-1]
    wide = jnp.promote_types(jnp.result_type(k, v), jnp.float32)
    zero_and_one = jnp.eye(key_dim, value_dim + key_dim, value_dim, dtype=wide)
    start = jnp.broadcast_to(zero_and_one, (batch, heads, *zero_and_one.shape))
    values = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, key_dim)))
    _, end = run({**arrays, "v": values}, start)
    return _Affine(end[..., value_dim:], end[..., :value_dim])


def _delta_rule_after(affine: _Affine, state: Array) -> Array:
    return jnp.matmul(affine.m, state, precision=lax.Precision.HIGHEST) + affine.n


_MAPS = {
    "gated_linear_attention": (_attention_summary, _attention_after),
    "gated_delta_rule": (_delta_rule_summary, _delta_rule_after),
    "mlstm": (_mlstm_summary, _mlstm_after),
}


# ---- segments ----


def _where(mask: Array, x: Array, y: Array) -> Array:
    """`jnp.where` with a mask [B] against arrays [B, ...]."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y)


def _zero_where(mask: Array, state: Any) -> Any:
    return jax.tree.map(lambda s: _where(mask, jnp.zeros_like(s), s), state)
