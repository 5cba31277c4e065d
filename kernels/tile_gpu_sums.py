"""The sum of a tile's rows on Hopper: across lanes by halves, across warps through shared memory."""

from __future__ import annotations

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector as vector_dialect

from jaxlin.kernels.mosaic_gpu import Ref
from jaxlin.kernels.mosaic_gpu_registers import WGMMA, interpreted, number

SUMS = 4
"""Float32 numbers that `column_sums` needs for each column: one a warp."""


def column_sums(x: Array, scratch: Ref) -> Array:
    """The sum of a tile's rows, as `load_columns` gives it, by way of scratch [SUMS * columns] that no warp reads now.

    Lanes that have the same columns exchange half of them, then a quarter and an eighth, and each adds up what it
    keeps: a third of the exchanges that sums known to all lanes take.
    """
    if interpreted():
        return jnp.sum(x, 0)
    columns = x.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=WGMMA.reduce(0)),
    )
    def add(_, x, scratch):
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        thread = arith.andi(utils.thread_idx(), number(utils.WARPGROUP_SIZE - 1))

        def place(warp, n):  # of what this lane has of eight columns, the n-th such
            column = arith.addi(arith.muli(n, number(8)), own)
            return [arith.index_cast(ir.IndexType.get(), arith.addi(arith.muli(warp, number(columns)), column))]

        warp = arith.shrui(thread, number(5))
        own = arith.muli(arith.andi(thread, number(3)), number(2))
        sums, first = [arith.addf(*rows) for rows in x.registers.reshape(-1, 2)], number(0)
        for distance in (16, 8, 4):
            upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(thread, number(distance)), number(0))
            half = len(sums) // 2
            halves = list(zip(sums[:half], sums[half:], strict=True))
            sent = [_exchanged(arith.select(upper, low, high), distance) for low, high in halves]
            sums = [arith.addf(arith.select(upper, high, low), y) for (low, high), y in zip(halves, sent, strict=True)]
            first = arith.addi(first, arith.select(upper, number(half), number(0)))
        mine = [arith.addi(first, number(n)) for n in range(len(sums))]
        utils.warp_barrier()  # its lanes have read what they found here before
        for n, value in zip(mine, sums, strict=True):
            vector_dialect.store(value, scratch, place(warp, n))
        utils.warpgroup_barrier()
        of_warps = [[vector_dialect.load(pair, scratch, place(number(w), n)) for w in range(SUMS)] for n in mine]
        utils.warpgroup_barrier()
        for n, parts in zip(mine, of_warps, strict=True):
            vector_dialect.store(functools.reduce(arith.addf, parts), scratch, place(warp, n))
        utils.warp_barrier()
        found = [vector_dialect.load(pair, scratch, place(warp, number(n))) for n in range(columns // 8)]
        layout = x.layout.reduce((0,))
        registers = np.array(found, dtype=object).reshape(layout.registers_shape((columns,)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return add(x, scratch)


def _exchanged(pair: ir.Value, distance: int) -> ir.Value:
    """The pair of float32 of the lane whose number differs in that bit."""
    found = [utils.shfl_bfly(vector_dialect.extract(pair, [], [n]), distance) for n in range(2)]
    return vector_dialect.from_elements(pair.type, found)
