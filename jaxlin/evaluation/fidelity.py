"""How faithful a student is to its teacher, layer by layer and end to end: mistakes of conversion show here at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.table import Table

from jaxlin.config import ModelConfig
from jaxlin.distill import squares
from jaxlin.evaluation.language_modeling import compare, on_mesh, put
from jaxlin.layer_local import Batch, by_layer, walk
from jaxlin.pattern import layers_of
from jaxlin.sharding import on_every_device


def fidelity(
    teacher: ModelConfig,
    teacher_params: Any,
    student: ModelConfig,
    student_params: Any,
    batches: Sequence[Batch],
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Each layer's mixer against the teacher's attention, both given the teacher's residual stream; then `compare`.

    Returns what `compare` does, and for every layer: mixer (its name), nmse (squared error of the mixer's output over
    the teacher's squares; 0 is perfect, 1 is as bad as zeros) and cosine (mean over tokens).
    """
    totals: Any = None
    with on_mesh(mesh):
        for batch in batches:
            sums = jax.tree.map(
                np.asarray, _layer_sums(teacher, student, teacher_params, student_params, put(batch, mesh))
            )
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    whole = compare(teacher, teacher_params, student, student_params, batches, mesh=mesh)
    error, power, cosine, tokens = totals
    return {
        **whole,
        "mixer": layers_of(student.mixer, student.num_hidden_layers),
        "nmse": (error / power).tolist(),
        "cosine": (cosine / tokens).tolist(),
    }


@jax.jit(static_argnums=(0, 1))
def _layer_sums(teacher: ModelConfig, student: ModelConfig, teacher_params, student_params, batch):
    """Per layer [L]: squared error, squares of the teacher's output, cosines; and the number of tokens."""
    valid = batch["segment_ids"] != 0

    def visit(apply, teacher_layer, params):
        mixed = apply(params).mixed
        cosine = jnp.sum(jnp.where(valid, _cosine(mixed, teacher_layer.mixed), 0))
        return *squares(mixed, teacher_layer.mixed, valid), cosine

    (found,) = walk(teacher, (student,), teacher_params, batch, (student_params["layers"],), visit)
    return on_every_device((*by_layer(found), jnp.sum(valid, dtype=jnp.float32)))


def _cosine(a, b):
    """Cosine over the last axis, in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(a * b, -1) * lax.rsqrt(jnp.maximum(jnp.sum(a * a, -1) * jnp.sum(b * b, -1), 1e-30))


def fidelity_table(report: dict[str, Any]) -> Table:
    """The report as a table; its title holds what is measured end to end."""
    table = Table(
        title=f"Fidelity to the teacher over {report['tokens']:,} held-out tokens: KL {report['kl']:.4f}, "
        f"perplexity {report['perplexity']:.2f} (teacher {report['teacher_perplexity']:.2f}), "
        f"agreement {report['agreement']:.1%}"
    )
    table.add_column("layer", justify="right")
    table.add_column("mixer")
    table.add_column("NMSE", justify="right")
    table.add_column("cosine", justify="right")
    for layer, (mixer, nmse, cosine) in enumerate(zip(report["mixer"], report["nmse"], report["cosine"], strict=True)):
        table.add_row(str(layer), mixer, f"{nmse:.4f}", f"{cosine:.4f}")
    return table
