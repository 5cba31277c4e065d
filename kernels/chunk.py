"""What the two kernel families share: chunks, segment masks, decays that never overflow, the scan over states.

Layout of a chunked array: [N, B, H, C, ...], N chunks of C tokens in front, so that a scan runs over axis 0 and every
product inside a chunk is one batched matmul. `g` is the log decay, <= 0 and finite.

Decays. Inside a chunk the decay from row j to row i is e^(g_{j+1} + ... + g_i). Written as e^(b_i - b_j), with b the
cumulative sum, it overflows when factored and cancels when |b| is large. Here every exponent is itself a sum of gates,
so never positive and never a difference: i > j lie in the two halves of exactly one aligned block of 2s rows,
s = 1, 2, 4 ... C/2, and with m the first row of its second half

    e^(g_{j+1} + ... + g_i) = e_s[i] e_s[j],   e_s[i] = e^(g_m + ... + g_i),   e_s[j] = e^(g_{j+1} + ... + g_{m-1}).

So log2(C) vectors e_s give all C^2 decays: as outer products for a gate per head, as scaled matmuls for channel gates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


def custom_vjp(function: Callable) -> Any:
    """`jax.custom_vjp` of a function whose first argument, the scale, is a constant."""
    return jax.custom_vjp(function, nondiff_argnums=(0,))


def chunk_length(time: int, chunk_size: int | None, default: int = 64) -> int:
    """Rows of a chunk: a power of two (`chunk_size` rounded up), no longer than the sequence needs."""
    return 1 << (min(chunk_size or default, time) - 1).bit_length()


def to_chunks(x: Array, length: int) -> Array:
    """[B, T, H, ...] -> [N, B, H, C, ...], the last chunk filled with zeros."""
    batch, time, heads, *rest = x.shape
    chunks = -(-time // length)
    x = jnp.pad(x, [(0, 0), (0, chunks * length - time)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, chunks, length, heads, *rest)
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def from_chunks(x: Array, time: int) -> Array:
    """[N, B, H, C, ...] -> [B, T, H, ...]."""
    chunks, batch, heads, length, *rest = x.shape
    x = x.transpose(1, 0, 3, 2, *range(4, x.ndim))
    return x.reshape(batch, chunks * length, heads, *rest)[:, :time]


def repeat_heads(x: Array, heads: int) -> Array:
    """[N, B, H, ...] -> [N, B, HV, ...]: value head j uses key head j // (HV // H)."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def sum_heads(x: Array, heads: int) -> Array:
    """The transpose of `repeat_heads`: [N, B, HV, ...] -> [N, B, H, ...], in a fixed order."""
    return x if x.shape[2] == heads else x.reshape(*x.shape[:2], heads, -1, *x.shape[3:]).sum(3)


def product(spec: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """einsum of operands in `dtype`, summed in at least float32; float32 operands are never rounded further."""
    precision = lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else lax.Precision.DEFAULT
    acc = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=acc)


# ---- segments ----


class Segments(NamedTuple):
    """Which rows may see which, as bool masks over chunks."""

    same: Array  # [N, B, 1, C, C]: rows i and j belong to one segment
    enter: Array  # [N, B, 1, C, 1]: the segment of row i reaches back to the chunk's initial state
    leave: Array  # [N, B, 1, C, 1]: the segment of row j is the chunk's last
    keep: Array  # [N, B, 1, 1, 1]: the chunk's initial state survives to its end


def mask_padding(segment_ids: Array | None, *arrays: Array | None) -> tuple:
    """Zero the padding rows of [B, T, ...] arrays: with q = k = v = 0 and g = 0 a row is a no-op."""
    if segment_ids is None:
        return arrays
    valid = segment_ids != 0
    return tuple(
        None if x is None else jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
        for x in arrays
    )


def segment_starts(segment_ids: Array) -> Array:
    """[B, T] bool: tokens whose id differs from the last non-zero one (the very first segment starts nothing)."""
    valid = segment_ids != 0
    rows = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    last = lax.cummax(jnp.where(valid, rows, -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return valid & (before >= 0) & (segment_ids != jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1))


def segment_masks(segment_ids: Array | None, length: int) -> Segments | None:
    """The masks of `segment_ids` [B, T]. Padding counts with the segment before it; ids may be used again."""
    if segment_ids is None:
        return None
    time = segment_ids.shape[1]
    run = jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)
    run = jnp.pad(run, ((0, 0), (0, -time % length)), mode="edge")
    run = run.reshape(run.shape[0], 1, -1, length, 1).transpose(2, 0, 1, 3, 4)
    last = run[..., -1:, :]
    carry = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    return Segments(run == run.swapaxes(-1, -2), run == carry, run == last, last == carry)


# ---- decays ----


class Decays(NamedTuple):
    """The decays of every chunk, segment masks included except in `levels`. [..., 1] is a gate per head."""

    enter: Array  # [N, B, H, C, 1|K]: from the chunk's initial state to row i, inclusive
    leave: Array  # [N, B, H, C, 1|K]: from row j to the chunk's end
    keep: Array  # [N, B, H, 1|K, 1]: from the chunk's initial state to its end
    pair: Array | None  # [N, B, H, C, C]: from row j to row i, 0 for j > i; None for channel gates
    levels: tuple[tuple[Array, Array], ...]  # channel gates: e_s of the second halves, of the first halves,
    # [N, B, H, C/2s, s, K] each, for s = 1, 2, 4 ... C/2; () for a gate per head


def level_mask(length: int, s: int) -> Array:
    """[C, C] bool: i and j < i lie in the second and the first half of one aligned block of 2s rows."""
    row = jnp.arange(length)
    i, j = row[:, None] // s, row[None, :] // s
    return (i % 2 == 1) & (j == i - 1)


def scalar_decays(g: Array | None, segments: Segments | None, length: int, dtype: jnp.dtype) -> Decays:
    """Decays of a gate per head [N, B, H, C] (B may be 1), or of none."""
    causal = jnp.tril(jnp.ones((length, length), bool))
    if g is None:
        ones = jnp.ones((1, 1, 1, length, 1), dtype)
        return _masked(Decays(ones, ones, ones[..., :1, :], causal.astype(dtype)[None, None, None], ()), segments)
    sizes = _level_sizes(length)
    sums = jnp.stack([_enter_sums(length), _leave_sums(length), *(_level_sums(length, s) for s in sizes)])
    e = jnp.exp(product("lct,nbht->lnbhc", sums, g, dtype))
    pair = jnp.eye(length, dtype=dtype)
    for s, e_s in zip(sizes, e[2:], strict=True):
        pair = jnp.where(level_mask(length, s), e_s[..., :, None] * e_s[..., None, :], pair)
    return _masked(Decays(e[0][..., None], e[1][..., None], e[0][..., -1:, None], pair, ()), segments)


def channel_decays(g: Array, segments: Segments | None) -> Decays:
    """Decays of a gate per channel [N, B, H, C, K]."""
    length = g.shape[-2]
    enter, leave = (jnp.exp(_row_sums(sums(length), g)) for sums in (_enter_sums, _leave_sums))
    levels = tuple(
        (jnp.exp(_row_sums(_enter_sums(s), second)), jnp.exp(_row_sums(_leave_sums(s), first)))
        for s in _level_sizes(length)
        for first, second in [_halves(g, s)]
    )
    return _masked(Decays(enter, leave, enter[..., -1, :, None], None, levels), segments)


def reverse_cumsum(x: Array) -> Array:
    """Sum over rows t >= i of [N, B, H, C, D], as a product with a triangle of ones."""
    return _row_sums(_enter_sums(x.shape[-2]).T, x)


def cumsum_before(x: Array) -> Array:
    """Sum over rows t < i of [N, B, H, C, D]."""
    return _row_sums(_leave_sums(x.shape[-2]).T, x)


def crossing_sums(e: Array) -> Array:
    """Sum of e_ij over i >= t > j, for every t: [..., C, C] -> [..., C, 1].

    As a double sum: differences of row sums and column sums would cancel most of what they add up.
    """
    before = product("...ij,jt->...it", e, _leave_sums(e.shape[-1]), e.dtype)
    return jnp.sum(jnp.tril(before), -2)[..., None]


def _level_sizes(length: int) -> list[int]:
    return [1 << n for n in range(length.bit_length() - 1)]


def _enter_sums(length: int) -> Array:
    return jnp.tril(jnp.ones((length, length)))


def _leave_sums(length: int) -> Array:
    return jnp.triu(jnp.ones((length, length)), 1)


def _level_sums(length: int, s: int) -> Array:
    """[C, C] of 0 and 1: row i sums the gates in the exponent of e_s[i]."""
    row = jnp.arange(length)
    block = row[:, None] // s == row[None, :] // s
    second = (row[:, None] // s) % 2 == 1
    return (block & jnp.where(second, row[None, :] <= row[:, None], row[None, :] > row[:, None])).astype(jnp.float32)


def _row_sums(sums: Array, x: Array) -> Array:
    """`sums` [C, C] times x [..., C, K]."""
    if x.shape[-1] > 1:  # a batched product needs no transpose of x
        sums = jnp.broadcast_to(sums, (*x.shape[:-1], sums.shape[0]))
    return product("...ij,...jk->...ik", sums, x, x.dtype)


def _masked(decays: Decays, segments: Segments | None) -> Decays:
    if segments is None:
        return decays
    enter, leave, keep = (
        jnp.where(mask, decay, jnp.zeros_like(decay)) for mask, decay in zip(segments[1:], decays[:3], strict=True)
    )
    pair = None if decays.pair is None else jnp.where(segments.same, decays.pair, jnp.zeros_like(decays.pair))
    return Decays(enter, leave, keep, pair, decays.levels)


# ---- channel-gated products ----


def channel_products(q: Array, k: Array, levels: tuple, precision: lax.Precision) -> Array:
    """P_ij = sum_k q_ik k_jk e^(g_{j+1,k} + ... + g_ik) for i > j, 0 elsewhere: [..., C, K] -> [..., C, C].

    Strictly lower: on the diagonal the decay is 1, P_ii = q_i.k_i. Segments are for the caller to mask.
    """
    p = jnp.zeros((*q.shape[:-1], 1, 1), q.dtype)  # diagonal blocks of s rows, s = 1, 2, 4 ...
    for second, first in levels:
        s = second.shape[-2]
        rows, columns = second * _halves(q, s)[1], first * _halves(k, s)[0]
        corner = jnp.einsum("...ik,...jk->...ij", rows, columns, precision=precision)
        p = p.reshape(*corner.shape[:-2], 2, s, s)
        top = jnp.concatenate([p[..., 0, :, :], jnp.zeros_like(corner)], axis=-1)
        p = jnp.concatenate([top, jnp.concatenate([corner, p[..., 1, :, :]], axis=-1)], axis=-2)
    return p.reshape(*q.shape[:-1], q.shape[-2])


def channel_products_vjp(dp: Array, q: Array, k: Array, levels: tuple, precision: lax.Precision) -> tuple[Array, Array]:
    """(dq, dk) of `channel_products` for a cotangent dp [..., C, C]; its diagonal and upper part are not read."""
    dot = functools.partial(jnp.einsum, precision=precision)
    dq, dk = jnp.zeros_like(q), jnp.zeros_like(k)
    dp = dp[..., None, :, :]
    for second, first in reversed(levels):
        s = second.shape[-2]
        dp = dp.reshape(*dp.shape[:-2], 2, s, 2, s)
        corner = dp[..., 1, :, 0, :]
        dp = jnp.stack([dp[..., 0, :, 0, :], dp[..., 1, :, 1, :]], axis=-3)
        dp = dp.reshape(*q.shape[:-2], -1, s, s)
        rows, columns = second * _halves(q, s)[1], first * _halves(k, s)[0]
        below = second * dot("...ij,...jk->...ik", corner, columns)
        above = first * dot("...ij,...ik->...jk", corner, rows)
        dq += jnp.stack([jnp.zeros_like(below), below], axis=-3).reshape(q.shape)
        dk += jnp.stack([above, jnp.zeros_like(above)], axis=-3).reshape(k.shape)
    return dq, dk


def _halves(x: Array, s: int) -> tuple[Array, Array]:
    """The first and the second halves of the aligned blocks of 2s rows: [..., C, K] -> [..., C/2s, s, K] each."""
    x = x.reshape(*x.shape[:-2], -1, 2, s, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


# ---- states ----


def scan_states(keep: Array, update: Array, state: Array, reverse: bool = False) -> tuple[Array, Array]:
    """S' = keep S + update over chunks: returns the S that each chunk receives [N, B, H, K, V], and the final S.

    keep [N, B, H, 1|K, 1] (or its broadcastable 1s), update [N, B, H, K, V], state [B, H, K, V]. With `reverse` the
    chunks run backwards: the adjoint, whose update is the cotangent that each chunk adds.
    """
    keep = jnp.broadcast_to(keep, (update.shape[0], *keep.shape[1:]))

    def body(s, xs):
        decay, new = xs
        return decay * s + new, s

    final, received = lax.scan(body, state, (keep, update), reverse=reverse)
    return received, final
