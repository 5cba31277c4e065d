"""The algebra of one stacked tile (see tile_tpu_layout.py): products, masks, decays, the triangular inverse.

Precision. float32 tiles are multiplied at `Precision.HIGHEST`. With bfloat16 inputs, an operand that is bfloat16 already is
exact; a float32 one is split into bfloat16 pieces: one where it meets the state, two (16 bits, as in bf16x3) inside a
chunk. The split is written out, since Mosaic knows only one pass and six in some releases.

Decays. log D_ij = sum_t [t <= i] g_t [t > j] is one product of triangles around diag(g): the sum of just the gates between
the two rows, so never positive, never a difference of cumulative sums, and exact to float32 (g in three pieces, 0 and 1 are
exact). The gate's gradient dg_t = sum_ij [t <= i] E_ij [t > j] is the same product around E.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels.tile_tpu_layout import ROWS, Layout

NN, NT, TN = (1, 0), (1, 1), (0, 0)
"""Axes that a product contracts: x y, x y^T, x^T y."""


def product(x: Array, y: Array, axes: tuple[int, int], dtype: Any, exact: bool = False) -> Array:
    """x y contracted over `axes`, in float32; float32 operands of a bfloat16 problem as one or (`exact`) two pieces."""
    if dtype == jnp.float32:
        return _dot(x, y, axes, lax.Precision.HIGHEST)
    count = 2 if exact else 1
    terms = [
        _dot(a, b, axes, lax.Precision.DEFAULT)
        for i, a in enumerate(pieces(x, count))
        for j, b in enumerate(pieces(y, count))
        if i + j < count
    ]
    return sum(terms[1:], terms[0])


def sums(x: Array, mask: Array) -> Array:
    """x times a bool matrix, float32 throughout: 24 bits in three pieces."""
    ones = mask.astype(jnp.float32).astype(jnp.bfloat16)
    terms = [_dot(a, ones, NN, lax.Precision.DEFAULT) for a in pieces(x, 3)]
    return terms[0] + terms[1] + terms[2]


def pieces(x: Array, count: int) -> list[Array]:
    """x as a sum of bfloat16s, by cutting the mantissa; one piece is rounded instead."""
    if x.dtype == jnp.bfloat16:
        return [x]
    if count == 1:
        return [x.astype(jnp.bfloat16)]
    high = lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536), jnp.float32
    )
    return [high.astype(jnp.bfloat16), *pieces(x - high, count - 1)]


def _dot(x: Array, y: Array, axes: tuple[int, int], precision: lax.Precision) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


# ---- masks ----


class Masks(NamedTuple):
    """Bool masks of a tile; i is its row, j or t its lane, both stacked (head, token)."""

    eye: Array  # i == j
    upto: Array  # t <= i, same head
    after: Array  # t > i, same head
    before: Array  # i > j, same head: [t, j]


def make_masks(layout: Layout) -> Masks:
    i, j = (lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis) for axis in (0, 1))
    same = lax.div(i, layout.chunk) == lax.div(j, layout.chunk)
    return Masks(i == j, same & (j <= i), same & (j > i), same & (j < i))


class Segments(NamedTuple):
    """The masks of packed segments, see `chunk.Segments`; all are bool."""

    valid: Array  # [128, 1] the row is a token
    same: Array  # [128, 128] row i and token j
    enter: Array  # [128, 1]
    leave: Array  # [128, 1] of tokens: padding writes nothing


def read_segments(ref: Any, masks: Masks) -> Segments | None:
    """From the rows run, carry, valid of `tile_tpu_layout.segment_rows`."""
    if ref is None:
        return None
    run, carry, valid = (ref[0, 0, i : i + 1, :] for i in range(3))
    run_i, token = to_column(run, masks), to_column(valid, masks) > 0
    return Segments(token, (run_i == run) & (valid > 0), run_i == carry[:, :1], (run_i == run[:, -1:]) & token)


def to_column(row: Array, masks: Masks) -> Array:
    """[1, 128] -> [128, 1]."""
    return jnp.sum(jnp.where(masks.eye, row, 0.0), axis=1, keepdims=True)


def row_sum(x: Array) -> Array:
    return jnp.sum(x, axis=1, keepdims=True)


def column_sum(x: Array) -> Array:
    return jnp.sum(x, axis=0, keepdims=True)


def per_head(columns: Array, rows: int, layout: Layout) -> Array:
    """The last row of each head [128, 1], repeated over `rows` rows a head: [pack * rows, 1]."""
    last = [columns[(h + 1) * layout.chunk - 1 : (h + 1) * layout.chunk] for h in range(layout.pack)]
    if layout.pack == 1:
        return jnp.broadcast_to(last[0], (rows, 1))
    return jnp.where(lax.broadcasted_iota(jnp.int32, (2 * rows, 1), 0) < rows, last[0], last[1])


# ---- decays of a gate per head ----


class Decays(NamedTuple):
    """Decays of a tile, segment masks included; the input gate, where there is one, is in `pair` and `leave`."""

    pair: Array  # [128, 128] from row j to row i, 0 for j > i
    enter: Array  # [128, 1] from the chunk's start to row i, inclusive
    leave: Array  # [128, 1] from row j to the chunk's end
    keep: Array  # [pack * K, 1] from the chunk's start to its end


def head_decays(g: Array | None, w: Array | None, masks: Masks, segments: Segments | None, layout: Layout) -> Decays:
    """From the log decays and the log input gates [1, 128] of a pack."""
    zero = jnp.zeros((ROWS, 1), jnp.float32)
    log_pair, log_enter, log_leave = jnp.zeros((ROWS, ROWS), jnp.float32), zero, zero
    if g is not None:
        upto = jnp.where(masks.upto, g, 0.0)
        log_pair, log_enter = sums(upto, masks.before), row_sum(upto)
        log_leave = row_sum(jnp.where(masks.after, g, 0.0))
    if w is not None:
        log_pair, log_leave = log_pair + w, log_leave + to_column(w, masks)
    pair = jnp.where(masks.upto, jnp.exp(log_pair), 0.0)
    enter, leave = jnp.exp(log_enter), jnp.exp(log_leave)
    if segments is not None:
        pair = jnp.where(segments.same, pair, 0.0)
        enter, leave = jnp.where(segments.enter, enter, 0.0), jnp.where(segments.leave, leave, 0.0)
    return Decays(pair, enter, leave, per_head(enter, layout.key, layout))


def head_gate_gradient(e: Array, reads: Array, writes: Array, through: Array, masks: Masks) -> Array:
    """dg [1, 128]: g_t is on every path from a row before t, or the state, to row t or later, or the end.

    e [128, 128] strictly lower; reads, writes [128, 1]; through [1, 128], what the state carries past the chunk.
    """
    into = sums(e, masks.after) + reads
    return column_sum(jnp.where(masks.upto, into, 0.0) + jnp.where(masks.after, writes, 0.0)) + through


def spread(row: Array, lanes: int, layout: Layout) -> Array:
    """The last row of each head of a column [128, 1], over that head's lanes: [1, lanes]."""
    last = [row[(h + 1) * layout.chunk - 1 : (h + 1) * layout.chunk] for h in range(layout.pack)]
    if layout.pack == 1:
        return jnp.broadcast_to(last[0], (1, lanes))
    return jnp.where(lax.broadcasted_iota(jnp.int32, (1, lanes), 1) < lanes // 2, last[0], last[1])


def head_total(x: Array, layout: Layout) -> Array:
    """Sum of each head's block of a block diagonal x [1 or pack * K, pack * D], on that head's lanes: [1, 128]."""
    x = column_sum(x)
    if layout.pack == 1:
        return jnp.broadcast_to(row_sum(x), (1, ROWS))
    left = lax.broadcasted_iota(jnp.int32, x.shape, 1) < x.shape[1] // 2
    first, second = row_sum(jnp.where(left, x, 0.0)), row_sum(jnp.where(left, 0.0, x))
    return jnp.where(lax.broadcasted_iota(jnp.int32, (1, ROWS), 1) < layout.chunk, first, second)
