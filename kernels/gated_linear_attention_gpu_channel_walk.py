"""Family A on Hopper, a gate per channel (GLA): the walk over the chunks.

One warpgroup has a (batch, value head, 64 values). With what `gated_linear_attention_gpu_channel_intra` made of each
chunk, the state S in registers goes by

    o = Q S + P v ;  S' = keep S + K^T v

and the cotangents of S and v in reverse by the same kernel, Q and K exchanged, P transposed:

    dv = K dS' + P^T do ;  dS = keep dS' + Q^T do

The states that a chunk starts from are kept, in bfloat16, as products read them. Where only the final state is wanted,
the first pass over the parts of long sequences, Q and P stay away.

Bytes at K = V = 64, in units of q: Q, K, v and P are read, o and the states written: 6.

Budget at K = 64: S, o in registers, 64 a thread; every operand is in shared memory. Shared memory: Q, K, v, P of 8 KB
in two stages, o written over v (64 KB); S as operand (8 KB): three programs an SM. At K = 128 Q and K are 16 KB, and
the second half of S lies over the first half of Q, which is done with: 104 KB, two programs.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_linear_attention_gpu_fwd import VALID, clean, present
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row
from jaxlin.kernels.tile_gpu_keys import key_rows, load_state, store_state
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots

STAGES = 2


def walk(
    writing: Array,
    v: Array,
    keep: Array,
    codes: Array | None,
    start: Array | None,
    reading: Array | None = None,
    p: Array | None = None,
    *,
    reverse: bool = False,
    save: bool = False,
) -> tuple[Array | None, Array, Array | None]:
    """(o [B, T, HV, V], final S [B, HV, K, V] float32, S at chunk starts [B, HV, N, K, V] if `save`).

    writing and reading, which are K and Q (in reverse Q and K) [B, T, HV, K], keep [B, HV, N, K], P [B, HV, N, C, C]; v
    [B, T, HV, V], whose padding by `codes` [B, N, C] may hold anything. start None is zero; o only with reading and P.
    """
    batch, time, heads, key_dim = writing.shape
    value_dim = v.shape[3]
    chunks = time // CHUNK
    stages = min(STAGES, chunks)
    flat = present(x=reading, y=writing, v=v, p=p, keep=keep, codes=codes, start=start)
    shape = jax.ShapeDtypeStruct
    out = dict(s=shape((batch, heads, key_dim, value_dim), jnp.float32))
    if reading is not None:
        out |= dict(o=shape(v.shape, v.dtype))
    if save:
        out |= dict(states=shape((batch, heads, chunks, key_dim, value_dim), v.dtype))
    halves = range(key_dim // CHUNK)
    buffers = dict(
        v=gpu.tile(stages, CHUNK, BLOCK),
        p=gpu.tile(stages, CHUNK, CHUNK),
        keep=gpu.vector(stages, key_dim),
        codes=gpu.vector(stages, CHUNK, dtype=jnp.int32),
    )
    scratch = {name: buffer for name, buffer in buffers.items() if name in flat}
    scratch |= {f"{name}{c}": gpu.tile(stages, CHUNK, CHUNK) for name in "xy" if name in flat for c in halves}
    scratch |= dict(barrier=gpu.barrier(len(scratch), stages))
    if reading is not None:
        scratch |= dict(state=gpu.tile(CHUNK, BLOCK))

    def gated_linear_attention_channel_walk(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(index, given, made, dict(zip(scratch, buffers, strict=True)), chunks, stages, reverse)

    grid = (batch, heads, value_dim // BLOCK)
    results = gpu.launch(
        gated_linear_attention_channel_walk, list(flat.values()), list(out.values()), grid, list(scratch.values())
    )
    results = dict(zip(out, results, strict=True))
    return results.get("o"), results["s"], results.get("states")


def _program(index, given, made, buffer, chunks, stages, reverse) -> None:
    b, h, w = index
    block = gpu.block(w)
    key_dim = given["y"].shape[3]
    halves = range(key_dim // CHUNK)
    reads, saves = "o" in made, len(halves) if "states" in made else 0  # groups of copies a chunk starts with

    def chunk(n, slot, refill, state):
        y, v = [buffer[f"y{c}"].at[slot] for c in halves], buffer["v"].at[slot]
        if "codes" in buffer:
            clean(lax.bitwise_and(gpu.load_rows(buffer["codes"].at[slot]), VALID) != 0, v)
        keep = [gpu.load_rows(buffer["keep"].at[slot, key_rows(c)]) for c in halves]
        new = [Sum([Product(y[c], v, ta=True)], by_row(keep[c], state[c])) for c in halves]
        if not reads:
            gpu.commit()  # no warp reads the chunk before any more
            refill()
            return tuple(dots(*new))
        x, o = [buffer[f"x{c}"].at[slot] for c in halves], None
        gpu.wait_out(1)  # the states of the chunk before
        for c in halves:
            tile = buffer["state"] if c == 0 else x[0]
            gpu.put(tile, state[c])
            if saves:
                gpu.copy_out((tile, made["states"].at[b, h, n, key_rows(c), block]))
            if c < halves[-1]:  # its x is the next one's tile
                (o,) = dots(Sum([Product(x[c], tile)], o), last=True)
        gpu.wait_out(saves)  # all of the chunk before
        refill()
        o, *new = dots(Sum([Product(x[-1], tile), Product(buffer["p"].at[slot], v, ta=reverse)], o), *new, last=True)
        v[...] = o.astype(v.dtype)
        gpu.copy_out((v, made["o"].at[b, gpu.chunk_rows(n), h, block]))
        return tuple(new)

    def half(keys, channels, n):
        return keys.at[b, gpu.chunk_rows(n), h, channels]

    part = dict(
        v=lambda n: given["v"].at[b, gpu.chunk_rows(n), h, block],
        p=lambda n: given["p"].at[b, h, n],
        keep=lambda n: given["keep"].at[b, h, n],
        codes=lambda n: given["codes"].at[b, n],
    )
    sources = [(part[name], buffer[name]) for name in part if name in buffer]
    for name, c in itertools.product("xy" if reads else "y", halves):
        sources.append((functools.partial(half, given[name], key_rows(c)), buffer[f"{name}{c}"]))
    state = load_state(given, "start", index, key_dim)
    state = gpu.stream(sources, buffer["barrier"], chunk, state, chunks=chunks, stages=stages, reverse=reverse)
    store_state(made["s"], state, index)
    gpu.wait_out(0)
