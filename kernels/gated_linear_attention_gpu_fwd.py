"""Family A forward on Hopper: one warpgroup walks the chunks of a (batch, value head, 64 values), S in registers.

    P_ij = scale q_i.k_j e^{b_i - c_j}, i >= j ;  n = scale e^b (Q S) + P V ;  l_i = scale e^{b_i} q_i.z + sum_j P_ij
    o = n | n / (l + eps) | n / max(|l|, floor) ;  S' = e^{b_C} S + K^T (e^{b_C - c} V) ;  z' likewise with V = 1

b is the cumulative log decay of the chunk and c = b - w, w the log input gate, both in powers of two, for which the
hardware has an instruction. Masks of segments multiply the decays. Every exponent is a difference of float32 sums of at
most 64 gates, each clamped at `MIN_GATE`: its error stays below 1e-3, which bfloat16 operands hide (they cost 4e-3).

Budget at K = 64, of 65536 registers and 227 KB of shared memory an SM: S, P and its decays in registers, then S, Q S
and n, 96 a thread, and pieces of tiles: 126 to 147, so three programs share an SM. Shared memory a program: q, k, v
tiles of 8 KB, 2 stages, o written over v (48 KB); S and the decayed V as operands (16 KB); vectors. There are two
programs with a denominator, which takes 235 registers, and at K = 128: then Q S does not wait for P, and K = 64 has 3
stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.gated_linear_attention import NORMALIZER_EPS
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row, columns, rows
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots
from jaxlin.kernels.tile_gpu_sums import SUMS, column_sums

STAGES = {64: 3, 128: 2}
"""Chunks in flight, by key dimension, where two programs share an SM."""
LIGHT_STAGES = 2
"""Likewise where three do: K = 64, without a denominator."""
MIN_GATE = -100.0
"""Gates below are taken as this: e^-100 is 0 in float32, and sums of stronger ones would lose the weaker."""
VALID, ENTER, LEAVE, KEEP, RUN = 1, 2, 4, 8, 16
"""Bits of a segment code: a token, one that sees the chunk's initial state, one that its final state sees; the initial
state survives the chunk (the same in all rows); multiples of RUN number the documents."""


class Form(NamedTuple):
    """What a kernel is compiled for."""

    scale: float
    gated: bool  # b comes along
    segments: bool  # segment codes come along
    denominator: str | None = None  # None, "sum" (linear attention's normaliser) or "max" (the mLSTM's, with a floor)
    write: bool = False  # c comes along; without, it is b
    beta: bool = False  # the delta rule's weight comes along

    @property
    def vectors(self) -> int:
        """Rows of the per-token vectors, of b, c, log2 of the floor, beta those that come along, in this order."""
        return self.gated + self.write + (self.denominator == "max") + self.beta


class Inputs(NamedTuple):
    """What both passes read; None where the form has no use for it. T is a multiple of 64, N = T / 64."""

    q: Array  # [B, T, H, K] bfloat16, K 64 or 128
    k: Array
    v: Array  # [B, T, HV, V], V a multiple of 64
    vectors: Array | None  # [1|B, HV, 1|N, R, C] float32, the form's
    codes: Array | None  # [B, N, C] int32


class States(NamedTuple):
    """S and z at the beginning of each chunk, as saved for the backward pass."""

    s: Array  # [B, HV, N, K, V] bfloat16, as products read it
    z: Array | None  # [B, HV, N, K] float32


def forward(
    form: Form, x: Inputs, s0: Array | None, z0: Array | None, save: bool
) -> tuple[Array, Array | None, tuple[Array, Array | None], States | None]:
    """(o [B, T, HV, V], l [B, HV, N, C] or None, final (S, z), chunk states if `save`); initial states default to 0."""
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks, summed = time // CHUNK, form.denominator is not None
    light = key_dim == 64 and not summed
    stages = min(LIGHT_STAGES if light else STAGES[key_dim], chunks)
    flat = present(q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, s0=s0, z0=z0)
    shape, f32 = jax.ShapeDtypeStruct, jnp.float32
    out = dict(o=shape(x.v.shape, x.v.dtype), s=shape((batch, heads, key_dim, value_dim), f32))
    if summed:
        out |= dict(l=shape((batch, heads, chunks, CHUNK), f32), z=shape((batch, heads, key_dim), f32))
    if save:
        out |= dict(states=shape((batch, heads, chunks, key_dim, value_dim), x.v.dtype))
        out |= dict(zs=shape((batch, heads, chunks, key_dim), f32)) if summed else {}
    copies = 3 + (x.vectors is not None) + (x.codes is not None)
    scratch = dict(
        q=gpu.tile(stages, CHUNK, key_dim),
        k=gpu.tile(stages, CHUNK, key_dim),
        v=gpu.tile(stages, CHUNK, BLOCK),
        state=gpu.tile(key_dim, BLOCK),
        barrier=gpu.barrier(copies, stages),
    )
    if form.gated or form.segments:
        scratch |= dict(written=gpu.tile(CHUNK, BLOCK))
    if x.vectors is not None:
        scratch |= dict(vectors=gpu.vector(stages, form.vectors, CHUNK))
    if form.segments:
        scratch |= dict(codes=gpu.vector(stages, CHUNK, dtype=jnp.int32))
    if summed:
        scratch |= dict(l=gpu.vector(CHUNK), z=gpu.vector(key_dim), sums=gpu.vector(SUMS * key_dim))

    def gated_linear_attention_fwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks, stages, light)

    grid = (batch, heads, value_dim // BLOCK)
    results = gpu.launch(
        gated_linear_attention_fwd, list(flat.values()), list(out.values()), grid, list(scratch.values())
    )
    results = dict(zip(out, results, strict=True))
    states = States(results["states"], results.get("zs")) if save else None
    return results["o"], results.get("l"), (results["s"], results.get("z")), states


def present(**arrays: Array | None) -> dict[str, Array]:
    """The arrays that there are, by name."""
    return {name: x for name, x in arrays.items() if x is not None}


def _program(form: Form, index, given, made, buffer, chunks, stages, light) -> None:
    b, h, w = index
    summed, save = form.denominator is not None, "states" in made
    block, first = gpu.block(w), w == 0
    s = gpu.load(given["s0"].at[b, h, :, block]) if "s0" in given else registers.zeros(*buffer["state"].shape)
    z = None
    if summed:
        z = gpu.load_columns(given["z0"].at[b, h]) if "z0" in given else registers.zero_columns(buffer["z"].shape[0])

    saves = (1 + summed) if save else 0  # groups of copies that a chunk starts with
    stores = saves + 1 + summed  # and has in all

    def anew(slot):
        """q, k, v and the decays of a chunk: kept from one part of it to the next, they take registers."""
        here = registers.unknown_zero(anew=True)
        return *(buffer[name].at[slot + here] for name in "qkv"), decays(form, buffer, slot + here, here)

    def chunk(n, slot, refill, carry):
        s, z = carry
        q, k, v, d = anew(slot)
        if save:
            gpu.wait_out(stores - saves)  # the saved state of the chunk before
        buffer["state"][...] = s.astype(jnp.bfloat16)
        if not save:
            gpu.commit()
        else:
            if z is not None:
                buffer["z"][...] = z
                gpu.copy_out((buffer["z"], made["zs"].at[b, h, n]), when=first)
            gpu.copy_out((buffer["state"], made["states"].at[b, h, n, :, block]))
        if form.segments:
            clean(d.valid, k, v)
        to_p, to_read = Sum([Product(q, k, tb=True)]), Sum([Product(q, buffer["state"])])
        if light:  # one wait more, and 32 registers less
            p, weight = dots(to_p, meanwhile=d.pair)
        else:
            p, read, weight = dots(to_p, to_read, meanwhile=d.pair)
        p = weight * p
        denominator = None
        if z is not None:
            l = jnp.sum(p, 1) + d.enter_scaled * jnp.sum(gpu.load(q) * columns(z), 1)  # noqa: E741
            denominator = l if d.valid is None else jnp.where(d.valid, l, 1.0)  # q is as it came in padding
        q, k, v, d = anew(slot)
        gpu.wait_out(saves)  # all that the chunk before made
        refill()
        if z is not None:
            z = d.keep * z + column_sums(by_row(d.leave, gpu.load(k)), buffer["sums"])
        if "written" in buffer:
            gpu.put(buffer["written"], by_row(d.leave, gpu.load(v)))
        if light:
            (read,) = dots(Sum([Product(q, buffer["state"])]))
        o, s = dots(
            Sum([Product(p.astype(jnp.bfloat16), v)], by_row(d.enter_scaled, read)),
            Sum([Product(k, buffer.get("written", v), ta=True)], s * d.keep),
            last=True,
        )
        if denominator is not None:
            buffer["l"][...] = denominator
            o = by_row(1 / denominator_of(form, denominator, d.floor), o)
        v[...] = stored(d, o)
        if summed:
            gpu.copy_out((buffer["l"], made["l"].at[b, h, n]), when=first)
        gpu.copy_out((v, made["o"].at[b, gpu.chunk_rows(n), h, block]))
        return s, z

    s, z = gpu.stream(
        sources(given, buffer, index),
        buffer["barrier"],
        chunk,
        (s, z),
        chunks=chunks,
        stages=stages,
    )
    made["s"].at[b, h, :, block][...] = s
    if z is not None:

        @pl.when(first)
        def _():
            made["z"].at[b, h][...] = z

    gpu.wait_out(0)


# ---- shared with the backward pass ----


class Decays(NamedTuple):
    """The decays of a chunk in registers, masked; of row i from the chunk's start, of row j to its end."""

    pair: Callable[..., Array]  # [C, C]: scale * decay from row j to row i, 0 where i < j; times a factor [C] of rows i
    keys: Callable[[], Array]  # likewise without scale, and 0 where i <= j
    enter: Array  # [C] of rows, or a scalar where it is the same for all
    enter_scaled: Array  # scale * enter
    leave: Array  # like enter
    keep: Array  # scalar
    valid: Array | None  # [C] bool
    floor: Array | None  # [C]


def decays(form: Form, buffer: dict, slot: Array, here: Array | int = 0) -> Decays:
    """The decays of the chunk in `slot`, from its vectors and segment codes.

    With `here`, a zero found anew in every chunk, masks are made in every chunk too, and take no registers in between.
    """
    i, j = registers.indices()
    i = i + here
    valid = floor = b = columns_c = together = None
    enter = leave = keep = jnp.float32(1)
    if form.gated:
        vectors = buffer["vectors"].at[slot]
        row = 1 if form.write else 0
        b, c = gpu.load_rows(vectors.at[0]), gpu.load_rows(vectors.at[row])
        columns_c = gpu.load_columns(vectors.at[row])
        last = vectors[0, CHUNK - 1]
        enter, leave, keep = jnp.exp2(b), jnp.exp2(last - c), jnp.exp2(last)
    if form.denominator == "max":
        floor = jnp.exp2(gpu.load_rows(buffer["vectors"].at[slot, form.gated + form.write]))
    if form.segments:
        codes = buffer["codes"].at[slot]
        code = gpu.load_rows(codes)
        together = lax.bitwise_xor(rows(code), columns(gpu.load_columns(codes))) < RUN
        valid = lax.bitwise_and(code, VALID) != 0
        enter, leave = (
            jnp.where(lax.bitwise_and(code, bit) != 0, x, 0.0) for bit, x in ((ENTER, enter), (LEAVE, leave))
        )
        keep = jnp.where(lax.bitwise_and(codes[0], KEEP) != 0, keep, 0.0)

    def weights(mask: Array, factor: float, per_row: Array | None = None) -> Array:
        mask = mask if together is None else mask & together
        if b is None:
            return jnp.where(mask, factor if per_row is None else rows(factor * per_row), 0.0)
        exponent = b + math.log2(factor)
        if per_row is not None and form.denominator == "max":  # positive
            exponent, per_row = exponent + jnp.log2(per_row), None
        # masked before the exponential, which the upper half would overflow
        found = jnp.exp2(jnp.where(mask, rows(exponent) - columns(columns_c), -1e30))
        return found if per_row is None else by_row(per_row, found)

    def pair(per_row: Array | None = None) -> Array:
        return weights(i >= j, form.scale, per_row)

    def keys() -> Array:
        return weights(i > j, 1.0)

    return Decays(pair, keys, enter, form.scale * enter, leave, keep, valid, floor)


def denominator_of(form: Form, l: Array, floor: Array | None) -> Array:  # noqa: E741
    """What the numerator is divided by."""
    return l + NORMALIZER_EPS if form.denominator == "sum" else jnp.maximum(jnp.abs(l), floor)


def clean(valid: Array, *tiles: gpu.Ref) -> None:
    """Zero the padding rows of tiles in shared memory, whatever they hold."""
    for t in tiles:
        t[...] = jnp.where(rows(valid, t.shape[1]), gpu.load(t), 0.0).astype(jnp.bfloat16)
    gpu.commit()


def stored(d: Decays, x: Array) -> Array:
    """A tile as it is handed on: bfloat16, zero in padding rows."""
    return (x if d.valid is None else jnp.where(rows(d.valid, x.shape[1]), x, 0.0)).astype(jnp.bfloat16)


def sources(given: dict, buffer: dict, index: tuple[Array, Array, Array]) -> list:
    """The parts of q, k, v, vectors and codes that a chunk reads, with their buffers."""
    b, h, w = index
    head = key_head(given, h)
    found = [(lambda n, x=given[x]: x.at[b, gpu.chunk_rows(n), head], buffer[x]) for x in ("q", "k")]
    found.append((lambda n: given["v"].at[b, gpu.chunk_rows(n), h, gpu.block(w)], buffer["v"]))
    return found + small_sources(given, buffer, b, h)


def key_head(given: dict, h: Array) -> Array:
    """The head of q and k that value head h has."""
    group = given["v"].shape[2] // given["q"].shape[2]
    return h if group == 1 else lax.div(h, jnp.int32(group))


def small_sources(given: dict, buffer: dict, b: Array, h: Array) -> list:
    """The parts of vectors and codes that a chunk reads, with their buffers."""
    found = []
    if "vectors" in given:
        x = given["vectors"]
        found.append((lambda n: x.at[b if x.shape[0] > 1 else 0, h, n if x.shape[2] > 1 else 0], buffer["vectors"]))
    if "codes" in given:
        found.append((lambda n: given["codes"].at[b, n], buffer["codes"]))
    return found
