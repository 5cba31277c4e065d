"""Calibrated output norms: a student's heads start at the size of the teacher's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlin.config import ModelConfig
from jaxlin.layer_local import Batch
from jaxlin.model import LanguageModel, apply
from jaxlin.sharding import on_every_device


def calibrate(
    student_params: Any, student: ModelConfig, teacher: ModelConfig, teacher_params: Any, batches: Iterable[Batch]
) -> Any:
    """Set the weight of each calibrated norm to the teacher's root mean square of that channel before o_proj.

    An RMS norm takes away the scale that o_proj expects; this gives it back, channel by channel. Some 64k tokens are
    plenty. Batches hold tokens and segment_ids [B, T].
    """
    if all(options.out_norm != "calibrated" for options in student.options):
        return student_params
    sums = [_squares(teacher, teacher_params, batch) for batch in batches]
    size = jnp.sqrt(sum(square for square, _ in sums) / sum(count for _, count in sums))  # [L, H, d]
    layers = dict(student_params["layers"])
    for i, options in enumerate(student.options):
        if options.out_norm == "calibrated":
            parts = layers[f"block_{i}"]
            old = parts["mixer"]["o_norm"]["weight"]
            weight = size[i :: student.period].reshape(old.shape).astype(old.dtype)
            layers[f"block_{i}"] = {**parts, "mixer": {**parts["mixer"], "o_norm": {"weight": weight}}}
    return {**student_params, "layers": layers}


@jax.jit(static_argnums=0)
def _squares(config: ModelConfig, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum over tokens of the squares of the teacher's heads, [L, H, d], and the number of tokens."""
    call = dict(segment_ids=batch["segment_ids"], logits=False, mutable=["intermediates"])
    _, seen = apply(LanguageModel(config), params, batch["tokens"], **call)
    heads = seen["intermediates"]["layers"]["block_0"]["mixer"]["heads"][0].astype(jnp.float32)
    valid = batch["segment_ids"] != 0
    squares = jnp.sum(jnp.where(valid[None, :, :, None, None], heads * heads, 0), axis=(1, 2))
    return on_every_device((squares, jnp.sum(valid)))
