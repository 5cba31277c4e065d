"""Floating-point operations of a stage: the teacher's in closed form, the student's by how they grow."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from jaxlin import placement, sharding
from jaxlin.config import MeshConfig, Stage1Config, Stage2Config, Stage3Config
from jaxlin.model_flops import model_flops
from tests.models import TEACHER, student_of

TIME = 32


def count(stage, teacher=TEACHER):
    mesh = sharding.make_mesh(MeshConfig())
    student = student_of("gated_deltanet", teacher=teacher)
    params = [placement.parameters(config, jnp.float32, mesh) for config in (student, teacher)]
    return model_flops(stage, student, teacher, *params, TIME, mesh)


def test_the_teacher_in_closed_form():
    c = TEACHER
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)
    attention = 2 * TIME * heads  # scores and their sum over all positions: the mask is not counted on
    expected = 2 * c.num_hidden_layers * (weights + attention)
    assert count(Stage1Config(batch_size=8)).teacher == expected
    assert count(Stage3Config(batch_size=8)).teacher == expected


def test_the_student():
    """More from stage to stage, whatever the batch; logits take both heads, and one's two gradients."""
    first, second, third = (count(cls(batch_size=8)).student for cls in (Stage1Config, Stage2Config, Stage3Config))
    assert 0 < first < second < third
    assert count(Stage2Config(batch_size=16, accumulation=2)).student == second
    larger = count(Stage3Config(batch_size=8), replace(TEACHER, vocab_size=TEACHER.vocab_size + 64)).student
    assert larger - third >= 4 * 2 * 64 * TEACHER.hidden_size
