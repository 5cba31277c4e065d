"""Family B backward on Hopper, a gate per channel (KDA): one warpgroup walks the chunks in reverse, dS in registers.

S, T - I and P come from the forward pass in bfloat16. First what the values go through, for all channels,

    Z = V - (e^b k) S ;  U = T (beta Z) ;  dU = P^T do + (e^{b_C - b} k) dS' ;  Y = T^T dU ;  dV = beta Y
    W_P = scale do U^T ;  W_L = -Y U^T       (below the diagonal; on it W_P alone: dq += W_ii k_i, dk += W_ii q_i)

then what keys and gates get, 64 channels at a time, with F = W_P u_q and L = W_L u_k of each level, on both sides of
the diagonal (`tile_gpu_channel`; u_q is q e_s in second halves, k e_s in first ones; u_k is beta k e_s, k e_s):

    dbeta_i = y_i.z_i + sum k e_s L (second halves) ;  dS = e^{b_C} dS' + scale (e^b q)^T do - (e^b k)^T dV
    dq = scale e^b (do S^T) + sum e_s F (second halves)
    dk = -e^b (dV S^T) + e^{b_C - b} (U dS'^T) + sum e_s (beta L (second halves), F + L (first halves))
    R = sum u_q F + u_k L (second halves), the same negative (first halves)
    dg_t = sum_{i >= t} (R_i + reads_i) + sum_{j < t} writes_j + e^{b_C} (S dS'^T)_kk

reads are q.dq and k.dk through S, writes k.dk through dS', by channel.

Budget at K = V = 64: dq, dk, R, a decay, a product and pieces of tiles in registers. Shared memory: q, k, v, do, S, T,
P of 8 KB and g of 16 KB in one stage, with the gradients written over q, k, v, g (dS waits there meanwhile), beta Z and
dU over v, Y over T, the Ws over P and T, writes over S (72 KB); dS', U, g in two pieces (32 KB): two programs an SM.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_delta_rule_gpu_fwd import beta_of
from jaxlin.kernels.gated_linear_attention_gpu_fwd import RUN, Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row, dot, rows
from jaxlin.kernels.tile_gpu_channel import half

STAGES = 1


class Gradients(NamedTuple):
    """dq, dk, dg for each value head and block of values [B, T, HV * V/64, K], dg float32; dv [B, T, HV, V]; dbeta
    [V/64, B, HV, N, C]; of the initial S."""

    q: Array
    k: Array
    v: Array
    g: Array
    beta: Array
    s: Array


def backward(
    form: Form, x: Inputs, g: Array, states: Array, t: Array, p: Array, do: Array, ds: Array | None
) -> Gradients:
    """The gradients of `forward`, whose chunk states, T - I and P come in; ds None is zero."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, blocks = time // CHUNK, value_dim // BLOCK
    flat = present(q=x.q, k=x.k, v=x.v, g=g, vectors=x.vectors, codes=x.codes, do=do, states=states, t=t, p=p, ds=ds)
    shape = jax.ShapeDtypeStruct
    per_key = (batch, time, heads * blocks, key_dim)
    out = dict(
        q=shape(per_key, x.q.dtype),
        k=shape(per_key, x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        g=shape(per_key, jnp.float32),
        beta=shape((blocks, batch, heads, chunks, CHUNK), jnp.float32),
        s=shape((batch, heads, key_dim, value_dim), jnp.float32),
    )
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, BLOCK),
        g=gpu.float_tile(STAGES, CHUNK, key_dim),
        do=gpu.tile(STAGES, CHUNK, BLOCK),
        states=gpu.tile(STAGES, key_dim, BLOCK),
        t=gpu.tile(STAGES, CHUNK, CHUNK),
        p=gpu.tile(STAGES, CHUNK, CHUNK),
        vectors=gpu.vector(STAGES, form.vectors, CHUNK),
        **channel.gates(key_dim),
        **channel.pieces("d_state", key_dim=key_dim),
        **{name: gpu.tile(CHUNK, CHUNK) for name in ("u", *(("u_q",) if key_dim > CHUNK else ()))},
        vector=gpu.vector(CHUNK),
        beta=gpu.vector(CHUNK),
        barrier=gpu.barrier(9 + form.segments, min(STAGES, chunks)),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))

    def gated_delta_rule_channel_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks)

    grid = (batch, heads, blocks)
    return Gradients(
        *gpu.launch(gated_delta_rule_channel_bwd, list(flat.values()), list(out.values()), grid, list(scratch.values()))
    )


def _program(form: Form, index, given, made, buffer, chunks) -> None:
    b, h, w = index
    block, blocks, key_dim = gpu.block(w), given["v"].shape[3] // BLOCK, given["q"].shape[3]
    halves = range(key_dim // CHUNK)
    sums, high, low = channel.unpack(buffer, halves)
    d_state = [buffer[f"d_state{c}"] for c in halves]
    u, vector = buffer["u"], buffer["vector"]
    u_q = buffer.get("u_q", u)  # with one half, u_q comes after U

    def chunk(n, slot, refill, d_states):
        q, k, g = ([half(buffer[name].at[slot], c) for c in halves] for name in "qkg")
        state = [buffer["states"].at[slot, channel.key_rows(c)] for c in halves]
        v, do, t, p = (buffer[name].at[slot] for name in ("v", "do", "t", "p"))
        if len(halves) == 1:
            state = [buffer["states"].at[slot]]
        d = decays(form, buffer, slot)
        beta = beta_of(form, buffer, slot)
        if form.segments:
            clean(d.valid, *q, *k, v, do)
        gpu.wait_out(0)
        refill()

        # U, dU and Y
        z, du, keep, carried = gpu.load(v), None, [], []
        for c in halves:
            gpu.put(d_state[c], d_states[c])
            keep.append(by_row(d.keep, rows(channel.cumulative(g[c], d.valid, sums[c], (high[c], low[c])))))
            carried.append(jnp.sum(keep[c] * gpu.load(state[c]) * d_states[c], 1))
            g[c][...] = keep[c] * d_states[c]  # dS waits where g was: too many tiles are alive
            enter = by_row(d.enter, channel.enter(sums[c]))
            z = z - channel.dot_pieces(enter * gpu.load(k[c]), state[c])
            leave = by_row(d.leave, channel.leave(sums[c]))
            du = channel.dot_pieces(leave * gpu.load(k[c]), d_state[c], du)
        x = by_row(beta, z)
        gpu.put(v, x)
        gpu.put(u, dot(t, v, x))
        du = dot(p, do, du, ta=True)
        gpu.put(v, du)
        y = dot(t, v, du, ta=True)
        d_beta = jnp.sum(y * z, 1)
        gpu.put(t, y)
        gpu.put(v, stored(d, by_row(beta, y)))

        # the cotangents of P and L, over P and T
        same = channel.same_run(buffer["codes"].at[slot], RUN) if form.segments else None
        dp = dot(do, u, tb=True)
        own = form.scale * channel.diagonal(dp)
        channel.put_symmetric(p, dp, dot(u, do, tb=True), same, form.scale)
        channel.put_symmetric(t, dot(t, u, tb=True), dot(u, t, tb=True), same, -1.0)

        new = []
        for c in halves:
            # rows written to the next state, then rows that read this one
            dk = by_row(d.leave, channel.leave(sums[c])) * dot(u, d_state[c], tb=True)
            enter = by_row(d.enter, channel.enter(sums[c]))
            dq = form.scale * enter * dot(do, state[c], tb=True)
            dk_read = -enter * dot(v, state[c], tb=True)
            gpu.put(state[c], gpu.load(k[c]) * dk)  # the writes: S is not read again
            r = gpu.load(q[c]) * dq + gpu.load(k[c]) * dk_read
            dk = dk + dk_read + by_row(own, gpu.load(q[c]))
            dq = dq + by_row(own, gpu.load(k[c]))
            gpu.put(u_q, form.scale * enter * gpu.load(q[c]))
            ds = dot(u_q, do, gpu.load(g[c]), ta=True)
            channel.put_pieces(-enter * gpu.load(k[c]), u_q, d_state[c])
            g[c][...] = dot(d_state[c], v, dot(u_q, v, ds, ta=True), ta=True)

            tiles = (q[c], k[c], p, t, u_q, d_state[c], sums[c])
            dq, dk, r, d_beta = inside(tiles, beta, (dq, dk, r, d_beta))

            q[c][...], k[c][...] = stored(d, dq), stored(d, dk)
            dg = channel.gate_gradient(r, state[c], carried[c], high[c], low[c], vector)
            new.append(gpu.load(g[c]))
            g[c][...] = dg if d.valid is None else jnp.where(rows(d.valid), dg, 0.0)
        buffer["beta"][...] = d_beta
        part = gpu.chunk_rows(n)
        copies = [(buffer[x].at[slot], made[x].at[b, part, h * blocks + w]) for x in "qkg"]
        copies += [(v, made["v"].at[b, part, h, block]), (buffer["beta"], made["beta"].at[w, b, h, n])]
        gpu.copy_out(*copies)
        return tuple(new)

    extra = (
        channel.source(given, buffer, index),
        (lambda n: given["do"].at[b, gpu.chunk_rows(n), h, block], buffer["do"]),
        (lambda n: given["states"].at[b, h, n, :, block], buffer["states"]),
        (lambda n: given["t"].at[b, h, n], buffer["t"]),
        (lambda n: given["p"].at[b, h, n], buffer["p"]),
    )
    parts = sources(given, buffer, index, extra)
    ds = channel.start(given, "ds", index, key_dim)
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES, reverse=True)
    channel.finish(made["s"], ds, index)
    gpu.wait_out(0, read=False)


def inside(tiles, beta: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
    """dq, dk, R and dbeta with what the pairs of the chunk add, level by level; u_q and u_k are tiles to use."""
    q, k, w_p, w_l, u_q, u_k, b = tiles

    def level(s, carry):
        dq, dk, r, d_beta = carry
        second, first = channel.roles(s)
        weight = jnp.where(channel.second_half(s), rows(beta), 1.0)
        e = channel.level(b, s)
        decayed = gpu.load(k) * e
        u_q[...] = jnp.where(channel.second_half(s), gpu.load(q) * e, decayed).astype(jnp.bfloat16)
        gpu.put(u_k, weight * decayed)
        f = dot(channel.at_corners(w_p, s), u_q)
        r = r + (second - first) * (gpu.load(u_q) * f)
        f = e * f
        dq, dk = dq + second * f, dk + first * f
        f = dot(channel.at_corners(w_l, s), u_k)
        r = r + (second - first) * (gpu.load(u_k) * f)
        f = e * f
        d_beta = d_beta + jnp.sum(second * (gpu.load(k) * f), 1)
        return dq, dk + weight * f, r, d_beta

    return channel.over_levels(level, carry)
