"""The walk that stages 1 and 2 and the fidelity report share: every layer on the teacher's own input.

One scan over layers carries the teacher's residual stream and nothing else: what is computed for a student layer stays
inside the scan's body, gradients included, so memory does not grow with depth (paper, section 3; no student residual
stream exists before stage 3). Several students may walk along: each layer of the teacher is computed once for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
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


def walk(
    teacher: ModelConfig, students: Sequence[ModelConfig], teacher_params: Any, batch: Batch, xs: Sequence[Any],
    visit: Visit,
) -> list[Any]:  # fmt: skip
    """Call `visit` for every layer of every student; what it returns comes back stacked, {block: [L / period, ...]}.

    `xs` is, for each student, {block: tree of [L / period, ...]}: parameters, or whatever else a layer needs.
    The batch is packed, see `forward`.
    """
    (teacher_block,) = blocks(teacher, packed=True)
    student_blocks = [blocks(student, packed=True) for student in students]
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    positions, _ = positions_in_segments(tokens.shape, segment_ids, None)
    # The period of all together divides the layers, since each student's own does.
    period = math.lcm(*(student.period for student in students))
    repeats = teacher.num_hidden_layers // period

    def run(block: Block, hidden, params) -> Layer:
        output, mixed, _ = apply(block, params, hidden, positions=positions, segment_ids=segment_ids)
        return Layer(mixed, output)

    def layers(hidden, xs):
        teacher_rows, rows = xs
        found = [{block.name: [] for block in own} for own in student_blocks]
        for i in range(period):
            layer = run(teacher_block, hidden, _row(teacher_rows, i))
            for own, mine, seen in zip(student_blocks, rows, found, strict=True):
                turn, block = i // len(own), own[i % len(own)]
                student_layer = functools.partial(run, block, hidden)
                seen[block.name].append(visit(student_layer, layer, _row(mine[block.name], turn)))
            hidden = layer.output
        return hidden, [{name: _stack(turns) for name, turns in seen.items()} for seen in found]

    rows = jax.tree.map(lambda a: a.reshape(repeats, -1, *a.shape[1:]), (teacher_params["layers"]["block_0"], list(xs)))
    embedded = jnp.take(teacher_params["embed_tokens"]["embedding"], tokens, axis=0).astype(teacher.dtype)
    found = lax.scan(layers, embedded, rows)[1]
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)


def _row(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], tree)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def by_block(values: jax.Array, period: int) -> dict[str, jax.Array]:
    """[L, ...] -> {block: [L / period, ...]}."""
    return {f"block_{i}": values[i::period] for i in range(period)}


def by_layer(values: dict[str, Any]) -> Any:
    """{block: tree of [L / period, ...]} -> the tree of [L, ...]."""
    rows = [values[f"block_{i}"] for i in range(len(values))]
    return jax.tree.map(lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:]), *rows)
