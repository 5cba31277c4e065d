"""What every GPU kernel here is made of: shared memory, products, a stream of chunks, the launch. Hopper, Mosaic GPU.

One program is one warpgroup of 128 threads (or two) with one (batch, value head). Tiles of bfloat16 live in shared
memory, swizzled as wgmma wants them; float32 tiles live in registers (`mosaic_gpu_registers`; 64 x 64: 32 registers a
thread). Lane semantics with explicit layouts: the default Warpgroup semantics did not finish inferring layouts for
kernels like these.

Differences between JAX versions are in these two files only. On the CPU (JAXLIN_INTERPRET=gpu) the interpreter runs one
block and has no wgmma on values: there, one block loops over the grid, products are `jnp.dot`, and whatever else works
on registers (`tile_gpu_*.py`) has its own few lines of `jnp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector as vector_dialect

from jaxlin.kernels.mosaic_gpu_registers import CHUNK, WGMMA, interpreted, widened, zeros

BLOCK = 64
"""Columns of the values that one warpgroup has."""

_JAX = tuple(jax.__version_info__[:2])
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_FLOAT_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
Ref = Any
Source = tuple[Callable[[Any], Ref], Ref] | tuple[Callable[[Any], Ref], Ref, Any]
"""What a `stream` copies."""


# ---- memory ----


def tile(*shape: int) -> Any:
    """Shared memory for bfloat16 tiles [..., rows, columns], as wgmma and TMA read them."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=() if interpreted() else _TRANSFORMS)


def float_tile(*shape: int) -> Any:
    """Shared memory for float32 tiles [..., rows, columns], as TMA reads them and registers load them."""
    return plgpu.SMEM(shape, jnp.float32, transforms=() if interpreted() else _FLOAT_TRANSFORMS)


def vector(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Shared memory for vectors [..., C]."""
    return plgpu.SMEM(shape, dtype)


def row_tile() -> Any:
    """Shared memory for a float32 tile [C, C] whose rows `take_rows` reads; wider, so that rows lie in other banks."""
    return plgpu.SMEM((CHUNK, CHUNK + 8), jnp.float32)


def in_turn(*groups: Any) -> Any:
    """The same shared memory for several groups of buffers, each used when the one before is done with; unpack it."""
    return groups if interpreted() else plgpu.RefUnion(*groups)


def put(ref: Ref, x: Array) -> None:
    """Write a tile to shared memory for a product, a copy or a load that follows."""
    ref[...] = x.astype(ref.dtype)
    commit()


def write_pieces(x: Array, high: Ref, low: Ref) -> None:
    """x = high + low, bfloat16 tiles, for a `commit` that follows."""
    rounded = x.astype(jnp.bfloat16)
    high[...] = rounded
    low[...] = (x - widened(rounded)).astype(jnp.bfloat16)


def load(ref: Ref) -> Array:
    """A tile as float32 in registers."""
    x = load_in(ref, WGMMA)
    return widened(x) if x.dtype == jnp.bfloat16 else x


def load_rows(ref: Ref) -> Array:
    """A vector [C], one entry for each row of a tile."""
    return load_in(ref, WGMMA.reduce(1))


def load_columns(ref: Ref) -> Array:
    """A vector [C], one entry for each column of a tile."""
    return load_in(ref, WGMMA.reduce(0))


def take_rows(ref: Ref, index: Array) -> Array:
    """Row index[i, 0] of a `row_tile` as row i: [C, C]; `index` is the same all along a row."""
    if interpreted():
        return jnp.take_along_axis(ref[:, : index.shape[1]], index, 0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), WGMMA),
        return_type=plgpu.ShapeDtypeStruct(index.shape, jnp.float32, layout=WGMMA),
    )
    def take(_, ref, index):
        pair, registers = ir.VectorType.get((2,), ir.F32Type.get()), np.empty_like(index.registers)
        places = index.layout.thread_idxs(index.shape)
        for at, (_, column) in zip(np.ndindex(registers.shape), places, strict=True):
            row = vector_dialect.extract(index.registers[at], [], [0])
            row = arith.index_cast(ir.IndexType.get(), row)
            registers[at] = vector_dialect.load(pair, ref, [row, column])
        return mgpu.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=None)

    return take(ref, index)


def load_in(ref: Ref, layout: Any) -> Array:
    """What `ref` holds, in registers laid out so."""
    if interpreted():
        return ref[...]
    position = ((),) if _JAX < (0, 11) else ()  # 0.10 still takes an index
    return plgpu.load(ref, *position, layout=layout, optimized=False)


def store(ref: Ref, x: Array) -> None:
    """Write registers to global memory."""
    x = x.astype(ref.dtype)
    if _JAX >= (0, 12) and not interpreted():
        plgpu.store(ref, x, optimized=False)  # 0.12 refuses to write to global memory otherwise
    else:
        ref[...] = x


def dot(a: Array | Ref, b: Ref, acc: Array | None = None, *, ta: bool = False, tb: bool = False) -> Array:
    """acc + a @ b in float32: a bfloat16 in registers or shared memory, b in shared memory; ta, tb transpose."""
    if interpreted():
        x, y = (t if isinstance(t, Array) else t[...] for t in (a, b))
        x, y = (t.astype(jnp.float32) for t in (x.T if ta else x, y.T if tb else y))
        product = jnp.dot(x, y, precision=lax.Precision.HIGHEST)
        return product if acc is None else acc + product
    a, b = (transposed(t) if flag else t for t, flag in ((a, ta), (b, tb)))
    acc = zeros(a.shape[0], b.shape[1]) if acc is None else acc
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def transposed(ref: Ref) -> Ref:
    """A tile in shared memory with rows and columns exchanged."""
    return plgpu.transpose_ref(ref, (1, 0)) if _JAX < (0, 11) else ref.transpose((1, 0))


# ---- chunks ----


def stream(
    sources: Sequence[Source],
    barrier: Ref,
    body: Callable[[Array, Array, Callable[[], None], Any], Any],
    carry: Any,
    *,
    chunks: int,
    stages: int,
    reverse: bool = False,
    started: bool = False,
) -> Any:
    """Run `carry = body(n, slot, refill, carry)` over chunks, their data copied `stages` ahead by TMA.

    sources: (chunk -> its part of global memory, shared memory [stages, ...]), and for some a third, when to copy it:
    warpgroups of a program share the copying. `barrier` has `stages` barriers of as many arrivals as there are copies
    in all. The body may overwrite its slot and copy it out. It calls `refill` once, when all that the
    previous chunk copied out has left shared memory and no warp reads it: the previous slot is then loaded anew. With
    one stage a chunk is loaded only once the one before is done and copied out: for programs that share an SM with
    another. What `start_stream` was called for is `started`.
    """
    stages = min(stages, chunks)

    def fetch(step, slot):
        _fetch_chunk(sources, barrier, chunks - 1 - step if reverse else step, slot)

    if not started:
        start_stream(sources, barrier, chunks=chunks, stages=stages, reverse=reverse)

    def turn(step, carry):
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(barrier.at[slot])

        def refill():
            @pl.when((step >= 1) & (step + (stages - 1) < chunks))
            def _():
                fetch(step + (stages - 1), lax.rem(step + (stages - 1), jnp.int32(stages)))

        carry = body(chunks - 1 - step if reverse else step, slot, refill if stages > 1 else lambda: None, carry)
        if stages == 1:
            wait_out(0)

            @pl.when(step + 1 < chunks)
            def _():
                fetch(step + 1, slot)

        return carry

    return lax.fori_loop(jnp.int32(0), jnp.int32(chunks), turn, carry)


def start_stream(
    sources: Sequence[Source],
    barrier: Ref,
    *,
    chunks: int,
    stages: int,
    reverse: bool = False,
) -> None:
    """Start the first copies of a `stream`, ahead of it."""
    for step in range(min(stages, chunks)):
        n = jnp.int32(chunks - 1 - step if reverse else step)
        _fetch_chunk(sources, barrier, n, jnp.int32(step))


def _fetch_chunk(sources: Sequence[Source], barrier: Ref, n: Array, slot: Array) -> None:
    for part, buffer, *when in sources:
        where(
            when[0] if when else True,
            lambda part=part, buffer=buffer: plgpu.copy_gmem_to_smem(part(n), buffer.at[slot], barrier.at[slot]),
        )


def where(condition: Array | bool, do: Callable[[], None]) -> None:
    """Do it where the condition holds, the same for a whole warpgroup."""
    if condition is True:
        do()
    else:
        pl.when(condition)(do)


def barrier(sources: int, stages: int) -> Any:
    """The barriers of a `stream`; for copies by `fetch`, or for as many warpgroups to `meet` at, it has one stage."""
    return plgpu.Barrier(num_arrivals=sources, num_barriers=stages)


def meet(barrier: Ref) -> None:
    """Wait for the program's other warpgroups; what each wrote to shared memory and committed is there for all."""
    plgpu.barrier_arrive(barrier.at[0])
    plgpu.barrier_wait(barrier.at[0])


def fetch(sources: Sequence[tuple[Ref, Ref]], barrier: Ref) -> None:
    """Start copies (global memory, shared memory) of which there is one in a program; `arrived` waits for them."""
    for part, buffer in sources:
        plgpu.copy_gmem_to_smem(part, buffer, barrier.at[0])


def arrived(barrier: Ref) -> None:
    """Wait for what `fetch` started."""
    plgpu.barrier_wait(barrier.at[0])


def copy_out(*copies: tuple[Ref, Ref], when: Array | bool = True) -> None:
    """Start copies (shared memory, global memory) as one group; what was written to shared memory is committed.

    Where `when` is false the group is empty.
    """
    commit()

    def start():
        for source, target in copies:
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    where(when, start)
    plgpu.commit_smem_to_gmem_group()


def commit() -> None:
    """Wait for the warpgroup's other warps; what all wrote to shared memory is visible to products and copies."""
    plgpu.commit_smem()


def chunk_rows(n: Array) -> Any:
    """The rows of chunk n, as an index into time."""
    return pl.ds(n * CHUNK, CHUNK)


def block(w: Array) -> Any:
    """The columns of block w of the values."""
    return pl.ds(w * BLOCK, BLOCK)


def wait_out(groups: int) -> None:
    """Wait until at most `groups` groups of copies still read shared memory.

    At its end a program waits for that alone: what it copied is complete when the kernel is, and waiting for the
    memory itself took a program of one chunk 5 % of its time.
    """
    plgpu.wait_smem_to_gmem(groups, wait_read_only=True)


# ---- launch ----


def launch(
    body: Callable[..., None],
    arrays: Sequence[Array],
    out: Sequence[Any],
    grid: Sequence[int],
    scratch: Sequence[Any] = (),
    state: Array | None = None,
    warpgroups: int | None = None,
) -> list[Array]:
    """Run body(index, input refs, output refs, scratch refs) for every index of the grid; outputs of types `out`.

    Nothing but `commit`, `wait_out` and barriers makes the warps of a warpgroup wait for each other: the body must have
    one of them between what one warp reads (a product reads all of its second operand) and what another writes over it.

    With `warpgroups` so many run a program, with one scratch; the index has one more entry, which of them it is. A
    `state` is one more input, which the body overwrites in place, and one more output.
    """
    names, count = tuple(f"g{i}" for i in range(len(grid))), len(arrays) + (state is not None)

    def run(index, refs):
        member = () if warpgroups is None else (lax.axis_index("warpgroup") if warpgroups > 1 else 0,)
        body((*index, *member), refs[:count], refs[count : count + len(out)], refs[count + len(out) :])

    def program(*refs):
        run(map(lax.axis_index, names), refs)

    def programs(*refs):
        def one(flat, _):
            index = []
            for size in reversed(grid):
                index.append(lax.rem(flat, jnp.int32(size)))
                flat = lax.div(flat, jnp.int32(size))
            run(reversed(index), refs)

        lax.fori_loop(0, math.prod(grid), one, None)

    mesh: dict[str, Any]
    options: dict[str, Any]
    if interpreted():
        mesh, options = dict(grid=(1,), grid_names=("all",)), dict(interpret=_interpreter())
    else:
        params = plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
            unsafe_no_auto_barriers=True,  # it would have two around each write and one before each copy
            reduction_scratch_bytes=0,
        )
        mesh, options = dict(grid=tuple(grid), grid_names=names), dict(compiler_params=params)
    if warpgroups is not None and warpgroups > 1:
        mesh |= dict(num_threads=warpgroups, thread_name="warpgroup")
    function = programs if interpreted() else program
    function.__name__ = body.__name__
    if state is None:
        kernel = plgpu.kernel(function, out_type=list(out), scratch_types=list(scratch), **mesh, **options)
        # XLA (jax 0.11.2) runs a kernel once more inside the copy of its output to an array of all layers, where a loop
        # over layers keeps it for the backward pass (openxla/xla pull request 45799); not through a barrier.
        return list(lax.optimization_barrier(kernel(*arrays)))
    # 0.10's plgpu.kernel takes no mutable arrays; pl.kernel does, but has its own idea of scratch.
    assert not scratch
    ref = jax.new_ref(state, memory_space=plgpu.GMEM)
    kernel = pl.kernel(function, out_type=list(out), mesh=plgpu.Mesh(**mesh), name=body.__name__, **options)
    return [*kernel(*arrays, ref), jax.freeze(ref)]


def _interpreter() -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # 0.10 does not export it

    return InterpretGPUParams()
