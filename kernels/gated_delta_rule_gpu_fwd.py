"""Family B forward on Hopper: one warpgroup walks the chunks of a (batch, value head, 64 values), S in registers.

    A_ij = k_i.k_j D_ij, i > j ;  T = (I + diag(beta) A)^-1 ;  U = T diag(beta) (V - enter K S)
    P_ij = scale q_i.k_j D_ij, i >= j ;  o = scale enter (Q S) + P U ;  S' = keep S + K^T (leave U)

D, enter, leave and keep are family A's decays. T comes from its diagonal blocks by doubling: with X the inverses of
the blocks of s rows, those of 2s rows are X - X L' X, L' the part of L between the halves of a block. X is block
diagonal, so X L' = (X L) masked, and L goes to shared memory once. No power of L appears, nothing grows with correlated
keys; products have bfloat16 operands, whose rounding (measured: 0.5e-3 of o) is below that of the others. The identity
in T stays out of products: U = x + (T - I) x keeps x in float32 where it counts, which takes the error of o from 4.0e-3
to 3.7e-3 (keys uncorrelated, T = 320). What is handed on as T is T - I.

Budget at K = V = 64: S, X and two products in registers, 128 a thread. Shared memory: q, k, v of 8 KB in 2 stages, o
written over v (48 KB); S, L (then T - I), X (then x and what is written), the rest of L (then U) as operands (32 KB):
two programs an SM.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK, by_row, dot

STAGES = 2
EXACT = 16
"""From blocks of so many rows on L has 16 bits: with keys correlated by 0.9, its 8 were the largest error of T."""


def forward(form: Form, x: Inputs, s0: Array | None, save: bool) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """(o [B, T, HV, V], final S [B, HV, K, V], if `save` (S at chunk starts [B, HV, N, K, V], T - I [B, HV, N, C, C])).

    The chunk states and T - I are bfloat16, as products read them.
    """
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks = time // CHUNK
    flat = present(q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, s0=s0)
    shape = jax.ShapeDtypeStruct
    out = dict(o=shape(x.v.shape, x.v.dtype), s=shape((batch, heads, key_dim, value_dim), jnp.float32))
    if save:
        out |= dict(states=shape((batch, heads, chunks, key_dim, value_dim), x.v.dtype))
        out |= dict(t=shape((batch, heads, chunks, CHUNK, CHUNK), x.v.dtype))
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, BLOCK),
        vectors=gpu.vector(STAGES, form.vectors, CHUNK),
        state=gpu.tile(1, key_dim, BLOCK),
        lower=gpu.tile(1, CHUNK, CHUNK),
        blocks=gpu.tile(1, CHUNK, CHUNK),
        u=gpu.tile(1, CHUNK, BLOCK),
        barrier=gpu.barrier(4 + form.segments, min(STAGES, chunks)),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))

    def gated_delta_rule_fwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks)

    grid = (batch, heads, value_dim // BLOCK)
    results = gpu.launch(gated_delta_rule_fwd, list(flat.values()), list(out.values()), grid, list(scratch.values()))
    results = dict(zip(out, results, strict=True))
    return results["o"], results["s"], (results["states"], results["t"]) if save else None


def _program(form: Form, index, given, made, buffer, chunks) -> None:
    b, h, w = index
    save, block = "states" in made, gpu.block(w)
    s = gpu.load(given["s0"].at[b, h, :, block]) if "s0" in given else gpu.zeros(*buffer["state"].shape[1:])

    def chunk(n, slot, refill, s):
        q, k, v = (buffer[name].at[slot] for name in "qkv")
        here = gpu.unknown_zero(anew=True)
        state, lower, blocks, u_tile = (buffer[name].at[here] for name in ("state", "lower", "blocks", "u"))
        if save:
            gpu.wait_out(2)
        gpu.put(state, s)
        if save:
            gpu.copy_out((state, made["states"].at[b, h, n, :, block]))
        d = decays(form, buffer, slot)
        beta = beta_of(form, buffer, slot)
        if form.segments:
            clean(d.valid, k, v)
        (a,) = d.keys(dot(k, k, tb=True))
        gpu.wait_out(1 if save else 0)
        refill()
        t = unit_lower_inverse(by_row(-beta, a), lower, u_tile, blocks).astype(jnp.bfloat16)
        if save:
            gpu.put(lower, t)
            gpu.copy_out((lower, made["t"].at[b, h, n]), when=w == 0)

        x = by_row(beta, gpu.load(v) - by_row(d.enter, dot(k, state)))
        gpu.put(blocks, x)
        u = dot(t, blocks, x)
        gpu.put(u_tile, u)
        (p,) = d.pair(dot(q, k, tb=True))
        o = dot(p.astype(jnp.bfloat16), u_tile, by_row(d.enter_scaled, dot(q, state)))
        written = u_tile
        if form.gated or form.segments:
            written = blocks
            gpu.put(written, by_row(d.leave, u))
        s = dot(k, written, s * d.keep, ta=True)
        v[...] = stored(d, o)
        gpu.copy_out((v, made["o"].at[b, gpu.chunk_rows(n), h, block]))
        return s

    s = gpu.stream(sources(given, buffer, index), buffer["barrier"], chunk, s, chunks=chunks, stages=STAGES)
    made["s"].at[b, h, :, block][...] = s
    gpu.wait_out(0, read=False)


# ---- shared with the backward pass ----


def beta_of(form: Form, buffer: dict, slot: Array) -> Array:
    """beta [C] of the chunk in `slot`."""
    return gpu.load_rows(buffer["vectors"].at[slot, form.vectors - 1])


def unit_lower_inverse(minus_lower: Array, lower: gpu.Ref, rest: gpu.Ref, blocks: gpu.Ref) -> Array:
    """(I + L)^-1 - I of -L, a strictly lower triangular tile in registers; three tiles of shared memory are used up.

    -L lies in `lower` and what bfloat16 leaves of it in `rest`; X, block by block, in `blocks`.
    """
    i, j = gpu.indices()
    apart = lax.bitwise_xor(i, j)  # in [s, 2s) where i and j lie in the two halves of a block of 2s rows
    x = jnp.where(i == j, 1.0, jnp.where(apart == 1, minus_lower, 0.0))
    rounded = minus_lower.astype(jnp.bfloat16)
    lower[...] = rounded
    rest[...] = (minus_lower - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
    size = 2
    while size < CHUNK:
        gpu.put(blocks, x)
        x_rounded = x.astype(jnp.bfloat16)
        corners = dot(x_rounded, lower)
        if size >= EXACT:
            corners = dot(x_rounded, rest, corners)
        corners = jnp.where(lax.bitwise_xor(apart, jnp.int32(size)) < size, corners, 0.0)
        x = dot(corners.astype(jnp.bfloat16), blocks, x)
        size *= 2
    return jnp.where(i == j, 0.0, x)
