"""One optimizer step, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlin.config import ModelConfig, StageConfig
from jaxlin.distill import counts, gradient_function, merge, trained_part
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
    stage: StageConfig, optimizer: optax.GradientTransformation, student: ModelConfig, teacher: ModelConfig, remat: str,
    *, placed: tuple[Any, Any] | None = None,
) -> Callable[..., tuple[Any, Any, dict[str, jax.Array]]]:  # fmt: skip
    """The jitted update: (params, opt_state, teacher params, batch [A, B, T]) -> (params, opt_state, metrics).

    `placed` (see `placement`) says where the new params and opt_state live; without it the compiler decides.
    """
    gradients = gradient_function(stage, student, teacher, remat)
    update = optax.with_extra_args_support(optimizer).update
    options: dict[str, Any] = {} if placed is None else dict(out_shardings=(*homes(placed), None))

    @functools.partial(jax.jit, donate_argnums=(0, 1), **options)
    def step(params, opt_state, teacher_params, batch):
        trained = trained_part(params, stage)
        count = counts({k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()})

        def micro(i):
            return gradients(trained, params, teacher_params, jax.tree.map(lambda a: a[i], batch), count)

        found, metrics = micro(0)
        for i in range(1, stage.accumulation):
            found, metrics = jax.tree.map(jnp.add, (found, metrics), micro(i))
        updates, opt_state = update(found, opt_state, trained, loss=metrics["loss"])
        metrics["gradient_norm"] = optax.tree.norm(found)
        if isinstance(opt_state, Guarded):
            metrics |= {"skipped": opt_state.skipped, "skipped_in_a_row": opt_state.in_a_row}
        return merge(params, optax.apply_updates(trained, updates)), opt_state, on_every_device(metrics)

    return step
