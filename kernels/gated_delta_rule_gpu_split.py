"""Family B's sequences cut into parts that run side by side; see `gated_linear_attention_gpu_split`.

The state at the start of a part is mapped to M S + N, its cotangent at the end to M^T dS + R. `maps` finds N and M of
every part in a first pass: the recurrence itself, N from a zero state, the columns of M from those of the identity with
v = 0. `adjoints` finds R. Both read T - I. A kernel then goes through the parts: XLA had three for each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.gated_delta_rule_gpu_bwd import Gradients
from jaxlin.kernels.gated_delta_rule_gpu_intra import beta_of
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present
from jaxlin.kernels.gated_linear_attention_gpu_split import cut, join
from jaxlin.kernels.mosaic_gpu import BLOCK, dot
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row
from jaxlin.kernels.tile_gpu_keys import key_rows, load_state, store_state
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots

STAGES = 2
THREE_OF_FOUR = (0, 0), (0, 1), (1, 0)
"""Pairs of pieces of bfloat16 that are multiplied: all but that of what is left of both."""


def starts(maps: Array, s0: Array | None, parts: int) -> Array:
    """The state at the start of each part [B * P, HV, K, V], from `maps` and that of the first part."""
    return _combine(maps, maps, s0, parts, adjoint=False)


def ends(maps: Array, r: Array, ds: Array | None, parts: int) -> Array:
    """The cotangent of the state at the end of each part, from `maps`, R and that of the last part."""
    return _combine(maps, r, ds, parts, adjoint=True)


def _combine(maps: Array, update: Array, start: Array | None, parts: int, adjoint: bool) -> Array:
    """S before each part, S' = M S + N (adjoint: M^T, from the last part to the first), products of 16 bits a side."""
    batch, heads, key_dim, width = maps.shape
    value_dim, halves = width - key_dim, range(key_dim // CHUNK)
    flat = present(m=maps, n=update, start=start)
    stages = 2 if len(halves) == 1 else 1
    scratch = dict(
        m=gpu.float_tile(len(halves), len(halves), stages, CHUNK, CHUNK),
        n=gpu.float_tile(len(halves), stages, CHUNK, BLOCK),
        m_pieces=gpu.tile(2, len(halves), len(halves), CHUNK, CHUNK),
        s_pieces=gpu.tile(2, len(halves), CHUNK, BLOCK),
        barrier=gpu.barrier(len(halves) * (len(halves) + 1), min(stages, parts)),
    )

    def gated_delta_rule_combine(index, inputs, outputs, buffers):
        b, h, w = index
        given, buffer = dict(zip(flat, inputs, strict=True)), dict(zip(scratch, buffers, strict=True))

        def pieces(name, *place):
            return [buffer[name].at[n, *place] for n in range(2)]

        def product(row, column):
            """Of M, or its transpose, with S: three of the four products of pieces."""
            m, s = pieces("m_pieces", *((column, row) if adjoint else (row, column))), pieces("s_pieces", column)
            return [Product(m[i], s[j], ta=adjoint) for i, j in THREE_OF_FOUR]

        def part(n, slot, refill, s):
            store_state(outputs[0], s, (b * parts + n, h, w))
            for c in halves:
                gpu.write_pieces(s[c], *pieces("s_pieces", c))
                for d in halves:
                    gpu.write_pieces(gpu.load(buffer["m"].at[c, d, slot]), *pieces("m_pieces", c, d))
            gpu.commit()
            refill()
            sums = ([x for d in halves for x in product(c, d)] for c in halves)
            return tuple(dots(*(Sum(x, gpu.load(buffer["n"].at[c, slot])) for c, x in enumerate(sums)), last=True))

        sources = [
            (lambda n, c=c: given["n"].at[b * parts + n, h, key_rows(c), gpu.block(w)], buffer["n"].at[c])
            for c in halves
        ]
        sources += [
            (
                lambda n, c=c, d=d: given["m"].at[b * parts + n, h, key_rows(c), pl.ds(value_dim + d * CHUNK, CHUNK)],
                buffer["m"].at[c, d],
            )
            for c in halves
            for d in halves
        ]
        s = load_state(given, "start", (b, h, w), key_dim)
        gpu.stream(sources, buffer["barrier"], part, s, chunks=parts, stages=stages, reverse=adjoint)

    out = [jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32)]
    grid = (batch // parts, heads, value_dim // BLOCK)
    return gpu.launch(gated_delta_rule_combine, list(flat.values()), out, grid, list(scratch.values()))[0]


def cut_inputs(x: Inputs, parts: int) -> Inputs:
    """The inputs with parts as rows of the batch, as vectors are already."""
    q, k, v, codes = (cut(y, parts, 1) for y in (x.q, x.k, x.v, x.codes))
    return Inputs(q, k, v, x.vectors, codes)


def join_gradients(d: Gradients, parts: int) -> Gradients:
    """The gradients of q, k, v with parts put together; those of the initial state are the first part's."""
    q, k, v = (join(y, parts, 1) for y in (d.q, d.k, d.v))
    return Gradients(q, k, v, d.vectors, d.s[::parts])


def maps(form: Form, x: Inputs, t: Array) -> Array:
    """N and, behind it, M of whole sequences (the parts, cut): [B, HV, K, V + K]."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    blocks = value_dim // BLOCK  # of N; those of M follow
    tiles = dict(k=(CHUNK, key_dim), v=(CHUNK, BLOCK), t=(CHUNK, CHUNK))
    own = dict(state=gpu.tile(key_dim, BLOCK))

    def gated_delta_rule_maps(index, given, made, buffer):
        _, _, w = index
        i, j = registers.indices(key_dim, BLOCK)
        s = jnp.where(i == j + BLOCK * (w - blocks), 1.0, 0.0)  # no row for blocks of N, whose w is less

        def chunk(n, slot, refill, s):
            k, v, t = (buffer[name].at[slot] for name in ("k", "v", "t"))
            gpu.commit()  # no warp reads the chunk before any more
            refill()
            gpu.put(buffer["state"], s)
            d = decays(form, buffer, slot)
            if form.segments:
                clean(d.valid, k, v)
            values = jnp.where(w < blocks, gpu.load(v), 0.0)
            x = by_row(beta_of(form, buffer, slot), values - by_row(d.enter, dot(k, buffer["state"])))
            gpu.put(v, x)
            (u,) = dots(Sum([Product(t, v)], x), last=True)
            gpu.put(v, by_row(d.leave, u))
            return dot(k, v, by_row(d.keep, s), ta=True)

        return s, chunk

    def last(w):
        return gpu.block(jnp.minimum(w, blocks - 1))

    width = value_dim + key_dim
    given = dict(k=x.k, v=x.v, t=t, vectors=x.vectors, codes=x.codes)
    size = (batch, time, heads, key_dim, width)
    return _walk(gated_delta_rule_maps, form, given, tiles, own, size, last, reverse=False)


def adjoints(form: Form, x: Inputs, t: Array, do: Array) -> Array:
    """R [B, HV, K, V] of whole sequences."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    tiles = dict(q=(CHUNK, key_dim), k=(CHUNK, key_dim), do=(CHUNK, BLOCK), t=(CHUNK, CHUNK))
    own = dict(state=gpu.tile(key_dim, BLOCK), p=gpu.tile(CHUNK, CHUNK), y=gpu.tile(CHUNK, BLOCK))

    def gated_delta_rule_adjoints(index, given, made, buffer):
        def chunk(n, slot, refill, ds):
            q, k, do, t = (buffer[name].at[slot] for name in ("q", "k", "do", "t"))
            gpu.commit()  # as above
            refill()
            d = decays(form, buffer, slot)
            if form.segments:
                clean(d.valid, q, k, do)
            gpu.put(buffer["state"], ds)
            p, du = dots(Sum([Product(q, k, tb=True)]), Sum([Product(k, buffer["state"])]))
            gpu.put(buffer["p"], d.pair() * p)
            du = dot(buffer["p"], do, by_row(d.leave, du), ta=True)
            gpu.put(buffer["y"], du)
            (y,) = dots(Sum([Product(t, buffer["y"], ta=True)], du), last=True)
            gpu.put(buffer["y"], by_row(-d.enter * beta_of(form, buffer, slot), y))
            gpu.put(buffer["p"], by_row(d.enter_scaled, gpu.load(do)))
            through = [Product(q, buffer["p"], ta=True), Product(k, buffer["y"], ta=True)]
            return dots(Sum(through, d.keep * ds))[0]

        return registers.zeros(key_dim, BLOCK), chunk

    given = dict(q=x.q, k=x.k, do=do, t=t, vectors=x.vectors, codes=x.codes)
    size = (batch, time, heads, key_dim, value_dim)
    return _walk(gated_delta_rule_adjoints, form, given, tiles, own, size, gpu.block, reverse=True)


def _walk(body, form: Form, given: dict, tiles: dict, own: dict, size: tuple, block, reverse: bool) -> Array:
    """S [B, HV, K, width] after `carry, chunk = body(...)` over all chunks; `block` finds a program's values."""
    batch, time, heads, key_dim, width = size
    chunks, flat = time // CHUNK, present(**given)
    group = heads // flat["k"].shape[2]
    scratch = {name: gpu.tile(STAGES, *shape) for name, shape in tiles.items()} | own
    scratch |= dict(vectors=gpu.vector(STAGES, form.vectors, CHUNK))
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))
    scratch |= dict(barrier=gpu.barrier(len(flat), min(STAGES, chunks)))

    def program(index, inputs, outputs, buffers):
        b, h, w = index
        x, buffer = dict(zip(flat, inputs, strict=True)), dict(zip(scratch, buffers, strict=True))
        key_head = h if group == 1 else lax.div(h, jnp.int32(group))
        part = dict(
            q=lambda n: x["q"].at[b, gpu.chunk_rows(n), key_head],
            k=lambda n: x["k"].at[b, gpu.chunk_rows(n), key_head],
            v=lambda n: x["v"].at[b, gpu.chunk_rows(n), h, block(w)],
            do=lambda n: x["do"].at[b, gpu.chunk_rows(n), h, block(w)],
            t=lambda n: x["t"].at[b, h, n],
            vectors=lambda n: x["vectors"].at[b, h, n],
            codes=lambda n: x["codes"].at[b, n],
        )
        carry, chunk = body(index, x, outputs, buffer)
        sources = [(part[name], buffer[name]) for name in flat]
        s = gpu.stream(sources, buffer["barrier"], chunk, carry, chunks=chunks, stages=STAGES, reverse=reverse)
        outputs[0].at[b, h, :, gpu.block(w)][...] = s

    program.__name__ = body.__name__
    out = [jax.ShapeDtypeStruct((batch, heads, key_dim, width), jnp.float32)]
    grid = (batch, heads, width // BLOCK)
    return gpu.launch(program, list(flat.values()), out, grid, list(scratch.values()))[0]
