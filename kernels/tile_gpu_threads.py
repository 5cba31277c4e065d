"""A number a thread on Hopper, for kernels without products: `THREADS` of them side by side, in plain arithmetic.

A thread reads and writes what is its own, in memory that is flat: with stride 1 sixteen bytes at a time, which then
begin at multiples of sixteen bytes.
"""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector as vector_dialect

from jaxlin.kernels.mosaic_gpu import Ref
from jaxlin.kernels.mosaic_gpu_registers import interpreted, number

THREADS = 128
"""Of a program."""

_LAYOUT = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)


def thread_numbers() -> Array:
    """[THREADS] int32."""
    if interpreted():
        return jnp.arange(THREADS, dtype=jnp.int32)
    return plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=_LAYOUT)


def take(ref: Ref, first: Array, count: int, stride: int = 1) -> list[Array]:
    """Numbers first, first + stride ... of `ref` [N], `count` of them: each [THREADS], as `first` is."""
    if interpreted():
        return list(ref[...][stride * jnp.arange(count, dtype=jnp.int32)[:, None] + first])
    own = plgpu.ShapeDtypeStruct((THREADS,), ref.dtype, layout=_LAYOUT)
    signed = True if jnp.issubdtype(ref.dtype, jnp.integer) else None

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT), return_type=(own,) * count)
    def load(_, ref, first):
        element, found = ir.MemRefType(ref.type).element_type, []
        one, several = (ir.VectorType.get((n,), element) for n in (1, _together(count, stride)))
        for place in _places(first, count, stride):
            x = vector_dialect.load(several, ref, [place], alignment=4 * several.shape[0])
            entries = [vector_dialect.extract(x, [], [n]) for n in range(several.shape[0])]
            found += [vector_dialect.from_elements(one, [x]) for x in entries]
        return tuple(
            mgpu.FragmentedArray(
                _registers=np.array([x], dtype=object).reshape(first.registers.shape),
                _layout=first.layout,
                _is_signed=signed,
            )
            for x in found
        )

    return list(load(ref, first))


def give(ref: Ref, first: Array, values: list[Array], stride: int = 1) -> None:
    """Write values [THREADS] to `ref` [N], at first, first + stride ... of each thread."""
    if interpreted():
        at = first[:, None] + stride * jnp.arange(len(values), dtype=jnp.int32)
        ref[...] = ref[...].at[at].set(jnp.stack(values, 1))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT) + (_LAYOUT,) * len(values))
    def store(_, ref, first, *values):
        entries = [vector_dialect.extract(x.registers.flat[0], [], [0]) for x in values]
        size = _together(len(entries), stride)
        several = ir.VectorType.get((size,), entries[0].type)
        for n, place in enumerate(_places(first, len(entries), stride)):
            x = vector_dialect.from_elements(several, entries[n * size : (n + 1) * size])
            vector_dialect.store(x, ref, [place], alignment=4 * size)

    store(ref, first, *values)


def _together(count: int, stride: int) -> int:
    """How many of a thread's numbers, of 32 bits, move at once."""
    return 4 if stride == 1 and count % 4 == 0 else 1


def _places(first: mgpu.FragmentedArray, count: int, stride: int) -> list[ir.Value]:
    """The indices of what moves at once."""
    start = vector_dialect.extract(first.registers.flat[0], [], [0])
    steps = range(0, count, _together(count, stride))
    return [arith.index_cast(ir.IndexType.get(), arith.addi(start, number(n * stride))) for n in steps]
