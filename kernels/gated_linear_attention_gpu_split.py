"""Sequences cut into parts that run side by side, where batch times heads would leave most of the GPU idle.

A part of the sequence maps the state at its start to S' = k S + N, its adjoint likewise in reverse: a first pass over
every part finds N (`accumulate`), one small product combines the parts (`combine`), and the kernels then run on the
parts as if they were rows of the batch, each from its own initial state. The first pass reads k and v (backward: q and
do) once more: a third of the traffic, for up to P times the parallelism.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.gated_linear_attention_gpu_bwd import Cotangents, Gradients
from jaxlin.kernels.gated_linear_attention_gpu_fwd import (
    ENTER,
    KEEP,
    LEAVE,
    VALID,
    Form,
    Inputs,
    clean,
    denominator_of,
    present,
)
from jaxlin.kernels.mosaic_gpu import BLOCK, dot
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row
from jaxlin.kernels.tile_gpu_sums import SUMS, column_sums

STAGES = 3
PROGRAMS = 264
"""Programs that fill an H100: two on each of its 132 multiprocessors."""
LEAST_CHUNKS = 4
"""Chunks in a part, at least."""


def parts_of(v: Array) -> int:
    """Into how many parts to cut sequences of values v [B, T, HV, V], by how many programs there are without."""
    batch, time, heads, value_dim = v.shape
    programs, chunks = batch * heads * (value_dim // BLOCK), time // CHUNK
    if 4 * programs > PROGRAMS:
        return 1
    return max(
        p for p in range(1, PROGRAMS // programs + 1) if chunks % p == 0 and (p == 1 or chunks // p >= LEAST_CHUNKS)
    )


def cut(x: Array | None, parts: int, axis: int) -> Array | None:
    """[B, ..., parts * n, ...] -> [B * parts, ..., n, ...]; no copy for axis 1. Arrays with one entry there stay."""
    if x is None or x.shape[axis] == 1:
        return x
    x = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 1).reshape(-1, *x.shape[1:axis], *x.shape[axis + 1 :])


def join(x: Array, parts: int, axis: int) -> Array:
    """The inverse of `cut`."""
    x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def combine(keep: Array, update: Array, start: Array | None, reverse: bool = False) -> Array:
    """The state at the start of each part (reverse: the cotangent at the end of each).

    keep [B, HV, P], update [B, HV, P, ...]; start [B, HV, ...] belongs to the first part (the last), None is zero.
    """
    if reverse:
        return jnp.flip(combine(jnp.flip(keep, 2), jnp.flip(update, 2), start), 2)
    part = jnp.arange(keep.shape[2])
    later = part[None, :] > part[:, None]
    onward = jnp.cumprod(jnp.where(later, keep[:, :, None, :], 1.0), axis=-1)  # [r, m]: over parts r + 1 ... m
    before = jnp.pad(onward, [(0, 0)] * 3 + [(1, 0)])[..., :-1]  # [r, p]: over parts r + 1 ... p - 1
    weights = jnp.where(later, before, 0.0).swapaxes(-1, -2)
    flat = update.reshape(*update.shape[:3], -1)
    states = jnp.matmul(weights, flat, precision=lax.Precision.HIGHEST)
    if start is not None:
        before = jnp.cumprod(jnp.concatenate([jnp.ones_like(keep[..., :1]), keep[..., :-1]], axis=2), axis=2)
        states += before[..., None] * start.reshape(*start.shape[:2], 1, -1)
    return states.reshape(update.shape)


# ---- family A ----


def cut_inputs(x: Inputs, parts: int) -> Inputs:
    """The inputs with parts as rows of the batch."""
    q, k, v, codes = (cut(y, parts, 1) for y in (x.q, x.k, x.v, x.codes))
    return Inputs(q, k, v, cut(x.vectors, parts, 2), codes)


def join_gradients(d: Gradients, parts: int) -> Gradients:
    """The gradients of q, k, v with parts put together; those of the initial state are the first part's."""
    q, k, v = (join(y, parts, 1) for y in (d.q, d.k, d.v))
    return Gradients(q, k, v, d.gates, d.s[::parts], None if d.z is None else d.z[::parts])


def starts(form: Form, x: Inputs, s0: Array | None, z0: Array | None, parts: int) -> tuple[Array, Array | None]:
    """The states at the start of each part, [B * P, HV, K, V] and [B * P, HV, K]."""
    _, leave, keep = _weights(form, x)
    summed = form.denominator is not None
    weights = None if leave is None else _stack(keep, leave)
    s, z = accumulate(*_cut(x.k, x.v, weights, x.codes, parts), summed=summed, reverse=False)
    return _at_parts(_keep_of_parts(x, keep, parts), s, z, s0, z0, reverse=False)


def cotangent_of_l(form: Form, x: Inputs, o: Array, l: Array, do: Array) -> Array:  # noqa: E741
    """Each block's share of dl, [B, HV * V/64, N, C], from l [B, HV, N, C] and o, do [B, T, HV, V]."""
    batch, _, heads, value_dim = o.shape
    along = (do.astype(jnp.float32) * o.astype(jnp.float32)).reshape(
        batch, -1, CHUNK, heads * value_dim // BLOCK, BLOCK
    )
    # A kernel of its own: XLA would take each sum, a row of 64, in a thread of the transposition that it is stacked by.
    along = lax.optimization_barrier(along.sum(-1)).transpose(0, 3, 1, 2)
    if x.codes is not None:  # do is as it came in padding
        along = jnp.where(lax.bitwise_and(x.codes, VALID)[:, None] != 0, along, 0.0)
    l = jnp.repeat(l, value_dim // BLOCK, 1)  # noqa: E741
    if form.denominator == "sum":
        return -along / denominator_of(form, l, None)
    floor = jnp.repeat(jnp.exp2(x.vectors[..., form.gated + form.write, :]), value_dim // BLOCK, 1)
    return jnp.where(jnp.abs(l) >= floor, -jnp.sign(l) * along / denominator_of(form, l, floor), 0.0)


def ends(
    form: Form,
    x: Inputs,
    l: Array | None,  # noqa: E741
    dl: Array | None,
    d: Cotangents,
    parts: int,
) -> Cotangents:
    """The cotangents with those of the final state at the end of each part; l (in parts) and dl with a denominator."""
    batch, _, heads, _ = x.v.shape
    enter, _, keep = _weights(form, x)
    ones = jnp.ones((1, x.v.shape[2], 1, CHUNK))
    read = form.scale * (ones if enter is None else enter)
    keep = ones[..., 0] if keep is None else keep
    summed = form.denominator is not None
    if summed:
        floor = jnp.exp2(x.vectors[..., form.gated + form.write, :]) if form.denominator == "max" else None
        r = 1 / denominator_of(form, join(l, parts, 2), floor)
        dl = dl.reshape(batch, heads, -1, *dl.shape[2:]).sum(2)
    weights = _stack(keep, read * r, read * dl) if summed else _stack(keep, read)
    s, z = accumulate(*_cut(x.q, d.o, weights, x.codes, parts), summed=summed, reverse=True)
    s, z = _at_parts(_keep_of_parts(x, keep, parts), s, z, d.s, d.z, reverse=True)
    return Cotangents(cut(d.o, parts, 1), s, z)


def _weights(form: Form, x: Inputs) -> tuple[Array | None, Array | None, Array | None]:
    """(enter [1|B, HV, 1|N, C], leave, keep [1|B, HV, 1|N]) of all chunks; None means 1."""
    enter = leave = keep = None
    if x.vectors is not None:
        b, c = x.vectors[..., 0, :], x.vectors[..., 1 if form.write else 0, :]
        last = b[..., -1]
        enter, leave, keep = jnp.exp2(b), jnp.exp2(last[..., None] - c), jnp.exp2(last)
    if x.codes is not None:
        code = x.codes[:, None]
        masks = (code & ENTER, code & LEAVE, code[..., 0] & KEEP)
        ones = jnp.ones((1, x.v.shape[2], 1, 1))
        enter, leave, keep = (
            jnp.where(mask != 0, y, 0.0)
            for mask, y in zip(
                masks, (ones, ones, ones[..., 0]) if enter is None else (enter, leave, keep), strict=True
            )
        )
    return enter, leave, keep


def _stack(keep: Array, *weights: Array) -> Array:
    """The weights of rows [1|B, HV, 1|N, C] and, in all of the last one, keep: [1|B, HV, 1|N, R, C]."""
    found = jnp.broadcast_arrays(*weights, keep[..., None])
    return jnp.stack(found, axis=3)


def _cut(x: Array, y: Array, weights: Array | None, codes: Array | None, parts: int) -> tuple:
    return cut(x, parts, 1), cut(y, parts, 1), cut(weights, parts, 2), cut(codes, parts, 1)


def _keep_of_parts(x: Inputs, keep: Array | None, parts: int) -> Array:
    """[B, HV, P]: the decay over each part."""
    batch, time, heads, _ = x.v.shape
    chunks = time // CHUNK
    keep = jnp.ones((1, 1, 1)) if keep is None else keep
    keep = jnp.broadcast_to(keep, (batch, heads, chunks))
    return keep.reshape(batch, heads, parts, -1).prod(-1)


def _at_parts(keep: Array, s: Array, z: Array | None, s0: Array | None, z0: Array | None, reverse: bool) -> tuple:
    """`combine` for S and z in the layout of the kernels, [B * P, HV, ...]."""
    batch, _, parts = keep.shape

    def of(update, start):
        by_part = jnp.moveaxis(update.reshape(batch, parts, *update.shape[1:]), 1, 2)
        return jnp.moveaxis(combine(keep, by_part, start, reverse), 2, 1).reshape(update.shape)

    return of(s, s0), None if z is None else of(z, z0)


# ---- the first pass ----


def accumulate(
    x: Array, y: Array, weights: Array | None, codes: Array | None, *, summed: bool, reverse: bool
) -> tuple[Array, Array | None]:
    """(S [B, HV, K, V], z [B, HV, K] or None) after all chunks from zero: S' = keep S + sum_i w_i x_i y_i^T.

    x [B, T, H, K]; y [B, T, HV, V]; weights [1|B, HV, 1|N, R, C]: w for S, where R = 3 another for z, whose y is 1, and
    keep; None means 1. Padding rows by `codes` may hold anything.
    """
    batch, time, key_heads, key_dim = x.shape
    heads, value_dim = y.shape[2:]
    blocks = value_dim // BLOCK
    chunks, group = time // CHUNK, heads // key_heads
    flat = present(x=x, y=y, weights=weights, codes=codes)
    out = [jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32)]
    out += [jax.ShapeDtypeStruct((batch, heads, key_dim), jnp.float32)] if summed else []
    shapes = dict(
        x=gpu.tile(STAGES, CHUNK, key_dim),
        y=gpu.tile(STAGES, CHUNK, BLOCK),
        weights=None if weights is None else gpu.vector(STAGES, weights.shape[3], CHUNK),
        codes=None if codes is None else gpu.vector(STAGES, CHUNK, dtype=jnp.int32),
        barrier=gpu.barrier(len(flat), min(STAGES, chunks)),
        written=gpu.tile(CHUNK, BLOCK),
        sums=gpu.vector(SUMS * key_dim) if summed else None,
    )
    shapes = present(**shapes)

    def gated_linear_attention_parts(index, inputs, outputs, buffers):
        b, h, w = index
        given, buffer = dict(zip(flat, inputs, strict=True)), dict(zip(shapes, buffers, strict=True))

        def chunk(n, slot, refill, carry):
            s, z = carry
            x, y = buffer["x"].at[slot], buffer["y"].at[slot]
            gpu.commit()  # no warp reads the chunk before any more
            refill()
            if codes is not None:
                clean(lax.bitwise_and(gpu.load_rows(buffer["codes"].at[slot]), VALID) != 0, x, y)
            last = 0 if weights is None else weights.shape[3] - 1
            decay = jnp.float32(1) if weights is None else buffer["weights"][slot, last, 0]
            if weights is not None:
                gpu.put(buffer["written"], by_row(gpu.load_rows(buffer["weights"].at[slot, 0]), gpu.load(y)))
            if z is not None:
                read = gpu.load(x)
                if weights is not None:
                    read = by_row(gpu.load_rows(buffer["weights"].at[slot, last - 1]), read)
                z = decay * z + column_sums(read, buffer["sums"])
            return dot(x, y if weights is None else buffer["written"], decay * s, ta=True), z

        key_head = h if group == 1 else lax.div(h, jnp.int32(group))
        sources = [
            (lambda n: given["x"].at[b, gpu.chunk_rows(n), key_head], buffer["x"]),
            (lambda n: given["y"].at[b, gpu.chunk_rows(n), h, gpu.block(w)], buffer["y"]),
        ]
        if "weights" in given:
            v = given["weights"]
            part = lambda n: v.at[b if v.shape[0] > 1 else 0, h, n if v.shape[2] > 1 else 0]  # noqa: E731
            sources.append((part, buffer["weights"]))
        if "codes" in given:
            sources.append((lambda n: given["codes"].at[b, n], buffer["codes"]))
        start = registers.zeros(key_dim, BLOCK), registers.zero_columns(key_dim) if summed else None
        s, z = gpu.stream(sources, buffer["barrier"], chunk, start, chunks=chunks, stages=STAGES, reverse=reverse)
        outputs[0].at[b, h, :, gpu.block(w)][...] = s
        if z is not None:

            @pl.when(w == 0)
            def _():
                outputs[1].at[b, h][...] = z

    found = gpu.launch(
        gated_linear_attention_parts, list(flat.values()), out, (batch, heads, blocks), list(shapes.values())
    )
    return found[0], found[1] if summed else None
