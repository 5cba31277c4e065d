"""Steps on a mesh: what lives where, what crosses the network, and that results are those of one device."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import placement, sharding
from jaxlin.config import MeshConfig, Stage1Config, Stage3Config, UserError
from jaxlin.distill import trained_part
from jaxlin.optimizer import make_optimizer
from jaxlin.train_step import make_step
from tests.models import TEACHER, random_params, student_of

TINY = replace(TEACHER, num_hidden_layers=2, vocab_size=64)
STUDENT = student_of("gated_deltanet", teacher=TINY)
BATCH, TIME = 8, 24
STAGES = (
    Stage1Config(batch_size=BATCH, layers=(1,)),
    Stage3Config(batch_size=BATCH, ce_weight=0.5, chunk_tokens=8),
)


def prepared(stage, mesh):
    """The step, its abstract parameters and optimizer state, and the optimizer."""
    params = placement.parameters(STUDENT, jnp.float32, mesh)
    optimizer = make_optimizer(stage, 10, STUDENT.num_hidden_layers, STUDENT.period)
    placed = (params,), (placement.optimizer_state(optimizer, trained_part(params, stage), mesh),)
    return make_step(stage, (optimizer,), (STUDENT,), TINY, "block", placed=placed), placed, optimizer


@pytest.mark.parametrize("stage", STAGES, ids=("stage1", "stage3"))
def test_a_step_on_a_mesh(stage):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    step, placed, optimizer = prepared(stage, mesh)
    moments = [a for a in jax.tree.leaves(placed[1]) if a.ndim > 2]
    assert moments and all("fsdp" in str(a.sharding.spec) or "tensor" in str(a.sharding.spec) for a in moments)

    params, teacher = jax.tree.map(np.asarray, (random_params(STUDENT, 7), random_params(TINY)))
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 3, (1, BATCH, TIME)), axis=-1)[..., ::-1].copy()
    batch = dict(tokens=rng.integers(0, TINY.vocab_size, ids.shape), segment_ids=ids)
    alone = make_step(stage, (optimizer,), (STUDENT,), TINY, "block")
    state = jax.tree.map(np.asarray, optimizer.init(trained_part(params, stage)))
    (expected,), _, (metrics,) = alone((params,), (state,), teacher, batch)

    with jax.set_mesh(mesh):
        arguments = jax.device_put(((params,), (state,)), placement.homes(placed))
        teacher = jax.device_put(teacher, placement.homes(placement.parameters(TINY, jnp.float32, mesh)))
        batch = jax.device_put(batch, placement.homes(placement.batch(stage, TIME, mesh)))
        compiled = step.lower(*arguments, teacher, batch).compile()
        found, state, (found_metrics,) = compiled(*arguments, teacher, batch)
    assert placement.homes((found, state)) == placement.homes(placed)
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a - c, b - c, atol=2e-4), found[0], expected, params)

    # Parameters come to the rows: of the whole batch, nothing but the looked-up embedding crosses the network.
    pattern = r" \w+\[([\d,]+)\]\S* (?:all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
    moved = [tuple(map(int, sizes.split(","))) for sizes in re.findall(pattern, compiled.as_text())]
    whole = [shape for shape in moved if shape[:2] == (BATCH, TIME) and np.prod(shape) > BATCH * TIME]
    assert moved and whole in ([], [(BATCH, TIME, TINY.hidden_size // 4)])


def test_a_batch_that_does_not_divide():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(UserError, match=r"--stage3.batch-size 6: must be a multiple of accumulation x data x fsdp = 4"):
        placement.check_batches({1: STAGES[0], 3: replace(STAGES[1], batch_size=6)}, mesh)
