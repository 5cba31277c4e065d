"""Decays of one stacked tile, by a gate per head or per channel: the same operations on both.

A gate per head. log D_ij = sum_t [t <= i] g_t [t > j] is one product of triangles around diag(g): the sum of just the
gates between the two rows, so never positive, never a difference of cumulative sums, and nothing is lost. The gate's
gradient dg_t = sum_ij [t <= i] E_ij [t > j] is the same product around E. Decays multiply products, never q or k.

A gate per channel goes by halves, as in chunk.py: for i > j there is one s = 1, 2, 4 ... with i in the second and j in
the first half of an aligned block of 2s rows, and the decay between them is e_s[i] e_s[j], each an exponential of a sum
of gates. Level s is the product of q e_s and k e_s, masked to its corners.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels.tile_tpu_algebra import (
    NN,
    NT,
    TN,
    Masks,
    Segments,
    column_sum,
    inner_products,
    product,
    row_sum,
    sums_after,
    sums_before,
    to_column,
)
from jaxlin.kernels.tile_tpu_layout import ROWS, Layout, Reader, read_row, unstack, write_row


class HeadGate:
    """Decays of a gate per head, or of none; segment masks and the input gate, where there is one, are included."""

    pair: Array  # [128, 128] from row j to row i, 0 for j > i
    enter: Array  # [128, 1] from the chunk's start to row i, inclusive
    leave: Array  # [128, 1] from row j to the chunk's end
    keep: Array  # [pack * K, 1] from the chunk's start to its end
    keep_row: Array  # [1, pack * K] the same

    def __init__(
        self, layout: Layout, masks: Masks, segments: Segments | None, g: Array | None, w: Array | None,
        m: Array | None, start: Array | None,
    ) -> None:  # fmt: skip
        """Of a pack [1, 128]: log decays g, log input gates w; with m (and m before the chunk) in units of e^m.

        m_i is taken off w_j and not off the gates between them, where its rounding would add up.
        """
        self.layout, self.masks = layout, masks
        zero = jnp.zeros((ROWS, 1), jnp.float32)
        log_pair, log_enter, log_leave = jnp.zeros((ROWS, ROWS), jnp.float32), zero, zero
        if g is not None:
            upto = jnp.where(masks.upto, g, 0.0)
            log_pair, log_enter = sums_after(upto, masks.before, layout.dtype), row_sum(upto)
            log_leave = row_sum(jnp.where(masks.after, g, 0.0))
        if m is not None:
            assert w is not None and start is not None  # they come together
            unit = to_column(m, masks)
            ends = [m[:, (h + 1) * layout.chunk - 1 : (h + 1) * layout.chunk] for h in range(layout.pack)]
            log_pair += w - unit
            log_enter += to_column(start, masks) - unit
            log_leave += to_column(w, masks) - halves(ends, (ROWS, 1))
        elif w is not None:
            log_pair, log_leave = log_pair + w, log_leave + to_column(w, masks)
        self.pair = jnp.where(masks.upto, jnp.exp(log_pair), 0.0)
        self.enter, self.leave = jnp.exp(log_enter), jnp.exp(log_leave)
        if segments is not None:
            self.pair = jnp.where(segments.same, self.pair, 0.0)
            self.enter = jnp.where(segments.enter, self.enter, 0.0)
            self.leave = jnp.where(segments.leave, self.leave, 0.0)
        last = [self.enter[(h + 1) * layout.chunk - 1 : (h + 1) * layout.chunk] for h in range(layout.pack)]
        self.keep, self.keep_row = (halves(last, shape) for shape in ((layout.key_lanes, 1), (1, layout.key_lanes)))

    def scores(self, x: Array, k: Array) -> Array:
        """sum_k x_ik k_jk D_ij for j <= i, else 0."""
        return inner_products(x, k, self.layout.dtype) * self.pair

    def scores_vjp(self, d: Array, scores: Array, x: Array, k: Array) -> tuple[Array, Array, Array]:
        """dx, dk and what `gradient` wants of them, for a cotangent d of `scores`."""
        inside = functools.partial(product, dtype=self.layout.dtype, exact=True)
        decayed = d * self.pair
        return inside(decayed, k, NN), inside(decayed, x, TN), jnp.where(self.masks.before, d * scores, 0.0)

    def read(self, x: Array, s: Array) -> Array:
        """(enter x) S."""
        return self.enter * product(x, s, NN, self.layout.dtype)

    def read_vjp(self, x: Array, d: Array) -> Array:
        """(enter x)^T d: the state's cotangent through `read`."""
        return product(x, self.enter * d.astype(jnp.float32), TN, self.layout.dtype)

    def write(self, k: Array, v: Array) -> Array:
        """(leave k)^T v."""
        return product(k, self.leave * v.astype(jnp.float32), TN, self.layout.dtype)

    def write_vjp(self, k: Array, ds: Array) -> Array:
        """(leave k) dS: the cotangent of v through `write`."""
        return self.leave * product(k, ds, NN, self.layout.dtype)

    def sizes(self, x: Array) -> Array:
        """What a decay multiplies, of products [128, pack * K] by channel."""
        return row_sum(x)

    def gradient(self, e: Array, reads: Array, writes: Array, carried: Array) -> Array:
        """dg [1, 128]: g_t is on every path from a row before t, or the state, to row t or later, or the end.

        e as `scores_vjp` gives it; reads, writes [128, 1]; carried [1, 128].
        """
        into = sums_after(e, self.masks.after, self.layout.dtype) + reads
        between = jnp.where(self.masks.upto, into, 0.0) + jnp.where(self.masks.after, writes, 0.0)
        return column_sum(between) + carried

    def carried(self, s: Array, ds: Array) -> Array:
        """What the state carries past the chunk, as `gradient` wants it."""
        return self._totals(column_sum(self.keep * s * ds))

    def carried_row(self, z: Array, dz: Array) -> Array:
        """The same of the normaliser."""
        return self._totals(self.keep_row * z * dz)

    def _totals(self, row: Array) -> Array:
        return halves([row_sum(x) for x in _split(row, self.layout)], (1, ROWS))

    def store(self, ref: Any, tile: Reader, pack: Any, dg: Array) -> None:
        write_row(ref, pack, dg)


class ChannelGate:
    """Decays of a gate per channel; segment masks are included, except in `levels`."""

    enter: Array  # [128, pack * K]
    leave: Array  # [128, pack * K]
    keep: Array  # [pack * K, 1]
    keep_row: Array  # [1, pack * K]
    levels: list[tuple[Array, Array]]  # the corners [128, 128] and e_s [128, pack * K], for s = 1, 2, 4 ...

    def __init__(self, layout: Layout, masks: Masks, segments: Segments | None, g: Array) -> None:
        """g: log decays [C, pack * K] of a pack, unstacked."""
        self.layout, self.masks, self.segments = layout, masks, segments
        c = layout.chunk
        i, t = (lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
        rows, lanes = (lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis) for axis in (0, 1))
        differ = rows ^ lanes
        sums = functools.partial(sums_before, dtype=layout.dtype)
        enter = jnp.exp(sums(t <= i, g))
        self.enter, self.leave = self._twice(enter), self._twice(jnp.exp(sums(t > i, g)))
        self.levels, s = [], 1
        while s < c:
            block, second = (i ^ t) < s, (i & s) != 0
            between = block & ((second & (t <= i)) | (~second & (t > i)))
            e = jnp.exp(sums(between, g))
            self.levels.append(((differ >= s) & (differ < 2 * s) & (rows > lanes), self._twice(e)))
            s *= 2
        self.keep_row = enter[c - 1 : c]
        if segments is not None:
            self.keep_row = jnp.where(segments.enter[c - 1 : c], self.keep_row, 0.0)
            self.enter = jnp.where(segments.enter, self.enter, 0.0)
            self.leave = jnp.where(segments.leave, self.leave, 0.0)
        self.keep = row_sum(jnp.where(_eye(layout.key_lanes), self.keep_row, 0.0))

    def scores(self, x: Array, k: Array) -> Array:
        x, k = x.astype(jnp.float32), k.astype(jnp.float32)
        p = jnp.where(self.masks.eye, row_sum(x * k), 0.0)
        for corners, e in self.levels:
            p = jnp.where(corners, product(x * e, k * e, NT, self.layout.dtype, exact=True), p)
        return p if self.segments is None else jnp.where(self.segments.same, p, 0.0)

    def scores_vjp(self, d: Array, scores: Array, x: Array, k: Array) -> tuple[Array, Array, Array]:
        del scores
        inside = functools.partial(product, dtype=self.layout.dtype, exact=True)
        x, k = x.astype(jnp.float32), k.astype(jnp.float32)
        d = d if self.segments is None else jnp.where(self.segments.same, d, 0.0)
        dx, dk = jnp.zeros_like(x), jnp.zeros_like(k)
        for corners, e in self.levels:
            below = jnp.where(corners, d, 0.0)
            dx += e * inside(below, k * e, NN)
            dk += e * inside(below, x * e, TN)
        own = row_sum(jnp.where(self.masks.eye, d, 0.0))
        return dx + own * k, dk + own * x, x * dx - k * dk

    def read(self, x: Array, s: Array) -> Array:
        return product(self.enter * x.astype(jnp.float32), s, NN, self.layout.dtype)

    def read_vjp(self, x: Array, d: Array) -> Array:
        return product(self.enter * x.astype(jnp.float32), d, TN, self.layout.dtype)

    def write(self, k: Array, v: Array) -> Array:
        return product(self.leave * k.astype(jnp.float32), v, TN, self.layout.dtype)

    def write_vjp(self, k: Array, ds: Array) -> Array:
        return product(self.leave * k.astype(jnp.float32), ds, NN, self.layout.dtype)

    def sizes(self, x: Array) -> Array:
        return x

    def gradient(self, e: Array, reads: Array, writes: Array, carried: Array) -> Array:
        """dg [C, pack * K]; e, reads, writes [128, pack * K], carried [1, pack * K]."""
        e, writes = (unstack(x, self.layout) for x in (e + reads, writes))
        c = self.layout.chunk
        t, i = (lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
        sums = functools.partial(sums_before, dtype=self.layout.dtype)
        return sums(i >= t, e) + sums(i < t, writes) + carried

    def carried(self, s: Array, ds: Array) -> Array:
        return column_sum(jnp.where(_eye(self.layout.key_lanes), self.keep * row_sum(s * ds), 0.0))

    def carried_row(self, z: Array, dz: Array) -> Array:
        return self.keep_row * z * dz

    def store(self, ref: Any, tile: Reader, pack: Any, dg: Array) -> None:
        tile.store_tokens(ref, pack, tile.tokens_only(dg), self.layout.key)

    def _twice(self, x: Array) -> Array:
        """The same rows for every head of the pack: lanes of other heads meet zeros."""
        return x if self.layout.pack == 1 else jnp.concatenate([x, x], axis=0)


def make_gate(
    layout: Layout, masks: Masks, segments: Segments | None, tile: Reader, x: dict, pack: Any
) -> HeadGate | ChannelGate:
    """The decays of a pack, from the refs g_channel (tokens) and g, w, m, start (rows), of which any may be absent."""
    if "g_channel" in x:
        return ChannelGate(layout, masks, segments, tile.tokens(x["g_channel"], pack, layout.key))
    return HeadGate(layout, masks, segments, *(read_row(x.get(name), pack) for name in ("g", "w", "m", "start")))


def _eye(size: int) -> Array:
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return i == j


def _split(row: Array, layout: Layout) -> list[Array]:
    """A row [1, lanes] with each head's lanes alone."""
    if layout.pack == 1:
        return [row]
    left = lax.broadcasted_iota(jnp.int32, row.shape, 1) < row.shape[1] // 2
    return [jnp.where(left, row, 0.0), jnp.where(left, 0.0, row)]


def halves(values: list[Array], shape: tuple[int, int]) -> Array:
    """One value a head [1, 1], over that head's share of a row or a column of `shape`."""
    if len(values) == 1:
        return jnp.broadcast_to(values[0], shape)
    axis, size = (0, shape[0]) if shape[1] == 1 else (1, shape[1])
    return jnp.where(lax.broadcasted_iota(jnp.int32, shape, axis) < size // 2, *values)
