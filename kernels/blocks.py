"""A recurrence over time, with its derivative, from passes over chunks: all at once, or in blocks for a CPU's caches.

The passes work on trees of arrays, all chunks side by side:

    forward(scale, inputs, state, segments) -> (outputs, final state, (states, rest))
    backward(scale, inputs, (states, rest), segments, d_outputs, d_final) -> (d_inputs, d_state)

inputs and outputs [N, B, H|HV, C, ...], what is saved for the backward pass [N, B, HV, ...], state [B, HV, ...]. Inputs
may have 1 for B. `states` are named "chunk_states" for rematerialisation policies.

Batched over everything, each product's operands and result pass through memory, which a CPU has too little bandwidth
for (and pays for by the page when it is new): heads of 4096 tokens one after the other took half of the time and less
than half of the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk

TOKENS = 4096
"""Tokens times heads of a block, at most, if one head of one sequence has no more."""
TIME, STATE, SAVED = (0, 2), (0, 1), (1, 2)
"""Axes of batch and heads, in arrays over time, in states, and in what is saved."""
V = 2
"""Where v is among the inputs (q, k, v, ...). The first output has its shape."""


class Walk(NamedTuple):
    """How to run a recurrence."""

    scale: float
    length: int  # rows of a chunk
    by_block: bool


def recurrence(forward: Callable, backward: Callable) -> Callable:
    """(walk, inputs, state, segment_ids [B, T] | None) -> (outputs, final state); arrays [B, T, H|HV, ...]."""

    def forward_whole(walk, inputs, state, segment_ids):
        chunks, segments = _to_chunks(walk, inputs), chunk.segment_masks(segment_ids, walk.length)
        outputs, final, saved = forward(walk.scale, chunks, state, segments)
        return _from_chunks(outputs, _time(inputs)), final, saved

    def backward_whole(walk, inputs, saved, segment_ids, d_outputs, d_final):
        chunks, segments = _to_chunks(walk, inputs), chunk.segment_masks(segment_ids, walk.length)
        d_inputs, d_state = backward(walk.scale, chunks, saved, segments, _to_chunks(walk, d_outputs), d_final)
        return _from_chunks(d_inputs, _time(inputs)), d_state

    @chunk.custom_vjp
    def run(walk: Walk, inputs: Any, state: Any, segment_ids: Array | None) -> tuple[Any, Any]:
        return run_forward(walk, inputs, state, segment_ids)[0]

    def run_forward(walk, inputs, state, segment_ids):
        function = functools.partial(forward_whole, walk)
        arguments, axes = (inputs, state, segment_ids), (TIME, STATE, TIME)
        outputs, final, (states, rest) = _by_block(walk, inputs, function, arguments, axes, (TIME, STATE, SAVED), {})
        states = jax.tree.map(lambda x: checkpoint_name(x, "chunk_states"), states)
        return (outputs, final), (inputs, (states, rest), segment_ids)

    def run_backward(walk, residuals, cotangents):
        function = functools.partial(backward_whole, walk)
        arguments, axes = (*residuals, *cotangents), (TIME, SAVED, TIME, TIME, STATE)
        # v's gradient goes over the output's: the page faults of new memory cost a CPU more than what is written to it.
        over = {V: len(jax.tree.leaves(residuals))}
        return (*_by_block(walk, residuals[0], function, arguments, axes, (TIME, STATE), over), None)

    run.defvjp(run_forward, run_backward)
    return run


def _time(inputs: Any) -> int:
    return jax.tree.leaves(inputs)[0].shape[1]


def _to_chunks(walk: Walk, arrays: Any) -> Any:
    return jax.tree.map(lambda x: chunk.to_chunks(x, walk.length), arrays)


def _from_chunks(arrays: Any, time: int) -> Any:
    return jax.tree.map(lambda x: chunk.from_chunks(x, time), arrays)


def _by_block(
    walk: Walk, inputs: Any, function: Callable, arguments: tuple, axes: tuple, out_axes: tuple, over: dict[int, int]
) -> tuple:
    """function(*arguments), for blocks of the batch and of the heads where the walk says so.

    `axes` and `out_axes` say where an argument and a result have batch and heads. With over[m] = n, the m-th array of
    the results is written over the n-th of the arguments, if they are alike; a block reads its part first.
    """
    batch, time, heads = inputs[0].shape[:3]
    rows = _largest_divisor(batch, TOKENS // time) if walk.by_block else batch
    grid = batch // rows, heads // (_largest_divisor(heads, TOKENS // (rows * time)) if walk.by_block else heads)
    if grid == (1, 1):
        return function(*arguments)

    arrays, places, arguments_tree = _flatten(arguments, axes)
    shapes, out_places, results_tree = _flatten(jax.eval_shape(function, *arguments), out_axes)
    over = {m: n for m, n in over.items() if (arrays[n].shape, arrays[n].dtype) == (shapes[m].shape, shapes[m].dtype)}

    def step(index, totals):
        block = index // grid[1], index % grid[1]
        now = dict(enumerate(arrays)) | {n: totals[m] for m, n in over.items()}
        parts = function(*arguments_tree.unflatten(_take(now[n], grid, block, a) for n, a in enumerate(places)))
        parts = jax.tree.leaves(parts)
        return [_put(x, y, grid, block, a) for x, y, a in zip(totals, parts, out_places, strict=True)]

    totals = [arrays[over[m]] if m in over else jnp.zeros(x.shape, x.dtype) for m, x in enumerate(shapes)]
    return results_tree.unflatten(lax.fori_loop(0, grid[0] * grid[1], step, totals))


def _flatten(trees: tuple, axes: tuple) -> tuple[list, list, Any]:
    """The arrays of `trees`, the axes of each, and the structure; axes[n] are those of trees[n]."""
    arrays, structure = jax.tree.flatten(trees)
    return arrays, [a for tree, a in zip(trees, axes, strict=True) for _ in jax.tree.leaves(tree)], structure


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, max(1, min(n, limit)) + 1) if n % d == 0)


def _starts(x: Array, grid: tuple[int, int], block: tuple, axes: tuple[int, int]) -> dict[int, tuple]:
    """By axis, where the block starts and its size; nothing for an axis that x does not have or has one entry of."""
    sizes = {axis: x.shape[axis] // count for axis, count in zip(axes, grid, strict=True) if axis < x.ndim}
    return {axis: (n * sizes[axis], sizes[axis]) for axis, n in zip(axes, block, strict=True) if sizes.get(axis)}


def _take(x: Array, grid: tuple[int, int], block: tuple, axes: tuple[int, int]) -> Array:
    for axis, (start, size) in _starts(x, grid, block, axes).items():
        x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x


def _put(total: Array, part: Array, grid: tuple[int, int], block: tuple, axes: tuple[int, int]) -> Array:
    """`total` with a block written; where it has one entry for a whole batch, the blocks' add up."""
    starts = _starts(total, grid, block, axes)
    where = [starts[axis][0] if axis in starts else 0 for axis in range(total.ndim)]
    if len(starts) < len(axes):
        part = part + lax.dynamic_slice(total, where, part.shape)
    return lax.dynamic_update_slice(total, part, where)
