"""Products and inverses of a tile's diagonal blocks on Hopper: a warp's 16 rows by itself, in registers.

A warp of wgmma's layout has 16 rows of a tile, and so all of the block of 16 rows and columns on the diagonal: [C, 16]
here is such blocks, column j of row i that of the block's row j. They are multiplied by `mma.sync`, whose operands
have the layouts of its accumulator or of its transpose: no shared memory, no barrier, and an answer after some 30
cycles, where a wgmma of a whole tile needs all three and a few hundred.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import vector as vector_dialect

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, number

SIZE = 16
"""Rows of a block: those of a warp."""


# ---- blocks and tiles ----


def of_tile(x: Array) -> Array:
    """[C, C] -> its diagonal blocks [C, 16]."""
    if registers.interpreted():
        return jnp.concatenate([x[at : at + SIZE, at : at + SIZE] for at in range(0, CHUNK, SIZE)])

    def cut(tile):
        odd, upper = (_is_set(_warp(), bit) for bit in (1, 2))

        def own(half, rows):
            a, b, c, d = (tile[2 * n + half, rows] for n in range(4))
            return arith.select(upper, arith.select(odd, d, c), arith.select(odd, b, a))

        return np.array([[own(half, rows) for rows in range(2)] for half in range(2)], dtype=object)

    return registers.by_registers(cut, (CHUNK, SIZE), x.dtype, x)


def as_tile(x: Array) -> Array:
    """[C, 16] -> [C, C] float32, zero off the diagonal blocks."""
    if registers.interpreted():
        same = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0) // SIZE == jnp.arange(CHUNK) // SIZE
        return jnp.where(same, jnp.tile(x, (1, CHUNK // SIZE)), 0.0)

    def spread(block):
        warp, zero = _warp(), _zeros()
        own = [arith.cmpi(arith.CmpIPredicate.eq, warp, number(n)) for n in range(4)]
        tile = [[arith.select(own[n // 2], block[n % 2, rows], zero) for rows in range(2)] for n in range(8)]
        return np.array(tile, dtype=object)

    return registers.by_registers(spread, (CHUNK, CHUNK), jnp.float32, x)


def of_rows(a: Array, b: Array, start: Array | None = None) -> Array:
    """start + a b^T by blocks, [C, 16] float32, of the rows of bfloat16 tiles."""
    if registers.interpreted():
        x, y = (t.astype(jnp.float32) for t in (a, b))
        found = of_tile(jnp.dot(x, y.T, precision=lax.Precision.HIGHEST))
        return found if start is None else start + found

    def multiply(a, b, *start):
        a, b = (
            [registers.bits_of(x) for x in t.reshape(-1)] for t in (a, b)
        )  # of 8 columns the upper 8 rows, then the lower
        sums = start[0] if start else np.full((2, 2), _zeros())
        for at in range(0, len(a), 4):
            for half in range(2):
                sums[half] = _multiply(a[at : at + 4], (b[at + half], b[at + 2 + half]), sums[half])
        return sums

    return registers.by_registers(multiply, (CHUNK, SIZE), jnp.float32, a, b, *([] if start is None else [start]))


def times_rows(a: Array, b: Array) -> Array:
    """a b by blocks, [C, N] float32: row i is the sum of the block's rows b_j by a_ij; bfloat16 [C, 16] and [C, N]."""
    if registers.interpreted():
        x, y = (t.astype(jnp.float32).reshape(CHUNK // SIZE, SIZE, -1) for t in (a, b))
        return jnp.einsum("wij,wjn->win", x, y, precision=lax.Precision.HIGHEST).reshape(CHUNK, -1)

    def multiply(a, b):
        a = [registers.bits_of(x) for x in a.reshape(-1)]
        sums = np.empty_like(b)
        for n, (upper, lower) in enumerate(b):
            sums[n] = _multiply(a, [_transposed(registers.bits_of(x)) for x in (upper, lower)], [_zeros()] * 2)
        return sums

    return registers.by_registers(multiply, b.shape, jnp.float32, a, b)


# ---- inverses ----


def unit_lower_inverses(minus: Array) -> Array:
    """(I + L)^-1 of each block, [C, 16]; `minus` are those of -L, strictly lower triangular.

    By doubling, from X = I - L of blocks of two rows: X - X L' X, L' the part of L between the halves of a block, all
    operands in bfloat16, sums in float32.
    """
    if registers.interpreted():
        return of_tile(_interpreted(as_tile(minus)))

    def invert(minus):
        thread = utils.thread_idx()
        row = arith.andi(arith.shrui(thread, number(2)), number(7))  # of 8, and the first of two columns
        column = arith.shli(arith.andi(thread, number(3)), number(1))

        # X of blocks of two rows
        odd = _is_set(row, 1)
        here = arith.cmpi(arith.CmpIPredicate.eq, column, arith.andi(row, number(6)))
        zero, one, nothing = _float(0.0), _float(1.0), number(0)
        x = [
            _pair(
                arith.select(here, arith.select(odd, _entry(minus[n, n], 0), one), zero),
                arith.select(arith.andi(here, odd), one, zero),
            )
            for n in range(2)
        ]

        # of 4 and 8 rows: the upper and the lower half of the 16 are one product, each has half of what is summed over
        below = [_transposed(_rounded(minus[n, n])) for n in range(2)]
        for size in (2, 4):
            upper, lower = (_rounded(t) for t in x)
            outside = arith.andi(arith.xori(arith.xori(row, number(size)), column), number(-size & 7))
            kept = arith.cmpi(arith.CmpIPredicate.eq, outside, nothing)
            products = _multiply((upper, nothing, nothing, lower), below, [_zeros()] * 2)
            upper_between, lower_between = (arith.select(kept, _rounded(t), nothing) for t in products)
            between = upper_between, nothing, nothing, lower_between
            x = _multiply(between, (_transposed(upper), _transposed(lower)), x)

        # of 16: only the corner is new
        upper, lower = (_rounded(t) for t in x)
        corner = lower
        for factor in (_rounded(minus[0, 1]), upper):
            found, _ = _multiply((corner, *[nothing] * 3), (_transposed(factor), nothing), [_zeros()] * 2)
            corner = _rounded(found)
        return np.array([[x[0], found], [_zeros(), x[1]]], dtype=object)

    return registers.by_registers(invert, (CHUNK, SIZE), jnp.float32, minus)


def _interpreted(minus: Array) -> Array:
    """The same by products of whole tiles."""
    i, j = registers.indices()
    x = jnp.where(i == j, 1.0, jnp.where(registers.outside_corners(1) == 0, minus, 0.0))
    for size in (2, 4, 8):
        block = x.astype(jnp.bfloat16)
        between = gpu.dot(block, minus.astype(jnp.bfloat16)).astype(jnp.bfloat16)
        x = gpu.dot(registers.keep_pairs(between, registers.outside_corners(size)), block, x)
    return x


# ---- registers ----


def _multiply(a, b, start) -> list[ir.Value]:
    """start + a b of 16 x 16 and 16 x 8, in pairs of the upper and lower 8 rows; of a those of 8 columns come first."""
    f32 = ir.F32Type.get()
    asm = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, "
    asm += "{$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    operands = [*a, *b, *(_entry(x, n) for x in start for n in range(2))]
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    four = llvm.inline_asm(llvm.StructType.get_literal([f32] * 4), operands, asm, constraints, has_side_effects=False)
    entries = [llvm.extractvalue(f32, four, [n]) for n in range(4)]
    return [_pair(*entries[:2]), _pair(*entries[2:])]


def _transposed(pair: ir.Value) -> ir.Value:
    """Of a block of 8 x 8 in bfloat16, a pair a lane, its transpose."""
    asm = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return llvm.inline_asm(pair.type, [pair], asm, "=r,r", has_side_effects=False)


def _rounded(pair: ir.Value) -> ir.Value:
    """A pair of float32 as two bfloat16 in 32 bits."""
    operands = [_entry(pair, 1), _entry(pair, 0)]
    return llvm.inline_asm(number(0).type, operands, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", has_side_effects=False)


def _warp() -> ir.Value:
    """The warp's number in its warpgroup."""
    return arith.andi(arith.shrui(utils.thread_idx(), number(5)), number(3))


def _zeros() -> ir.Value:
    return _pair(_float(0.0), _float(0.0))


def _entry(pair: ir.Value, n: int) -> ir.Value:
    return vector_dialect.extract(pair, [], [n])


def _pair(low: ir.Value, high: ir.Value) -> ir.Value:
    return vector_dialect.from_elements(ir.VectorType.get((2,), low.type), [low, high])


def _is_set(x: ir.Value, bit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ne, arith.andi(x, number(bit)), number(0))


def _float(x: float) -> ir.Value:
    return mgpu.c(x, ir.F32Type.get())
