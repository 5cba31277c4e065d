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
    """(I + L)^-1 of strictly lower triangular L [..., C, C], any C, in the dtype of L (float32 or float64).

    Entries of L on or above the diagonal must be zero.
    """
    size = lower.shape[-1]
    if size <= BASE:
        return _substitute(lower)
    half = BASE * -(-size // (2 * BASE))  # the first half is a multiple of BASE: one ragged leaf at most
    top = unit_lower_inverse(lower[..., :half, :half])
    bottom = unit_lower_inverse(lower[..., half:, half:])
    # [[A, 0], [L21, D]]^-1 = [[A^-1, 0], [-D^-1 L21 A^-1, D^-1]]
    corner = -_product(bottom, _product(lower[..., half:, :half], top))
    batch = [(0, 0)] * (lower.ndim - 1)
    return jnp.concatenate(
        [jnp.pad(top, [*batch, (0, size - half)]), jnp.concatenate([corner, bottom], axis=-1)], axis=-2
    )


def _substitute(lower: Array) -> Array:
    """Forward substitution by columns: row i is final once rows < i are, then leaves every row below it."""
    inverse = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    for i in range(lower.shape[-1] - 1):
        inverse = inverse - lower[..., :, i : i + 1] * inverse[..., i : i + 1, :]
    return inverse


def _product(a: Array, b: Array) -> Array:
    return jnp.einsum("...ij,...jk->...ik", a, b, precision=lax.Precision.HIGHEST)
