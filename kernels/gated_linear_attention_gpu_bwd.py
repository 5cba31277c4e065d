"""Family A backward on Hopper: a program walks the chunks of a (batch, value head, K of the values) in reverse.

It is K / 64 warpgroups, 1 or 2. Each has 64 of the values, and all keys of their dS in registers; dV is its own, and
dQ and dK, which are sums over values, it finishes for 64 of the keys, reading the other's v, do, S and dS' in shared
memory. So q and k are read once and dq and dk are written once, however large a head is.

With r = 1 / (what n was divided by), dn = r do, dl the cotangent of l, P and the decays as in the forward pass:

    A = tril(dn V^T + dl 1^T) ;  E = A . P ;  A~ = A . decays                        (C x C, in registers)
    dl_i = -r_i (dn_i.n_i) sign,  dn_i.n_i = sum_j (dn V^T)_ij P_ij + q_i.(scale enter_i S dn_i)
    dV = P^T dn + leave K dS' ;  dQ = scale enter (dn S^T + dl z^T) + A~ K ;  dK = leave (V dS'^T + dz') + A~^T Q
    dS = keep dS' + scale (enter Q)^T dn ;  dz likewise with dl

so neither o nor n is read. Where V has several blocks all is a sum over them, dl too, each block's share of which then
comes in. For the gates each row i gets, in float32,

    rows_i = sum_j E_ij + reads_i     (strictly lower part of E; reads = q.dQ and writes = k.dK of the state)
    columns_j = sum_i E_ij ;  own_j = E_jj + writes_j ;  kept_k = keep ((S dS'^T)_kk + z_k dz'_k)

from which the caller takes dw = columns + own and

    dg_t = sum_(i >= t) (rows - columns)_i + sum_(i < t) writes_i + sum_k kept_k .

(All writes less those of i >= t would be the same, but where gates are strong nothing would be left of it.) `kept` is
added to rows and to writes, 64 channels to the 64 tokens: each token gets all of it through one or the other.

Budget at K = V = 64: dS, P (or E), A and one product are alive at once, 128 registers a thread and pieces of tiles, in
the 255 there are; at K = 128 another 32. Shared memory: q, k, v, do, S of 8 KB in 2 stages, with dq, dk, dv written
over q, k, v (80 KB); P, A~ and dS as operands (24 KB); vectors (8 KB); sums over warps where P was: two programs an SM.
At K = 128 there are 128 KB of the first four, S in one stage, copied when the chunk before is done, and the operands
(88 KB), vectors (10 KB): one program of two warpgroups, and no room for another buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.gated_linear_attention_gpu_fwd import (
    Form,
    Inputs,
    States,
    clean,
    decays,
    denominator_of,
    key_head,
    present,
    small_sources,
    stored,
)
from jaxlin.kernels.mosaic_gpu import BLOCK, dot
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row, columns, rows
from jaxlin.kernels.tile_gpu_keys import load_state, member_of, over, store_state
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots
from jaxlin.kernels.tile_gpu_sums import SUMS, column_sums

STAGES = 2
ROWS, WRITES, COLUMNS, OWN = range(4)
"""The vectors [C] of what is made for gates."""


class Cotangents(NamedTuple):
    """What comes in: do [B, T, HV, V], of the final S [B, HV, K, V] and z [B, HV, K]; None for zeros."""

    o: Array
    s: Array | None
    z: Array | None


class Gradients(NamedTuple):
    """dq, dk for each value head and program of it [B, T, HV * V/K, K]; dv [B, T, HV, V]; of gates
    [V/64, B, HV, N, 4 C] (None if not asked for); of the initial S and z."""

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
    """The gradients of `forward`, whose l and chunk states come in; with `gate` those of b and c too. K divides V.

    dl [B, HV * V/64, N, C], each block's share of the cotangent of l, is needed with a denominator and more than one.
    """
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, team, programs = time // CHUNK, key_dim // CHUNK, value_dim // key_dim
    summed = form.denominator is not None
    if dl is not None:
        dl = dl.reshape(batch, heads * programs, team, chunks, CHUNK).sum(2)
    flat = present(
        q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, do=d.o, states=states.s, l=l, zs=states.z, dl=dl,
        ds=d.s, dz=d.z,
    )  # fmt: skip
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = dict(
        q=shape((batch, time, heads * programs, key_dim), x.q.dtype),
        k=shape((batch, time, heads * programs, key_dim), x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        s=shape((batch, heads, key_dim, value_dim), f32),
    )
    if summed:
        out |= dict(z=shape((batch, heads * programs, key_dim), f32))
    if gate:
        out |= dict(gates=shape((value_dim // BLOCK, batch, heads, chunks, 4 * CHUNK), f32))
    copies = 4 * team + (x.vectors is not None) + (x.codes is not None) + 2 * summed + (dl is not None)
    scratch = dict(
        **{name: gpu.tile(team, STAGES, CHUNK, CHUNK) for name in ("q", "k", "v", "do")},
        states=gpu.tile(team, team, STAGES if team == 1 else 1, CHUNK, BLOCK),
        d_state=gpu.tile(team, team, CHUNK, BLOCK),
        p=gpu.in_turn((gpu.tile(team, CHUNK, CHUNK),), (gpu.vector(team, CHUNK * CHUNK // 2),)),
        a=gpu.tile(1, CHUNK, CHUNK),
        barrier=gpu.barrier(copies + (team == 1), min(STAGES, chunks)),
        late=gpu.barrier(team * team, 1),
        meeting=gpu.barrier(team, 1),
    )
    if x.vectors is not None:
        scratch |= dict(vectors=gpu.vector(STAGES, form.vectors, CHUNK))
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))
    if summed:
        scratch |= dict(l_dl=gpu.vector(2, STAGES, CHUNK), zs=gpu.vector(STAGES, key_dim), dz=gpu.vector(key_dim))
    if gate:
        scratch |= dict(gates=gpu.vector(team, 4 * CHUNK))

    def gated_linear_attention_bwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks)

    results = gpu.launch(
        gated_linear_attention_bwd,
        list(flat.values()),
        list(out.values()),
        (batch, heads, programs),
        list(scratch.values()),
        warpgroups=team,
    )
    results = dict(zip(out, results, strict=True))
    if summed:
        results["z"] = results["z"].reshape(batch, heads, programs, key_dim).sum(2)
    return Gradients(*(results.get(name) for name in ("q", "k", "v", "gates", "s", "z")))


def _program(form: Form, index, given, made, buffer, chunks) -> None:
    b, h, program, me = index
    summed, gate = form.denominator is not None, "gates" in made
    own = member_of(index, made, buffer)
    team, w, row, values, keys, first, alone = own.team, own.w, own.row, own.values, own.keys, own.first, own.alone
    share = 1.0 if alone else jnp.where(first, 1.0, 0.0)  # of what both warpgroups find
    (p_tiles,), (sums,) = buffer["p"]

    def over_rows(x):
        return column_sums(x, sums.at[me, pl.ds(0, SUMS * CHUNK)])

    def anew(slot):
        """Tiles and decays of a chunk, for a part of it: kept from one to the next they would be spilled."""
        tiles = own.tiles(slot)
        return tiles, decays(form, buffer, tiles.slot, tiles.here)

    def reading(d, per_row):
        return d.enter_scaled if per_row is None else d.enter_scaled * per_row

    def chunk(n, slot, refill, ds):
        tiles, d = anew(slot)
        q, k, v, do = tiles.all("q", "k", "v", "do")
        own_q, own_k, own_v, own_do = tiles.own("q", "k", "v", "do")
        p_tile, a_tile = p_tiles.at[me + tiles.here], tiles.of(0, "a")

        def made_gates(row):
            return buffer["gates"].at[me + tiles.here, pl.ds(row * CHUNK, CHUNK)]

        if form.segments:
            clean(d.valid, own_q, own_k, own_v, own_do)
            own.meet()
        for c in team:
            tiles.d_state(c, me)[...] = ds[c].astype(jnp.bfloat16)
        gpu.commit()

        dl = per_row = denominator = None
        if summed:
            l = gpu.load_rows(buffer["l_dl"].at[0, slot])  # noqa: E741
            denominator = denominator_of(form, l, d.floor)
            per_row = 1 / denominator
        qk, a, weight = dots(
            Sum([Product(q[c], k[c], tb=True) for c in team]),
            Sum([Product(do[u], v[u], tb=True) for u in team]),
            meanwhile=lambda: d.pair(per_row),
        )
        p = weight * qk  # r P: r is in the weights, so that A comes out of dO V^T + dl / r
        if "dl" in given:
            dl = gpu.load_rows(buffer["l_dl"].at[1, slot])
            a += rows(jnp.where(dl == 0, 0.0, dl * denominator))  # a floor may be infinite
        elif summed:
            assert alone  # two warpgroups are given dl, and S has not arrived yet
            through_p = jnp.sum(a * p, 1)
            read = dot(own_do, tiles.state(0, me), tb=True)
            dl = -(through_p + reading(d, per_row) * jnp.sum(gpu.load(own_q) * read, 1))
            if form.denominator == "max":
                dl = jnp.where(jnp.abs(l) >= d.floor, jnp.where(l < 0, -dl, dl), 0.0)
            a += rows(dl)
            dl *= per_row
        p_tile[...] = p.astype(jnp.bfloat16)
        decayed = weight * a

        def put_a():  # the same in both
            a_tile[...] = decayed.astype(jnp.bfloat16)

        gpu.where(first, put_a)
        gpu.commit()
        own.meet()
        gpu.wait_out(0)
        refill()
        by_rows = writes = diagonal = strict = kept = None
        if gate:
            i, j = registers.indices()
            e = a * p
            strict = jnp.where(i > j, e, 0.0)
            by_rows = share * jnp.sum(strict, 1)
            diagonal = share * jnp.sum(e, 1) - by_rows

        # of the own values: dv, and dS at the chunk's start
        tiles, d = anew(slot)
        q, k, v = tiles.all("q", "k", "v")
        own_q, own_k, own_do = tiles.own("q", "k", "do")
        p_tile, a_tile = p_tiles.at[me + tiles.here], tiles.of(0, "a")
        dv = over(team, lambda c, x: dot(k[c], tiles.d_state(c, me), x))
        dv = stored(d, dot(p_tile, own_do, by_row(d.leave, dv), ta=True))
        gpu.commit()  # no warp reads P any more
        if gate:
            made_gates(COLUMNS)[...] = share * over_rows(strict)  # where P was
            gpu.commit()
        gpu.put(p_tile, by_row(reading(d, per_row), gpu.load(own_do)))
        if not alone:
            gpu.arrived(buffer["late"])
        if gate:
            kept = d.keep * sum(jnp.sum(gpu.load(tiles.state(c, me)) * ds[c], 1) for c in team)
        new = tuple(dot(q[c], p_tile, d.keep * ds[c], ta=True) for c in team)

        # of the own keys: dk, then dq, dz
        start = columns(gpu.load_columns(buffer["dz"].at[keys])) if summed else None
        dk = by_row(d.leave, over(team, lambda u, x: dot(v[u], tiles.d_state(me, u), x, tb=True), start))
        if gate:
            writes = jnp.sum(gpu.load(own_k) * dk, 1)
        dk = stored(d, dot(a_tile, own_q, dk, ta=True))

        tiles, d = anew(slot)
        (do,), (own_q, own_k, own_v) = tiles.all("do"), tiles.own("q", "k", "v")
        dq = by_row(reading(d, per_row), over(team, lambda u, x: dot(do[u], tiles.state(me, u), x, tb=True)))
        if summed:
            z, dz = gpu.load_columns(buffer["zs"].at[slot, keys]), gpu.load_columns(buffer["dz"].at[keys])
            dq = dq + by_row(dl * d.enter_scaled, columns(z))
        if gate:
            by_rows += jnp.sum(gpu.load(own_q) * dq, 1)
        if gate and summed:
            kept += d.keep * gpu.load_rows(buffer["zs"].at[slot, keys]) * gpu.load_rows(buffer["dz"].at[keys])
        dq = stored(d, dot(tiles.of(0, "a"), own_k, dq))
        if summed:
            gpu.commit()
            through = over_rows(by_row(dl * d.enter_scaled, gpu.load(own_q)))
            buffer["dz"].at[keys][...] = d.keep * dz + through

        gpu.commit()
        own.meet()  # nobody reads this chunk any more
        own_q[...], own_k[...], own_v[...] = dq, dk, dv
        pl.when(n > 0)(lambda: own.fetch_states(given["states"].at[b, h, n - 1]))
        if gate:
            made_gates(ROWS)[...] = by_rows + kept
            made_gates(OWN)[...] = diagonal + writes
            made_gates(WRITES)[...] = writes + kept
        part = gpu.chunk_rows(n)
        copies = [(x, made[name].at[b, part, row, keys]) for x, name in ((own_q, "q"), (own_k, "k"))]
        copies += [(own_v, made["v"].at[b, part, h, values])]
        gpu.copy_out(*copies, *([(buffer["gates"].at[me], made["gates"].at[w, b, h, n])] if gate else []))
        return new

    head = key_head(given, h)
    parts = [(lambda n, x=given[x]: x.at[b, gpu.chunk_rows(n), head, keys], buffer[x].at[me]) for x in ("q", "k")]
    parts += [(lambda n, x=given[x]: x.at[b, gpu.chunk_rows(n), h, values], buffer[x].at[me]) for x in ("v", "do")]
    shared = small_sources(given, buffer, b, h)
    if summed:
        shared.append((lambda n: given["l"].at[b, h, n], buffer["l_dl"].at[0]))
        shared.append((lambda n: given["zs"].at[b, h, n], buffer["zs"]))
        start = registers.zero_columns(CHUNK)
        if "dz" in given:
            start = jnp.where(program == 0, gpu.load_columns(given["dz"].at[b, h, keys]), start)
        buffer["dz"].at[keys][...] = start
    if "dl" in given:
        shared.append((lambda n: given["dl"].at[b, row, n], buffer["l_dl"].at[1]))
    if alone:
        shared.append((lambda n: given["states"].at[b, h, n, :, values], buffer["states"].at[0, 0]))
    parts += [(*source, first) for source in shared]
    own.fetch_states(given["states"].at[b, h, jnp.int32(chunks - 1)])
    ds = load_state(given, "ds", (b, h, w), made["q"].shape[3])
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES, reverse=True)
    store_state(made["s"], ds, (b, h, w))
    if summed:
        made["z"].at[b, row, keys][...] = gpu.load_columns(buffer["dz"].at[keys])
    gpu.wait_out(0)
