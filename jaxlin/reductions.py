"""Several reductions in one pass over what they read. None can be differentiated.

Left to itself XLA for GPUs makes each a kernel of its own: of logits, each is a pass over gigabytes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


def sums(terms: dict[str, Array], axes: tuple[int, ...]) -> dict[str, Array]:
    """The sum of each array, all of one shape, over `axes`."""
    names, arrays = zip(*terms.items(), strict=True)
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)

    def add(left, right):
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return dict(zip(names, lax.reduce(arrays, zeros, add, axes), strict=True))


class Largest(NamedTuple):
    """The largest entry of each row, and the index of the first that is as large."""

    value: Array
    index: Array


def maxima(*arrays: Array) -> list[Largest]:
    """The largest of each array along the last axis; arrays have one shape."""
    index = lax.broadcasted_iota(jnp.int32, arrays[0].shape, arrays[0].ndim - 1)
    operands = [x for a in arrays for x in (a, index)]
    least = [x for a in arrays for x in (jnp.array(-jnp.inf, a.dtype), jnp.int32(0))]

    def larger(left, right):
        found = []
        for a, i, b, j in zip(left[::2], left[1::2], right[::2], right[1::2], strict=True):
            first = (a > b) | ((a == b) & (i < j))
            found += [jnp.where(first, a, b), jnp.where(first, i, j)]
        return tuple(found)

    flat = lax.reduce(operands, least, larger, [arrays[0].ndim - 1])
    return [Largest(value, index) for value, index in zip(flat[::2], flat[1::2], strict=True)]
