"""Family B backward on Hopper: a program walks the chunks of a (batch, value head, K of the values) in reverse.

It is K / 64 warpgroups, 1 or 2, as in family A: each has 64 of the values with their U, Y, dV and dS, and finishes dQ
and dK for 64 of the keys, for which it reads the other's do, U, S and dS' in shared memory. The adjoint system is
solved, T itself is never differentiated; T - I and S come from the forward pass in bfloat16.

    Z = V - enter K S ;  U = T (beta Z) ;  dU = P^T do + leave K dS' ;  Y = T^T dU
    dP = tril(do U^T) ;  dA = -stril(beta Y U^T) ;  dV = beta Y ;  dbeta_i = y_i.z_i - sum_j (y_i.u_j) A_ij
    dQ = scale enter (do S^T) + dP~ K ;  dK = -enter (dV S^T) + leave (U dS'^T) + dA~ K + dP~^T Q + dA~^T K
    dS = keep dS' + scale (enter Q)^T do - (enter K)^T dV

with ~ for "times the decays". For the gate each row i gets, in float32 and with E = stril(dP . P) + dA . A,

    rows_i = sum_j E_ij + reads_i ;  columns_j = sum_i E_ij

(reads = q.dQ + k.dK through S), writes = k.dK through dS', and each channel k kept_k = keep (S dS'^T)_kk. As in family
A, dg_t = sum_(i >= t) (rows - columns)_i + sum_(i < t) writes_i + sum_k kept_k, and `kept` is added to rows and writes.
All is a sum over the programs that share a head.

A chunk is six links of products, of which those of a link are in flight together: Q K^T and K dS'; K S and dU; U and Y;
dP, dA, Q K^T again and K K^T (at K = 128 with a gate a link of its own: too many registers); what dQ and dK get through
states; the rest of them, and dS.

Budget at K = V = 64: dS, and of what a chunk makes up to four tiles and the decays, 192 registers a thread, and another
32 at K = 128. So little waits in registers for long: Q K^T and the decays are found twice, E when U and Y are there.
Shared memory: q, k, v, S of 8 KB in 2 stages; do and T - I, with which a chunk does not begin, in one, copied when the
chunk before is done with it; dS, and two tiles, of x (then U) and P (then dU, then the rows that read S); Y and dP lie
over T, dA over S, scaled do over do, and dq, dk, dv over q, k, v (104 KB); vectors (5 KB): two programs an SM. At
K = 128 S and v come late too, Y and dA lie where the next chunk's v will be: 216 KB and vectors, one program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.gated_delta_rule_gpu_intra import beta_of
from jaxlin.kernels.gated_linear_attention_gpu_fwd import (
    Form,
    Inputs,
    clean,
    decays,
    key_head,
    present,
    small_sources,
    stored,
)
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row
from jaxlin.kernels.tile_gpu_keys import load_state, member_of, store_state
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots
from jaxlin.kernels.tile_gpu_sums import SUMS, column_sums

STAGES = 2
"""Chunks in flight."""
BETA, ROWS, WRITES, COLUMNS = range(4)
"""The vectors [C] that come out, all but the first only for gates."""


class Gradients(NamedTuple):
    """dq, dk for each value head and program of it [B, T, HV * V/K, K]; dv [B, T, HV, V]; vectors
    [V/64, B, HV, N, C or 4 C]; of the initial S."""

    q: Array
    k: Array
    v: Array
    vectors: Array
    s: Array


def backward(form: Form, x: Inputs, states: Array, t: Array, do: Array, ds: Array | None, gate: bool) -> Gradients:
    """The gradients of `forward`, whose chunk states and T - I come in; ds None is zero; with `gate` those of b too.

    K divides V.
    """
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, team, programs = time // CHUNK, key_dim // CHUNK, value_dim // key_dim
    size = 4 * CHUNK if gate else CHUNK
    flat = present(q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, do=do, states=states, t=t, ds=ds)
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = dict(
        q=shape((batch, time, heads * programs, key_dim), x.q.dtype),
        k=shape((batch, time, heads * programs, key_dim), x.k.dtype),
        v=shape(x.v.shape, x.v.dtype),
        vectors=shape((value_dim // BLOCK, batch, heads, chunks, size), f32),
        s=shape((batch, heads, key_dim, value_dim), f32),
    )
    alone = team == 1
    scratch = dict(
        **{name: gpu.tile(team, STAGES, CHUNK, CHUNK) for name in ("q", "k", "v")},
        states=gpu.tile(team, team, STAGES if alone else 1, CHUNK, BLOCK),
        d_state=gpu.tile(team, team, CHUNK, BLOCK),
        **{name: gpu.tile(team, CHUNK, BLOCK) for name in ("do", "u", "p")},
        t=gpu.tile(1, CHUNK, CHUNK),
        vectors=gpu.vector(STAGES, form.vectors, CHUNK),
        made=gpu.vector(team, size),
        barrier=gpu.barrier((4 if alone else 2 * team) + 1 + form.segments, min(STAGES, chunks)),
        late=gpu.barrier(2 if alone else 1 + 2 * team + team * team, 1),
        meeting=gpu.barrier(team, 1),
    )
    if gate:
        scratch |= dict(sums=gpu.vector(team, SUMS * CHUNK))
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
            (batch, heads, programs),
            list(scratch.values()),
            warpgroups=team,
        )
    )


def _program(form: Form, index, given, made, buffer, chunks, gate) -> None:
    b, h, _, me = index
    own = member_of(index, made, buffer)
    team, w, row, values, keys, first, alone = own.team, own.w, own.row, own.values, own.keys, own.first, own.alone
    share = 1.0 if alone else jnp.where(first, 1.0, 0.0)  # of what both warpgroups find

    def fetch_late(n, slot):
        """Start to copy what there is room for once the chunk before is done; of two warpgroups' also S and v."""
        part = gpu.chunk_rows(n)
        gpu.fetch([(given["do"].at[b, part, h, values], buffer["do"].at[me])], buffer["late"])
        gpu.where(first, lambda: gpu.fetch([(given["t"].at[b, h, n], buffer["t"].at[0])], buffer["late"]))
        own.fetch_states(given["states"].at[b, h, n])
        if not alone:
            gpu.fetch([(given["v"].at[b, part, h, values], buffer["v"].at[me, slot])], buffer["late"])

    assert alone or STAGES == 2  # Y of two warpgroups lies in the other slot

    def place_of_y(tiles, m):
        return tiles.of(0, "t") if alone else buffer["v"].at[m, 1 - tiles.slot]

    def place_of_da(tiles):
        return tiles.state(0, 0) if alone else place_of_y(tiles, 0)

    def chunk(n, slot, refill, ds):
        tiles = own.tiles(slot)
        q, k, do, u = tiles.all("q", "k", "do", "u")
        own_q, own_k, v, own_do, own_u, own_p = tiles.own("q", "k", "v", "do", "u", "p")
        t = tiles.of(0, "t")

        def made_vector(row):
            return buffer["made"].at[me + tiles.here, pl.ds(row * CHUNK, CHUNK)]

        d = decays(form, buffer, slot)
        beta = beta_of(form, buffer, slot)
        if form.segments:
            clean(d.valid, own_q, own_k)
            own.meet()
        for c in team:
            tiles.d_state(c, me)[...] = ds[c].astype(jnp.bfloat16)
        gpu.commit()
        k_state = Sum([Product(k[c], tiles.state(c, me)) for c in team])
        k_d_state = Sum([Product(k[c], tiles.d_state(c, me)) for c in team])
        q_k, k_k = (Sum([Product(x[c], k[c], tb=True) for c in team]) for x in (q, k))

        def weights():  # decays are read again each time: kept, they would be spilled
            return decays(form, buffer, slot).pair()

        # U, Y of the own values; a tile has one thing after the other
        p, du, weight = dots(q_k, k_d_state, meanwhile=weights)
        own_p[...] = (weight * p).astype(jnp.bfloat16)
        gpu.arrived(buffer["late"])
        if form.segments:
            clean(d.valid, v, own_do)
        gpu.commit()
        to_du = Sum([Product(own_p, own_do, ta=True)], by_row(d.leave, du))
        read, du = dots(k_state, to_du, last=True)
        z = gpu.load(v) - by_row(d.enter, read)
        x = by_row(beta, z)
        own_u[...], own_p[...] = (tile.astype(jnp.bfloat16) for tile in (x, du))
        gpu.commit()
        gpu.wait_out(0)
        refill()
        new_u, y = dots(Sum([Product(t, own_u)], x), Sum([Product(t, own_p, ta=True)], du), last=True)
        own_y = place_of_y(tiles, me)
        dv, d_beta = by_row(beta, y), jnp.sum(y * z, 1)
        own_u[...], own_y[...], own_p[...] = (tile.astype(jnp.bfloat16) for tile in (new_u, y, by_row(-d.enter, dv)))
        v[...] = stored(d, dv)
        gpu.commit()
        own.meet()

        # -dA is beta times what is here called dl; both are times the decays and scale
        i, j = registers.indices()
        to_dp = Sum([Product(do[m], u[m], tb=True) for m in team])
        to_dl = Sum([Product(place_of_y(tiles, m), u[m], tb=True) for m in team])
        more = [*([q_k] if gate else []), *([k_k] if alone or not gate else [])]  # as far as there are registers
        dp, dl, *more, weight = dots(to_dp, to_dl, *more, meanwhile=weights, last=alone)
        dp, dl = weight * dp, jnp.where(i > j, weight * dl, 0.0)

        def put_dp():
            t[...] = dp.astype(jnp.bfloat16)

        def put_da():
            place_of_da(tiles)[...] = da

        gpu.where(first, put_dp)
        if gate:
            e = jnp.where(i > j, dp * more.pop(0), 0.0)
        (a,) = more or dots(k_k)
        dl_a = dl * a
        made_vector(BETA)[...] = d_beta - jnp.sum(dl_a, 1) * (share / form.scale)
        if gate:
            e -= by_row(beta * (1 / form.scale), dl_a)
            e = e if alone else share * e
            made_vector(COLUMNS)[...] = column_sums(e, buffer["sums"].at[me])
            by_rows = jnp.sum(e, 1)
        da = by_row(beta * (-1 / form.scale), dl).astype(jnp.bfloat16)
        own.meet()  # nobody needs Y, nor do as it came
        own_do[...] = by_row(d.enter_scaled, gpu.load(own_do)).astype(jnp.bfloat16)
        if not alone:
            gpu.where(first, put_da)
        gpu.commit()
        own.meet()

        # of the own keys: rows written to the next state, rows reading this one
        tiles = own.tiles(slot)
        q, k, do, u, p = tiles.all("q", "k", "do", "u", "p")
        own_q, own_k, v, own_do, own_p = tiles.own("q", "k", "v", "do", "p")
        dp_tile, da_tile = tiles.of(0, "t"), place_of_da(tiles)
        written = Sum([Product(u[m], tiles.d_state(me, m), tb=True) for m in team])
        reading = Sum([Product(p[m], tiles.state(me, m), tb=True) for m in team])
        read_do = Sum([Product(do[m], tiles.state(me, m), tb=True) for m in team])
        dk, dk_read, dq = dots(written, reading, read_do, last=alone)
        dk = by_row(d.leave, dk)
        if gate:
            kept = d.keep * sum(jnp.sum(gpu.load(tiles.state(c, me)) * ds[c], 1) for c in team)
            made_vector(WRITES)[...] = jnp.sum(gpu.load(own_k) * dk, 1) + kept
            by_rows += jnp.sum(gpu.load(own_k) * dk_read, 1) + jnp.sum(gpu.load(own_q) * dq, 1)
            made_vector(ROWS)[...] = by_rows + kept
        dk += dk_read
        if alone:
            put_da()
            gpu.commit()
        d_keys = [Product(da_tile, own_k), Product(dp_tile, own_q, ta=True), Product(da_tile, own_k, ta=True)]
        through = [[Product(q[c], own_do, ta=True), Product(k[c], own_p, ta=True)] for c in team]
        dk, dq, *new = dots(
            Sum(d_keys, dk),
            Sum([Product(dp_tile, own_k)], dq),
            *(Sum(through[c], d.keep * ds[c]) for c in team),
            last=alone,
        )
        own.meet()  # nobody reads this chunk any more
        own_q[...], own_k[...] = stored(d, dq), stored(d, dk)
        pl.when(n > 0)(lambda: fetch_late(n - 1, 1 - tiles.slot))
        part = gpu.chunk_rows(n)
        copies = [(x, made[name].at[b, part, row, keys]) for x, name in ((own_q, "q"), (own_k, "k"))]
        copies += [(v, made["v"].at[b, part, h, values]), (buffer["made"].at[me], made["vectors"].at[w, b, h, n])]
        gpu.copy_out(*copies)
        return tuple(new)

    head = key_head(given, h)
    parts = [(lambda n, x=given[x]: x.at[b, gpu.chunk_rows(n), head, keys], buffer[x].at[me]) for x in ("q", "k")]
    shared = small_sources(given, buffer, b, h)
    if alone:
        parts.append((lambda n: given["v"].at[b, gpu.chunk_rows(n), h, values], buffer["v"].at[0]))
        shared.append((lambda n: given["states"].at[b, h, n, :, values], buffer["states"].at[0, 0]))
    parts += [(*source, first) for source in shared]
    fetch_late(jnp.int32(chunks - 1), 0)
    ds = load_state(given, "ds", (b, h, w), made["q"].shape[3])
    ds = gpu.stream(parts, buffer["barrier"], chunk, ds, chunks=chunks, stages=STAGES, reverse=True)
    store_state(made["s"], ds, (b, h, w))
    gpu.wait_out(0)
