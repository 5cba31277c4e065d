"""Tiles and vectors in registers on Hopper: what the kernels here do between loads, products and stores.

A float32 or bfloat16 tile is in the layout of wgmma's accumulator: warp w has rows 16 w ... 16 w + 15, a thread two of
them, eight apart, and of each the columns 2 m, 2 m + 1 of every eight, a pair of bfloat16 in one register. A vector
belongs to the rows of a tile or to its columns; `rows` and `columns` spread it over one.

Kernels bound by instructions are written for what ptxas makes of them (kernels/README.md says how to see it without a
GPU): an entry that is rounded by itself takes four times as long as one of a pair, and what is the same all along a row
is found once only where it is a vector that was spread.
"""

from __future__ import annotations

import os
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import vector as vector_dialect

CHUNK = 64
"""Rows of a chunk, and of every tile: wgmma multiplies 64 rows at a time."""

WGMMA = plgpu.Layout.WGMMA


def interpreted() -> bool:
    """Whether GPU kernels are to be interpreted on the CPU."""
    return os.environ.get("JAXLIN_INTERPRET") == "gpu"


# ---- zeros ----


def zeros(rows: int, columns: int) -> Array:
    """A float32 tile of zeros in registers."""
    return in_layout(jnp.zeros((rows, columns), jnp.float32), WGMMA)


def zero_rows(rows: int) -> Array:
    """A float32 vector of zeros, as `load_rows` gives it."""
    return in_layout(jnp.zeros((rows,), jnp.float32), WGMMA.reduce(1))


def zero_columns(columns: int) -> Array:
    """A float32 vector of zeros, as `load_columns` gives it."""
    return in_layout(jnp.zeros((columns,), jnp.float32), WGMMA.reduce(0))


def in_layout(x: Array, layout: Any) -> Array:
    """x laid out so."""
    return x if interpreted() else plgpu.layout_cast(x, layout)


# ---- rows and columns ----


def rows(x: Array, columns: int = CHUNK) -> Array:
    """[R] -> [R, columns]: entry r all along row r."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def by_row(x: Array, tile: Array) -> Array:
    """A tile with each row times its entry of x [R], or all of it times a scalar."""
    return (x if x.ndim == 0 else rows(x, tile.shape[1])) * tile


def columns(x: Array, rows: int = CHUNK) -> Array:
    """[N] -> [rows, N]: entry n all along column n."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def indices(rows: int = CHUNK, columns: int = CHUNK) -> tuple[Array, Array]:
    """Row and column numbers of a tile, int32."""
    if interpreted():
        i, j = (lax.broadcasted_iota(jnp.int32, (rows, columns), d) for d in (0, 1))
        return i, j
    i = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=WGMMA.reduce(1))
    j = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=WGMMA.reduce(0))
    return lax.broadcast_in_dim(i, (rows, columns), [0]), lax.broadcast_in_dim(j, (rows, columns), [1])


def outside_corners(size: Array | int, pairs: bool = False, columns: int = CHUNK) -> Array:
    """0 where row and column (or its pair of columns) lie in the two halves of one aligned block of 2 `size` rows.

    With fewer columns they are those of the row's own block of so many rows.
    """
    i, j = indices(CHUNK, columns)
    return ((i ^ size) ^ j) & ((-size & -2 if pairs else -size) & (columns - 1))  # one instruction an entry


# ---- bfloat16 in pairs ----


def widened(x: Array) -> Array:
    """A bfloat16 tile as float32: an instruction an entry, where a conversion takes one and a half."""
    if interpreted():
        return x.astype(jnp.float32)

    def widen(pair):
        bits = bits_of(pair)
        low, high = arith.shli(bits, number(16)), arith.andi(bits, number(-1 << 16))
        f32 = ir.F32Type.get()
        return vector_dialect.from_elements(ir.VectorType.get((2,), f32), [arith.bitcast(f32, x) for x in (low, high)])

    return _by_register(widen, jnp.float32, x)


def keep_pairs(x: Array, apart: Array, mask: Array | None = None) -> Array:
    """A bfloat16 tile where `apart`, taken at the even column of each pair, is 0, and zero elsewhere.

    Of a pair that is kept, only the bits of `mask` at its even column: the low half is the even column's entry.
    """
    if interpreted():
        kept = jnp.repeat((apart == 0)[:, ::2], 2, 1)
        if mask is not None:
            half = lax.shift_right_logical(jnp.repeat(mask[:, ::2], 2, 1), 16 * (indices(*x.shape)[1] & 1))
            kept &= half & 1 != 0
        return jnp.where(kept, x, 0)

    def keep(pair, apart, *mask):
        bits, (apart, *mask) = bits_of(pair), (vector_dialect.extract(t, [], [0]) for t in (apart, *mask))
        bits = arith.andi(bits, mask[0]) if mask else bits
        bits = arith.select(arith.cmpi(arith.CmpIPredicate.eq, apart, number(0)), bits, number(0))
        one = ir.VectorType.get((1,), bits.type)
        return vector_dialect.bitcast(pair.type, vector_dialect.from_elements(one, [bits]))

    return _by_register(keep, x.dtype, x, apart, *([] if mask is None else [mask]))


def by_registers(function, shape: tuple[int, int], dtype: Any, *tiles: Array) -> Array:
    """A tile of `shape`, made by `function` of the pairs of tiles: arrays [of 8 columns, 2 of 8 rows of the warp's]."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,) * len(tiles),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=WGMMA),
    )
    def make(_, *tiles):
        made, layout = function(*(t.registers.reshape(-1, 2).copy() for t in tiles)), tiles[0].layout
        return mgpu.FragmentedArray(
            _registers=made.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
        )

    return make(*tiles)


def _by_register(function, dtype: Any, *tiles: Array) -> Array:
    """`by_registers`, of one shape and one pair at a time."""

    def each(*tiles):
        made = np.empty_like(tiles[0])
        for at in np.ndindex(made.shape):
            made[at] = function(*(t[at] for t in tiles))
        return made

    return by_registers(each, tiles[0].shape, dtype, *tiles)


def bits_of(pair: ir.Value) -> ir.Value:
    """A pair of bfloat16 as 32 bits."""
    i32 = _int32()
    return vector_dialect.extract(vector_dialect.bitcast(ir.VectorType.get((1,), i32), pair), [], [0])


def number(x: int) -> ir.Value:
    """A constant of 32 bits."""
    return mgpu.c(x, _int32())


def _int32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


# ---- what compilers must not know ----


def unknown_zero(anew: bool = False) -> Array:
    """0, which no compiler knows to be 0: for what would else be constant in a register operand of several products.

    ptxas 13.0 sets the constant registers of such an operand only before the second product: the first one of a
    program multiplies whatever was in them. A zero found `anew` in every chunk, as an index into tiles [1, ...], keeps
    their addresses from being computed before the loop, where each takes a register, which is then spilled.
    """
    if interpreted():
        return jnp.int32(0)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())))
    def highest_bit_of_the_number_of_multiprocessors(_):
        asm = "{ .reg .u32 n; mov.u32 n, %nsmid; shr.u32 $0, n, 31; }"
        value = llvm.inline_asm(_int32(), [], asm, "=r", has_side_effects=anew)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return highest_bit_of_the_number_of_multiprocessors()
