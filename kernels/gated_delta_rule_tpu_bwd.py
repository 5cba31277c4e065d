"""Family B on the TPU, backward: one pass over the chunks in reverse, the cotangent of the state carried in VMEM.

T is computed again and never differentiated: Y = T^T dU solves the adjoint system.

    dU = scale P^T do + (leave K) dS ;   Y = T^T dU ;   dV = B Y ;   dP = scale do U^T ;   dA = -B stril(Y U^T)
    dbeta_i = y_i.z_i - sum_j (y_i.u_j) A_ij
    dq = scale enter (do S^T) + [dP] ;   dk = -enter (dV S^T) + leave (U dS^T) + [dP] + [dA]
    dS <- keep dS + scale (enter Q)^T do - (enter K)^T dV

where [dP], [dA] is what goes through the products P and A. dg as kernels/README.md derives it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import tile_tpu_layout as tiles
from jaxlin.kernels.gated_delta_rule_tpu_fwd import Inputs, solve
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
    to_column,
)
from jaxlin.kernels.tile_tpu_gates import make_gate
from jaxlin.kernels.tile_tpu_layout import Layout


def backward(
    layout: Layout, scale: float, x: Inputs, states: Array, do: Array, ds: Array, key_dtype: Any
) -> dict[str, Array]:
    """dq, dk (in `key_dtype`), dv, dbeta, dg (if there is one), and ds of the initial state.

    `states` are what each chunk received; do, ds the cotangents of o and of the final state.
    """
    inputs = x.blocks() | dict(states=("states", states), do=("value", do), ds=("state", ds))
    outputs: dict[str, tuple[str, Any]] = dict(
        dq=("key", key_dtype), dk=("key", key_dtype), dv=("value", None), dbeta=("rows", None), ds=("state", None)
    )
    kinds = dict(g="rows", g_channel="key")
    outputs |= {f"d{n}": (kind, jnp.float32) for n, kind in kinds.items() if getattr(x, n) is not None}
    scratch = dict(ds=(layout.packs, layout.key_lanes, layout.value_lanes))
    kernel = functools.partial(_kernel, layout, scale)
    return tiles.call(kernel, layout, "gated_delta_rule_backward", inputs, outputs, scratch, reverse=True)


def _kernel(layout: Layout, scale: float, x: dict, out: dict, scratch: dict) -> None:
    masks = make_masks(layout)
    segments = read_segments(x.get("segments"), masks)
    tile = tiles.Reader(layout, segments)

    @pl.when(pl.program_id(2) == 0)
    def _():
        tiles.each_pack(layout, lambda p: tile.load_state(scratch["ds"], x["ds"], p))

    tiles.each_pack(layout, functools.partial(_pack, layout, scale, tile, masks, segments, x, out, scratch))

    @pl.when(pl.program_id(2) == layout.chunks - 1)
    def _():
        tiles.each_pack(layout, lambda p: tile.store_state(out["ds"], p, scratch["ds"][p]))


def _pack(
    layout: Layout, scale: float, tile: tiles.Reader, masks: Masks, segments: Segments | None,
    x: dict, out: dict, scratch: dict, p: Any,
) -> None:  # fmt: skip
    dtype = layout.dtype
    inside = functools.partial(product, dtype=dtype, exact=True)
    q, k = (tile.stacked(x[name], p, layout.key) for name in "qk")
    v, do = (tile.stacked(x[name], p, layout.value) for name in ("v", "do"))
    s, ds = tiles.expand(x["states"][0, 0, 0, p], layout), scratch["ds"][p]
    beta = to_column(tiles.read_row(x["beta"], p), masks)
    gate = make_gate(layout, masks, segments, tile, x, p)
    a, t, z, u = solve(layout, masks, gate, beta, k, v.astype(jnp.float32), s)
    scores = gate.scores(q, k)

    du = scale * inside(scores, do, TN) + gate.write_vjp(k, ds)
    y = inside(t, du, TN)
    dv = beta * y
    dl = -jnp.where(masks.before, inside(y, u, NT), 0.0)
    dbeta = row_sum(y * z) + row_sum(dl * a)

    dq_enter = scale * gate.enter * product(do, s, NT, dtype)
    dk_enter = -gate.enter * product(dv, s, NT, dtype)
    dk_leave = gate.leave * product(u, ds, NT, dtype)
    scratch["ds"][p] = gate.keep * ds + scale * gate.read_vjp(q, do) - gate.read_vjp(k, dv)

    dq, dk_p, e_p = gate.scores_vjp(scale * inside(do, u, NT), scores, q, k)
    dk_row, dk_a, e_a = gate.scores_vjp(beta * dl, a, k, k)
    tile.store(out["dq"], p, dq + dq_enter, layout.key)
    tile.store(out["dk"], p, dk_p + dk_row + dk_a + dk_enter + dk_leave, layout.key)
    tile.store(out["dv"], p, dv, layout.value)
    tiles.write_row(out["dbeta"], p, column_sum(jnp.where(masks.eye, dbeta, 0.0)))

    for name in ("dg", "dg_channel"):
        if name in out:
            q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
            reads, writes = gate.sizes(q32 * dq_enter + k32 * dk_enter), gate.sizes(k32 * dk_leave)
            carried = gate.carried(s.astype(jnp.float32), ds)
            gate.store(out[name], tile, p, gate.gradient(e_p + e_a, reads, writes, carried))
