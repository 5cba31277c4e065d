"""Sequences with gates per channel cut into parts that run side by side; see `gated_linear_attention_gpu_split`.

The state at the end of a part is M S + N. N is what the kernels find from a zero state, in a first pass that costs as
much as the second; M is diag(e^{sum of g}) for family A. For family B its columns are the states that those of the
identity are taken to by v = 0: further blocks of values in the same pass. Likewise in reverse.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxlin.kernels.gated_linear_attention_gpu_fwd import KEEP, VALID, Inputs
from jaxlin.kernels.gated_linear_attention_gpu_split import combine, cut, join, parts_of
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK
from jaxlin.kernels.tile_gpu_channel import MIN_GATE


def parts(v: Array) -> int:
    """Into how many parts to cut sequences of values v [B, T, HV, V]."""
    batch, time, heads, value_dim = v.shape
    return parts_of(batch * heads * (value_dim // BLOCK), time // CHUNK)


def cut_inputs(x: Inputs, g: Array, parts: int) -> tuple[Inputs, Array]:
    """The inputs with parts as rows of the batch."""
    q, k, v, codes, g = (cut(y, parts, 1) for y in (x.q, x.k, x.v, x.codes, g))
    return Inputs(q, k, v, cut(x.vectors, parts, 2), codes), g


def join_gradients(d, parts: int):
    """The gradients of q, k, v, g with parts put together; that of the initial state is the first part's."""
    q, k, v, g = (join(y, parts, 1) for y in (d.q, d.k, d.v, d.g))
    return d._replace(q=q, k=k, v=v, g=g, s=d.s[::parts])


def keep_of_parts(g: Array, codes: Array | None) -> Array:
    """Family A's M, [B * P, HV, K], of parts cut."""
    g = jnp.maximum(g, MIN_GATE)
    if codes is None:
        return jnp.exp(g.sum(1))
    valid = (codes.reshape(codes.shape[0], -1) & VALID) != 0
    keep = jnp.exp(jnp.where(valid[:, :, None, None], g, 0.0).sum(1))
    return jnp.where(((codes[..., 0] & KEEP) != 0).all(1)[:, None, None], keep, 0.0)


def at_parts(keep: Array, update: Array, start: Array | None, parts: int, reverse: bool = False) -> Array:
    """Family A's state at the start of each part (reverse: cotangent at its end), [B * P, HV, K, V].

    keep [B * P, HV, K], update [B * P, HV, K, V]; start [B, HV, K, V] belongs to the first part (the last).
    """
    _, heads, key_dim, value_dim = update.shape

    def by_part(x):  # every channel is a head of its own
        return jnp.moveaxis(x.reshape(-1, parts, heads * key_dim, *x.shape[3:]), 1, 2)

    start = None if start is None else start.reshape(-1, heads * key_dim, value_dim)
    found = combine(by_part(keep), by_part(update), start, reverse)
    return jnp.moveaxis(found, 2, 1).reshape(update.shape)
