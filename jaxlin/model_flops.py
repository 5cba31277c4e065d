"""Floating-point operations a token that a stage's losses and gradients take: what MFU is a share of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from jaxlin import placement, sharding
from jaxlin.config import MeshConfig, ModelConfig, StageConfig
from jaxlin.distill import counts, gradient_function, needs_teacher, trained_part
from jaxlin.kernels.hlo_tpu_traffic import program_flops
from jaxlin.model import forward


class ModelFlops(NamedTuple):
    """Of matrix products, for each token position of a batch."""

    teacher: float
    """Its forward pass; 0 where the stage does not need it."""
    student: float
    """Its forward and backward passes, and the comparison of logits in stage 3."""

    def __str__(self) -> str:
        return (
            f"{sum(self) / 1e9:.2g} GFLOP a token (teacher {self.teacher / 1e9:.2g}, student {self.student / 1e9:.2g})"
        )

    def metrics(self) -> dict[str, float]:
        """As metrics."""
        return {"teacher_flops_per_token": self.teacher, "student_flops_per_token": self.student}


def together(students: Iterable[ModelFlops]) -> float:
    """Of the teacher's one forward pass and all students' work, a token."""
    students = list(students)
    return students[0].teacher + sum(student.student for student in students)


def model_flops(
    stage: StageConfig, student: ModelConfig, teacher: ModelConfig, params: Any, teacher_params: Any,
    seq_len: int, mesh: jax.sharding.Mesh,
) -> ModelFlops:  # fmt: skip
    """Count them in the traced programs, for parameters that may be abstract; blocks are not recomputed in it.

    Recurrences count as one device computes them: in chunks, whose products the definition does not have. What a mesh
    adds (maps of states, where sequences are cut) is no part of the model.
    """
    batch = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in placement.batch(stage, seq_len, mesh).items()}
    gradients = gradient_function(stage, student, teacher, "none")

    def learn(params, teacher_params, batch):
        return gradients(trained_part(params, stage), params, teacher_params, batch, counts(batch))

    def teach(params, batch):
        return forward(teacher, params, batch["tokens"], segment_ids=batch["segment_ids"], logits=False).hidden

    tokens = batch["tokens"].size
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), list(mesh.devices.flat)[:1])):
        taught = program_flops(jax.make_jaxpr(teach)(teacher_params, batch)) / tokens if needs_teacher(stage) else 0.0
        learnt = program_flops(jax.make_jaxpr(learn)(params, teacher_params, batch)) / tokens
    return ModelFlops(taught, learnt - taught)
