"""Shapes and homes of what a training step takes and gives back: parameters, optimizer state, batches.

Nothing here holds numbers: the trainer places what it makes by these, and a plan compiles a step from them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxlin import sharding
from jaxlin.config import MeshConfig, ModelConfig, StageConfig, UserError
from jaxlin.student import abstract_params


def parameters(config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Any:
    """A model's parameters, each split as its logical axes say."""
    boxed = abstract_params(config)
    return jax.tree.map(
        lambda a, home: jax.ShapeDtypeStruct(a.shape, dtype, sharding=home),
        nn.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )


def optimizer_state(optimizer: optax.GradientTransformation, trained: Any, mesh: jax.sharding.Mesh) -> Any:
    """The optimizer's state for placed parameters: moments live with their parameters, counters everywhere."""

    def absent(a: Any) -> bool:  # the moments of a parameter that another part of the optimizer moves
        return isinstance(a, optax.MaskedNode)

    def with_parameter(a: Any, parameter: Any) -> Any:
        return a if absent(a) else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=parameter.sharding)

    return optax.tree.map_params(
        optimizer,
        with_parameter,
        jax.eval_shape(optimizer.init, trained),
        trained,
        is_leaf=absent,
        transform_non_params=lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.replicated(mesh)),
    )


def batch(stage: StageConfig, seq_len: int, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Tokens and segment ids of one optimizer step, [A, B, T]: A micro-batches, B split over devices.

    Sequences are whole: positions and next tokens need their neighbours, and only activations take room.
    """
    shape = (stage.accumulation, stage.batch_size // stage.accumulation, seq_len)
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh, 1))
    return {"tokens": array, "segment_ids": array}


def make_mesh(
    config: MeshConfig,
    models: Sequence[ModelConfig],
    stages: dict[int, StageConfig],
    seq_len: int,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all), for these models and stages. No parameter need exist.

    Raises UserError for heads, widths, vocabularies, sequences and batches that the mesh does not divide.
    """
    devices = jax.devices() if devices is None else devices
    sharding.require_divides((abstract_params(model) for model in models), config, len(devices))
    sharding.require_divides_time(seq_len, config, len(devices))
    mesh = sharding.make_mesh(config, devices)
    check_batches(stages, mesh)
    return mesh


def check_batches(stages: dict[int, StageConfig], mesh: jax.sharding.Mesh) -> None:
    """Refuse batches that accumulation and the mesh do not divide."""
    shards = sharding.batch_shards(mesh)
    for n, stage in stages.items():
        unit = stage.accumulation * shards
        if stage.batch_size % unit:
            below = stage.batch_size // unit * unit
            raise UserError(
                f"--stage{n}.batch-size {stage.batch_size}: must be a multiple of accumulation x data x fsdp = {unit}: "
                f"use {f'{below} or ' if below else ''}{below + unit}"
            )


def homes(tree: Any) -> Any:
    """The shardings of placed arrays, abstract or real."""
    return jax.tree.map(lambda a: a.sharding, tree)
