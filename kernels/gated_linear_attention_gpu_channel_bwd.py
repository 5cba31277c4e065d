"""Family A backward on Hopper, a gate per channel (GLA): one warpgroup walks the chunks in reverse, dS in registers.

With W = scale (do V^T) on and below the diagonal, P and S from the forward pass and F, R of the levels
(`tile_gpu_channel`),

    dV = P^T do + (e^{b_C - b} k) dS' ;  dS = e^{b_C} dS' + scale (e^b q)^T do
    dq_state = scale e^b (do S^T) ;      dq = dq_state + diag(W) k + sum over levels of e_s F (second halves)
    dk_state = e^{b_C - b} (V dS'^T) ;   dk = dk_state + diag(W) q + sum over levels of e_s F (first halves)
    dg_t = sum_{i >= t} (R_i + q_i dq_state_i) + sum_{j < t} k_j dk_state_j + e^{b_C} (S dS'^T)_kk

all by channel. dg is written where g was: neither its sums nor those of gates are seen by anything else.

Budget at K = V = 64: dq, dk, R, a decay and a product in registers, 160 a thread and pieces of tiles, of 255; dS waits
in shared memory, where g was.
Shared memory: q, k, v, do, S, P of 8 KB and g of 16 KB in one stage, with dq, dk, dv, dg written over q, k, v, g
(64 KB); dS', u, W and g in two pieces as operands (40 KB): two programs an SM, one computes while the other loads.
Keys of 128 are taken in halves, one after the other; one program an SM.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_linear_attention_gpu_fwd import RUN, Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row, dot, rows
from jaxlin.kernels.tile_gpu_channel import half

STAGES = 1


class Gradients(NamedTuple):
    """dq, dk, dg for each value head and block of values [B, T, HV * V/64, K], dg float32; dv [B, T, HV, V]; of the
    initial S."""

    q: Array
    k: Array
    v: Array
    g: Array
    s: Array


def backward(form: Form, x: Inputs, g: Array, states: Array, p: Array, do: Array, ds: Array | None) -> Gradients:
    """The gradients of `forward`, whose chunk states and P come in; ds None is zero."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, blocks = time // CHUNK, value_dim // BLOCK
    flat = present(q=x.q, k=x.k, v=x.v, g=g, codes=x.codes, do=do, states=states, p=p, ds=ds)
    shape = jax.ShapeDtypeStruct
    per_key = (batch, time, heads * blocks, key_dim)
    out = dict(
        q=shape(per_key, x.q.dtype),
        k=shape(per_key, x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        g=shape(per_key, jnp.float32),
        s=shape((batch, heads, key_dim, value_dim), jnp.float32),
    )
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, BLOCK),
        g=gpu.float_tile(STAGES, CHUNK, key_dim),
        do=gpu.tile(STAGES, CHUNK, BLOCK),
        states=gpu.tile(STAGES, key_dim, BLOCK),
        p=gpu.tile(STAGES, CHUNK, CHUNK),
        **channel.gates(key_dim),
        **{name: gpu.tile(CHUNK, CHUNK) for name in ("d_state", "u", "w")},
        vector=gpu.vector(CHUNK),
        barrier=gpu.barrier(7 + form.segments, min(STAGES, chunks)),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))

    def gated_linear_attention_channel_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks)

    grid = (batch, heads, blocks)
    return Gradients(
        *gpu.launch(
            gated_linear_attention_channel_bwd, list(flat.values()), list(out.values()), grid, list(scratch.values())
        )
    )


def _program(form: Form, index, given, made, buffer, chunks) -> None:
    b, h, w = index
    block, blocks, key_dim = gpu.block(w), given["v"].shape[3] // BLOCK, given["q"].shape[3]
    halves = range(key_dim // CHUNK)
    sums, high, low = channel.unpack(buffer, halves)
    d_state, u, w_tile, vector = (buffer[x] for x in ("d_state", "u", "w", "vector"))

    def chunk(n, slot, refill, d_states):
        v, do, p = (buffer[name].at[slot] for name in ("v", "do", "p"))
        d = decays(form, buffer, slot)
        if form.segments:
            clean(d.valid, buffer["q"].at[slot], buffer["k"].at[slot], v, do)
        same = channel.same_run(buffer["codes"].at[slot], RUN) if form.segments else None
        dp = dot(do, v, tb=True)
        own = form.scale * channel.diagonal(dp)
        channel.put_symmetric(w_tile, dp, dot(v, do, tb=True), same, form.scale)
        gpu.wait_out(0)
        refill()
        dv, new = dot(p, do, ta=True), []

        for c in halves:
            q, k, g = (half(buffer[name].at[slot], c) for name in "qkg")
            state = buffer["states"].at[slot, channel.key_rows(c)] if len(halves) > 1 else buffer["states"].at[slot]
            ds, b_c, pieces = d_states[c], sums[c], (high[c], low[c])
            keep = by_row(d.keep, rows(channel.cumulative(g, d.valid, b_c, pieces)))
            gpu.put(d_state, ds)
            carried = jnp.sum(keep * gpu.load(state) * ds, 1)

            # rows that read the state
            enter = by_row(d.enter_scaled, channel.enter(b_c))
            dq = enter * dot(do, state, tb=True)
            gpu.put(u, enter * gpu.load(q))
            g[...] = dot(u, do, keep * ds, ta=True)  # dS waits where g was: too many tiles are alive
            r = gpu.load(q) * dq

            # rows that are written to the next one
            leave = by_row(d.leave, channel.leave(b_c))
            dk = leave * dot(v, d_state, tb=True)
            gpu.put(u, leave * gpu.load(k))
            dv = dot(u, d_state, dv)
            if c == halves[-1]:
                v[...] = stored(d, dv)
            gpu.put(d_state, gpu.load(k) * dk)  # the writes: dS' is not read again

            # rows that meet inside the chunk
            dq = dq + by_row(own, gpu.load(k))
            dk = dk + by_row(own, gpu.load(q))
            dq, dk, r = inside(q, k, w_tile, u, b_c, (dq, dk, r))

            q[...], k[...] = stored(d, dq), stored(d, dk)
            dg = channel.gate_gradient(r, d_state, carried, *pieces, vector)
            new.append(gpu.load(g))
            g[...] = dg if d.valid is None else jnp.where(rows(d.valid), dg, 0.0)
        part = gpu.chunk_rows(n)
        copies = [(buffer[x].at[slot], made[x].at[b, part, h * blocks + w]) for x in "qkg"]
        gpu.copy_out(*copies, (v, made["v"].at[b, part, h, block]))
        return tuple(new)

    extra = (
        channel.source(given, buffer, index),
        (lambda n: given["do"].at[b, gpu.chunk_rows(n), h, block], buffer["do"]),
        (lambda n: given["states"].at[b, h, n, :, block], buffer["states"]),
        (lambda n: given["p"].at[b, h, n], buffer["p"]),
    )
    parts = sources(given, buffer, index, extra)
    ds = channel.start(given, "ds", index, key_dim)
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES, reverse=True)
    channel.finish(made["s"], ds, index)
    gpu.wait_out(0, read=False)


def inside(q, k, w, u, b, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """dq, dk and R with what the pairs of the chunk add, level by level; u is a tile to use."""

    def level(s, carry):
        dq, dk, r = carry
        second, first = channel.roles(s)
        e = channel.level(b, s)
        gpu.put(u, jnp.where(channel.second_half(s), gpu.load(q), gpu.load(k)) * e)
        f = dot(channel.at_corners(w, s), u)
        r = r + (second - first) * (gpu.load(u) * f)
        f = e * f
        return dq + second * f, dk + first * f, r

    return channel.over_levels(level, carry)
