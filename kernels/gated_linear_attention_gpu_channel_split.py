"""Sequences with gates per channel cut into parts that run side by side; see `gated_linear_attention_gpu_split`.

The state at the end of a part is M S + N. N is what the kernel that walks over the chunks finds from a zero state, in a
first pass; M is the product of the chunks' keep for family A. For family B its columns are the states that those of the
identity are taken to by v = 0: further blocks of values in the same pass. Likewise in reverse. What chunks have without
the state is found before, once.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxlin.kernels.gated_linear_attention_gpu_fwd import Inputs
from jaxlin.kernels.gated_linear_attention_gpu_split import combine, cut


def cut_inputs(x: Inputs, g: Array, parts: int) -> tuple[Inputs, Array]:
    """The inputs with parts as rows of the batch, as vectors are already."""
    q, k, v, codes, g = (cut(y, parts, 1) for y in (x.q, x.k, x.v, x.codes, g))
    return Inputs(q, k, v, x.vectors, codes), g


def at_parts(keep: Array, update: Array, start: Array | None, parts: int, reverse: bool = False) -> Array:
    """Family A's state at the start of each part (reverse: cotangent at its end), [B * P, HV, K, V].

    keep [B * P, HV, N, K] of chunks, update [B * P, HV, K, V]; start [B, HV, K, V] is of the first part (the last).
    """
    _, heads, key_dim, value_dim = update.shape

    def by_part(x):  # every channel is a head of its own
        return jnp.moveaxis(x.reshape(-1, parts, heads * key_dim, *x.shape[3:]), 1, 2)

    start = None if start is None else start.reshape(-1, heads * key_dim, value_dim)
    found = combine(by_part(keep.prod(2)), by_part(update), start, reverse)
    return jnp.moveaxis(found, 2, 1).reshape(update.shape)
