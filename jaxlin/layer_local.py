"""The walk that stages 1 and 2 and the fidelity report share: every layer on the teacher's own input.

One scan over layers carries the teacher's residual stream and nothing else: what is computed for a student layer stays
inside the scan's body, gradients included, so memory does not grow with depth (paper, section 3; no student residual
stream exists before stage 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlin.config import ModelConfig
from jaxlin.mixers.common import positions_in_segments
from jaxlin.model import Block, apply, blocks

Batch = Mapping[str, Any]  # tokens and segment_ids [B, T], on the host or on devices


class Layer(NamedTuple):
    """What a layer makes of the teacher's residual stream.

    mixed: [B, T, D], the mixer's output before the residual is added.
    output: [B, T, D], the block's output.
    """

    mixed: jax.Array
    output: jax.Array


# (apply the student's block with these parameters, the teacher's layer, this layer's part of `xs`) -> anything
Visit = Callable[[Callable[[Any], Layer], Layer, Any], Any]


def walk(teacher: ModelConfig, student: ModelConfig, teacher_params: Any, batch: Batch, xs: Any, visit: Visit) -> Any:
    """Call `visit` for every layer; what it returns comes back stacked, {block: [L / period, ...]}.

    `xs` is {block: tree of [L / period, ...]}: parameters, or whatever else a layer needs.
    """
    (teacher_block,) = blocks(teacher)
    student_blocks = blocks(student)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    positions, _ = positions_in_segments(tokens.shape, segment_ids, None)

    def run(block: Block, hidden, params) -> Layer:
        output, mixed, _ = apply(block, params, hidden, positions=positions, segment_ids=segment_ids)
        return Layer(mixed, output)

    def period(hidden, xs):
        teacher_parts, parts = xs
        found = {}
        for i, block in enumerate(student_blocks):
            layer = run(teacher_block, hidden, jax.tree.map(lambda a, i=i: a[i], teacher_parts))
            found[block.name] = visit(functools.partial(run, block, hidden), layer, parts[block.name])
            hidden = layer.output
        return hidden, found

    repeats = student.num_hidden_layers // student.period
    by_period = jax.tree.map(
        lambda a: a.reshape(repeats, student.period, *a.shape[1:]), teacher_params["layers"]["block_0"]
    )
    embedded = jnp.take(teacher_params["embed_tokens"]["embedding"], tokens, axis=0).astype(teacher.dtype)
    return lax.scan(period, embedded, (by_period, xs))[1]


def by_block(values: jax.Array, period: int) -> dict[str, jax.Array]:
    """[L, ...] -> {block: [L / period, ...]}."""
    return {f"block_{i}": values[i::period] for i in range(period)}


def by_layer(values: dict[str, Any]) -> Any:
    """{block: tree of [L / period, ...]} -> the tree of [L, ...]."""
    rows = [values[f"block_{i}"] for i in range(len(values))]
    return jax.tree.map(lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:]), *rows)
