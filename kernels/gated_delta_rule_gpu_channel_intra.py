"""Family B on Hopper, a gate per channel (KDA): what chunks have without the state, one warpgroup for each.

    A_ij = sum_k k_ik k_jk e^{b_ik - b_jk}, i > j ;  P_ij = scale sum_k q_ik k_jk e^{b_ik - b_jk}, i >= j
    T = (I + diag(beta) A)^-1 ;  T' = (I + A diag(beta))^-1 ;  T diag(beta) = diag(beta) T'
    Q = scale e^b q ;  K = e^b k ;  W = e^{b_C - b} k ;  keep = e^{b_C}

A and P share the decayed keys of each level (`tile_gpu_channel`); T as for a gate per head. T and T' are kept without
their diagonals. With T' the forward pass has U / beta without a division, and that is all that the gradients of keys,
gates and beta need of the values; T is for the adjoint system. Each is an inverse of its own: with
T' = I - A T diag(beta), o had 2e-2 where keys are correlated by 0.999. Masks of segments and zeros of padding are in
all of these.

Q and W have a second piece of bfloat16, 16 bits in all: with 8, o had 3.9e-3 by Q's and 3.7e-3 by W's, 3.6e-3 by K's
(of 4e-3 allowed, 3.5e-3 with two of each; gates weak, T = 257).

Bytes at K = V = 64, in units of q: q, k and g (2) are read, Q and W twice, K, P, T, T' written: 12.

Budget at K = 64: A, the blocks of T and T' and two products in registers, 160 a thread, and pieces of tiles, so two
programs an SM. Shared memory: q, k of 8 KB; b of 18 KB, and in turn g and its pieces; three tiles for each inverse and
one for P (56 KB). What is made is written over all of these: 90 KB. At K = 128, 108 KB, the inverses are found one
after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels import tile_gpu_blocks as blocks
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_delta_rule_gpu_intra import Lower, beta_of, unit_lower_inverses
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, WGMMA, by_row, columns
from jaxlin.kernels.tile_gpu_keys import key_rows, over
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots


class Chunks(NamedTuple):
    """What the walks and the backward pass read, bfloat16 but for keep; keys [B, T, HV, K], pairs [B, HV, N, C, C]."""

    q: Array
    q_rest: Array
    k: Array
    w: Array
    w_rest: Array
    p: Array
    t: Array  # T - I
    t_values: Array  # T' - I
    keep: Array  # [B, HV, N, K] float32


def intra(form: Form, x: Inputs, g: Array) -> Chunks:
    """Everything of all chunks; g [B, T, HV, K] float32."""
    batch, time, heads, key_dim = g.shape
    chunks, halves = time // CHUNK, key_dim // CHUNK
    flat = present(q=x.q, k=x.k, g=g, vectors=x.vectors, codes=x.codes)
    shape = jax.ShapeDtypeStruct
    keys, pairs = shape(g.shape, x.q.dtype), shape((batch, heads, chunks, CHUNK, CHUNK), x.q.dtype)
    out = Chunks(*[keys] * 5, *[pairs] * 3, shape((batch, heads, chunks, key_dim), jnp.float32))
    scratch = channel.keys_and_gates(halves)
    scratch |= {name: gpu.tile(CHUNK, CHUNK) for name in ("lower", "rest", "p", *(f"free{c}" for c in range(halves)))}
    if halves == 1:  # room for T' beside T, in two programs an SM
        scratch |= {f"{name}_values": gpu.tile(CHUNK, CHUNK) for name in ("lower", "rest", "blocks")}
    scratch |= dict(vectors=gpu.vector(1, form.vectors, CHUNK), keep=gpu.vector(key_dim))
    if form.segments:
        scratch |= dict(codes=gpu.vector(1, CHUNK, dtype=jnp.int32))
    scratch |= dict(barrier=gpu.barrier(3 * halves + 1 + form.segments, 1))

    def gated_delta_rule_channel_intra(index, inputs, outputs, buffers):
        given, buffer = dict(zip(flat, inputs, strict=True)), dict(zip(scratch, buffers, strict=True))
        _program(form, index, given, Chunks(*outputs), buffer, halves)

    grid = (batch, heads, chunks)
    return Chunks(*gpu.launch(gated_delta_rule_channel_intra, list(flat.values()), out, grid, list(scratch.values())))


def _program(form: Form, index, given, made: Chunks, buffer, count: int) -> None:
    b, h, n = index
    halves, free = range(count), [buffer[f"free{c}"] for c in range(count)]
    q, k, gates = channel.unpack(buffer, count)
    together = "lower_values" in buffer
    p_tile, lower, lower_values = (buffer[name] for name in ("p", "lower", "lower_values" if together else "lower"))
    gpu.fetch(channel.sources(given, buffer, index, count), buffer["barrier"])
    gpu.arrived(buffer["barrier"])
    d, beta = decays(form, buffer, jnp.int32(0)), beta_of(form, buffer, jnp.int32(0))
    keep = [channel.cumulative(gates[c], d.valid) for c in halves]
    if form.segments:
        clean(d.valid, *q, *k)

    def rows_of(c, s):
        e = channel.level(gates[c].b, s)
        return [(gpu.load(x[c]) * e).astype(jnp.bfloat16) for x in (q, k)]

    def merged(s, found, carry):
        corners = channel.corners(s, found[0].shape[1])
        return tuple(jnp.where(corners, x, before) for x, before in zip(found, carry, strict=True))

    def own_level(s, carry):
        p = a = None
        for c in halves:
            reading, keys = rows_of(c, s)
            p, a = blocks.of_rows(reading, keys, p), blocks.of_rows(keys, keys, a)
        return merged(s, (p, a), carry)

    def level(s, carry):
        reading = []
        for c in halves:
            rows, keys = rows_of(c, s)
            gpu.put(free[c], keys)
            reading.append(rows)
        found = dots(*(Sum([Product(x[c], free[c], tb=True) for c in halves]) for x in (reading, free)), last=True)
        return merged(s, found, carry)

    p = over(halves, lambda c, x: blocks.of_rows(gpu.load_in(q[c], WGMMA), gpu.load_in(k[c], WGMMA), x))
    own = channel.over_levels(channel.OWN_LEVELS, own_level, (p, registers.zeros(CHUNK, blocks.SIZE)))
    p, a = channel.over_levels(channel.LEVELS, level, tuple(blocks.as_tile(x) for x in own))
    p, a = d.pair() * p, d.keys() * a
    gpu.put(p_tile, p)

    def minus_values():
        return -columns(gpu.load_columns(buffer["vectors"].at[0, form.vectors - 1])) * a

    t = Lower(by_row(-beta, a), lower, buffer["rest"], free[0])
    if together:
        tiles = (buffer[f"{name}_values"] for name in ("lower", "rest", "blocks"))
        t, t_values = unit_lower_inverses(t, Lower(minus_values(), *tiles))
        gpu.put(lower_values, t_values)
        gpu.put(lower, t)
        gpu.copy_out((lower, made.t.at[b, h, n]))
    else:
        gpu.put(lower, *unit_lower_inverses(t))
        gpu.copy_out((lower, made.t.at[b, h, n]))
        gpu.wait_out(0)
        gpu.put(lower, *unit_lower_inverses(t._replace(minus=minus_values())))

    part = gpu.chunk_rows(n)
    copies = [(p_tile, made.p.at[b, h, n]), (lower_values, made.t_values.at[b, h, n])]
    for c in halves:
        enter, leave = channel.enter(gates[c].b), by_row(d.leave, channel.leave(gates[c].b))
        reading = by_row(d.enter_scaled, enter) * gpu.load(q[c])
        keys = by_row(d.enter, enter) * gpu.load(k[c])
        written = leave * gpu.load(k[c])
        channel.put_pieces(reading, q[c], free[c])
        channel.put_pieces(written, gates[c].high, gates[c].low)
        k[c][...] = keys.astype(jnp.bfloat16)
        buffer["keep"].at[key_rows(c)][...] = d.keep * keep[c]
        to = (made.q, made.q_rest, made.k, made.w, made.w_rest)
        tiles = (q[c], free[c], k[c], gates[c].high, gates[c].low)
        copies += [(x, y.at[b, part, h, key_rows(c)]) for x, y in zip(tiles, to, strict=True)]
    gpu.copy_out(*copies, (buffer["keep"], made.keep.at[b, h, n]))
    gpu.wait_out(0)
