"""Family A backward on Hopper, a gate per channel (GLA): q, k and g, of all chunks at once.

One warpgroup has a chunk and 64 keys. dS' of every chunk and dV come from the walk in reverse
(`gated_linear_attention_gpu_channel_walk`). With W = scale (do V^T) on and below the diagonal and F, R of the levels
(`tile_gpu_channel`),

    dq_state = scale e^b (do S^T) ;      dq = dq_state + diag(W) k + sum over levels of e_s F (second halves)
    dk_state = e^{b_C - b} (V dS'^T) ;   dk = dk_state + diag(W) q + sum over levels of e_s F (first halves)
    dg_t = sum_{i >= t} (R_i + q_i dq_state_i) + sum_{j < t} k_j dk_state_j + e^{b_C} (S dS'^T)_kk

all by channel. Blocks of 64 values are summed in registers, in float32.

Bytes at K = V = 64, in units of q: q, k, g (2), v, do, S, dS' are read, dq, dk, dg (2) written: 12. With the walk 18,
the forward pass 13. Handing on W, dq_state and dk_state in place of dS' would be 4 more, or they would be rounded.

Budget: dq, dk, R, a decay and a product in registers, 160 a thread, and pieces of tiles. Shared memory: q, k of 8 KB
and b of 18 KB, and in turn g and its pieces, with the gradients written over them; v, do, S, dS' of 8 KB of one block
of values, and then W, u and writes over them: 66 KB, two programs an SM, as many as the registers allow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_linear_attention_gpu_fwd import RUN, Form, Inputs, clean, decays, present, stored
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row
from jaxlin.kernels.tile_gpu_keys import key_rows
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots

STAGES = 1
"""Blocks of values in flight."""


def backward(form: Form, x: Inputs, g: Array, states: Array, d_states: Array, do: Array) -> tuple[Array, Array, Array]:
    """dq, dk, dg [B, T, HV, K], dg float32, from S at the start and dS' at the end of chunks [B, HV, N, K, V]."""
    batch, time, heads, key_dim = g.shape
    blocks = x.v.shape[3] // BLOCK
    stages = min(STAGES, blocks)
    flat = present(q=x.q, k=x.k, g=g, codes=x.codes, v=x.v, do=do, states=states, d_states=d_states)
    shape = jax.ShapeDtypeStruct
    out = dict(q=shape(g.shape, x.q.dtype), k=shape(g.shape, x.k.dtype), g=shape(g.shape, jnp.float32))
    scratch = dict(
        **channel.keys_and_gates(1),
        **{name: gpu.tile(stages, CHUNK, BLOCK) for name in ("v", "do", "states", "d_states")},
        carried=gpu.vector(CHUNK),
        barrier=gpu.barrier(3 + form.segments, 1),
        values_barrier=gpu.barrier(4, stages),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(1, CHUNK, dtype=jnp.int32))

    def gated_linear_attention_channel_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), blocks, stages)

    grid = (batch, heads, time // CHUNK * (key_dim // CHUNK))
    return tuple(
        gpu.launch(
            gated_linear_attention_channel_bwd, list(flat.values()), list(out.values()), grid, list(scratch.values())
        )
    )


def _program(form: Form, index, given, made, buffer, blocks, stages) -> None:
    b, h, n = index
    halves = given["q"].shape[3] // CHUNK
    n, c = lax.div(n, jnp.int32(halves)), lax.rem(n, jnp.int32(halves))
    ((q,), (k,), (gates,)) = channel.unpack(buffer, 1)
    values = sources(given, buffer, (b, h, n, c))
    gpu.fetch(channel.sources(given, buffer, (b, h, n), 1, c), buffer["barrier"])
    gpu.start_stream(values, buffer["values_barrier"], chunks=blocks, stages=stages)
    gpu.arrived(buffer["barrier"])
    d = decays(form, buffer, jnp.int32(0))
    keep = d.keep * channel.cumulative(gates, d.valid)
    if form.segments:
        clean(d.valid, q, k)

    dp, dp_t, dq, dk, carried = through_state(values, buffer, d.valid, blocks, stages)
    w_tile, u, writes = (buffer[name].at[0] for name in ("v", "do", "states"))  # where nothing is needed any more
    own = form.scale * channel.diagonal(dp)
    same = channel.same_run(buffer["codes"].at[0], RUN) if form.segments else None
    channel.put_symmetric(w_tile, dp, dp_t, same, form.scale)
    dq = by_row(d.enter_scaled, channel.enter(gates.b)) * dq
    dk = by_row(d.leave, channel.leave(gates.b)) * dk
    gpu.put(writes, gpu.load(k) * dk)
    r = gpu.load(q) * dq
    dq = dq + by_row(own, gpu.load(k))
    dk = dk + by_row(own, gpu.load(q))
    dq, dk, r = inside(q, k, w_tile, u, gates.b, (dq, dk, r))

    q[...], k[...] = stored(d, dq), stored(d, dk)
    channel.put_gradient(gates, r, writes, keep * carried, buffer["carried"], d.valid)
    rows, channels = gpu.chunk_rows(n), key_rows(c)
    gpu.copy_out(*((x, made[name].at[b, rows, h, channels]) for name, x in (("q", q), ("k", k), ("g", gates.g))))
    gpu.wait_out(0)


def sources(given, buffer, index) -> list:
    """The parts of v, do, S and dS' of block w of the values, with their buffers."""
    b, h, n, c = index
    rows, channels = gpu.chunk_rows(n), key_rows(c)
    found = [(lambda w, x=given[x]: x.at[b, rows, h, gpu.block(w)], buffer[x]) for x in ("v", "do")]
    states = [(lambda w, x=given[x]: x.at[b, h, n, channels, gpu.block(w)], buffer[x]) for x in ("states", "d_states")]
    return found + states


def through_state(
    values: list, buffer, valid: Array | None, blocks: int, stages: int
) -> tuple[Array, Array, Array, Array, Array]:
    """do V^T and its transpose, do S^T, V dS'^T, and (S dS'^T)_kk [K]: sums over all values."""

    def block(w, slot, refill, sums):
        v, do, state, d_state = (buffer[name].at[slot] for name in ("v", "do", "states", "d_states"))
        if valid is not None:
            clean(valid, v, do)
        products = (do, v), (v, do), (do, state), (v, d_state)
        found = dots(
            *(Sum([Product(a, b, tb=True)], x) for (a, b), x in zip(products, sums[:4], strict=True)), last=True
        )
        refill()  # no warp is in the block before any more
        return *found, sums[4] + jnp.sum(gpu.load(state) * gpu.load(d_state), 1)

    sums = (*[registers.zeros(CHUNK, CHUNK)] * 4, registers.zero_rows(CHUNK))
    return gpu.stream(values, buffer["values_barrier"], block, sums, chunks=blocks, stages=stages, started=True)


def inside(q, k, w, u, b, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """dq, dk and R with what the pairs of the chunk add, level by level; u is a tile to use."""

    def level(s, product, carry):
        dq, dk, r = carry
        second, first = channel.roles(s)
        e = channel.level(b, s)
        chosen = jnp.where(channel.second_half(s), gpu.load(q), gpu.load(k))
        rounded, f = product(0, (chosen * e).astype(jnp.bfloat16))
        r = r + (second - first) * (rounded * f)
        f = e * f
        return dq + second * f, dk + first * f, r

    return channel.over_products(((w, u),), level, carry)
