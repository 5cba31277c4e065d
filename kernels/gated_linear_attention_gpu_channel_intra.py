"""Family A on Hopper, a gate per channel (GLA): what chunks have without the state, one warpgroup for each.

    P_ij = scale sum_k q_ik k_jk e^{b_ik - b_jk}, i >= j ;  Q = scale e^b q ;  K = e^{b_C - b} k ;  keep = e^{b_C}

P by levels (`tile_gpu_channel`); its diagonal has no decay. Masks of segments and zeros of padding are in all four, so
that the walk over the chunks (`gated_linear_attention_gpu_channel_walk`) needs no gates, and nothing here depends on
the values, of which there may be several blocks.

Bytes at K = V = 64, in units of q: q, k and g (2) are read, P, Q, K written: 7. A walk that makes Q and K by itself
reads g instead, once for each block of values.

Budget at K = 64: P, a decay and a product in registers, 96 a thread, and pieces of tiles. Shared memory: q, k of 8 KB,
with Q, K written over them; b of 18 KB, and in turn g and its two pieces; decayed k, then P (8 KB): 42 KB.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import tile_gpu_blocks as blocks
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, WGMMA, by_row
from jaxlin.kernels.tile_gpu_keys import key_rows, over
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots


class Chunks(NamedTuple):
    """What the walks and the backward pass read, bfloat16 but for keep."""

    q: Array  # [B, T, HV, K], decayed and scaled
    k: Array  # [B, T, HV, K], decayed
    keep: Array  # [B, HV, N, K] float32
    p: Array  # [B, HV, N, C, C]


def intra(form: Form, x: Inputs, g: Array) -> Chunks:
    """Q, K, keep and P of all chunks; g [B, T, HV, K] float32."""
    batch, time, heads, key_dim = g.shape
    chunks, halves = time // CHUNK, key_dim // CHUNK
    flat = present(q=x.q, k=x.k, g=g, codes=x.codes)
    shape = jax.ShapeDtypeStruct
    out = Chunks(
        q=shape(g.shape, x.q.dtype),
        k=shape(g.shape, x.k.dtype),
        keep=shape((batch, heads, chunks, key_dim), jnp.float32),
        p=shape((batch, heads, chunks, CHUNK, CHUNK), x.q.dtype),
    )
    scratch = dict(
        **channel.keys_and_gates(halves),
        decayed=gpu.tile(CHUNK, CHUNK),
        keep=gpu.vector(key_dim),
        barrier=gpu.barrier(3 * halves + form.segments, 1),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(1, CHUNK, dtype=jnp.int32))

    def gated_linear_attention_channel_intra(index, inputs, outputs, buffers):
        given, buffer = dict(zip(flat, inputs, strict=True)), dict(zip(scratch, buffers, strict=True))
        _program(form, index, given, Chunks(*outputs), buffer, halves)

    grid = (batch, heads, chunks)
    return Chunks(
        *gpu.launch(gated_linear_attention_channel_intra, list(flat.values()), out, grid, list(scratch.values()))
    )


def _program(form: Form, index, given, made: Chunks, buffer, count: int) -> None:
    b, h, n = index
    halves, decayed = range(count), buffer["decayed"]
    q, k, gates = channel.unpack(buffer, count)
    gpu.fetch(channel.sources(given, buffer, index, count), buffer["barrier"])
    gpu.arrived(buffer["barrier"])
    d = decays(form, buffer, jnp.int32(0))
    keep = [channel.cumulative(gates[c], d.valid) for c in halves]
    if form.segments:
        clean(d.valid, *q, *k)

    def rows_of(c, s):
        chosen = jnp.where(channel.second_half(s), gpu.load(q[c]), gpu.load(k[c]))
        return (chosen * channel.level(gates[c].b, s)).astype(jnp.bfloat16)

    def own_level(s, p):
        u = [rows_of(c, s) for c in halves]
        return jnp.where(channel.corners(s, blocks.SIZE), over(halves, lambda c, x: blocks.of_rows(u[c], u[c], x)), p)

    def level(s, p):
        product = None
        for c in halves:
            u = rows_of(c, s)
            gpu.put(decayed, u)
            (product,) = dots(Sum([Product(u, decayed, tb=True)], product), last=True)
        return jnp.where(channel.corners(s), product, p)

    p = over(halves, lambda c, x: blocks.of_rows(gpu.load_in(q[c], WGMMA), gpu.load_in(k[c], WGMMA), x))
    p = blocks.as_tile(channel.over_levels(channel.OWN_LEVELS, own_level, p))
    p = d.pair() * channel.over_levels(channel.LEVELS, level, p)
    decayed[...] = p.astype(decayed.dtype)
    copies = [(decayed, made.p.at[b, h, n]), (buffer["keep"], made.keep.at[b, h, n])]
    for c in halves:
        b_c, channels = gates[c].b, key_rows(c)
        q[c][...] = by_row(d.enter_scaled, channel.enter(b_c) * gpu.load(q[c])).astype(jnp.bfloat16)
        k[c][...] = by_row(d.leave, channel.leave(b_c) * gpu.load(k[c])).astype(jnp.bfloat16)
        buffer["keep"].at[channels][...] = d.keep * keep[c]
        copies += [(x[c], y.at[b, gpu.chunk_rows(n), h, channels]) for x, y in ((q, made.q), (k, made.k))]
    gpu.copy_out(*copies)
    gpu.wait_out(0)
