"""Family A backward on Hopper: one warpgroup a (batch, value head) walks the chunks in reverse, dS in registers.

With r = 1 / (what n was divided by), dn = r do, dl the cotangent of l, P and the decays as in the forward pass:

    A = tril(dn V^T + dl 1^T) ;  E = A . P ;  A~ = A . decays                        (C x C, in registers)
    dl_i = -r_i (dn_i.n_i) sign,  dn_i.n_i = sum_j (dn V^T)_ij P_ij + q_i.(scale enter_i S dn_i)
    dV = P^T dn + leave K dS' ;  dQ = scale enter (dn S^T + dl z^T) + A~ K ;  dK = leave (V dS'^T + dz') + A~^T Q
    dS = keep dS' + scale (enter Q)^T dn ;  dz likewise with dl

so neither o nor n is read. For the gates each row i gets, in float32,

    rows_i = sum_j E_ij - writes_i + reads_i     (strictly lower part of E; reads = q.dQ and writes = k.dK of the state)
    ends_i = writes_i + keep (S dS'^T)_ii ;  columns_j = sum_i E_ij ;  own_j = E_jj + writes_j ;  zdz = keep z.dz'

from which the caller takes dg = revcumsum(rows - columns) + sum(ends + zdz) and dw = columns + own.

Budget at K = V = 64: dS, P (or E), A and one product are alive at once, 128 registers a thread and pieces of tiles, in
the 255 there are. Shared memory: q, k, v, do, S of 8 KB in 2 stages, with dq, dk, dv written over q, k, v (80 KB); P,
A~ and dS as operands (24 KB); vectors (4 KB), sums over warps (6 KB): two programs an SM.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_linear_attention_gpu_fwd import (
    Decays,
    Form,
    Inputs,
    States,
    clean,
    decays,
    denominator_of,
    present,
    sources,
)
from jaxlin.kernels.mosaic_gpu import CHUNK, columns, dot, rows

STAGES = 2
ROWS, ENDS, COLUMNS, OWN, ZDZ = range(5)
"""Rows of the gates' part of the output."""


class Cotangents(NamedTuple):
    """What comes in: do [B, T, HV, V], of the final S [B, HV, K, V] and z [B, HV, K]; None for zeros."""

    o: Array
    s: Array | None
    z: Array | None


class Gradients(NamedTuple):
    """dq, dk for each value head [B, T, HV, K], dv [B, T, HV, V], of gates [B, HV, N, 5, C] (None if not asked for),
    of the initial S and z (z only with a denominator)."""

    q: Array
    k: Array
    v: Array
    gates: Array | None
    s: Array
    z: Array | None


def backward(
    form: Form,
    x: Inputs,
    l: Array | None,  # noqa: E741
    states: States,
    d: Cotangents,
    gate: bool,
) -> Gradients:
    """The gradients of `forward`, whose l and chunk states come in; with `gate` those of b and c too."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks = time // CHUNK
    summed = form.denominator is not None
    flat = present(
        q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, do=d.o, states=states.s, l=l, zs=states.z, ds=d.s, dz=d.z
    )
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = dict(
        q=shape((batch, time, heads, key_dim), x.q.dtype),
        k=shape((batch, time, heads, key_dim), x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        s=shape((batch, heads, key_dim, value_dim), f32),
    )
    if summed:
        out |= dict(z=shape((batch, heads, key_dim), f32))
    if gate:
        out |= dict(gates=shape((batch, heads, chunks, 5, CHUNK), f32))
    copies = 5 + (x.vectors is not None) + (x.codes is not None) + 2 * summed
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, value_dim),
        do=gpu.tile(STAGES, CHUNK, value_dim),
        states=gpu.tile(STAGES, key_dim, value_dim),
        p=gpu.tile(CHUNK, CHUNK),
        a=gpu.tile(CHUNK, CHUNK),
        d_state=gpu.tile(key_dim, value_dim),
        barrier=gpu.barrier(copies, min(STAGES, chunks)),
    )
    if x.vectors is not None:
        scratch |= dict(vectors=gpu.vector(STAGES, form.vectors, CHUNK))
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))
    if summed:
        scratch |= dict(l=gpu.vector(STAGES, CHUNK), zs=gpu.vector(STAGES, key_dim))
    if gate:
        scratch |= dict(gates=gpu.vector(5, CHUNK))

    def gated_linear_attention_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks)

    results = gpu.launch(
        gated_linear_attention_bwd, list(flat.values()), list(out.values()), (batch, heads), list(scratch.values())
    )
    results = dict(zip(out, results, strict=True))
    return Gradients(*(results.get(name) for name in ("q", "k", "v", "gates", "s", "z")))


def _program(form: Form, index, given, made, buffer, chunks) -> None:
    b, h = index
    summed, gate = form.denominator is not None, "gates" in made
    ds = gpu.load(given["ds"].at[b, h]) if "ds" in given else gpu.zeros(*buffer["d_state"].shape)
    dz = None
    if summed:
        dz = gpu.load_columns(given["dz"].at[b, h]) if "dz" in given else gpu.zero_columns(made["z"].shape[2])

    def chunk(n, slot, refill, carry):
        ds, dz = carry
        q, k, v, do, state = (buffer[name].at[slot] for name in ("q", "k", "v", "do", "states"))
        d = decays(form, buffer, slot)
        if form.segments:
            clean(d.valid, q, k, v, do)
        gpu.put(buffer["d_state"], ds)
        through = d.keep * jnp.sum(gpu.load(state) * ds, 1) if gate else None

        p = d.pair(dot(q, k, tb=True))
        a = dot(do, v, tb=True)
        r = dl = None
        reading = d.reading
        if summed:
            l = gpu.load_rows(buffer["l"].at[slot])  # noqa: E741
            r = 1 / denominator_of(form, l, d.floor)
            reading, a = reading * rows(r), a * rows(r)
            dl = -r * (jnp.sum(a * p, 1) + jnp.sum(gpu.load(q) * (dot(do, state, tb=True) * reading), 1))
            if form.denominator == "max":
                dl = jnp.where(jnp.abs(l) >= d.floor, jnp.where(l < 0, -dl, dl), 0.0)
            a = a + rows(dl)
        gpu.wait_out(0)
        refill()
        buffer["p"][...] = (p if r is None else p * rows(r)).astype(jnp.bfloat16)
        gpu.put(buffer["a"], d.pair(a))
        if gate:
            i, j = gpu.indices()
            e = a * p
            strict = jnp.where(i > j, e, 0.0)
            buffer["gates"].at[COLUMNS][...] = jnp.sum(strict, 0)
            e_rows, e_own = jnp.sum(strict, 1), jnp.sum(jnp.where(i == j, e, 0.0), 1)

        # dv is written as soon as v has been read: few tiles are alive at once
        dk = dot(v, buffer["d_state"], tb=True)
        dv = dot(buffer["p"], do, dot(k, buffer["d_state"]) * d.leaving, ta=True)
        v[...] = _valid(d, dv)
        dk = (dk if dz is None else dk + columns(dz)) * d.leaving
        writes = jnp.sum(gpu.load(k) * dk, 1) if gate else None
        dk = dot(buffer["a"], q, dk, ta=True)
        dq = dot(do, state, tb=True) * reading
        if summed:
            dq = dq + rows(dl * d.enter_scaled) * columns(gpu.load_columns(buffer["zs"].at[slot]))
        if gate:
            buffer["gates"].at[ROWS][...] = e_rows + jnp.sum(gpu.load(q) * dq, 1) - writes
            buffer["gates"].at[OWN][...] = e_own + writes
            buffer["gates"].at[ENDS][...] = writes + through
            if dz is not None:
                zdz = gpu.load_columns(buffer["zs"].at[slot]) * dz
                buffer["gates"].at[ZDZ][...] = d.keep * zdz
        dq = dot(buffer["a"], k, dq)

        if summed:
            dz = d.keep * dz + jnp.sum(gpu.load(q) * rows(dl * d.enter_scaled), 0)
        gpu.put(buffer["p"], gpu.load(do) * reading)
        ds = dot(q, buffer["p"], d.keep * ds, ta=True)
        q[...], k[...] = _valid(d, dq), _valid(d, dk)
        copies = [(tile, made[x].at[b, gpu.chunk_rows(n), h]) for tile, x in ((q, "q"), (k, "k"), (v, "v"))]
        gpu.copy_out(*copies, *([(buffer["gates"], made["gates"].at[b, h, n])] if gate else []))
        return ds, dz

    extra = [
        (lambda n: given["do"].at[b, gpu.chunk_rows(n), h], buffer["do"]),
        (lambda n: given["states"].at[b, h, n], buffer["states"]),
    ]
    if summed:
        extra += [(lambda n, x=given[x]: x.at[b, h, n], buffer[x]) for x in ("l", "zs")]
    parts = sources(given, buffer, index, tuple(extra))
    ds, dz = gpu.stream(parts, buffer["barrier"], chunk, (ds, dz), chunks=chunks, stages=STAGES, reverse=True)
    made["s"].at[b, h][...] = ds
    if dz is not None:
        made["z"].at[b, h][...] = dz
    gpu.wait_out(0, read=False)


def _valid(d: Decays, x: Array) -> Array:
    """What is stored: bfloat16, zero in padding rows."""
    return (x if d.valid is None else jnp.where(rows(d.valid), x, 0.0)).astype(jnp.bfloat16)
