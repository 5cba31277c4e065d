"""How arrays meet the TPU kernels: heads packed into lanes, chunks stacked into tiles of 128 rows, blocks, the grid.

A tile is what one head would be with 128 rows a chunk. Heads of 64 go in pairs: q is read as [B, T, H * 64], in which
two neighbouring heads are the 128 lanes of a vector register, and a chunk of 64 tokens of such a pair [64, 128] is
stacked to 128 rows, head 0 on lanes 0-63 of rows 0-63, head 1 on lanes 64-127 of rows 64-127, zeros elsewhere:

    [q_0 q_1]  ->  [[q_0, 0], [0, q_1]]

Products of stacked tiles are block diagonal, so two heads of 64 and one of 128 run through the same code, on full MXU
tiles, and nothing is ever transposed in HBM. A grid step handles several packs; the last grid axis walks the chunks.
Per-token numbers (gates, masks) are rows of 128 lanes in the order of the stacked rows. Rows past the end of the
sequence and lanes past the last head hold anything in a block: they are zeroed when read, and never written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlin.kernels import chunk

ROWS = 128
"""Rows of a tile."""
LANES = 128
SEGMENT_ROWS = 8
"""Sublanes of the per-token masks, of which three are used: run, carry, valid."""
BLOCK_BYTES = 6 << 20
"""What the blocks and the states of one grid step may take of VMEM, before double buffering."""
MAX_PACKS = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one kernel call, after padding K and V."""

    batch: int
    time: int
    heads: int  # value heads
    key: int  # 64, or a multiple of 128
    value: int
    dtype: Any  # of q, k and v: bfloat16 or float32
    packs: int  # packs of heads in a grid step
    blocks: int  # grid steps that share the heads

    @property
    def pack(self) -> int:
        """Heads in a pack."""
        return 2 if min(self.key, self.value) < LANES else 1

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return ROWS // self.pack

    @property
    def chunks(self) -> int:
        return -(-self.time // self.chunk)

    @property
    def key_lanes(self) -> int:
        return self.pack * self.key

    @property
    def value_lanes(self) -> int:
        return self.pack * self.value

    @property
    def heads_padded(self) -> int:
        return self.blocks * self.packs * self.pack

    @property
    def ragged(self) -> bool:
        """Whether the last chunk has rows past the end."""
        return self.time % self.chunk != 0


def padded(size: int) -> int:
    """The head size that the kernels run: 64, or the next multiple of 128."""
    return 64 if size <= 64 else -(-size // LANES) * LANES


def make_layout(batch: int, time: int, heads: int, key: int, value: int, dtype: Any) -> Layout:
    """The layout of heads whose sizes are already padded."""
    key, value = padded(key), padded(value)
    pack = 2 if min(key, value) < LANES else 1
    item = jnp.dtype(dtype).itemsize
    tokens = ROWS // pack
    lanes = pack * max(key, value)
    per_pack = 7 * tokens * lanes * item + 4 * pack * key * pack * value * 4
    limit = max(1, min(MAX_PACKS, BLOCK_BYTES // per_pack))
    wanted = -(-heads // pack)
    packs = min(range(limit, 0, -1), key=lambda p: (-(-wanted // p) * p, -p))
    return Layout(batch, time, heads, key, value, jnp.dtype(dtype), packs, -(-wanted // packs))


# ---- arrays as the kernels read them ----


def flat(x: Array) -> Array:
    """[B, T, H, D] -> [B, T, H * D]."""
    return x.reshape(*x.shape[:2], -1)


def pad_last(x: Array, size: int) -> Array:
    """Zeros up to `size` along the last axis."""
    return x if x.shape[-1] == size else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def operand_dtype(*arrays: Array) -> Any:
    """bfloat16 where all of q, k and v are, else float32; the TPU has nothing wider."""
    dtype = jnp.result_type(*arrays)
    if dtype not in (jnp.bfloat16, jnp.float32, jnp.float16):
        raise NotImplementedError(f"TPU kernels take bfloat16 and float32, not {dtype}")
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def pad_state(layout: Layout, s: Array) -> Array:
    """[B, HV, K, V] with K and V padded."""
    *_, key, value = s.shape
    if (key, value) == (layout.key, layout.value):
        return s
    return jnp.pad(s, ((0, 0), (0, 0), (0, layout.key - key), (0, layout.value - value)))


def token_arrays(layout: Layout, q: Array, k: Array, v: Array) -> dict[str, Any]:
    """q, k [B, T, H, K] and v [B, T, HV, V], padded and flat."""
    sizes = dict(q=(q, layout.key), k=(k, layout.key), v=(v, layout.value))
    return {n: flat(pad_last(x, size)).astype(layout.dtype) for n, (x, size) in sizes.items()}


def gate_arrays(layout: Layout, segment_ids: Array | None, g: Array | None) -> dict[str, Any]:
    """g as rows [B, T, HV], zero where padded, or as tokens "g_channel" [B, T, HV, K], there holding anything."""
    if g is None:
        return dict(g=None, g_channel=None)
    if g.ndim == 3:
        return dict(g=to_rows(layout, *chunk.mask_padding(segment_ids, g)), g_channel=None)
    return dict(g=None, g_channel=flat(pad_last(g, layout.key)).astype(jnp.float32))


def per_value_head(layout: Layout, heads: int, x: Any) -> Any:
    """A tuple with q and k [B, T, H * K], for every value head instead: value head j has key head j // (HV // H)."""
    if heads == layout.heads:
        return x
    shape, group = (layout.batch, layout.time, heads, layout.key), layout.heads // heads
    return x._replace(**{n: flat(jnp.repeat(getattr(x, n).reshape(shape), group, axis=2)) for n in ("q", "k")})


def sum_value_heads(layout: Layout, heads: int, x: Array) -> Array:
    """The transpose of `per_value_head`, in a fixed order."""
    if heads == layout.heads:
        return x
    return flat(x.reshape(layout.batch, layout.time, heads, layout.heads // heads, -1).sum(3))


def to_rows(layout: Layout, x: Array) -> Array:
    """Per-token numbers [B, T, HV] -> [B, blocks, N, packs, 128] float32, zeros past the end."""
    n = layout
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, n.chunks * n.chunk - n.time), (0, 0)))
    x = x.reshape(n.batch, n.chunks, n.chunk, -1).swapaxes(2, 3)  # after this, whole rows move
    x = jnp.pad(x, ((0, 0), (0, 0), (0, n.heads_padded - n.heads), (0, 0)))
    return x.reshape(n.batch, n.chunks, n.blocks, n.packs, ROWS).swapaxes(1, 2)


def from_rows(layout: Layout, x: Array) -> Array:
    """The inverse of `to_rows`."""
    n = layout
    x = x.swapaxes(1, 2).reshape(n.batch, n.chunks, n.heads_padded, n.chunk)[:, :, : n.heads].swapaxes(2, 3)
    return x.reshape(n.batch, n.chunks * n.chunk, n.heads)[:, : n.time]


def to_packs(layout: Layout, x: Array) -> Array:
    """A row per head [B, HV, K] -> [B, blocks, packs, pack * K]."""
    n = layout
    x = jnp.pad(x, ((0, 0), (0, n.heads_padded - n.heads), (0, 0)))
    return x.reshape(n.batch, n.blocks, n.packs, n.pack * x.shape[-1])


def from_packs(layout: Layout, x: Array) -> Array:
    """The inverse of `to_packs`."""
    return x.reshape(layout.batch, layout.heads_padded, -1)[:, : layout.heads]


def segment_rows(layout: Layout, segment_ids: Array | None) -> Array | None:
    """[B, N, 8, 128] float32: run, carry (the run before the chunk) and 1 for tokens; None where all are one segment.

    A ragged sequence is one with padding at its end. Runs are those of `chunk.segment_masks`.
    """
    n = layout
    if segment_ids is None:
        if not n.ragged:
            return None
        segment_ids = jnp.ones((n.batch, n.time), jnp.int32)
    run = jnp.cumsum(chunk.segment_starts(segment_ids), axis=1, dtype=jnp.int32)
    tail = ((0, 0), (0, n.chunks * n.chunk - n.time))
    run = jnp.pad(run, tail, mode="edge").reshape(n.batch, n.chunks, 1, n.chunk)
    valid = jnp.pad(segment_ids != 0, tail).reshape(run.shape)
    carry = jnp.pad(run[:, :-1, :, -1:], ((0, 0), (1, 0), (0, 0), (0, 0)))
    rows = jnp.concatenate([run, jnp.broadcast_to(carry, run.shape), valid], axis=2).astype(jnp.float32)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, SEGMENT_ROWS - rows.shape[2]), (0, 0)))
    return jnp.concatenate([rows] * n.pack, axis=-1)


# ---- blocks ----


def specs(layout: Layout, reverse: bool = False) -> dict[str, pl.BlockSpec]:
    """Blocks by what they hold, for the grid (batch, head blocks, chunks); `reverse` walks the chunks backwards."""
    n = layout

    def chunk_of(i):
        return n.chunks - 1 - i if reverse else i

    def tokens(lanes):
        return pl.BlockSpec((1, n.chunk, n.packs * lanes), lambda b, h, i: (b, chunk_of(i), h))

    def packs(*shape):
        zeros = (0,) * len(shape)
        return pl.BlockSpec((1, 1, 1, n.packs, *shape), lambda b, h, i: (b, h, chunk_of(i), 0, *zeros))

    return dict(
        key=tokens(n.key_lanes),
        value=tokens(n.value_lanes),
        rows=packs(ROWS),
        states=packs(n.key, n.value_lanes),
        normalizers=packs(n.key_lanes),
        segments=pl.BlockSpec((1, 1, SEGMENT_ROWS, ROWS), lambda b, h, i: (b, chunk_of(i), 0, 0)),
        state=pl.BlockSpec((1, n.packs * n.pack, n.key, n.value), lambda b, h, i: (b, h, 0, 0)),
        normalizer=pl.BlockSpec((1, 1, n.packs, n.key_lanes), lambda b, h, i: (b, h, 0, 0)),
        row=pl.BlockSpec((1, 1, n.packs, ROWS), lambda b, h, i: (b, h, 0, 0)),
    )


def shapes(layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that `specs` cuts into blocks, as outputs."""
    n = layout
    grid = (n.batch, n.blocks, n.chunks, n.packs)
    float32 = jnp.float32
    return dict(
        key=jax.ShapeDtypeStruct((n.batch, n.time, n.heads * n.key), n.dtype),
        value=jax.ShapeDtypeStruct((n.batch, n.time, n.heads * n.value), n.dtype),
        rows=jax.ShapeDtypeStruct((*grid, ROWS), float32),
        states=jax.ShapeDtypeStruct((*grid, n.key, n.value_lanes), n.dtype),
        normalizers=jax.ShapeDtypeStruct((*grid, n.key_lanes), float32),
        state=jax.ShapeDtypeStruct((n.batch, n.heads, n.key, n.value), float32),
        normalizer=jax.ShapeDtypeStruct((n.batch, n.blocks, n.packs, n.key_lanes), float32),
        row=jax.ShapeDtypeStruct((n.batch, n.blocks, n.packs, ROWS), float32),
    )


def stabilizer_scratch(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Room for the stabiliser m of a chunk's tokens and of its start, shaped like a block of rows."""
    return dict.fromkeys(("m", "start"), (1, 1, 1, layout.packs, ROWS))


def interpreted() -> bool:
    """Whether JAXLIN_INTERPRET asks for the kernels to run on the CPU, operation by operation."""
    return os.environ.get("JAXLIN_INTERPRET") == "tpu"


def call(
    kernel: Callable, layout: Layout, name: str, inputs: dict, outputs: dict, scratch: dict, reverse: bool = False
) -> dict[str, Array]:
    """Run `kernel(inputs, outputs, scratch)`, dicts of refs, over the grid.

    inputs: name -> (kind of block, array or None); outputs: name -> (kind, dtype or None for the kind's own).
    """
    blocks, arrays = specs(layout, reverse), shapes(layout)
    present = {n: x for n, x in inputs.items() if x[1] is not None}
    out_shape = {
        n: arrays[kind] if dtype is None else jax.ShapeDtypeStruct(arrays[kind].shape, dtype)
        for n, (kind, dtype) in outputs.items()
    }
    return pl.pallas_call(
        kernel,
        grid=(layout.batch, layout.blocks, layout.chunks),
        in_specs=({n: blocks[kind] for n, (kind, _) in present.items()},),
        out_specs={n: blocks[kind] for n, (kind, _) in outputs.items()},
        out_shape=out_shape,
        scratch_shapes=({n: pltpu.VMEM(shape, jnp.float32) for n, shape in scratch.items()},),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpreted(),
        name=name,
    )({n: x for n, (_, x) in present.items()})


# ---- inside the kernels ----


def each_pack(layout: Layout, body: Callable[[Any], None]) -> None:
    """`body` for every pack of the grid step: a loop, so that neither code nor temporaries grow with the packs."""
    lax.fori_loop(0, layout.packs, lambda p, _: body(p), None)


def read_row(ref: Any, pack: Any) -> Any:
    """The row [1, 128] of a pack from a "rows" block, None where there is no such block."""
    return None if ref is None else ref[0, 0, 0, pl.ds(pack, 1), :]


def write_row(ref: Any, pack: Any, row: Array) -> None:
    ref[0, 0, 0, pl.ds(pack, 1), :] = row


class Reader:
    """Reads and writes packs of the current block, zeroing what is no token or no head."""

    def __init__(self, layout: Layout, segments: Any):
        self.layout, self.block = layout, pl.program_id(1)
        self.valid = None if segments is None else segments.valid

    def stacked(self, ref: Any, pack: Any, size: int) -> Array:
        """Tokens [C, pack * size] of one pack, stacked to [128, pack * size]."""
        return stack(self.tokens(ref, pack, size), self.layout)

    def tokens(self, ref: Any, pack: Any, size: int) -> Array:
        n = self.layout
        width = n.pack * size
        x = ref[0, :, pl.ds(pack * width, width)]
        mask = None if self.valid is None else self.valid[: n.chunk]
        if n.heads != n.heads_padded:
            real = lax.broadcasted_iota(jnp.int32, (1, width), 1) < size * self._heads_left(pack)
            mask = real if mask is None else mask & real
        return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))

    def tokens_only(self, x: Array) -> Array:
        """Zero the rows of [C, ...] that are padding."""
        return x if self.valid is None else jnp.where(self.valid[: self.layout.chunk], x, jnp.zeros_like(x))

    def store(self, ref: Any, pack: Any, x: Array, size: int) -> None:
        """Unstack [128, pack * size] and write it as tokens."""
        self.store_tokens(ref, pack, unstack(x, self.layout), size)

    def store_tokens(self, ref: Any, pack: Any, x: Array, size: int) -> None:
        width = self.layout.pack * size
        ref[0, :, pl.ds(pack * width, width)] = x.astype(ref.dtype)

    def state(self, ref: Any, pack: Any) -> Array:
        """The states of one pack, block diagonal [pack * K, pack * V]."""
        n = self.layout
        parts = []
        for h in range(n.pack):
            s = ref[0, pack * n.pack + h]
            parts.append(s if n.heads == n.heads_padded else jnp.where(h < self._heads_left(pack), s, 0.0))
        if n.pack == 1:
            return parts[0]
        zero = jnp.zeros_like(parts[0])
        return jnp.concatenate(
            [jnp.concatenate([parts[0], zero], axis=1), jnp.concatenate([zero, parts[1]], axis=1)], axis=0
        )

    def load_state(self, scratch: Any, ref: Any, pack: Any) -> None:
        scratch[pack] = self.state(ref, pack)

    def store_state(self, ref: Any, pack: Any, s: Array) -> None:
        n = self.layout
        for h in range(n.pack):
            ref[0, pack * n.pack + h] = s[h * n.key : (h + 1) * n.key, h * n.value : (h + 1) * n.value]

    def _heads_left(self, pack: Any) -> Array:
        """Heads from this pack's first one on."""
        n = self.layout
        return n.heads - (self.block * n.packs + pack) * n.pack


def stack(x: Array, layout: Layout) -> Array:
    """[R, pack * D] -> [pack * R, pack * D], rows of head h with nothing but its own lanes."""
    if layout.pack == 1:
        return x
    left = lax.broadcasted_iota(jnp.int32, x.shape, 1) < x.shape[1] // 2
    zero = jnp.zeros_like(x)
    return jnp.concatenate([jnp.where(left, x, zero), jnp.where(left, zero, x)], axis=0)


def unstack(x: Array, layout: Layout) -> Array:
    """[128, pack * D] -> [C, pack * D], from each head's rows its own lanes."""
    if layout.pack == 1:
        return x
    upper, lower = x[: layout.chunk], x[layout.chunk :]
    return jnp.where(lax.broadcasted_iota(jnp.int32, upper.shape, 1) < x.shape[1] // 2, upper, lower)


def compact(s: Array, layout: Layout) -> Array:
    """Block diagonal [pack * K, pack * V] -> [K, pack * V]."""
    return s if layout.pack == 1 else s[: layout.key] + s[layout.key :]


def expand(s: Array, layout: Layout) -> Array:
    """The inverse of `compact`."""
    return stack(s, layout)
