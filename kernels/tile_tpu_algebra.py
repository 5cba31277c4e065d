"""The algebra of one stacked tile (see tile_tpu_layout.py): products, masks, the triangular inverse.

Precision. float32 tiles are multiplied at `Precision.HIGHEST`, q k^T and k k^T as three bfloat16 pieces each. With
bfloat16 inputs, an operand that is bfloat16 already is exact; a float32 one is split into bfloat16 pieces: one where it
meets the state, two (16 bits, as in bf16x3) inside a chunk. The split is written out, since some releases of Mosaic
know only one pass and six.
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
    return _by_pieces(x, y, axes, 2 if exact else 1)


def inner_products(x: Array, y: Array, dtype: Any) -> Array:
    """x y^T, of rows that may be nearly orthogonal: in a float32 problem more exact than a sum in float32.

    The six passes are as many as `HIGHEST` takes, but each is summed by itself. The large one adds products of 16 bits,
    which a float32 sum hardly rounds, so that what cancels in it does; in the others there is little to round.
    """
    return _by_pieces(x, y, NT, 3 if dtype == jnp.float32 else 1)


def _by_pieces(x: Array, y: Array, axes: tuple[int, int], count: int) -> Array:
    terms = [
        _dot(a, b, axes, lax.Precision.DEFAULT)
        for i, a in enumerate(pieces(x, count))
        for j, b in enumerate(pieces(y, count))
        if i + j < count
    ]
    return _total(terms)


def sums_after(x: Array, mask: Array, dtype: Any) -> Array:
    """x times a bool matrix: 24 bits of x, or 16 of a bfloat16 problem's."""
    ones = _ones(mask)
    return _total([_dot(a, ones, NN, lax.Precision.DEFAULT) for a in pieces(x, _sum_pieces(dtype))])


def sums_before(mask: Array, x: Array, dtype: Any) -> Array:
    """A bool matrix times x, as precisely."""
    ones = _ones(mask)
    return _total([_dot(ones, a, NN, lax.Precision.DEFAULT) for a in pieces(x, _sum_pieces(dtype))])


def _sum_pieces(dtype: Any) -> int:
    return 3 if dtype == jnp.float32 else 2


def _total(terms: list[Array]) -> Array:
    return sum(terms[1:], terms[0])


def _ones(mask: Array) -> Array:
    return mask.astype(jnp.float32).astype(jnp.bfloat16)


def pieces(x: Array, count: int) -> list[Array]:
    """x as a sum of bfloat16s, each of them what is left, rounded: in its bits, as XLA drops casts to and fro."""
    if x.dtype == jnp.bfloat16:
        return [x]
    if count == 1:
        return [x.astype(jnp.bfloat16)]
    bits = (lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(0x8000)) & jnp.int32(-0x10000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
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
    run: Array  # [128, 128] row i and row j, padding too
    continues: Array  # [1, 128] the row's run began before the chunk
    tokens: Array  # [1, 128] the row is a token


def read_segments(ref: Any, masks: Masks) -> Segments | None:
    """From the rows run, carry, valid of `tile_tpu_layout.segment_rows`."""
    if ref is None:
        return None
    run, carry, valid = (ref[0, 0, i : i + 1, :] for i in range(3))
    run_i, token = to_column(run, masks), to_column(valid, masks) > 0
    same = run_i == run
    return Segments(
        token, same & (valid > 0), run_i == carry[:, :1], (run_i == run[:, -1:]) & token, same, run == carry, valid > 0
    )


def to_column(row: Array, masks: Masks) -> Array:
    """[1, 128] -> [128, 1]."""
    return jnp.sum(jnp.where(masks.eye, row, 0.0), axis=1, keepdims=True)


def row_sum(x: Array) -> Array:
    return jnp.sum(x, axis=1, keepdims=True)


def column_sum(x: Array) -> Array:
    return jnp.sum(x, axis=0, keepdims=True)


# ---- (I + L)^-1 ----


def unit_lower_inverse(lower: Array, layout: Layout) -> Array:
    """(I + L)^-1 of strictly lower, block diagonal L [128, 128]: X <- X - X M X, M the corners of blocks of 2s rows.

    No power of L is formed, so 16 bits do for bfloat16 inputs.
    """
    i, j = (lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in (0, 1))
    differ = i ^ j
    inverse = jnp.where(i == j, 1.0, jnp.where(differ == 1, -lower, 0.0))
    s = 2
    while s < layout.chunk:
        corners = jnp.where((differ >= s) & (differ < 2 * s), lower, 0.0)
        left = product(inverse, corners, NN, layout.dtype, exact=True)
        inverse -= product(left, inverse, NN, layout.dtype, exact=True)
        s *= 2
    return inverse
