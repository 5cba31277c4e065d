"""Causal depthwise convolution over the latest tokens of a segment, whole or in pieces of the sequence.

y_t = sum_w kernel_w x_(t - W + 1 + w) over the last W tokens of the segment that are not padding, as in Mamba (Gu & Dao
2023, arXiv 2312.00752, section 3.4). The last W - 1 inputs are its state, the tail: it passes between pieces as the
states of the recurrences do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxlin import sharding
from jaxlin.mixers.rounding import rounded_once
from jaxlin.sequence_parallel import hand_over, last_segment


def short_conv(
    kernel: Float[Array, "W H d"],
    x: Float[Array, "B T H d"],
    segment_ids: Int[Array, "B T"] | None,
    tail: Float[Array, "B W-1 H d"],
    *,
    packed: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B W-1 H d"]]:
    """The convolution of x, which continues `tail`, and the tail after it: zeros stand for inputs that were not there.

    The last tap weighs the current token. Padding (id 0) gives 0 and is stepped over; the tail belongs to the first
    segment. `packed` promises that no padding lies before or within a segment: then inputs are shifted instead of
    gathered, which takes a GPU a quarter of the time. Where the promise is broken, taps beyond the padding are lost.
    """
    layout = sharding.layout(*x.shape[:3])
    if layout is None or layout.time is None:
        return _outputs(kernel, x, segment_ids, tail, packed), _tail_after(x, segment_ids, tail)
    axis = layout.time

    def piece(kernel, x, segment_ids, tail):
        before, final = hand_over(_summary(x, segment_ids, tail.shape[1]), _append, tail, segment_ids, axis)
        return _outputs(kernel, x, segment_ids, before, packed), final

    tokens, tails = layout.by_token(layout.heads), P(layout.batch, None, layout.heads)
    in_specs = (P(None, layout.heads), tokens, layout.by_token(), tails)
    mapped = jax.shard_map(piece, in_specs=in_specs, out_specs=(tokens, tails), check_vma=False)
    return mapped(kernel, x, segment_ids, tail)


class _Inputs(NamedTuple):
    """The last inputs of a piece, at most W - 1 of its last segment."""

    last: Array  # [B, W - 1, H, d], zeros before them
    count: Array  # [B], how many they are


def _summary(x: Array, segment_ids: Array | None, size: int) -> _Inputs:
    batch, length = x.shape[:2]
    count = jnp.full(batch, length) if segment_ids is None else jnp.sum(last_segment(segment_ids), axis=1)
    nothing = jnp.zeros((batch, size, *x.shape[2:]), x.dtype)
    return _Inputs(_tail_after(x, segment_ids, nothing), count)


def _append(inputs: _Inputs, tail: Array) -> Array:
    """The tail after a piece: its last inputs, and before them what they leave of the tail."""
    size = tail.shape[1]
    index = (jnp.arange(size) + inputs.count[:, None])[:, :, None, None]
    moved = jnp.take_along_axis(tail, jnp.minimum(index, size - 1), axis=1)
    return inputs.last + jnp.where(index < size, moved, 0)


def _outputs(kernel: Array, x: Array, segment_ids: Array | None, tail: Array, packed: bool) -> Array:
    padded = jnp.concatenate([tail, x], axis=1)
    if segment_ids is None:
        return _whole_cotangent(_shifted(kernel, padded, lambda rows: None))
    ids = _with_tail(segment_ids, tail.shape[1])
    if not packed:
        return _where(segment_ids != 0, _gathered(kernel, padded, ids)[:, tail.shape[1] :])
    y = _shifted(kernel, padded, lambda rows: ids[:, rows] == segment_ids)
    return _whole_cotangent(_where(segment_ids != 0, y))


def _shifted(kernel: Array, padded: Array, counts: Callable[[slice], Array | None]) -> Array:
    """Every tap on the rows so many tokens before; `counts` says of such rows which do (None: all)."""

    @rounded_once
    def taps(kernel, padded):
        size, y = kernel.shape[0], 0.0
        for lag in range(size):
            rows = slice(size - 1 - lag, padded.shape[1] - lag)
            term, same = kernel[size - 1 - lag] * padded[:, rows], counts(rows)
            y += term if same is None else _where(same, term)
        return y

    return taps(kernel, padded)


def _gathered(kernel: Array, padded: Array, ids: Array) -> Array:
    """Every tap on the last tokens of a segment, however much padding is between them."""
    before, rows = previous_valid(ids), []
    index = jnp.where(ids != 0, jnp.arange(ids.shape[1], dtype=jnp.int32), -1)
    for _ in range(1, kernel.shape[0]):
        index = jnp.where(index >= 0, jnp.take_along_axis(before, jnp.maximum(index, 0), axis=1), -1)
        same = (index >= 0) & (jnp.take_along_axis(ids, jnp.maximum(index, 0), axis=1) == ids)
        rows.append(jnp.where(same, index, -1))

    @rounded_once
    def taps(kernel, padded):
        y = kernel[-1] * padded
        for lag, row in enumerate(rows, 1):
            y += kernel[-1 - lag] * _take_rows(padded, row, _invert(row))
        return y

    return taps(kernel, padded)


@jax.custom_vjp
def _whole_cotangent(y: Array) -> Array:
    """y, whose cotangent is in memory before anything reads it: XLA would find it again in each sum for the kernel."""
    return y


_whole_cotangent.defvjp(lambda y: (y, None), lambda _, dy: (lax.optimization_barrier(dy),))


def _where(tokens: Array, x: Array) -> Array:
    """x [B, T, H, d], 0 but at these tokens [B, T]."""
    return jnp.where(tokens[:, :, None, None], x, 0)


def _tail_after(x: Array, segment_ids: Array | None, tail: Array) -> Array:
    """The last W - 1 tokens that are not padding and belong to the row's last segment; zeros stand for the rest."""
    size, padded = tail.shape[1], jnp.concatenate([tail, x], axis=1)
    if segment_ids is None or not size:  # one tap needs nothing of the past
        return padded[:, padded.shape[1] - size :]
    ids = _with_tail(segment_ids, size)
    before = previous_valid(ids)
    last = jnp.max(jnp.where(ids != 0, jnp.arange(ids.shape[1]), -1), axis=1)[:, None]
    rows = [last]
    for _ in range(size - 1):
        rows.append(jnp.take_along_axis(before, jnp.maximum(rows[-1], 0), axis=1))
    rows = jnp.concatenate(rows[::-1], axis=1)
    same = jnp.take_along_axis(ids, jnp.maximum(rows, 0), axis=1) == jnp.take_along_axis(ids, last, axis=1)
    rows = jnp.where((rows >= 0) & same, rows, -1)
    taken = jnp.take_along_axis(padded, jnp.maximum(rows, 0)[:, :, None, None], axis=1)
    return _where(rows >= 0, taken)


def _with_tail(segment_ids: Array, size: int) -> Array:
    """Ids of the tail and of x: the tail belongs to the first segment; with no token in the row, any id keeps it."""
    first = jnp.argmax(segment_ids != 0, axis=1)
    first_id = jnp.take_along_axis(segment_ids, first[:, None], axis=1)
    return jnp.concatenate([jnp.broadcast_to(jnp.maximum(first_id, 1), (len(first), size)), segment_ids], axis=1)


def previous_valid(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the last non-padding token before each one; -1 where there is none."""
    index = jnp.where(segment_ids != 0, jnp.arange(segment_ids.shape[1], dtype=jnp.int32), -1)
    latest = lax.cummax(index, axis=1)
    return jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


@jax.custom_vjp
def _take_rows(x: Array, index: Array, inverse: Array) -> Array:
    """Rows index[b, t] of x[b]; 0 where the index is -1. No row is taken twice, so the transpose is a take too."""
    taken = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, :, None, None], axis=1)
    return _where(index >= 0, taken)


_take_rows.defvjp(
    lambda x, index, inverse: (_take_rows(x, index, inverse), (index, inverse)),
    lambda saved, dy: (_take_rows(dy, saved[1], saved[0]), None, None),
)


def _invert(index: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The inverse of a partial one-to-one map of positions; -1 where nothing maps."""
    batch, length = index.shape
    rows = jnp.arange(batch)[:, None]
    target = jnp.where(index >= 0, index, length)
    empty = jnp.full((batch, length + 1), -1, jnp.int32)
    return empty.at[rows, target].set(jnp.arange(length, dtype=jnp.int32)[None])[:, :length]
