"""Family A backward on Hopper: one warpgroup walks the chunks of a (batch, value head, 64 values) in reverse.

With r = 1 / (what n was divided by), dn = r do, dl the cotangent of l, P and the decays as in the forward pass:

    A = tril(dn V^T + dl 1^T) ;  E = A . P ;  A~ = A . decays                        (C x C, in registers)
    dl_i = -r_i (dn_i.n_i) sign,  dn_i.n_i = sum_j (dn V^T)_ij P_ij + q_i.(scale enter_i S dn_i)
    dV = P^T dn + leave K dS' ;  dQ = scale enter (dn S^T + dl z^T) + A~ K ;  dK = leave (V dS'^T + dz') + A~^T Q
    dS = keep dS' + scale (enter Q)^T dn ;  dz likewise with dl

so neither o nor n is read. Where V is split between programs all is a sum over them, dl too, each program's share of
which then comes in. For the gates each row i gets, in float32,

    rows_i = sum_j E_ij + reads_i     (strictly lower part of E; reads = q.dQ and writes = k.dK of the state)
    columns_j = sum_i E_ij ;  own_j = E_jj + writes_j

and each channel k keep ((S dS'^T)_kk + z_k dz'_k), from which the caller takes dw = columns + own and

    dg_t = sum_(i >= t) (rows - columns)_i + sum_(i < t) writes_i + sum(channels) .

(All writes less those of i >= t would be the same, but where gates are strong nothing would be left of it.)

Budget at K = V = 64: dS, P (or E), A and one product are alive at once, 128 registers a thread and pieces of tiles, in
the 255 there are. Keys of 128 are two tiles of 64 of everything, and what is a sum over values, dK and dQ, is finished
for one half before the other is begun: whole, dS, dK and dQ alone would be 192 registers. Shared memory: q, k, v, do, S
of 8 KB in 2 stages, with dq, dk, dv written over q, k, v (80 KB); P, A~ and dS as operands (24 KB); vectors (4 KB),
with dz among them, sums over warps (6 KB): two programs an SM.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_linear_attention_gpu_fwd import (
    Form,
    Inputs,
    States,
    clean,
    decays,
    denominator_of,
    present,
    sources,
    stored,
)
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row, columns, dot, rows
from jaxlin.kernels.tile_gpu_keys import key_rows, load_state, over, store_state

STAGES = 2
ROWS, WRITES, COLUMNS, OWN, CHANNELS = range(5)
"""The vectors [C] of what is made for gates; from the last on there are [K] for the channels, then for those of z."""


class Cotangents(NamedTuple):
    """What comes in: do [B, T, HV, V], of the final S [B, HV, K, V] and z [B, HV, K]; None for zeros."""

    o: Array
    s: Array | None
    z: Array | None


class Gradients(NamedTuple):
    """dq, dk for each value head and block of values [B, T, HV * V/64, K]; dv [B, T, HV, V]; of gates
    [V/64, B, HV, N, 4 C + 2 K] (None if not asked for; the last K only with a denominator); of the initial S and z."""

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
    dl: Array | None = None,
) -> Gradients:
    """The gradients of `forward`, whose l and chunk states come in; with `gate` those of b and c too.

    dl [B, HV * V/64, N, C], each block's share of the cotangent of l, is needed with a denominator and more than one.
    """
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, blocks = time // CHUNK, value_dim // BLOCK
    summed = form.denominator is not None
    flat = present(
        q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, do=d.o, states=states.s, l=l, zs=states.z, dl=dl,
        ds=d.s, dz=d.z,
    )  # fmt: skip
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = dict(
        q=shape((batch, time, heads * blocks, key_dim), x.q.dtype),
        k=shape((batch, time, heads * blocks, key_dim), x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        s=shape((batch, heads, key_dim, value_dim), f32),
    )
    if summed:
        out |= dict(z=shape((batch, heads * blocks, key_dim), f32))
    if gate:
        out |= dict(gates=shape((blocks, batch, heads, chunks, 4 * CHUNK + 2 * key_dim), f32))
    halves = key_dim // CHUNK
    copies = 2 + 3 * halves + (x.vectors is not None) + (x.codes is not None) + 2 * summed + (dl is not None)
    scratch = dict(
        **{f"{name}{c}": gpu.tile(STAGES, CHUNK, CHUNK) for name in ("q", "k", "states") for c in range(halves)},
        **{f"d_state{c}": gpu.tile(1, CHUNK, BLOCK) for c in range(halves)},
        v=gpu.tile(STAGES, CHUNK, BLOCK),
        do=gpu.tile(STAGES, CHUNK, BLOCK),
        p=gpu.tile(1, CHUNK, CHUNK),
        a=gpu.tile(1, CHUNK, CHUNK),
        barrier=gpu.barrier(copies, min(STAGES, chunks)),
    )
    if x.vectors is not None:
        scratch |= dict(vectors=gpu.vector(STAGES, form.vectors, CHUNK))
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))
    if summed:
        scratch |= dict(l=gpu.vector(STAGES, CHUNK), zs=gpu.vector(STAGES, key_dim), dz=gpu.vector(key_dim))
    if dl is not None:
        scratch |= dict(dl=gpu.vector(STAGES, CHUNK))
    if gate:
        scratch |= dict(gates=gpu.vector(1, 4 * CHUNK + 2 * key_dim))

    def gated_linear_attention_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks)

    grid = (batch, heads, blocks)
    results = gpu.launch(
        gated_linear_attention_bwd, list(flat.values()), list(out.values()), grid, list(scratch.values())
    )
    results = dict(zip(out, results, strict=True))
    if summed:
        results["z"] = results["z"].reshape(batch, heads, blocks, key_dim).sum(2)
    return Gradients(*(results.get(name) for name in ("q", "k", "v", "gates", "s", "z")))


def _program(form: Form, index, given, made, buffer, chunks) -> None:
    b, h, w = index
    summed, gate = form.denominator is not None, "gates" in made
    block, blocks = gpu.block(w), given["v"].shape[3] // BLOCK
    halves = range(given["q"].shape[3] // CHUNK)

    def dz(c):
        return buffer["dz"].at[key_rows(c)]

    ds = load_state(given, "ds", index, given["q"].shape[3])
    if summed:
        for c in halves:
            start = gpu.zero_columns(CHUNK)
            if "dz" in given:
                start = jnp.where(w == 0, gpu.load_columns(given["dz"].at[b, h, key_rows(c)]), start)
            dz(c)[...] = start

    def chunk(n, slot, refill, ds):
        q, k, state = ([buffer[f"{name}{c}"].at[slot] for c in halves] for name in ("q", "k", "states"))
        v, do = (buffer[name].at[slot] for name in ("v", "do"))
        here = gpu.unknown_zero(anew=True)
        d_state = [buffer[f"d_state{c}"].at[here] for c in halves]
        p_tile, a_tile = buffer["p"].at[here], buffer["a"].at[here]

        def made_gates(row):
            return buffer["gates"].at[here, pl.ds(row * CHUNK, CHUNK)]

        def z(c):
            return buffer["zs"].at[slot, key_rows(c)]

        d = decays(form, buffer, slot)
        if form.segments:
            clean(d.valid, *q, *k, v, do)
        for c in halves:
            gpu.put(d_state[c], ds[c])

        r = dl = None
        reading, qk = d.enter_scaled, over(halves, lambda c, x: dot(q[c], k[c], x, tb=True))
        if summed:
            (p,) = d.pair(qk)
            l = gpu.load_rows(buffer["l"].at[slot])  # noqa: E741
            r = 1 / denominator_of(form, l, d.floor)
            reading, a = reading * r, by_row(r, dot(do, v, tb=True))
            if "dl" in given:
                dl = gpu.load_rows(buffer["dl"].at[slot])
            else:
                dl = jnp.sum(a * p, 1)
                for c in halves:
                    dl += jnp.sum(gpu.load(q[c]) * by_row(reading, dot(do, state[c], tb=True)), 1)
                dl = -r * dl
                if form.denominator == "max":
                    dl = jnp.where(jnp.abs(l) >= d.floor, jnp.where(l < 0, -dl, dl), 0.0)
            a = a + rows(dl)
            p_tile[...] = by_row(r, p).astype(jnp.bfloat16)
            (decayed,) = d.pair(a)
        else:
            a = dot(do, v, tb=True)
            p, decayed = d.pair(qk, a)
            p_tile[...] = p.astype(jnp.bfloat16)
        gpu.put(a_tile, decayed)
        gpu.wait_out(0)
        refill()
        if gate:
            i, j = gpu.indices()
            e = a * p
            strict = jnp.where(i > j, e, 0.0)
            made_gates(COLUMNS)[...] = jnp.sum(strict, 0)
            by_rows, own, writes = jnp.sum(strict, 1), jnp.sum(jnp.where(i == j, e, 0.0), 1), 0.0

        dv = over(halves, lambda c, x: dot(k[c], d_state[c], x))
        dv = stored(d, dot(p_tile, do, by_row(d.leave, dv), ta=True))
        gpu.put(p_tile, by_row(reading, gpu.load(do)))
        # one half of the keys after the other: few tiles are alive at once
        new = []
        for c in halves:
            dk = dot(v, d_state[c], tb=True)
            if summed:
                dk = dk + columns(gpu.load_columns(dz(c)))
            dk = by_row(d.leave, dk)
            if gate:
                writes += jnp.sum(gpu.load(k[c]) * dk, 1)
            dk = dot(a_tile, q[c], dk, ta=True)
            dq = by_row(reading, dot(do, state[c], tb=True))
            if summed:
                dq = dq + by_row(dl * d.enter_scaled, columns(gpu.load_columns(z(c))))
            if gate:
                by_rows += jnp.sum(gpu.load(q[c]) * dq, 1)
                made_gates(CHANNELS + c)[...] = d.keep * jnp.sum(gpu.load(state[c]) * ds[c], 1)
                if summed:
                    made_gates(CHANNELS + len(halves) + c)[...] = (
                        d.keep * gpu.load_columns(z(c)) * gpu.load_columns(dz(c))
                    )
            dq = dot(a_tile, k[c], dq)
            if summed:
                dz(c)[...] = d.keep * gpu.load_columns(dz(c)) + jnp.sum(by_row(dl * d.enter_scaled, gpu.load(q[c])), 0)
            new.append(dot(q[c], p_tile, d.keep * ds[c], ta=True))
            q[c][...], k[c][...] = stored(d, dq), stored(d, dk)
        v[...] = dv
        if gate:
            made_gates(ROWS)[...] = by_rows
            made_gates(OWN)[...] = own + writes
            made_gates(WRITES)[...] = writes
        part = gpu.chunk_rows(n)
        copies = [
            (tile[c], made[x].at[b, part, h * blocks + w, key_rows(c)])
            for tile, x in ((q, "q"), (k, "k"))
            for c in halves
        ]
        copies += [(v, made["v"].at[b, part, h, block])]
        gpu.copy_out(*copies, *([(buffer["gates"].at[here], made["gates"].at[w, b, h, n])] if gate else []))
        return tuple(new)

    extra = [(lambda n: given["do"].at[b, gpu.chunk_rows(n), h, block], buffer["do"])]
    for c in halves:
        extra.append((lambda n, c=c: given["states"].at[b, h, n, key_rows(c), block], buffer[f"states{c}"]))
    if summed:
        extra += [(lambda n, x=given[x]: x.at[b, h, n], buffer[x]) for x in ("l", "zs")]
        if "dl" in given:
            extra += [(lambda n: given["dl"].at[b, h * blocks + w, n], buffer["dl"])]
    parts = sources(given, buffer, index, tuple(extra))
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES, reverse=True)
    store_state(made["s"], ds, index)
    if summed:
        for c in halves:
            made["z"].at[b, h * blocks + w, key_rows(c)][...] = gpu.load_columns(dz(c))
    gpu.wait_out(0, read=False)
