"""The mLSTM's stabiliser on the TPU, a chunk at a time: m_t = max(log f_t + m_{t-1}, i_t), inside the kernels.

    m_t = max( max_{j <= t} log f_{j+1} + ... + log f_t + i_j ,  log f_1 + ... + log f_t + m_0 )

Each sum is of just its own terms (a product of triangles, see tile_tpu_gates.py), so m is as exact as the
recurrence's. At a new segment m_{t-1} is 0, as in `mlstm.stabilizer`; padding hands m on. The forward kernel saves
m_{t-1}, from which both kernels make m_t.
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


def previous(
    layout: Layout, masks: Masks, segments: Segments | None, log_f: Array, i: Array, start: Array
) -> tuple[Array, Array]:
    """m_{t-1} of every token of a pack, and m at the chunk's end over each head's lanes: rows [1, 128].

    log_f, i: rows, 0 at padding; start: m before the chunk, over each head's lanes.
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
    m = jnp.maximum(written, row_sum(jnp.where(seen, log_f, 0.0)) + entering)
    ends = [m[(h + 1) * layout.chunk - 1 : (h + 1) * layout.chunk] for h in range(layout.pack)]
    before = column_sum(jnp.where(follows, m, 0.0)) + jnp.where(first, start, 0.0)
    return before, halves(ends, (1, ROWS))


def with_stabilizer(layout: Layout, segments: Segments | None, x: dict, before: Array, rows: dict, p: Any) -> dict:
    """The refs `x` with log f and i as the gates g and w, and m_t and m before the chunk of pack p, made in `rows`."""
    m = jnp.maximum(read_row(x["log_f"], p) + before, read_row(x["i"], p))
    m = m if segments is None else jnp.where(segments.tokens, m, before)
    firsts = [before[:, h * layout.chunk : h * layout.chunk + 1] for h in range(layout.pack)]
    for name, row in dict(m=m, start=halves(firsts, (1, ROWS))).items():
        write_row(rows[name], p, row)
    return x | dict(g=x["log_f"], w=x["i"]) | {name: rows[name] for name in ("m", "start")}
