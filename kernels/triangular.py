"""The inverse of a unit lower triangular matrix, by forward substitution in 16-row blocks and exact block merging.

No power of L is ever formed, so every intermediate stays as small as the inverse itself. A Neumann product or a
Newton-Schulz iteration is wrong by factors of 10 to 1e19 in float32 as soon as the keys of a chunk are correlated.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

BASE = 16
"""Rows up to which substitution is used: beyond, two products with the halves' inverses are cheaper."""


def unit_lower_inverse(lower: Array) -> Array:
    """(I + L)^-1 of strictly lower triangular L [..., C, C], C a power of two, in the dtype of L (at least float32).

    Entries of L on or above the diagonal must be zero.
    """
    size = lower.shape[-1]
    base = min(BASE, size)
    leaves = jnp.stack([lower[..., i : i + base, i : i + base] for i in range(0, size, base)])
    return _merge(lower, list(_substitute(leaves)))


def _merge(lower: Array, leaves: list[Array]) -> Array:
    """The inverse of I + L from those of its diagonal blocks: [[A, 0], [M, D]]^-1 = [[A', 0], [-D' M A', D']].

    D' M comes first: then T (I + L) is I to rounding, and T b as exact as what it solves for is large. In the other
    order (I + L) T is, which with identical keys and beta 2 cost a digit of the states in float32.
    """
    if len(leaves) == 1:
        return leaves[0]
    half, middle = lower.shape[-1] // 2, len(leaves) // 2
    top = _merge(lower[..., :half, :half], leaves[:middle])
    bottom = _merge(lower[..., half:, half:], leaves[middle:])
    corner = -_product(_product(bottom, lower[..., half:, :half]), top)
    above = jnp.concatenate([top, jnp.zeros_like(top)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corner, bottom], axis=-1)], axis=-2)


def _substitute(lower: Array) -> Array:
    """Forward substitution by columns: row i is final once the rows above it are, then leaves every row below.

    A loop, not its unrolling: what enters a loop is computed once, else XLA on the CPU computes L again in every step.
    """

    def eliminate(i, inverse):
        column = lax.dynamic_slice_in_dim(lower, i, 1, axis=-1)
        row = lax.dynamic_slice_in_dim(inverse, i, 1, axis=-2)
        return inverse - column * row

    identity = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return lax.fori_loop(0, lower.shape[-1] - 1, eliminate, identity, unroll=5)


def _product(a: Array, b: Array) -> Array:
    return jnp.einsum("...ij,...jk->...ik", a, b, precision=lax.Precision.HIGHEST)
