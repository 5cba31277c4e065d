"""Family A on the TPU, forward: linear attention, RetNet, GLA, and the mLSTM, one pass over the chunks.

    P_ij = scale q_i.k_j D_ij ;   n = scale enter (Q S) + P V ;   S' = keep S + (leave K)^T V
    l = scale enter (q.z) + P 1 ;   z' = keep z + (leave K)^T 1 ;   o = n, n / (l + eps) or n / max(|l|, e^-m)

`leave` and D hold the input gate where there is one. Everything of a chunk stays in VMEM; S and z are carried there
from chunk to chunk. kernels/README.md has the derivation.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import tile_tpu_layout as tiles
from jaxlin.kernels.gated_linear_attention import LEAST_LOG_DENOMINATOR, NORMALIZER_EPS
from jaxlin.kernels.mlstm_tpu_stabilizer import previous, with_stabilizer
from jaxlin.kernels.tile_tpu_algebra import (
    NN,
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


class Options(NamedTuple):
    """What is fixed when a kernel is compiled."""

    scale: float
    denominator: Literal["sum", "max"] | None  # o = n / (l + eps), n / max(|l|, e^-m), or n
    heads: int  # key heads


class Inputs(NamedTuple):
    """Arrays as `tile_tpu_layout` blocks them; None where the op has no such thing."""

    q: Array  # [B, T, HV * K]
    k: Array
    v: Array  # [B, T, HV * V]
    g: Array | None  # rows: log decays per head; log f where there is m
    g_channel: Array | None  # [B, T, HV * K]: log decays per channel
    w: Array | None  # rows: log input gates; i where there is m
    m: Array | None  # row: the mLSTM's stabiliser before the first token
    segments: Array | None

    def blocks(self) -> dict[str, tuple[str, Array | None]]:
        kinds = dict(q="key", k="key", v="value", g="rows", g_channel="key", w="rows", m="row", segments="segments")
        names = {} if self.m is None else dict(g="log_f", w="i", m="m0")
        return {names.get(name, name): (kinds[name], x) for name, x in self._asdict().items()}


def forward(layout: Layout, options: Options, x: Inputs, s: Array, z: Array | None, save: bool) -> dict[str, Array]:
    """o, the final s (and z, m), and with `save` what the backward pass reads.

    That is the states (and normalizers) that each chunk receives, and m_{t-1} of every token.
    """
    n = layout
    inputs = x.blocks() | dict(s0=("state", s), z0=("normalizer", z))
    outputs: dict[str, tuple[str, Any]] = dict(o=("value", None), s=("state", None))
    scratch = dict(s=(n.packs, n.key_lanes, n.value_lanes))
    if save:
        outputs["states"] = ("states", None)
    if z is not None:
        outputs["z"] = ("normalizer", None)
        scratch["z"] = (n.packs, 1, n.key_lanes)
        if save:
            outputs["normalizers"] = ("normalizers", None)
    if x.m is not None:
        outputs["m_end"] = ("row", None)
        scratch |= tiles.stabilizer_scratch(layout) | dict(m_end=(n.packs, 1, tiles.ROWS))
        if save:
            outputs["before"] = ("rows", None)
    kernel = functools.partial(_kernel, layout, options)
    return tiles.call(kernel, layout, "gated_linear_attention_forward", inputs, outputs, scratch)


def _kernel(layout: Layout, options: Options, x: dict, out: dict, scratch: dict) -> None:
    masks = make_masks(layout)
    segments = read_segments(x.get("segments"), masks)
    tile = tiles.Reader(layout, segments)

    @pl.when(pl.program_id(2) == 0)
    def _():
        def load(p):
            scratch["s"][p] = tile.state(x["s0"], p)
            for name in ("z", "m_end"):
                if name in scratch:
                    scratch[name][p] = x[f"{name[0]}0"][0, 0, pl.ds(p, 1), :]

        tiles.each_pack(layout, load)

    tiles.each_pack(layout, functools.partial(_pack, layout, options, tile, masks, segments, x, out, scratch))

    @pl.when(pl.program_id(2) == layout.chunks - 1)
    def _():
        def store(p):
            tile.store_state(out["s"], p, scratch["s"][p])
            for name in ("z", "m_end"):
                if name in scratch:
                    out[name][0, 0, pl.ds(p, 1), :] = scratch[name][p]

        tiles.each_pack(layout, store)


def _pack(
    layout: Layout, options: Options, tile: tiles.Reader, masks: Masks, segments: Segments | None,
    x: dict, out: dict, scratch: dict, p: Any,
) -> None:  # fmt: skip
    scale = options.scale
    if "m0" in x:
        log_f, i = (tiles.read_row(x[name], p) for name in ("log_f", "i"))
        before, scratch["m_end"][p] = previous(layout, masks, segments, log_f, i, scratch["m_end"][p])
        x = with_stabilizer(layout, segments, x, before, scratch, p)
        if "before" in out:
            tiles.write_row(out["before"], p, before)
    q, k = (tile.stacked(x[name], p, layout.key) for name in "qk")
    v = tile.stacked(x["v"], p, layout.value)
    s = scratch["s"][p]
    gate = make_gate(layout, masks, segments, tile, x, p)
    scores = scale * gate.scores(q, k)
    o = scale * gate.read(q, s) + product(scores, v, NN, layout.dtype, exact=True)
    scratch["s"][p] = gate.keep * s + gate.write(k, v)
    if "states" in out:
        out["states"][0, 0, 0, p] = tiles.compact(s, layout).astype(layout.dtype)
    if options.denominator is not None:
        z, m = scratch["z"][p], tiles.read_row(x.get("m"), p)
        l = scale * row_sum(gate.enter * q.astype(jnp.float32) * z) + row_sum(scores)  # noqa: E741
        o = o * denominator(l, m, masks)[0]
        scratch["z"][p] = gate.keep_row * z + column_sum(gate.leave * k.astype(jnp.float32))
        if "normalizers" in out:
            tiles.write_row(out["normalizers"], p, z)
    tile.store(out["o"], p, o, layout.value)


def denominator(l: Array, m: Array | None, masks: Masks) -> tuple[Array, Array | float]:  # noqa: E741
    """1 / d and the derivative of d by l, for columns l [128, 1] and the row m [1, 128]."""
    if m is None:
        return 1.0 / (l + NORMALIZER_EPS), 1.0
    floor = jnp.exp(jnp.maximum(-to_column(m, masks), LEAST_LOG_DENOMINATOR))
    slope = jnp.where(l >= floor, 1.0, jnp.where(l <= -floor, -1.0, 0.0))
    return 1.0 / jnp.maximum(jnp.abs(l), floor), slope
