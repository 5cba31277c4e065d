"""Family B backward on Hopper: one warpgroup walks the chunks of a (batch, value head, 64 values) in reverse.

The adjoint system is solved, T itself is never differentiated; T - I and S come from the forward pass in bfloat16.

    Z = V - enter K S ;  U = T (beta Z) ;  dU = P^T do + leave K dS' ;  Y = T^T dU
    dP = tril(do U^T) ;  dA = -stril(beta Y U^T) ;  dV = beta Y ;  dbeta_i = y_i.z_i - sum_j (y_i.u_j) A_ij
    dQ = scale enter (do S^T) + dP~ K ;  dK = -enter (dV S^T) + leave (U dS'^T) + dA~ K + dP~^T Q + dA~^T K
    dS = keep dS' + scale (enter Q)^T do - (enter K)^T dV

with ~ for "times the decays". For the gate each row i gets, in float32 and with E = stril(dP . P) + dA . A,

    rows_i = sum_j E_ij + reads_i - writes_i ;  columns_j = sum_i E_ij

(reads = q.dQ + k.dK through S, writes = k.dK through dS') and each channel k keep (S dS'^T)_kk, so that
dg = revcumsum(rows - columns) + sum(writes) + sum(channels). All is a sum over the programs that share a head.

Budget at K = V = 64: dS, dK and up to three products in registers, 160 a thread. Shared memory: q, k, v, do, S, T - I
of 8 KB in 2 stages, dq, dk, dv written over q, k, v (96 KB); dS, U and four tiles for operands that must lie there
(48 KB) and vectors (5 KB): one program an SM. Two programs with one stage each were slower (0.78 against 0.61 ms).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_delta_rule_gpu_fwd import beta_of
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row, dot

STAGES = 2
BETA, ROWS, WRITES, COLUMNS = range(4)
"""The vectors [C] that come out, the last three only for gates, where one of channels [K] follows."""


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
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, BLOCK),
        do=gpu.tile(STAGES, CHUNK, BLOCK),
        states=gpu.tile(STAGES, key_dim, BLOCK),
        t=gpu.tile(STAGES, CHUNK, CHUNK),
        vectors=gpu.vector(STAGES, form.vectors, CHUNK),
        d_state=gpu.tile(key_dim, BLOCK),
        u=gpu.tile(CHUNK, BLOCK),
        **{name: gpu.tile(CHUNK, CHUNK) for name in ("p", "dp", "x", "y")},
        made=gpu.vector(size),
        barrier=gpu.barrier(7 + form.segments, min(STAGES, chunks)),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))

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
        )
    )


def _program(form: Form, index, given, made, buffer, chunks, gate) -> None:
    b, h, w = index
    block, blocks = gpu.block(w), given["v"].shape[3] // BLOCK
    ds = gpu.load(given["ds"].at[b, h, :, block]) if "ds" in given else gpu.zeros(*buffer["d_state"].shape)

    def made_vector(row):
        return buffer["made"].at[pl.ds(row * CHUNK, CHUNK)]

    def chunk(n, slot, refill, ds):
        q, k, v, do, state, t = (buffer[name].at[slot] for name in ("q", "k", "v", "do", "states", "t"))
        d_state, u_tile, p_tile, dp_tile, x_tile = (buffer[name] for name in ("d_state", "u", "p", "dp", "x"))
        y_tile = da_tile = buffer["y"]  # one after the other
        d = decays(form, buffer, slot)
        beta = beta_of(form, buffer, slot)
        if form.segments:
            clean(d.valid, q, k, v, do)
        gpu.put(d_state, ds)
        through = d.keep * jnp.sum(gpu.load(state) * ds, 1) if gate else None

        # U; what of P and dP follows; dU and Y
        z = gpu.load(v) - by_row(d.enter, dot(k, state))
        x = by_row(beta, z)
        gpu.put(x_tile, x)
        gpu.put(u_tile, dot(t, x_tile, x))
        dp = dot(do, u_tile, tb=True)
        p, dp_decayed = d.pair(dot(q, k, tb=True), dp)
        if gate:
            i, j = gpu.indices()
            e = jnp.where(i > j, dp * p, 0.0)
        p_tile[...] = p.astype(jnp.bfloat16)
        gpu.put(dp_tile, dp_decayed)
        du = dot(p_tile, do, by_row(d.leave, dot(k, d_state)), ta=True)
        gpu.put(y_tile, du)
        gpu.wait_out(0)
        refill()
        y = dot(t, y_tile, du, ta=True)
        d_beta = jnp.sum(y * z, 1)
        gpu.put(x_tile, y)
        dv = by_row(beta, y)
        v[...] = stored(d, dv)

        # -dA is beta times what is here called dl
        dl = dot(x_tile, u_tile, tb=True)
        a, dl_decayed = d.keys(dot(k, k, tb=True), dl)
        dl_a = dl * a
        made_vector(BETA)[...] = d_beta - jnp.sum(dl_a, 1)
        if gate:
            e = e - by_row(beta, dl_a)
            made_vector(COLUMNS)[...] = jnp.sum(e, 0)
            e_rows = jnp.sum(e, 1)
        gpu.put(da_tile, by_row(-beta, dl_decayed))

        # rows reading the state, then rows written to the next one
        gpu.put(x_tile, by_row(-d.enter, dv))
        dk = dot(x_tile, state, tb=True)
        dq = by_row(d.enter_scaled, dot(do, state, tb=True))
        reads = jnp.sum(gpu.load(q) * dq, 1) + jnp.sum(gpu.load(k) * dk, 1) if gate else None
        dk_leave = by_row(d.leave, dot(u_tile, d_state, tb=True))
        if gate:
            writes = jnp.sum(gpu.load(k) * dk_leave, 1)
            made_vector(ROWS)[...] = e_rows + reads - writes
            made_vector(WRITES)[...] = writes
            buffer["made"].at[pl.ds(4 * CHUNK, q.shape[1])][...] = through
        dk = dot(da_tile, k, dk + dk_leave)
        dk = dot(dp_tile, q, dk, ta=True)
        dk = dot(da_tile, k, dk, ta=True)
        dq = dot(dp_tile, k, dq)

        gpu.put(p_tile, by_row(d.enter_scaled, gpu.load(do)))
        ds = dot(k, x_tile, dot(q, p_tile, d.keep * ds, ta=True), ta=True)
        q[...], k[...] = stored(d, dq), stored(d, dk)
        part = gpu.chunk_rows(n)
        copies = [(tile, made[x].at[b, part, h * blocks + w]) for tile, x in ((q, "q"), (k, "k"))]
        copies += [(v, made["v"].at[b, part, h, block]), (buffer["made"], made["vectors"].at[w, b, h, n])]
        gpu.copy_out(*copies)
        return ds

    extra = (
        (lambda n: given["do"].at[b, gpu.chunk_rows(n), h, block], buffer["do"]),
        (lambda n: given["states"].at[b, h, n, :, block], buffer["states"]),
        (lambda n: given["t"].at[b, h, n], buffer["t"]),
    )
    parts = sources(given, buffer, index, extra)
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES, reverse=True)
    made["s"].at[b, h, :, block][...] = ds
    gpu.wait_out(0, read=False)
