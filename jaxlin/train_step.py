"""One optimizer step, compiled: of one student, or of several that share the teacher's forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlin.config import ModelConfig, StageConfig
from jaxlin.distill import counts, gradient_function, joint_gradient_function, merge, trained_part
from jaxlin.optimizer import Guarded
from jaxlin.placement import homes
from jaxlin.sharding import on_every_device


def make_loss(stage: StageConfig, student: ModelConfig, teacher: ModelConfig) -> Callable[..., jax.Array]:
    """The stage's loss without training: (params, teacher params, batch [B, T]) -> loss."""
    gradients = gradient_function(stage, student, teacher, "none")

    @jax.jit
    def loss(params, teacher_params, batch):
        # The compiler leaves out what nobody uses: the gradients.
        found = gradients(trained_part(params, stage), params, teacher_params, batch, counts(batch))[1]["loss"]
        return on_every_device(found)

    return loss


def make_step(
    stage: StageConfig, optimizers: Sequence[optax.GradientTransformation], students: Sequence[ModelConfig],
    teacher: ModelConfig, remat: str, *, placed: tuple[Any, Any] | None = None,
) -> Callable[..., tuple[Any, Any, tuple[dict[str, jax.Array], ...]]]:  # fmt: skip
    """The jitted update: (params, opt_states, teacher params, batch [A, B, T]) -> (params, opt_states, metrics).

    All but the teacher's params and the batch are tuples, with one entry for each student.
    `placed` (see `placement`) says where the new params and opt_states live; without it the compiler decides.
    """
    gradients = joint_gradient_function(stage, students, teacher, remat)
    options: dict[str, Any] = {} if placed is None else dict(out_shardings=(*homes(placed), None))

    @functools.partial(jax.jit, donate_argnums=(0, 1), **options)
    def step(params, opt_states, teacher_params, batch):
        trained = tuple(trained_part(own, stage) for own in params)
        count = counts({k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()})

        def micro(i):
            return gradients(trained, params, teacher_params, jax.tree.map(lambda a: a[i], batch), count)

        found, metrics = micro(0)
        for i in range(1, stage.accumulation):
            found, metrics = jax.tree.map(jnp.add, (found, metrics), micro(i))
        updated = map(_update, optimizers, params, trained, opt_states, found, metrics)
        params, opt_states, metrics = zip(*updated, strict=True)
        return params, opt_states, on_every_device(metrics)

    return step


def _update(
    optimizer: optax.GradientTransformation, params: Any, trained: Any, opt_state: Any, gradient: Any,
    metrics: dict[str, jax.Array],
) -> tuple[Any, Any, dict[str, jax.Array]]:  # fmt: skip
    """One student's new parameters and optimizer state, and its metrics with what the optimizer has to say."""
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(gradient, opt_state, trained, loss=metrics["loss"])
    metrics = {**metrics, "gradient_norm": optax.tree.norm(gradient)}
    if isinstance(opt_state, Guarded):
        metrics |= {"skipped": opt_state.skipped, "skipped_in_a_row": opt_state.in_a_row}
    return merge(params, optax.apply_updates(trained, updates)), opt_state, metrics
