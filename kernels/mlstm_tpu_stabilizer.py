"""The mLSTM's stabiliser on the TPU, a chunk at a time: m_t = max(log f_t + m_{t-1}, i_t), inside the forward kernel.

    m_t = max( max_{j <= t} log f_{j+1} + ... + log f_t + i_j ,  log f_1 + ... + log f_t + m_0 )

Each sum is of just its own terms (a product of triangles, see tile_tpu_gates.py), so m is as exact as the recurrence's.
At a new segment m_{t-1} is 0, as in `mlstm.stabilizer`; padding hands m on.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels.tile_tpu_algebra import Masks, Segments, column_sum, row_sum, sums_after, to_column
from jaxlin.kernels.tile_tpu_gates import halves
from jaxlin.kernels.tile_tpu_layout import ROWS, Layout, read_row, write_row

LEAST = -1e30
"""Less than any m, and finite."""


def stabilize(
    layout: Layout, masks: Masks, segments: Segments | None, log_f: Array, i: Array, start: Array
) -> tuple[Array, Array, Array, Array]:
    """Log decay g = log f + m_{t-1} - m_t, log input gate w = i - m_t, m, and m at the chunk's end: rows [1, 128].

    log_f, i: rows of a pack, 0 at padding; start: m before the chunk, over each head's lanes.
    """
    t, j = (lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis) for axis in (0, 1))
    seen, follows = masks.upto, masks.after & (j == t + 1)  # [t, j]; the row before j is t
    first = lax.rem(lax.broadcasted_iota(jnp.int32, (1, ROWS), 1), layout.chunk) == 0
    entering = to_column(start, masks)
    if segments is not None:
        seen, follows, first = seen & segments.same, follows & segments.run, first & segments.continues
        entering = jnp.where(segments.enter, entering, 0.0)
    pair = sums_after(jnp.where(masks.upto, log_f, 0.0), masks.before, jnp.float32) + i
    written = jnp.max(jnp.where(seen, pair, LEAST), axis=1, keepdims=True)
    column = jnp.maximum(written, row_sum(jnp.where(seen, log_f, 0.0)) + entering)
    m = column_sum(jnp.where(masks.eye, column, 0.0))
    before = column_sum(jnp.where(follows, column, 0.0)) + jnp.where(first, start, 0.0)
    g, w = log_f + before - m, i - m
    if segments is not None:
        g, w = (jnp.where(segments.tokens, x, 0.0) for x in (g, w))
    ends = [column[(h + 1) * layout.chunk - 1 : (h + 1) * layout.chunk] for h in range(layout.pack)]
    return g, w, m, halves(ends, (1, ROWS))


def stabilized(
    layout: Layout, masks: Masks, segments: Segments | None, x: dict, rows: dict, carry: Any, p: Any
) -> dict:
    """The refs `x`, with g, w and m of pack p made from log_f and i; they are in `rows`, and m goes on in `carry`."""
    log_f, i = read_row(x["log_f"], p), read_row(x["i"], p)
    *found, carry[p] = stabilize(layout, masks, segments, log_f, i, carry[p])
    for name, row in zip("gwm", found, strict=True):
        write_row(rows[name], p, row)
    return x | {name: rows[name] for name in "gwm"}
