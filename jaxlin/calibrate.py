"""Calibrated output norms: the student's heads start as the best rescaling of themselves to the teacher's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin.config import ModelConfig
from jaxlin.layer_local import Batch, walk


def calibrate(
    student_params: Any, student: ModelConfig, teacher: ModelConfig, teacher_params: Any, batches: Iterable[Batch]
) -> Any:
    """Set the weight of each calibrated norm to the least-squares fit of the teacher's channel by the student's.

    An RMS norm takes away the scale that o_proj expects, and a linear attention without softmax may point away from
    the teacher's output. For each channel the weight w that minimises sum (w s - t)^2 is sum(s t) / sum(s s), s the
    student's normed and gated channel and t the teacher's, both before o_proj and given the teacher's residual stream.
    The layer's error then is at most that of a mixer that gives zeros. Batches hold tokens and segment_ids [B, T].
    """
    if all(options.out_norm != "calibrated" for options in student.options):
        return student_params
    ones = {block: _with_weight(parts, None) for block, parts in student_params["layers"].items()}
    sums: Any = None
    for batch in batches:
        new = jax.tree.map(np.asarray, _products(student, teacher, teacher_params, ones, batch))
        sums = new if sums is None else jax.tree.map(np.add, sums, new)
    layers = dict(student_params["layers"])
    for (block, parts), options in zip(layers.items(), student.options, strict=True):
        if options.out_norm == "calibrated":
            product, square = sums[block]
            layers[block] = _with_weight(parts, product / np.maximum(square, 1e-12))
    return {**student_params, "layers": layers}


def _with_weight(parts: Any, weight: Any) -> Any:
    """A block's parameters with `weight` in its output norm; None is ones."""
    if "o_norm" not in parts["mixer"]:
        return parts
    old = parts["mixer"]["o_norm"]["weight"]
    new = jnp.ones_like(old) if weight is None else jnp.asarray(weight, old.dtype).reshape(old.shape)
    return {**parts, "mixer": {**parts["mixer"], "o_norm": {"weight": new}}}


@jax.jit(static_argnums=(0, 1))
def _products(student: ModelConfig, teacher: ModelConfig, teacher_params, student_layers, batch: Batch):
    """Sums over tokens of s t and s s, {block: ([L / period, H, d], [L / period, H, d])}."""
    valid = (batch["segment_ids"] != 0)[:, :, None, None]

    def visit(apply, teacher_layer, params):
        s, t = (jnp.where(valid, a.astype(jnp.float32), 0) for a in (apply(params).heads, teacher_layer.heads))
        t = t.reshape(s.shape)
        return jnp.sum(s * t, axis=(0, 1)), jnp.sum(s * s, axis=(0, 1))

    return walk(teacher, student, teacher_params, batch, student_layers, visit)
