"""Family A on the TPU, backward: one pass over the chunks in reverse, the cotangent of the state carried in VMEM.

With r = 1 / d the inverse denominator (1 without one) and dn = r do:

    dl = -r d'(l) (dn.n),   dn.n = rowsum(P . dn V^T) + q.(scale enter dn S^T): n itself is not needed
    dP = tril(dn V^T + dl 1^T) ;   dv = P^T dn + leave (K dS)
    dq = scale (dP . D) k + scale enter (dn S^T + dl z^T) ;   dk = scale (dP . D)^T q + leave (V dS^T + 1 dz^T)
    dS <- keep dS + scale (enter Q)^T dn ;   dz <- keep dz + scale (enter Q)^T dl

and dg, dw from E = dP . P as kernels/README.md derives them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import tile_tpu_layout as tiles
from jaxlin.kernels.gated_linear_attention_tpu_fwd import Inputs, Options, denominator
from jaxlin.kernels.mlstm_tpu_stabilizer import with_stabilizer
from jaxlin.kernels.tile_tpu_algebra import (
    NT,
    TN,
    Masks,
    Segments,
    column_sum,
    make_masks,
    product,
    read_segments,
    row_sum,
)
from jaxlin.kernels.tile_tpu_gates import make_gate
from jaxlin.kernels.tile_tpu_layout import Layout


def backward(
    layout: Layout, options: Options, x: Inputs, saved: dict[str, Array], do: Array, ds: Array, dz: Array | None
) -> dict[str, Array]:
    """dq, dk, dv, dg, dw (those there are), and ds, dz of the initial state.

    `saved` is what `forward` saved; do, ds, dz the cotangents of o and of the final state.
    """
    n = layout
    inputs = x.blocks() | dict(
        states=("states", saved["states"]), normalizers=("normalizers", saved.get("normalizers")),
        before=("rows", saved.get("before")), do=("value", do), ds=("state", ds), dz=("normalizer", dz),
    )  # fmt: skip
    inputs.pop("m0", None)
    key_dtype = n.dtype if options.heads == n.heads else jnp.float32  # summed over value heads before it is rounded
    outputs: dict[str, tuple[str, Any]] = dict(
        dq=("key", key_dtype), dk=("key", key_dtype), dv=("value", None), ds=("state", None)
    )
    scratch = dict(ds=(n.packs, n.key_lanes, n.value_lanes))
    kinds = dict(g="rows", g_channel="key", w="rows")
    outputs |= {f"d{n}": (kind, jnp.float32) for n, kind in kinds.items() if getattr(x, n) is not None}
    if dz is not None:
        outputs["dz"] = ("normalizer", None)
        scratch["dz"] = (n.packs, 1, n.key_lanes)
    if x.m is not None:
        scratch |= tiles.stabilizer_scratch(layout)
    kernel = functools.partial(_kernel, layout, options)
    return tiles.call(kernel, layout, "gated_linear_attention_backward", inputs, outputs, scratch, reverse=True)


def _kernel(layout: Layout, options: Options, x: dict, out: dict, scratch: dict) -> None:
    masks = make_masks(layout)
    segments = read_segments(x.get("segments"), masks)
    tile = tiles.Reader(layout, segments)

    @pl.when(pl.program_id(2) == 0)
    def _():
        def load(p):
            scratch["ds"][p] = tile.state(x["ds"], p)
            if "dz" in scratch:
                scratch["dz"][p] = x["dz"][0, 0, pl.ds(p, 1), :]

        tiles.each_pack(layout, load)

    tiles.each_pack(layout, functools.partial(_pack, layout, options, tile, masks, segments, x, out, scratch))

    @pl.when(pl.program_id(2) == layout.chunks - 1)
    def _():
        def store(p):
            tile.store_state(out["ds"], p, scratch["ds"][p])
            if "dz" in scratch:
                out["dz"][0, 0, pl.ds(p, 1), :] = scratch["dz"][p]

        tiles.each_pack(layout, store)


def _pack(
    layout: Layout, options: Options, tile: tiles.Reader, masks: Masks, segments: Segments | None,
    x: dict, out: dict, scratch: dict, p: Any,
) -> None:  # fmt: skip
    dtype, scale = layout.dtype, options.scale
    if "before" in x:
        x = with_stabilizer(layout, segments, x, tiles.read_row(x["before"], p), scratch, p)
    q, k = (tile.stacked(x[name], p, layout.key) for name in "qk")
    v, do = (tile.stacked(x[name], p, layout.value) for name in ("v", "do"))
    s, ds = tiles.expand(x["states"][0, 0, 0, p], layout), scratch["ds"][p]
    gate = make_gate(layout, masks, segments, tile, x, p)
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    decayed = gate.scores(q, k)
    scores = scale * decayed
    q_enter = scale * gate.enter * q32

    dp = product(do, v, NT, dtype)
    dq_state = product(do, s, NT, dtype)
    dk_state = product(v, ds, NT, dtype)
    dn = do
    if options.denominator is not None:
        z, dz, m = tiles.read_row(x["normalizers"], p), scratch["dz"][p], tiles.read_row(x.get("m"), p)
        l = row_sum(q_enter * z) + row_sum(scores)  # noqa: E741
        r, slope = denominator(l, m, masks)
        dn, dp, dq_state = r * do.astype(jnp.float32), r * dp, r * dq_state
        dl = -r * slope * (row_sum(scores * dp) + row_sum(q_enter * dq_state))
        dp, dq_state, dk_state = dp + dl, dq_state + dl * z, dk_state + dz
        scratch["dz"][p] = gate.keep_row * dz + column_sum(dl * q_enter)
    dq_state, dk_state = scale * gate.enter * dq_state, gate.leave * dk_state
    scratch["ds"][p] = gate.keep * ds + scale * gate.read_vjp(q, dn)

    dq, dk, e = gate.scores_vjp(scale * dp, decayed, q, k)
    dv = product(scores, dn, TN, dtype, exact=True) + gate.write_vjp(k, ds)
    tile.store(out["dq"], p, dq + dq_state, layout.key)
    tile.store(out["dk"], p, dk + dk_state, layout.key)
    tile.store(out["dv"], p, dv, layout.value)

    reads, writes = gate.sizes(q32 * dq_state), gate.sizes(k32 * dk_state)
    for name in ("dg", "dg_channel"):
        if name in out:
            carried = gate.carried(s.astype(jnp.float32), ds)
            if options.denominator is not None:
                carried += gate.carried_row(z, dz)
            gate.store(out[name], tile, p, gate.gradient(e, reads, writes, carried))
    if "dw" in out:
        tiles.write_row(out["dw"], p, column_sum(dp * scores + jnp.where(masks.eye, writes, 0.0)))
