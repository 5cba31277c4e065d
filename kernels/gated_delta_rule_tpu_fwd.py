"""Family B on the TPU, forward: DeltaNet, Gated DeltaNet, KDA, one pass over the chunks.

    A_ij = k_i.k_j D_ij, i > j ;   P_ij = q_i.k_j D_ij, i >= j ;   T = (I + B A)^-1
    U = T B (V - (enter K) S) ;   o = scale ((enter Q) S + P U) ;   S' = keep S + (leave K)^T U

Everything of a chunk, T included, stays in VMEM; S is carried there from chunk to chunk. kernels/README.md has more.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import tile_tpu_layout as tiles
from jaxlin.kernels.tile_tpu_algebra import (
    NN,
    Masks,
    Segments,
    make_masks,
    product,
    read_segments,
    to_column,
    unit_lower_inverse,
)
from jaxlin.kernels.tile_tpu_gates import ChannelGate, HeadGate, make_gate
from jaxlin.kernels.tile_tpu_layout import Layout


class Inputs(NamedTuple):
    """Arrays as `tile_tpu_layout` blocks them; None where the op has no such thing."""

    q: Array  # [B, T, HV * K]
    k: Array
    v: Array  # [B, T, HV * V]
    beta: Array  # rows
    g: Array | None  # rows: log decays per head
    g_channel: Array | None  # [B, T, HV * K]: log decays per channel
    segments: Array | None

    def blocks(self) -> dict[str, tuple[str, Array | None]]:
        kinds = dict(q="key", k="key", v="value", beta="rows", g="rows", g_channel="key", segments="segments")
        return {name: (kinds[name], x) for name, x in self._asdict().items()}


def forward(layout: Layout, scale: float, x: Inputs, s: Array, save: bool) -> dict[str, Array]:
    """o, the final s, and with `save` the states that each chunk receives."""
    inputs = x.blocks() | dict(s0=("state", s))
    outputs: dict[str, tuple[str, Any]] = dict(o=("value", None), s=("state", None))
    if save:
        outputs["states"] = ("states", None)
    scratch = dict(s=(layout.packs, layout.key_lanes, layout.value_lanes))
    return tiles.call(
        functools.partial(_kernel, layout, scale), layout, "gated_delta_rule_forward", inputs, outputs, scratch
    )


def _kernel(layout: Layout, scale: float, x: dict, out: dict, scratch: dict) -> None:
    masks = make_masks(layout)
    segments = read_segments(x.get("segments"), masks)
    tile = tiles.Reader(layout, segments)

    @pl.when(pl.program_id(2) == 0)
    def _():
        tiles.each_pack(layout, lambda p: tile.load_state(scratch["s"], x["s0"], p))

    tiles.each_pack(layout, functools.partial(_pack, layout, scale, tile, masks, segments, x, out, scratch))

    @pl.when(pl.program_id(2) == layout.chunks - 1)
    def _():
        tiles.each_pack(layout, lambda p: tile.store_state(out["s"], p, scratch["s"][p]))


def _pack(
    layout: Layout, scale: float, tile: tiles.Reader, masks: Masks, segments: Segments | None,
    x: dict, out: dict, scratch: dict, p: Any,
) -> None:  # fmt: skip
    q, k = (tile.stacked(x[name], p, layout.key) for name in "qk")
    v = tile.stacked(x["v"], p, layout.value).astype(jnp.float32)
    s = scratch["s"][p]
    beta = to_column(tiles.read_row(x["beta"], p), masks)
    gate = make_gate(layout, masks, segments, tile, x, p)
    solved = solve(layout, masks, gate, beta, k, v, s)
    scores = gate.scores(q, k)
    o = gate.read(q, s) + product(scores, solved.u, NN, layout.dtype, exact=True)
    scratch["s"][p] = gate.keep * s + gate.write(k, solved.u)
    if "states" in out:
        out["states"][0, 0, 0, p] = tiles.compact(s, layout).astype(layout.dtype)
    tile.store(out["o"], p, scale * o, layout.value)


class Solved(NamedTuple):
    """The delta rule's triangular system of a tile."""

    a: Array  # [128, 128], i > j
    t: Array  # [128, 128], (I + B A)^-1
    z: Array  # [128, pack * V], V - (enter K) S
    u: Array  # [128, pack * V], T B Z


def solve(
    layout: Layout, masks: Masks, gate: HeadGate | ChannelGate, beta: Array, k: Array, v: Array, s: Array
) -> Solved:
    """beta [128, 1], v in float32."""
    a = jnp.where(masks.before, gate.scores(k, k), 0.0)
    t = unit_lower_inverse(beta * a, layout)
    z = v - gate.read(k, s)
    return Solved(a, t, z, product(t, beta * z, NN, layout.dtype, exact=True))
