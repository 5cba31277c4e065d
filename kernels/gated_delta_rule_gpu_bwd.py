"""Family B backward on Hopper: one warpgroup walks the chunks of a (batch, value head, 64 values) in reverse.

The adjoint system is solved, T itself is never differentiated; T - I and S come from the forward pass in bfloat16.

    Z = V - enter K S ;  U = T (beta Z) ;  dU = P^T do + leave K dS' ;  Y = T^T dU
    dP = tril(do U^T) ;  dA = -stril(beta Y U^T) ;  dV = beta Y ;  dbeta_i = y_i.z_i - sum_j (y_i.u_j) A_ij
    dQ = scale enter (do S^T) + dP~ K ;  dK = -enter (dV S^T) + leave (U dS'^T) + dA~ K + dP~^T Q + dA~^T K
    dS = keep dS' + scale (enter Q)^T do - (enter K)^T dV

with ~ for "times the decays". For the gate each row i gets, in float32 and with E = stril(dP . P) + dA . A,

    rows_i = sum_j E_ij + reads_i ;  columns_j = sum_i E_ij

(reads = q.dQ + k.dK through S), writes = k.dK through dS', and each channel k keep (S dS'^T)_kk. As in family A,
dg_t = sum_(i >= t) (rows - columns)_i + sum_(i < t) writes_i + sum(channels). All is a sum over the programs that
share a head.

A chunk is seven links of products (nine at K = 128), those of a link in flight together; before, each of twenty was
waited for alone.

Budget at K = V = 64: dS, and of what a chunk makes up to three tiles and a product, 160 registers a thread. So nothing
waits in registers for long: K S and Q K^T are found twice, E when U and Y are there, and keys of 128 are two tiles of
64 of everything, dK and dQ of one half finished before the other is begun. (Whole, products did not fit beside dS and
ptxas had each wait for the one before.) Shared memory: q, k, v, S of 8 KB in 2 stages (1 at
K = 128); do and T - I, with which a chunk does not begin, in one, copied when the chunk before is done with it; dS, and
two tiles, of x (then U) and P (then dU, then the rows that read S); Y and dP lie over T, dA over S, scaled do over do,
and dq, dk, dv over q, k, v (104 KB); vectors (3 KB); 111 KB at either K: two programs an SM.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_delta_rule_gpu_intra import beta_of
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row
from jaxlin.kernels.tile_gpu_keys import key_rows, load_state, store_state
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots

STAGES = {64: 2, 128: 1}
"""Chunks in flight, by key dimension."""
BETA, ROWS, WRITES, COLUMNS, CHANNELS = range(5)
"""The vectors [C] that come out, all but the first only for gates; the last is of channels, [K]."""


class Gradients(NamedTuple):
    """dq, dk for each value head and block of values [B, T, HV * V/64, K]; dv [B, T, HV, V]; vectors
    [V/64, B, HV, N, C or 4 C + K]; of the initial S."""

    q: Array
    k: Array
    v: Array
    vectors: Array
    s: Array


def backward(form: Form, x: Inputs, states: Array, t: Array, do: Array, ds: Array | None, gate: bool) -> Gradients:
    """The gradients of `forward`, whose chunk states and T - I come in; ds None is zero; with `gate` those of b too."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, blocks = time // CHUNK, value_dim // BLOCK
    size = 4 * CHUNK + key_dim if gate else CHUNK
    flat = present(q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, do=do, states=states, t=t, ds=ds)
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = dict(
        q=shape((batch, time, heads * blocks, key_dim), x.q.dtype),
        k=shape((batch, time, heads * blocks, key_dim), x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        vectors=shape((blocks, batch, heads, chunks, size), f32),
        s=shape((batch, heads, key_dim, value_dim), f32),
    )
    halves, stages = key_dim // CHUNK, STAGES[key_dim]
    scratch = dict(
        **{f"{name}{c}": gpu.tile(stages, CHUNK, CHUNK) for name in ("q", "k", "states") for c in range(halves)},
        **{f"d_state{c}": gpu.tile(1, CHUNK, BLOCK) for c in range(halves)},
        v=gpu.tile(stages, CHUNK, BLOCK),
        **{name: gpu.tile(1, CHUNK, BLOCK) for name in ("do", "t", "u", "p")},
        vectors=gpu.vector(stages, form.vectors, CHUNK),
        made=gpu.vector(1, size),
        barrier=gpu.barrier(2 + 3 * halves + form.segments, min(stages, chunks)),
        late=gpu.barrier(2, 1),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(stages, CHUNK, dtype=jnp.int32))

    def gated_delta_rule_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks, gate)

    return Gradients(
        *gpu.launch(
            gated_delta_rule_bwd,
            list(flat.values()),
            list(out.values()),
            (batch, heads, blocks),
            list(scratch.values()),
            barriers=False,
        )
    )


def _program(form: Form, index, given, made, buffer, chunks, gate) -> None:
    b, h, w = index
    block, blocks, key_dim = gpu.block(w), given["v"].shape[3] // BLOCK, given["q"].shape[3]
    halves = range(key_dim // CHUNK)
    ds = load_state(given, "ds", index, key_dim)

    def fetch_late(n):
        """Start to copy what a chunk does not begin with: one tile each, free when the chunk before is done."""
        parts = [(given["do"].at[b, gpu.chunk_rows(n), h, block], buffer["do"].at[0])]
        gpu.fetch([*parts, (given["t"].at[b, h, n], buffer["t"].at[0])], buffer["late"])

    def chunk(n, slot, refill, ds):
        here = gpu.unknown_zero(anew=True)
        slot += here  # which one stage alone would leave constant
        q, k, state = ([buffer[f"{name}{c}"].at[slot] for c in halves] for name in ("q", "k", "states"))
        v, do, t = buffer["v"].at[slot], buffer["do"].at[here], buffer["t"].at[here]
        d_state = [buffer[f"d_state{c}"].at[here] for c in halves]

        def made_vector(row):
            return buffer["made"].at[here, pl.ds(row * CHUNK, CHUNK)]

        d = decays(form, buffer, slot)
        beta = beta_of(form, buffer, slot)
        if form.segments:
            clean(d.valid, *q, *k, v)
        for c in halves:
            d_state[c][...] = ds[c].astype(jnp.bfloat16)
        gpu.commit()
        k_state = Sum([Product(k[c], state[c]) for c in halves])
        q_k, k_k = (Sum([Product(x[c], k[c], tb=True) for c in halves]) for x in (q, k))

        def z(read):
            return gpu.load(v) - by_row(d.enter, read)

        # U, dU, Y; a tile has one thing after the other
        read, p, du = dots(k_state, q_k, Sum([Product(k[c], d_state[c]) for c in halves]))
        x_tile = u_tile = buffer["u"].at[here]
        p_tile = du_tile = read_tile = buffer["p"].at[here]
        x = by_row(beta, z(read))
        x_tile[...], p_tile[...] = (tile.astype(jnp.bfloat16) for tile in (x, *d.pair(p)))
        gpu.commit()
        gpu.arrived(buffer["late"])
        if form.segments:
            clean(d.valid, do)
        u, du = dots(Sum([Product(t, x_tile)], x), Sum([Product(p_tile, do, ta=True)], by_row(d.leave, du)), last=True)
        u_tile[...], du_tile[...] = (tile.astype(jnp.bfloat16) for tile in (u, du))
        gpu.commit()
        gpu.wait_out(0)
        refill()
        y, dp, read = dots(
            Sum([Product(t, du_tile, ta=True)], du), Sum([Product(do, u_tile, tb=True)]), k_state, last=True
        )
        d_beta = jnp.sum(y * z(read), 1)
        dv = by_row(beta, y)
        y_tile = dp_tile = t
        y_tile[...], read_tile[...] = (tile.astype(jnp.bfloat16) for tile in (y, by_row(-d.enter, dv)))
        v[...], do[...] = stored(d, dv), by_row(d.enter_scaled, gpu.load(do)).astype(jnp.bfloat16)
        gpu.commit()

        # -dA is beta times what is here called dl; both are times the decays and scale
        i, j = gpu.indices()
        e = 0.0
        dl, *q_k = dots(Sum([Product(y_tile, u_tile, tb=True)]), *([q_k] if gate else []), last=True)
        dp, dl = decays(form, buffer, slot).pair(dp, dl)  # read again: kept, they would be spilled
        dl = jnp.where(i > j, dl, 0.0)
        dp_tile[...] = dp.astype(jnp.bfloat16)
        if gate:
            e = jnp.where(i > j, dp * q_k[0], 0.0)
        (a,) = dots(k_k)
        dl_a = dl * a
        made_vector(BETA)[...] = d_beta - jnp.sum(dl_a, 1) * (1 / form.scale)
        if gate:
            e -= by_row(beta * (1 / form.scale), dl_a)
            made_vector(COLUMNS)[...] = jnp.sum(e, 0)
            by_rows, writes = jnp.sum(e, 1), 0.0
        da = by_row(beta * (-1 / form.scale), dl).astype(jnp.bfloat16)
        da_tile = state[0]

        # rows written to the next state, then rows reading this one, one half of the keys after the other
        new = []
        for c in halves:
            written, reading = Product(u_tile, d_state[c], tb=True), Product(read_tile, state[c], tb=True)
            dk, dk_read, dq = dots(Sum([written]), Sum([reading]), Sum([Product(do, state[c], tb=True)]), last=c == 0)
            dk = by_row(d.leave, dk)
            if gate:
                writes += jnp.sum(gpu.load(k[c]) * dk, 1)
                by_rows += jnp.sum(gpu.load(k[c]) * dk_read, 1) + jnp.sum(gpu.load(q[c]) * dq, 1)
                made_vector(CHANNELS + c)[...] = d.keep * jnp.sum(gpu.load(state[c]) * ds[c], 1)
            dk += dk_read
            if c == 0:
                gpu.put(da_tile, da)
            d_keys = [Product(da_tile, k[c]), Product(dp_tile, q[c], ta=True), Product(da_tile, k[c], ta=True)]
            through = [Product(q[c], do, ta=True), Product(k[c], read_tile, ta=True)]
            dk, dq, d_start = dots(
                Sum(d_keys, dk), Sum([Product(dp_tile, k[c])], dq), Sum(through, d.keep * ds[c]), last=True
            )
            new.append(d_start)
            q[c][...], k[c][...] = stored(d, dq), stored(d, dk)

        @pl.when(n > 0)
        def _():
            fetch_late(n - 1)

        if gate:
            made_vector(ROWS)[...] = by_rows
            made_vector(WRITES)[...] = writes
        part = gpu.chunk_rows(n)
        copies = [
            (tile[c], made[x].at[b, part, h * blocks + w, key_rows(c)])
            for tile, x in ((q, "q"), (k, "k"))
            for c in halves
        ]
        copies += [(v, made["v"].at[b, part, h, block]), (buffer["made"].at[here], made["vectors"].at[w, b, h, n])]
        gpu.copy_out(*copies)
        return tuple(new)

    extra = []
    for c in halves:
        extra.append((lambda n, c=c: given["states"].at[b, h, n, key_rows(c), block], buffer[f"states{c}"]))
    parts = sources(given, buffer, index, tuple(extra))
    fetch_late(jnp.int32(chunks - 1))
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES[key_dim], reverse=True)
    store_state(made["s"], ds, index)
    gpu.wait_out(0, read=False)
