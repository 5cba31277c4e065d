"""Family B backward on Hopper: one warpgroup a (batch, value head) walks the chunks in reverse, dS in registers.

The adjoint system is solved, T itself is never differentiated; T and S come from the forward pass in bfloat16.

    Z = V - enter K S ;  U = T (beta Z) ;  dU = P^T do + leave K dS' ;  Y = T^T dU
    dP = tril(do U^T) ;  dA = -stril(beta Y U^T) ;  dV = beta Y ;  dbeta_i = y_i.z_i - sum_j (y_i.u_j) A_ij
    dQ = scale enter (do S^T) + dP~ K ;  dK = -enter (dV S^T) + leave (U dS'^T) + dA~ K + dP~^T Q + dA~^T K
    dS = keep dS' + scale (enter Q)^T do - (enter K)^T dV

with ~ for "times the decays". For the gate each row i gets, in float32 and with E = stril(dP . P) + dA . A,

    rows_i = sum_j E_ij + reads_i - writes_i ;  ends_i = writes_i + keep (S dS'^T)_ii ;  columns_j = sum_i E_ij

(reads = q.dQ + k.dK through S, writes = k.dK through dS'), so that dg = revcumsum(rows - columns) + sum(ends).

Budget at K = V = 64: dS, dK and up to three products in registers, 160 a thread. Shared memory: q, k, v, do, S, T of
8 KB in 2 stages, dq, dk, dv written over q, k, v (96 KB); dS, U and four tiles for operands that must lie there (48 KB)
and vectors (9 KB): one program an SM.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_delta_rule_gpu_fwd import beta_of, spread, strict
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present, sources
from jaxlin.kernels.mosaic_gpu import CHUNK, dot, rows

STAGES = 2
BETA, ROWS, ENDS, COLUMNS = range(4)
"""Rows of the vectors that come out; the last three only for gates."""


class Gradients(NamedTuple):
    """dq, dk for each value head [B, T, HV, K], dv [B, T, HV, V], of vectors [B, HV, N, R, C], of the initial S."""

    q: Array
    k: Array
    v: Array
    vectors: Array
    s: Array


def backward(form: Form, x: Inputs, states: Array, t: Array, do: Array, ds: Array | None, gate: bool) -> Gradients:
    """The gradients of `forward`, whose chunk states and T come in; ds None is zero; with `gate` those of b too."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, made_rows = time // CHUNK, 4 if gate else 1
    flat = present(q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, do=do, states=states, t=t, ds=ds)
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = dict(
        q=shape((batch, time, heads, key_dim), x.q.dtype),
        k=shape((batch, time, heads, key_dim), x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        vectors=shape((batch, heads, chunks, made_rows, CHUNK), f32),
        s=shape((batch, heads, key_dim, value_dim), f32),
    )
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, value_dim),
        do=gpu.tile(STAGES, CHUNK, value_dim),
        states=gpu.tile(STAGES, key_dim, value_dim),
        t=gpu.tile(STAGES, CHUNK, CHUNK),
        vectors=gpu.vector(STAGES, form.vectors, CHUNK),
        d_state=gpu.tile(key_dim, value_dim),
        u=gpu.tile(CHUNK, value_dim),
        **{name: gpu.tile(CHUNK, CHUNK) for name in ("p", "a", "x", "y")},
        made=gpu.vector(made_rows, CHUNK),
        barrier=gpu.barrier(7 + form.segments, min(STAGES, chunks)),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))

    def gated_delta_rule_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks, gate)

    return Gradients(
        *gpu.launch(
            gated_delta_rule_bwd, list(flat.values()), list(out.values()), (batch, heads), list(scratch.values())
        )
    )


def _program(form: Form, index, given, made, buffer, chunks, gate) -> None:
    b, h = index
    ds = gpu.load(given["ds"].at[b, h]) if "ds" in given else gpu.zeros(*buffer["d_state"].shape)

    def chunk(n, slot, refill, ds):
        q, k, v, do, state, t = (buffer[name].at[slot] for name in ("q", "k", "v", "do", "states", "t"))
        u_tile, p_tile, a_tile, x_tile, y_tile = (buffer[name] for name in "upaxy")
        d_state, out = buffer["d_state"], buffer["made"]
        d = decays(form, buffer, slot)
        beta, enter = beta_of(form, buffer, slot), spread(d.enter)
        if form.segments:
            clean(d.valid, q, k, v, do)
        gpu.put(d_state, ds)
        through = d.keep * jnp.sum(gpu.load(state) * ds, 1) if gate else None

        # U, dU and Y
        z = gpu.load(v) - enter * dot(k, state)
        gpu.put(x_tile, rows(beta) * z)
        gpu.put(u_tile, dot(t, x_tile))
        p = d.pair(dot(q, k, tb=True))
        gpu.put(p_tile, p)
        gpu.put(y_tile, dot(p_tile, do, dot(k, d_state) * d.leaving, ta=True))
        gpu.wait_out(0)
        refill()
        y = dot(t, y_tile, ta=True)
        d_beta = jnp.sum(y * z, 1)
        gpu.put(y_tile, y)
        dv = rows(beta) * y
        v[...] = _valid(d, dv)

        # inside the chunk
        dp = dot(do, u_tile, tb=True)
        e = strict(dp * p) if gate else None
        gpu.put(p_tile, d.pair(dp))
        dl = strict(dot(y_tile, u_tile, tb=True), -1.0)
        a = d.pair(dot(k, k, tb=True)) * (1 / form.scale)
        dl_a = dl * a
        out.at[BETA][...] = d_beta + jnp.sum(dl_a, 1)
        da = rows(beta) * dl
        if gate:
            e = e + rows(beta) * dl_a
            out.at[COLUMNS][...] = jnp.sum(e, 0)
            e_rows = jnp.sum(e, 1)
        gpu.put(a_tile, d.pair(da) * (1 / form.scale))

        # rows reading the state, then rows written to the next one
        gpu.put(y_tile, enter * dv)
        dk = dot(y_tile, state, tb=True) * -1.0
        dq = dot(do, state, tb=True) * d.reading
        reads = jnp.sum(gpu.load(q) * dq, 1) + jnp.sum(gpu.load(k) * dk, 1) if gate else None
        dk_leave = dot(u_tile, d_state, tb=True) * d.leaving
        if gate:
            writes = jnp.sum(gpu.load(k) * dk_leave, 1)
            out.at[ROWS][...] = e_rows + reads - writes
            out.at[ENDS][...] = writes + through
        dk = dot(a_tile, k, dk + dk_leave)
        dk = dot(p_tile, q, dk, ta=True)
        dk = dot(a_tile, k, dk, ta=True)
        dq = dot(p_tile, k, dq)

        gpu.put(x_tile, gpu.load(do) * d.reading)
        ds = dot(q, x_tile, d.keep * ds, ta=True) - dot(k, y_tile, ta=True)
        q[...], k[...] = _valid(d, dq), _valid(d, dk)
        copies = [(tile, made[x].at[b, gpu.chunk_rows(n), h]) for tile, x in ((q, "q"), (k, "k"), (v, "v"))]
        gpu.copy_out(*copies, (out, made["vectors"].at[b, h, n]))
        return ds

    extra = (
        (lambda n: given["do"].at[b, gpu.chunk_rows(n), h], buffer["do"]),
        (lambda n: given["states"].at[b, h, n], buffer["states"]),
        (lambda n: given["t"].at[b, h, n], buffer["t"]),
    )
    parts = sources(given, buffer, index, extra)
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES, reverse=True)
    made["s"].at[b, h][...] = ds
    gpu.wait_out(0, read=False)


def _valid(d, x: Array) -> Array:
    """What is stored: bfloat16, zero in padding rows."""
    return (x if d.valid is None else jnp.where(rows(d.valid), x, 0.0)).astype(jnp.bfloat16)
