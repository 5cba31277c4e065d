"""Family B forward on Hopper, a gate per channel (KDA): one warpgroup has a (batch, value head, 64 values), in chunks.

    A_ij = sum_k k_ik k_jk e^{b_ik - b_jk}, i > j ;  T = (I + diag(beta) A)^-1 ;  U = T beta (V - (e^b k) S)
    P_ij = scale sum_k q_ik k_jk e^{b_ik - b_jk}, i >= j ;  o = scale (e^b q) S + P U
    S' = e^{b_C} S + (e^{b_C - b} k)^T U

A and P share the decayed keys of each level (`tile_gpu_channel`); T as for a gate per head, kept without its diagonal.
The chunk states, T - I and P, in bfloat16, are kept for the backward pass.

What reads the state or is added to it is rounded to 16 bits, in two pieces of bfloat16: e^b q, e^b k, e^{b_C - b} k, U.
In 8 bits the decays, which a gate per head leaves out of its operands, would cost as much as all that is rounded there.

Budget at K = 64: S, beta Z, o, T's blocks and a product in registers, 160 a thread, and pieces of tiles. Shared memory:
q, k, v of 8 KB and g of 16 KB in one stage, with o written over v (40 KB); e^{b_C - b} k and U in two pieces, L and
then T, g in two pieces and then P and S (56 KB): two programs an SM.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_delta_rule_gpu_fwd import beta_of, unit_lower_inverse
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row, dot, rows
from jaxlin.kernels.tile_gpu_channel import half

STAGES = 1


def forward(
    form: Form, x: Inputs, g: Array, s0: Array | None, save: bool
) -> tuple[Array, Array, tuple[Array, Array, Array] | None]:
    """(o [B, T, HV, V], final S [B, HV, K, V], if `save` (S at chunk starts, T - I and P [B, HV, N, ...])).

    g [B, T, HV, K] float32; the initial state defaults to 0.
    """
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks = time // CHUNK
    flat = present(q=x.q, k=x.k, v=x.v, g=g, vectors=x.vectors, codes=x.codes, s0=s0)
    shape = jax.ShapeDtypeStruct
    out = dict(o=shape(x.v.shape, x.v.dtype), s=shape((batch, heads, key_dim, value_dim), jnp.float32))
    if save:
        out |= dict(states=shape((batch, heads, chunks, key_dim, value_dim), x.v.dtype))
        out |= {name: shape((batch, heads, chunks, CHUNK, CHUNK), x.v.dtype) for name in "tp"}
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, BLOCK),
        g=gpu.float_tile(STAGES, CHUNK, key_dim),
        vectors=gpu.vector(STAGES, form.vectors, CHUNK),
        **channel.gates(key_dim),
        **channel.pieces("leaving", "rest", key_dim=key_dim),
        **{name: gpu.tile(CHUNK, CHUNK) for name in ("lower", "u", "u_rest")},
        barrier=gpu.barrier(5 + form.segments, min(STAGES, chunks)),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))

    def gated_delta_rule_channel_fwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks)

    grid = (batch, heads, value_dim // BLOCK)
    results = gpu.launch(
        gated_delta_rule_channel_fwd, list(flat.values()), list(out.values()), grid, list(scratch.values())
    )
    results = dict(zip(out, results, strict=True))
    return results["o"], results["s"], tuple(results[x] for x in ("states", "t", "p")) if save else None


def _program(form: Form, index, given, made, buffer, chunks) -> None:
    b, h, w = index
    save, block = "states" in made, gpu.block(w)
    halves = range(given["q"].shape[3] // CHUNK)
    sums, high, low = channel.unpack(buffer, halves)
    leaving, rest = ([buffer[f"{x}{c}"] for c in halves] for x in ("leaving", "rest"))
    p_tile, lower_tile, u, u_rest = high[0], buffer["lower"], buffer["u"], buffer["u_rest"]

    def chunk(n, slot, refill, state):
        q, k, g = ([half(buffer[name].at[slot], c) for c in halves] for name in "qkg")
        v = buffer["v"].at[slot]
        gpu.wait_out(0)
        refill()
        d = decays(form, buffer, slot)
        beta = beta_of(form, buffer, slot)
        keep = [channel.cumulative(g[c], d.valid, sums[c], (high[c], low[c])) for c in halves]
        for c in halves:
            g[c][...] = state[c]  # S waits where g was: too many tiles are alive
        if form.segments:
            clean(d.valid, *q, *k, v)

        def level(s, carry):
            p = a = None
            for c in halves:
                e = channel.level(sums[c], s)
                gpu.put(leaving[c], gpu.load(k[c]) * e)
                a = dot(leaving[c], leaving[c], a, tb=True)
                p = dot((gpu.load(q[c]) * e).astype(jnp.bfloat16), leaving[c], p, tb=True)
            corners = channel.corners(s)
            return jnp.where(corners, p, carry[0]), jnp.where(corners, a, carry[1])

        p = None
        for c in halves:
            p = dot(q[c], k[c], p, tb=True)
        p, a = channel.over_levels(level, (p, gpu.zeros(CHUNK, CHUNK)))

        read = o = None
        for c in halves:
            leave = by_row(d.leave, channel.leave(sums[c]))
            channel.put_pieces(leave * gpu.load(k[c]), leaving[c], rest[c])
            enter = channel.enter(sums[c])
            gpu.put(low[c], gpu.load(g[c]))
            read = channel.dot_pieces(by_row(d.enter, enter) * gpu.load(k[c]), low[c], read)
            o = channel.dot_pieces(by_row(d.enter_scaled, enter) * gpu.load(q[c]), low[c], o)
        x = by_row(beta, gpu.load(v) - read)
        (p,), (a,) = d.pair(p), d.keys(a)
        gpu.put(p_tile, p)
        t = unit_lower_inverse(by_row(-beta, a), lower_tile, u_rest, u).astype(jnp.bfloat16)
        if save:
            gpu.put(lower_tile, t)
            gpu.copy_out((lower_tile, made["t"].at[b, h, n]), (p_tile, made["p"].at[b, h, n]), when=w == 0)
            gpu.copy_out(*((low[c], made["states"].at[b, h, n, channel.key_rows(c), block]) for c in halves))

        gpu.put(u, x)
        channel.put_pieces(dot(t, u, x), u, u_rest)
        o = dot(p_tile, u_rest, dot(p_tile, u, o))
        v[...] = stored(d, o)
        gpu.copy_out((v, made["o"].at[b, gpu.chunk_rows(n), h, block]))
        new = []
        for c in halves:
            s = by_row(d.keep, rows(keep[c])) * gpu.load(g[c])
            for x, y in ((leaving[c], u), (leaving[c], u_rest), (rest[c], u)):
                s = dot(x, y, s, ta=True)
            new.append(s)
        return tuple(new)

    parts = [*sources(given, buffer, index), channel.source(given, buffer, index)]
    state = channel.start(given, "s0", index, given["q"].shape[3])
    state = gpu.stream(parts, buffer["barrier"], chunk, state, chunks=chunks, stages=STAGES)
    channel.finish(made["s"], state, index)
    gpu.wait_out(0, read=False)
