"""Family A forward on Hopper, a gate per channel (GLA): one warpgroup has a (batch, value head, 64 values), in chunks.

    P_ij = scale sum_k q_ik k_jk e^{b_ik - b_jk}, i >= j ;  o = scale (e^b q) S + P V
    S' = e^{b_C} S + (e^{b_C - b} k)^T V

P by levels, see `tile_gpu_channel`; its diagonal has no decay. P, e^b q and e^{b_C - b} k are rounded to bfloat16 for
their products. The chunk states and P, in bfloat16, are kept for the backward pass.

Budget at K = 64: S, P, a decay and a product in registers, 128 a thread, and pieces of tiles, so two programs an SM.
Shared memory a program: q, k, v of 8 KB and g of 16 KB in two stages, o written over v (80 KB); decayed k, and g in two
pieces, written over with S and P once there are all decays (24 KB).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row, dot, rows
from jaxlin.kernels.tile_gpu_channel import half

STAGES = {64: 2, 128: 1}
"""Chunks in flight, by key dimension."""


def forward(
    form: Form, x: Inputs, g: Array, s0: Array | None, save: bool
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """(o [B, T, HV, V], final S [B, HV, K, V], if `save` (S at chunk starts [B, HV, N, K, V], P [B, HV, N, C, C])).

    g [B, T, HV, K] float32; the initial state defaults to 0.
    """
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, stages = time // CHUNK, STAGES[key_dim]
    flat = present(q=x.q, k=x.k, v=x.v, g=g, codes=x.codes, s0=s0)
    shape = jax.ShapeDtypeStruct
    out = dict(o=shape(x.v.shape, x.v.dtype), s=shape((batch, heads, key_dim, value_dim), jnp.float32))
    if save:
        out |= dict(states=shape((batch, heads, chunks, key_dim, value_dim), x.v.dtype))
        out |= dict(p=shape((batch, heads, chunks, CHUNK, CHUNK), x.v.dtype))
    scratch = dict(
        q=gpu.tile(stages, CHUNK, key_dim),
        k=gpu.tile(stages, CHUNK, key_dim),
        v=gpu.tile(stages, CHUNK, BLOCK),
        g=gpu.float_tile(stages, CHUNK, key_dim),
        **channel.gates(key_dim),
        decayed=gpu.tile(CHUNK, CHUNK),
        barrier=gpu.barrier(4 + form.segments, min(stages, chunks)),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(stages, CHUNK, dtype=jnp.int32))

    def gated_linear_attention_channel_fwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks, stages)

    grid = (batch, heads, value_dim // BLOCK)
    results = gpu.launch(
        gated_linear_attention_channel_fwd, list(flat.values()), list(out.values()), grid, list(scratch.values())
    )
    results = dict(zip(out, results, strict=True))
    return results["o"], results["s"], (results["states"], results["p"]) if save else None


def _program(form: Form, index, given, made, buffer, chunks, stages) -> None:
    b, h, w = index
    save, block = "states" in made, gpu.block(w)
    halves = range(given["q"].shape[3] // CHUNK)
    sums, high, low = channel.unpack(buffer, halves)

    def chunk(n, slot, refill, state):
        q, k, v, g = (buffer[name].at[slot] for name in "qkvg")
        d = decays(form, buffer, slot)
        gpu.wait_out(1)  # the states and P of the chunk before
        keep = [channel.cumulative(half(g, c), d.valid, sums[c], (high[c], low[c])) for c in halves]
        if form.segments:
            clean(d.valid, q, k, v)

        def level(s, p):
            product = None
            for c in halves:
                e = channel.level(sums[c], s)
                u = jnp.where(channel.second_half(s), gpu.load(half(q, c)), gpu.load(half(k, c))) * e
                gpu.put(buffer["decayed"], u)
                product = dot(u.astype(jnp.bfloat16), buffer["decayed"], product, tb=True)
            return jnp.where(channel.corners(s), product, p)

        (p,) = d.pair(channel.over_levels(level, dot(q, k, tb=True)))
        gpu.wait_out(0)
        refill()

        o, new = None, []
        for c in halves:
            reading = by_row(d.enter_scaled, channel.enter(sums[c]) * gpu.load(half(q, c)))
            leaving = by_row(d.leave, channel.leave(sums[c]) * gpu.load(half(k, c)))
            gpu.put(buffer["decayed"], leaving)
            gpu.put(low[c], state[c])
            if save:
                gpu.copy_out((low[c], made["states"].at[b, h, n, channel.key_rows(c), block]))
            o = dot(reading.astype(jnp.bfloat16), low[c], o)
            new.append(dot(buffer["decayed"], v, by_row(d.keep, rows(keep[c])) * state[c], ta=True))
        gpu.put(high[0], p)
        if save:
            gpu.copy_out((high[0], made["p"].at[b, h, n]), when=w == 0)
        o = dot(high[0], v, o)
        v[...] = stored(d, o)
        gpu.copy_out((v, made["o"].at[b, gpu.chunk_rows(n), h, block]))
        return tuple(new)

    parts = [*sources(given, buffer, index), channel.source(given, buffer, index)]
    state = channel.start(given, "s0", index, given["q"].shape[3])
    state = gpu.stream(parts, buffer["barrier"], chunk, state, chunks=chunks, stages=stages)
    channel.finish(made["s"], state, index)
    gpu.wait_out(0, read=False)
