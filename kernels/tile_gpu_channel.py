"""Decays of a gate per channel on Hopper, of one chunk and 64 channels, and the levels of products inside it.

b [C, K], the cumulative log2 gates of the chunk, is a product of a triangle of ones with g, which is split in two
bfloat16 tiles, 16 bits. A decay is two to a difference of rows of b, as for a gate per head: off by 1e-5 of the gates
in between and by 2^-24 b; each gate is clamped at `MIN_GATE`, so that this stays below 3e-4. Rows meet as in
kernels/README.md: for i > j there is one level s = 1, 2, 4 ... 32 with i in the second and j in the first half of an
aligned block of 2s rows. With a the last row of its first half and e_s = 2^-|b - b_a|, never above 1,

    e^{b_i - b_j} = e_s[i] e_s[j],     P = sum over s of (q e_s) (k e_s)^T masked to the corners of level s.

Backward each row of a level has one role, so q e_s (second halves) and k e_s (first halves) are one tile u, and with W
the cotangent of P on both sides of the diagonal, W_ij = W_ji, one product gives what both sides get:

    F = (W masked to the corners) u ;   dq += e_s F (second halves) ;   dk += e_s F (first halves)
    R_i = sum over s of u F (second halves) - u F (first halves)           (u rounded as the product reads it)

R_i is what row i adds to the cotangent of b_i. E_ijk = u_ik W_ij u_jk enters R_i and, negative, R_j with the very same
rounding, so that the pairs on one side of t cancel in dg_t = sum_{i >= t} R_i but for float32's rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels import tile_gpu_blocks as blocks
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, WGMMA, columns, rows
from jaxlin.kernels.tile_gpu_keys import key_rows
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots

OWN_LEVELS, LEVELS = range(4), range(4, 6)
"""s = 1, 2, 4, 8, whose pairs of rows a warp has itself (`tile_gpu_blocks`), and 16, 32, which take whole tiles."""
MIN_GATE = -40.0
"""Gates below are taken as this: e^-40 is nothing beside 1 in float32; sums of stronger ones would lose the weaker."""
UNROLL = False
"""Levels one after the other in the code: a tenth fewer instructions, but more registers than there are."""
Range = tuple[Array | None, Array | None]
"""first and last: rows [first_i, last_i) for every row i of a tile; None is the start or the end of the chunk."""


class Gates(NamedTuple):
    """The same shared memory for what becomes of g of 64 channels, one after the other."""

    g: gpu.Ref  # [C, 64] float32; dg in the end
    high: gpu.Ref
    low: gpu.Ref
    b: gpu.Ref


def cumulative(gates: Gates, valid: Array | None) -> Array:
    """Write b, of log gates g, none in padding; e^{b_C} [K], for the rows of the state."""
    x = jnp.maximum(gpu.load(gates.g), MIN_GATE) * math.log2(math.e)
    if valid is not None:
        x = jnp.where(rows(valid), x, 0.0)
    gpu.commit()  # the pieces lie where g does
    put_pieces(x, gates.high, gates.low)
    gates.b.at[:, pl.ds(0, CHUNK)][...] = sums(gates.high, gates.low, (None, registers.indices()[0] + 1))
    gpu.commit()
    return jnp.exp2(gpu.load_rows(_row(gates.b, CHUNK - 1)))


def put_pieces(x: Array, high: gpu.Ref, low: gpu.Ref) -> None:
    """x = high + low in bfloat16 tiles."""
    gpu.write_pieces(x, high, low)
    gpu.commit()


# ---- sums over rows ----


def before() -> Range:
    """All rows before row i."""
    return None, registers.indices()[0]


def onward() -> Range:
    """Row i and all behind it."""
    return registers.indices()[0], None


def sums(high: gpu.Ref, low: gpu.Ref | None, over: Range, acc: Array | None = None) -> Array:
    """acc + the sums of the rows of high + low over a range of rows for each row; they may then be written over."""
    t, (first, last) = registers.indices()[1] + registers.unknown_zero(), over
    chosen = t < last if first is None else t >= first if last is None else (t >= first) & (t < last)
    chosen = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
    return dots(Sum([Product(chosen, x) for x in (high, low) if x is not None], acc), last=True)[0]


def put_gradient(gates: Gates, r: Array, writes: gpu.Ref, carried: Array, vector: gpu.Ref, valid: Array | None) -> None:
    """Write dg_t = sum_{i >= t} r_i + sum_{j < t} writes_j + what the state carries over the chunk [K], over b."""
    gpu.commit()  # the pieces lie where b does
    vector[...] = carried
    put_pieces(r, gates.high, gates.low)
    dg = sums(gates.high, gates.low, onward(), registers.columns(gpu.load_columns(vector)))
    dg = sums(writes, None, before(), dg)
    gates.g[...] = dg if valid is None else jnp.where(rows(valid), dg, 0.0)


# ---- decays ----


def enter(b: gpu.Ref) -> Array:
    """From the chunk's start to row i, inclusive."""
    return jnp.exp2(_own(b))


def leave(b: gpu.Ref) -> Array:
    """From behind row i to the chunk's end."""
    return jnp.exp2(columns(gpu.load_columns(_row(b, CHUNK - 1))) - _own(b))


def level(b: gpu.Ref, s: Array) -> Array:
    """e_s: from the middle of a block of 2s rows to row i of its second half, from row j of its first to the middle."""
    i, second = registers.indices()[0], second_half(s)
    middle = (i & -2 * s) + s - 1
    ends, starts = (gpu.take_rows(b, jnp.where(second, x, y)) for x, y in ((i, middle), (middle, i)))
    return jnp.exp2(ends - starts)


def _own(b: gpu.Ref) -> Array:
    return gpu.load(b.at[:, pl.ds(0, CHUNK)])


def _row(b: gpu.Ref, i: int) -> gpu.Ref:
    return b.at[i, pl.ds(0, CHUNK)]


# ---- levels ----


def second_half(s: Array) -> Array:
    """Where a row lies in the second half of its block of 2s rows, all along the row."""
    return (registers.indices()[0] & s) != 0


def roles(s: Array) -> tuple[Array, Array]:
    """1 in the rows of second halves and 0 in others, and the opposite: for multiply-adds."""
    second = jnp.where(second_half(s), 1.0, 0.0)
    return second, 1.0 - second


def corners(s: Array, columns: int = CHUNK) -> Array:
    """Where row and column lie in the two halves of one block of 2s rows, on either side of the diagonal."""
    return registers.outside_corners(s, columns=columns) == 0


def over_levels(levels: range, body, carry):
    """carry = body(s, carry) for s = 1, 2, 4 ..., as far as they are among `levels`."""
    if UNROLL:
        for n in levels:
            carry = body(jnp.int32(1 << n), carry)
        return carry
    first, last = jnp.int32(levels.start), jnp.int32(levels.stop)
    return lax.fori_loop(first, last, lambda n, carry: body(lax.shift_left(jnp.int32(1), n), carry), carry)


def over_products(pairs: Sequence[tuple[gpu.Ref, gpu.Ref]], body, carry):
    """carry = body(s, product, carry) over all levels; product(n, x) is a bfloat16 x as float32, and F = W_n x.

    W_n, masked to the level, is what `put_symmetric` wrote to the first of pair n; the other is a tile to use.
    """
    own = [blocks.of_tile(gpu.load_in(w, WGMMA)) for w, _ in pairs]

    def of_own_rows(s, n, x):
        return registers.widened(x), blocks.times_rows(at_corners(own[n], s), x)

    def of_all_rows(s, n, x):
        w, u = pairs[n]
        gpu.put(u, x)
        (f,) = dots(Sum([Product(at_corners(gpu.load_in(w, WGMMA), s), u)]), last=True)
        return gpu.load(u), f

    for levels, product in ((OWN_LEVELS, of_own_rows), (LEVELS, of_all_rows)):
        carry = over_levels(levels, lambda s, x, of=product: body(s, functools.partial(of, s), x), carry)
    return carry


def put_symmetric(target: gpu.Ref, lower: Array, upper: Array, mask: Array | None, scale: float) -> None:
    """Write W: the cotangents of pairs j < i from `lower`, of its transpose from `upper`, none on the diagonal."""
    i, j = registers.indices()
    apart = i != j if mask is None else (i != j) & mask
    gpu.put(target, jnp.where(apart, scale * jnp.where(i > j, lower, upper), 0.0))


def at_corners(w: Array, s: Array) -> Array:
    """W [C, C] (from level 2 on), or its diagonal blocks [C, 16], in bfloat16, masked to the corners of a level."""
    first, second = jnp.int32((1 << 16) - 1), jnp.int32(-1 << 16)  # of a pair of columns
    outside = registers.outside_corners(s, pairs=True, columns=w.shape[1])
    if w.shape[1] == CHUNK:
        return registers.keep_pairs(w, outside)
    mask = jnp.where(registers.indices(*w.shape)[0] & 1 == 0, second, first)  # level 1 has one of them, others both
    return registers.keep_pairs(w, outside, jnp.where(s == 1, mask, -1))


def same_run(codes: gpu.Ref, run: int) -> Array:
    """[C, C]: rows i and j belong to one document, from segment codes."""
    return lax.bitwise_xor(rows(gpu.load_rows(codes)), registers.columns(gpu.load_columns(codes))) < run


def diagonal(product: Array) -> Array:
    """The diagonal of a tile, by rows."""
    i, j = registers.indices()
    return jnp.sum(jnp.where(i == j, product, 0.0), 1)


# ---- programs ----


def keys_and_gates(count: int) -> dict:
    """Shared memory for `count` times 64 keys of a chunk: q0, q1, k0, k1, and `Gates` in gates0, gates1."""
    pair = (gpu.tile(CHUNK, CHUNK), gpu.tile(CHUNK, CHUNK))
    both = gpu.in_turn((gpu.float_tile(CHUNK, CHUNK),), pair, (gpu.row_tile(),))
    keys = {f"{name}{c}": gpu.tile(CHUNK, CHUNK) for name in "qk" for c in range(count)}
    return keys | {f"gates{c}": both for c in range(count)}


def unpack(buffer: dict, count: int) -> tuple[list[gpu.Ref], list[gpu.Ref], list[Gates]]:
    """q, k and gates of `keys_and_gates`."""
    q, k, gates = ([buffer[f"{name}{c}"] for c in range(count)] for name in ("q", "k", "gates"))
    return q, k, [Gates(g, high, low, b) for (g,), (high, low), (b,) in map(tuple, gates)]


def sources(given: dict, buffer: dict, index: tuple[Array, Array, Array], count: int, first: int | Array = 0) -> list:
    """The parts of q, k, g, vectors and codes of chunk (b, h, n), with their buffers; keys from half `first` on."""
    b, h, n = index
    group = given["g"].shape[2] // given["q"].shape[2]
    head, part = h if group == 1 else lax.div(h, jnp.int32(group)), gpu.chunk_rows(n)
    q, k, gates = unpack(buffer, count)
    found = []
    for c in range(count):
        channels = key_rows(first + c)
        found += [(given[name].at[b, part, head, channels], x[c]) for name, x in (("q", q), ("k", k))]
        found.append((given["g"].at[b, part, h, channels], gates[c].g))
    if "vectors" in given:
        found.append((given["vectors"].at[b, h, n], buffer["vectors"].at[0]))
    if "codes" in given:
        found.append((given["codes"].at[b, n], buffer["codes"].at[0]))
    return found
