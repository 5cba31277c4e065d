"""Family B backward on Hopper, a gate per channel (KDA): q, k, g and beta, of all chunks at once.

One warpgroup has a chunk and 64 keys. S, R of every chunk and dS', Y come from the walks
(`gated_delta_rule_gpu_channel_walk`). With U = beta R,

    W_P = scale do U^T ;  W_L = -Y U^T       (below the diagonal; on it W_P alone: dq += W_ii k_i, dk += W_ii q_i)

and F = W_P u_q, L = W_L u_k of each level, on both sides of the diagonal (`tile_gpu_channel`; u_q is q e_s in second
halves, k e_s in first ones; u_k is beta k e_s, k e_s),

    dbeta_i = y_i.r_i
    dq = scale e^b (do S^T) + sum e_s F (second halves)
    dk = -e^b (beta Y S^T) + e^{b_C - b} (U dS'^T) + sum e_s (beta L (second halves), F + L (first halves))
    Rows = sum u_q F + u_k L (second halves), the same negative (first halves)
    dg_t = sum_{i >= t} (Rows_i + reads_i) + sum_{j < t} writes_j + e^{b_C} (S dS'^T)_kk

reads are q.dq and k.dk through S, writes k.dk through dS', by channel. Blocks of 64 values are summed in registers, in
float32: first for the Ws, then for the rest, for which the blocks, where there are several, are read again.

Bytes at K = V = 64, in units of q: q, k, g (2), do, R, Y, S, dS' are read, dq, dk, dg (2) written: 13. With the walk in
reverse 23, the forward pass 23.

Budget: dq, dk, Rows, a decay, a product and pieces of tiles in registers. Shared memory: q, k of 8 KB and b of 18 KB,
and in turn g and its pieces, with the gradients written over them; do, R, Y, S, dS' of one block, and then u_q, u_k
and writes over them (40 KB); the Ws (16 KB): 90 KB, two programs an SM, as many as the registers allow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_delta_rule_gpu_intra import beta_of
from jaxlin.kernels.gated_linear_attention_gpu_fwd import RUN, Form, Inputs, clean, decays, present, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, dot
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row, rows
from jaxlin.kernels.tile_gpu_keys import key_rows

VALUES = ("do", "r", "y")
STATES = ("states", "d_states")


def backward(
    form: Form, x: Inputs, g: Array, states: Array, r: Array, d_states: Array, y: Array, do: Array
) -> tuple[Array, Array, Array, Array]:
    """dq, dk, dg [B, T, HV, K], dg float32, and dbeta [B, HV, N, C]."""
    batch, time, heads, key_dim = g.shape
    blocks, chunks, halves = do.shape[3] // BLOCK, time // CHUNK, key_dim // CHUNK
    flat = present(q=x.q, k=x.k, g=g, vectors=x.vectors, codes=x.codes)
    flat |= dict(do=do, r=r, y=y, states=states, d_states=d_states)
    shape = jax.ShapeDtypeStruct
    out = dict(q=shape(g.shape, x.q.dtype), k=shape(g.shape, x.k.dtype), g=shape(g.shape, jnp.float32))
    out |= dict(beta=shape((batch, heads, chunks, CHUNK), jnp.float32))
    scratch = {name: gpu.tile(CHUNK, CHUNK) for name in ("w_p", "w_l")} | channel.keys_and_gates(1)
    scratch |= {name: gpu.tile(1, CHUNK, BLOCK) for name in VALUES + STATES}
    scratch |= dict(vectors=gpu.vector(1, form.vectors, CHUNK), carried=gpu.vector(CHUNK), beta=gpu.vector(CHUNK))
    if form.segments:
        scratch |= dict(codes=gpu.vector(1, CHUNK, dtype=jnp.int32))
    scratch |= dict(barrier=gpu.barrier(4 + form.segments, 1))
    scratch |= dict(first_barrier=gpu.barrier(len(VALUES + STATES) if blocks == 1 else len(VALUES), 1))
    if blocks > 1:
        scratch |= dict(second_barrier=gpu.barrier(len(VALUES + STATES), 1))

    def gated_delta_rule_channel_bwd(index, inputs, outputs, buffers):
        b, h, n = index
        index = b, h, lax.div(n, jnp.int32(halves)), lax.rem(n, jnp.int32(halves))
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), blocks)

    grid = (batch, heads, chunks * halves)
    return tuple(
        gpu.launch(gated_delta_rule_channel_bwd, list(flat.values()), list(out.values()), grid, list(scratch.values()))
    )


def _program(form: Form, index, given, made, buffer, blocks) -> None:
    b, h, n, c = index
    w_p, w_l, ((q,), (k,), (gates,)) = buffer["w_p"], buffer["w_l"], channel.unpack(buffer, 1)
    values, states = sources(given, buffer, index)
    first = values + states if blocks == 1 else values
    gpu.fetch(channel.sources(given, buffer, (b, h, n), 1, c), buffer["barrier"])
    gpu.start_stream(first, buffer["first_barrier"], chunks=blocks, stages=1)
    gpu.arrived(buffer["barrier"])
    d, beta = decays(form, buffer, jnp.int32(0)), beta_of(form, buffer, jnp.int32(0))
    keep = d.keep * channel.cumulative(gates, d.valid)
    if form.segments:
        clean(d.valid, q, k)

    own, d_beta = put_pairs(form, first, buffer, beta, d.valid, blocks)
    dq, dk, dk_read, carried = through_state(values + states, buffer, beta, d.valid, blocks)
    u_q, u_k, writes = (buffer[name].at[0] for name in ("do", "y", "states"))  # where nothing is needed any more
    dk = by_row(d.leave, channel.leave(gates.b)) * dk
    gpu.put(writes, gpu.load(k) * dk)
    enter = channel.enter(gates.b)
    dq = by_row(d.enter_scaled, enter) * dq
    dk_read = by_row(-beta * d.enter, enter) * dk_read
    r = gpu.load(q) * dq + gpu.load(k) * dk_read
    dk = dk + dk_read + by_row(own, gpu.load(q))
    dq = dq + by_row(own, gpu.load(k))
    dq, dk, r = inside((q, k, w_p, w_l, u_q, u_k, gates.b), beta, (dq, dk, r))

    q[...], k[...] = stored(d, dq), stored(d, dk)
    buffer["beta"][...] = d_beta
    channel.put_gradient(gates, r, writes, keep * carried, buffer["carried"], d.valid)
    part, channels = gpu.chunk_rows(n), key_rows(c)
    gpu.copy_out(*((x, made[name].at[b, part, h, channels]) for name, x in (("q", q), ("k", k), ("g", gates.g))))
    gpu.copy_out((buffer["beta"], made["beta"].at[b, h, n]), when=c == 0)
    gpu.wait_out(0)


def sources(given, buffer, index) -> tuple[list, list]:
    """The parts of do, R and Y of block w of the values, and of S and dS', with their buffers."""
    b, h, n, c = index
    part, channels = gpu.chunk_rows(n), key_rows(c)
    values = [(lambda w, x=given[name]: x.at[b, part, h, gpu.block(w)], buffer[name]) for name in VALUES]
    states = [(lambda w, x=given[name]: x.at[b, h, n, channels, gpu.block(w)], buffer[name]) for name in STATES]
    return values, states


def put_pairs(form: Form, first: list, buffer, beta: Array, valid: Array | None, blocks: int) -> tuple[Array, Array]:
    """Write W_P and W_L, and U of the last block over R; the diagonal of W_P, and dbeta."""

    def block(w, slot, refill, sums):
        do, y = (buffer[name].at[slot] for name in ("do", "y"))
        dp, dp_t, dl, dl_t, d_beta = sums
        u, found = put_u(buffer, slot, beta, valid)
        dp, dp_t = dot(do, u, dp, tb=True), dot(u, do, dp_t, tb=True)
        dl, dl_t = dot(y, u, dl, tb=True), dot(u, y, dl_t, tb=True)
        return dp, dp_t, dl, dl_t, d_beta + found

    sums = (*[registers.zeros(CHUNK, CHUNK)] * 4, registers.zero_rows(CHUNK))
    barrier = buffer["first_barrier"]
    dp, dp_t, dl, dl_t, d_beta = gpu.stream(first, barrier, block, sums, chunks=blocks, stages=1, started=True)
    same = channel.same_run(buffer["codes"].at[0], RUN) if form.segments else None
    channel.put_symmetric(buffer["w_p"], dp, dp_t, same, form.scale)
    channel.put_symmetric(buffer["w_l"], dl, dl_t, same, -1.0)
    return form.scale * channel.diagonal(dp), d_beta


def through_state(
    second: list, buffer, beta: Array, valid: Array | None, blocks: int
) -> tuple[Array, Array, Array, Array]:
    """do S^T, U dS'^T, Y S^T, and (S dS'^T)_kk [K]: sums over all values. One block is there already."""

    def block(w, slot, refill, sums):
        do, u, y, state, d_state = (buffer[name].at[slot] for name in VALUES + STATES)
        dq, dk, dk_read, carried = sums
        if blocks > 1:
            put_u(buffer, slot, beta, valid)
        dq, dk, dk_read = dot(do, state, dq, tb=True), dot(u, d_state, dk, tb=True), dot(y, state, dk_read, tb=True)
        return dq, dk, dk_read, carried + jnp.sum(gpu.load(state) * gpu.load(d_state), 1)

    sums = (*[registers.zeros(CHUNK, CHUNK)] * 3, registers.zero_rows(CHUNK))
    if blocks == 1:
        sums = block(0, 0, None, sums)
    else:
        sums = gpu.stream(second, buffer["second_barrier"], block, sums, chunks=blocks, stages=1)
    gpu.commit()  # no warp reads the tiles any more
    return sums


def put_u(buffer, slot, beta: Array, valid: Array | None) -> tuple[gpu.Ref, Array]:
    """U, written over R, and y.r by rows; do without what padding holds."""
    do, r, y = (buffer[name].at[slot] for name in VALUES)
    if valid is not None:
        clean(valid, do)
    found = gpu.load(r)
    d_beta = jnp.sum(gpu.load(y) * found, 1)
    gpu.put(r, by_row(beta, found))
    return r, d_beta


def inside(tiles, beta: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
    """dq, dk and Rows with what the pairs of the chunk add, level by level; u_q and u_k are tiles to use."""
    q, k, w_p, w_l, u_q, u_k, b = tiles

    def level(s, product, carry):
        dq, dk, r = carry
        second, first = channel.roles(s)
        weight = jnp.where(channel.second_half(s), rows(beta), 1.0)
        e = channel.level(b, s)
        chosen = jnp.where(channel.second_half(s), gpu.load(q), gpu.load(k))
        rounded, f = product(0, (e * chosen).astype(jnp.bfloat16))
        found = rounded * f
        f = e * f
        dq, dk = dq + second * f, dk + first * f
        rounded, f = product(1, (weight * (e * gpu.load(k))).astype(jnp.bfloat16))
        r = r + (second - first) * (found + rounded * f)
        return dq, dk + weight * (e * f), r

    return channel.over_products(((w_p, u_q), (w_l, u_k)), level, carry)
