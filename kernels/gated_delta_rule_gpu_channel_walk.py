"""Family B on Hopper, a gate per channel (KDA): the walks over the chunks.

One warpgroup has a (batch, value head, 64 values). With what `gated_delta_rule_gpu_channel_intra` made of each chunk,
the state S in registers goes by

    R = T' (V - K S) ;  U = beta R ;  o = Q S + P U ;  S' = keep S + W^T U

and its cotangent in reverse by the adjoint system,

    dU = P^T do + W dS' ;  Y = T^T dU ;  dV = beta Y ;  dS = keep dS' + Q^T do - K^T dV

The states that a chunk starts from, R, dS' and Y are kept, in bfloat16, for what is left of the gradients. The identity
in T and T' stays out of products, U is rounded to 16 bits. Where only the final state is wanted, the first pass over
the parts of long sequences, Q and P stay away (in reverse, nothing does).

Bytes at K = V = 64, in units of q: Q and W twice, K, V, P, T' are read, o, S, R written: 11. In reverse Q, K, do, P, T
and W twice are read, dV, dS', Y written: 10.

Budget at K = 64: S, R and o in registers, 96 a thread; every operand is in shared memory. Tiles of 8 KB in one stage,
and all that a chunk makes is written over those it is done with (in reverse dS' has a tile of its own): 64 KB, so that
other programs on the SM compute while one loads. At K = 128 104 and 96 KB.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels import tile_gpu_channel as channel
from jaxlin.kernels.gated_delta_rule_gpu_channel_intra import Chunks
from jaxlin.kernels.gated_linear_attention_gpu_fwd import VALID, clean, present
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, by_row
from jaxlin.kernels.tile_gpu_keys import key_rows, load_state, store_state
from jaxlin.kernels.tile_gpu_products import Product, Sum, dots

STAGES = 1
ADJOINT_STAGES = 1
KEYS, PAIRS, VALUES = ("q", "q_rest", "k", "w", "w_rest"), ("p", "t", "t_values"), ("v", "do", "o", "r", "y", "dv")


def forward(
    x: Chunks, v: Array, beta: Array, codes: Array | None, s0: Array | None, *, read: bool = True, save: bool = False
) -> tuple[Array | None, Array, tuple[Array, Array] | None]:
    """(o [B, T, HV, V] if `read`, final S [B, HV, K, V], if `save` (S at chunk starts [B, HV, N, K, V], R like o)).

    v [B, T, HV, V], whose padding by `codes` [B, N, C] may hold anything; beta [B, HV, N, 1, C]; s0 None is zero. Where
    s0 has more columns than v, those have v = 0.
    """
    given = dict(k=x.k, w=x.w, w_rest=x.w_rest, v=v, t_values=x.t_values, keep=x.keep, beta=beta, codes=codes, start=s0)
    given |= dict(q=x.q, q_rest=x.q_rest, p=x.p) if read else {}
    out = _walk(gated_delta_rule_channel_walk, given, v, ("o",) * read + ("r", "states") * save, STAGES, reverse=False)
    return out.get("o"), out["s"], (out["states"], out["r"]) if save else None


def adjoint(
    x: Chunks, do: Array, beta: Array, codes: Array | None, ds: Array | None, *, save: bool = False
) -> tuple[Array, tuple[Array, Array, Array] | None]:
    """(dS of the initial state, if `save` (dV, Y [B, T, HV, V], dS' at chunk ends [B, HV, N, K, V])).

    ds None is zero.
    """
    given = dict(
        q=x.q, k=x.k, w=x.w, w_rest=x.w_rest, do=do, p=x.p, t=x.t, keep=x.keep, beta=beta, codes=codes, start=ds
    )
    out = _walk(gated_delta_rule_channel_adjoint, given, do, ("dv", "y", "states") * save, ADJOINT_STAGES, reverse=True)
    return out["s"], (out["dv"], out["y"], out["states"]) if save else None


def gated_delta_rule_channel_walk(tiles: dict, beta: Array, keep: list, state: tuple, save) -> tuple[tuple, dict]:
    """S' and the tiles that hold o and R, from the tiles of a chunk; `save(c, tile)` is called with those of S."""
    k, v, t, halves = tiles["k"], tiles["v"], tiles["t_values"], range(len(state))
    reads = "q" in tiles
    minus_z, o = -gpu.load(v), None
    for c in halves:
        tile = v if c == 0 else k[0]
        gpu.put(tile, state[c])
        save(c, tile)
        of_q = [Sum([Product(tiles[name][c], tile) for name in ("q", "q_rest")], o)] if reads else []
        minus_z, *found = dots(Sum([Product(k[c], tile)], minus_z), *of_q, last=True)
        o = found[0] if reads else None
    u, rest = k[-1], tiles["q_rest"][0] if reads else t
    z = -minus_z
    gpu.put(u, z)
    (r,) = dots(Sum([Product(t, u)], z), last=True)
    if reads:
        t[...] = r.astype(t.dtype)
    channel.put_pieces(by_row(beta, r), u, rest)
    new = []
    for c in halves:
        pieces = ((tiles["w"][c], u), (tiles["w"][c], rest), (tiles["w_rest"][c], u))
        new.append(Sum([Product(x, y, ta=True) for x, y in pieces], by_row(keep[c], state[c])))
    if not reads:
        return tuple(dots(*new)), {}
    o, *new = dots(Sum([Product(tiles["p"], piece) for piece in (u, rest)], o), *new, last=True)
    tiles["p"][...] = o.astype(v.dtype)
    return tuple(new), dict(o=tiles["p"], r=t)


def gated_delta_rule_channel_adjoint(tiles: dict, beta: Array, keep: list, state: tuple, save) -> tuple[tuple, dict]:
    """dS and the tiles that hold dV and Y, from the tiles of a chunk; `save(c, tile)` is called with those of dS'."""
    q, k, w, do, p, t = (tiles[name] for name in ("q", "k", "w", "do", "p", "t"))
    halves = range(len(state))
    du = Sum([Product(p, do, ta=True)])
    for c in halves:
        tile = tiles["state"] if c == 0 else w[0]
        gpu.put(tile, state[c])
        save(c, tile)
        products = [*du.products, Product(w[c], tile), Product(tiles["w_rest"][c], tile)]
        (total,) = dots(Sum(products, du.start), last=True)
        du = Sum([], total)
    dv = w[-1]
    gpu.put(dv, total)
    through = (Sum([Product(q[c], do, ta=True)], by_row(keep[c], state[c])) for c in halves)
    y, *through = dots(Sum([Product(t, dv, ta=True)], total), *through, last=True)
    t[...] = y.astype(t.dtype)
    gpu.put(dv, by_row(beta, y))
    minus = dots(*(Sum([Product(k[c], dv, ta=True)], -through[c]) for c in halves))
    return tuple(-x for x in minus), dict(dv=dv, y=t)


def _walk(body, given: dict, like: Array, made: tuple[str, ...], stages: int, reverse: bool) -> dict:
    """The final S [B, HV, K, V], and by name what else is made, after `body` of all chunks; `like` [B, T, HV, V]."""
    given = present(**given)
    batch, heads, chunks, key_dim = given["keep"].shape
    value_dim = given["start"].shape[3] if "start" in given else like.shape[3]
    assert value_dim == like.shape[3] or not made  # what is made is of v's columns
    halves, stages = range(key_dim // CHUNK), min(stages, chunks)
    shape = jax.ShapeDtypeStruct
    out = dict(s=shape((batch, heads, key_dim, value_dim), jnp.float32))
    out |= {name: shape(like.shape, like.dtype) for name in made}
    if "states" in made:
        out |= dict(states=shape((batch, heads, chunks, key_dim, value_dim), like.dtype))
    scratch = {f"{name}{c}": gpu.tile(stages, CHUNK, CHUNK) for name in KEYS if name in given for c in halves}
    scratch |= {name: gpu.tile(stages, CHUNK, CHUNK) for name in PAIRS + VALUES if name in given}
    scratch |= dict(keep=gpu.vector(stages, key_dim), beta=gpu.vector(stages, 1, CHUNK))
    if "codes" in given:
        scratch |= dict(codes=gpu.vector(stages, CHUNK, dtype=jnp.int32))
    scratch |= dict(barrier=gpu.barrier(len(scratch), stages))
    if reverse:
        scratch |= dict(state=gpu.tile(CHUNK, BLOCK))

    def program(index, inputs, outputs, buffers):
        x, y = dict(zip(given, inputs, strict=True)), dict(zip(out, outputs, strict=True))
        _program(body, index, x, y, dict(zip(scratch, buffers, strict=True)), chunks, stages, reverse)

    program.__name__ = body.__name__
    grid = (batch, heads, value_dim // BLOCK)
    results = gpu.launch(program, list(given.values()), list(out.values()), grid, list(scratch.values()))
    return dict(zip(out, results, strict=True))


def _program(body, index, given, made, buffer, chunks, stages, reverse) -> None:
    b, h, w = index
    block, key_dim = gpu.block(w), given["keep"].shape[3]
    blocks, of_state = (x.shape[3] // BLOCK for x in (given["do" if reverse else "v"], made["s"]))
    halves = range(key_dim // CHUNK)

    def chunk(n, slot, refill, state):
        tiles = {name: [buffer[f"{name}{c}"].at[slot] for c in halves] for name in KEYS if name in given}
        tiles |= {name: buffer[name].at[slot] for name in PAIRS + VALUES if name in given}
        tiles |= {name: buffer[name] for name in ("state",) if name in buffer}
        gpu.wait_out(0)
        refill()
        if "codes" in buffer:
            valid = lax.bitwise_and(gpu.load_rows(buffer["codes"].at[slot]), VALID) != 0
            clean(valid, tiles["do" if reverse else "v"])
        if of_state > blocks:

            def no_values():
                tiles["v"][...] = registers.zeros(CHUNK, BLOCK).astype(tiles["v"].dtype)

            gpu.where(w >= blocks, no_values)
        keep = [gpu.load_rows(buffer["keep"].at[slot, key_rows(c)]) for c in halves]

        def save(c, tile):
            if "states" in made:
                gpu.copy_out((tile, made["states"].at[b, h, n, key_rows(c), block]))

        beta = gpu.load_rows(buffer["beta"].at[slot, 0])
        new, done = body(tiles, beta, keep, state, save)
        rows = gpu.chunk_rows(n)
        gpu.copy_out(*((tile, made[name].at[b, rows, h, block]) for name, tile in done.items() if name in made))
        return new

    def part(name):
        x = given[name]
        if name in VALUES:
            own = block if of_state == blocks else gpu.block(jnp.minimum(w, blocks - 1))
            return lambda n: x.at[b, gpu.chunk_rows(n), h, own]
        return lambda n: x.at[b, n] if name == "codes" else x.at[b, h, n]

    def key_part(name, c):
        return lambda n: given[name].at[b, gpu.chunk_rows(n), h, key_rows(c)]

    sources = [(key_part(name, c), buffer[f"{name}{c}"]) for name in KEYS if name in given for c in halves]
    sources += [(part(name), buffer[name]) for name in given if name in buffer]
    state = load_state(given, "start", index, key_dim)
    state = gpu.stream(sources, buffer["barrier"], chunk, state, chunks=chunks, stages=stages, reverse=reverse)
    store_state(made["s"], state, index)
    gpu.wait_out(0)
