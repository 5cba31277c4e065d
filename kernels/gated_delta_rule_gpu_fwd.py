"""Family B forward on Hopper: one warpgroup walks the chunks of a (batch, value head, 64 values), S in registers.

    U = T diag(beta) (V - enter K S) ;  P_ij = scale q_i.k_j D_ij, i >= j
    o = scale enter (Q S) + P U ;  S' = keep S + K^T (leave U)

D, enter, leave and keep are family A's decays, T - I comes from `gated_delta_rule_gpu_intra`. A chunk is links of
products, of which those of a link are in flight together. At K = 128 there are three: K S, Q S, Q K^T; T x (meanwhile
the decays of P); P U, K^T U. At K = 64 there are four, with less alive at once: K S; T x, Q K^T; Q S; P U, K^T U.

Budget at K = V = 64: S and two products in registers, 96 a thread, and pieces of tiles: 154 to 168. Shared memory: q,
k, v of 8 KB in 2 stages; x is written over v, then what is written to S, then o (48 KB); T, with which a chunk does not
begin, in one, copied when the chunk before is done with U, which lies over it; S as operand (16 KB): 66 KB, three
programs an SM. At K = 128 it is 107 KB, and two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.gated_delta_rule_gpu_intra import beta_of
from jaxlin.kernels.gated_linear_attention_gpu_fwd import Form, Inputs, clean, decays, present, sources, stored
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots

STAGES = 2


def forward(form: Form, x: Inputs, t: Array, s0: Array | None, save: bool) -> tuple[Array, Array, Array | None]:
    """(o [B, T, HV, V], final S [B, HV, K, V], S at chunk starts [B, HV, N, K, V] if `save`), from `intra`'s T - I.

    The chunk states are bfloat16, as products read them.
    """
    batch, time, _, key_dim = x.q.shape
    heads, value_dim = x.v.shape[2:]
    chunks = time // CHUNK
    light = key_dim == 64
    flat = present(q=x.q, k=x.k, v=x.v, vectors=x.vectors, codes=x.codes, t=t, s0=s0)
    shape = jax.ShapeDtypeStruct
    out = dict(o=shape(x.v.shape, x.v.dtype), s=shape((batch, heads, key_dim, value_dim), jnp.float32))
    if save:
        out |= dict(states=shape((batch, heads, chunks, key_dim, value_dim), x.v.dtype))
    scratch = dict(
        q=gpu.tile(STAGES, CHUNK, key_dim),
        k=gpu.tile(STAGES, CHUNK, key_dim),
        v=gpu.tile(STAGES, CHUNK, BLOCK),
        t=gpu.tile(1, CHUNK, CHUNK),
        vectors=gpu.vector(STAGES, form.vectors, CHUNK),
        state=gpu.tile(1, key_dim, BLOCK),
        barrier=gpu.barrier(4 + form.segments, min(STAGES, chunks)),
        late=gpu.barrier(1, 1),
    )
    if form.segments:
        scratch |= dict(codes=gpu.vector(STAGES, CHUNK, dtype=jnp.int32))

    def gated_delta_rule_fwd(index, inputs, outputs, buffers):
        given, made = dict(zip(flat, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(form, index, given, made, dict(zip(scratch, buffers, strict=True)), chunks, light)

    grid = (batch, heads, value_dim // BLOCK)
    results = gpu.launch(
        gated_delta_rule_fwd,
        list(flat.values()),
        list(out.values()),
        grid,
        list(scratch.values()),
    )
    results = dict(zip(out, results, strict=True))
    return results["o"], results["s"], results.get("states")


def _program(form: Form, index, given, made, buffer, chunks, light) -> None:
    b, h, w = index
    save, block = "states" in made, gpu.block(w)
    s = gpu.load(given["s0"].at[b, h, :, block]) if "s0" in given else registers.zeros(*buffer["state"].shape[1:])

    def fetch_late(n):
        """Start to copy T, with which a chunk does not begin: one tile, free when the chunk before is done."""
        gpu.fetch([(given["t"].at[b, h, n], buffer["t"].at[0])], buffer["late"])

    def anew(slot):
        """A chunk's tiles and decays: kept from one part of it to the next, they take registers."""
        here = registers.unknown_zero(anew=True)
        tiles = (*(buffer[name].at[slot + here] for name in "qkv"), *(buffer[name].at[here] for name in ("state", "t")))
        return *tiles, decays(form, buffer, slot + here, here)

    def chunk(n, slot, refill, s):
        q, k, v, state, t, d = anew(slot)
        if save:
            gpu.wait_out(1)  # the saved state of the chunk before
        state[...] = s.astype(jnp.bfloat16)
        if not save:
            gpu.commit()
        else:
            gpu.copy_out((state, made["states"].at[b, h, n, :, block]))
        beta = beta_of(form, buffer, slot)
        if form.segments:
            clean(d.valid, k, v)
        if light:  # one wait more, and 64 registers less
            (kept,) = dots(Sum([Product(k, state)]))
        else:
            kept, read, p = dots(Sum([Product(k, state)]), Sum([Product(q, state)]), Sum([Product(q, k, tb=True)]))
        gpu.wait_out(1 if save else 0)  # o of the chunk before
        refill()

        q, k, v, state, t, d = anew(slot)
        x = by_row(beta, gpu.load(v) - by_row(d.enter, kept))
        gpu.put(v, x)
        gpu.arrived(buffer["late"])
        t_x = Sum([Product(t, v)], x)
        if light:
            u, p = dots(t_x, Sum([Product(q, k, tb=True)]), last=True)
            p = d.pair() * p
        else:
            u, p = dots(t_x, meanwhile=lambda: d.pair() * p, last=True)
        q, k, v, state, t, d = anew(slot)
        u_tile = written = t
        u_tile[...] = u.astype(jnp.bfloat16)
        if form.gated or form.segments:
            written = v
            written[...] = by_row(d.leave, u).astype(jnp.bfloat16)
        gpu.commit()
        if light:
            (read,) = dots(Sum([Product(q, state)]))
        s, o = dots(
            Sum([Product(k, written, ta=True)], by_row(d.keep, s)),
            Sum([Product(p.astype(jnp.bfloat16), u_tile)], by_row(d.enter_scaled, read)),
            last=True,
        )

        @pl.when(n + 1 < chunks)
        def _():
            fetch_late(n + 1)

        v[...] = stored(d, o)
        gpu.copy_out((v, made["o"].at[b, gpu.chunk_rows(n), h, block]))
        return s

    fetch_late(jnp.int32(0))
    s = gpu.stream(sources(given, buffer, index), buffer["barrier"], chunk, s, chunks=chunks, stages=STAGES)
    made["s"].at[b, h, :, block][...] = s
    gpu.wait_out(0)
