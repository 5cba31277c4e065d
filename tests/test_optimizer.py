"""Muon beside AdamW: which parameters it moves, how, where its state lives, and that it resumes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jaxlin import placement, sharding
from jaxlin.checkpoint import Checkpoints
from jaxlin.config import MeshConfig, Stage2Config, Stage3Config
from jaxlin.distill import trained_part
from jaxlin.optimizer import make_optimizer
from jaxlin.student import init_student
from jaxlin.train_step import make_step
from tests.models import TEACHER, random_params, student_of

STUDENT = student_of("retnet")
STAGE = Stage3Config(
    optimizer="muon", schedule="constant", warmup=0.0, weight_decay=0.0, clip=0.0, lr=1e-2, lr_new=1e-3
)


def orthogonalised(path):
    return path[0] == "layers" and path[-1] == "kernel" and path[-2] in (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # fmt: skip


def matrices(path, array):
    """[L, inputs, outputs] of a stacked kernel."""
    inputs = array.shape[1:-1] if path[-2] == "o_proj" else array.shape[1:2]
    return np.asarray(array).reshape(array.shape[0], np.prod(inputs), -1)


def test_each_layers_projection_is_orthogonalised_by_itself():
    """Singular values near 1 times the size of AdamW's updates, whatever other layers do; the rest is AdamW's."""
    params = random_params(STUDENT, 7)
    leaves, tree = jax.tree.flatten(params)
    gradient = jax.tree.unflatten(tree, [jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)])
    # Of other sizes, layer by layer: what is orthogonal does not change.
    louder = {**gradient, "layers": jax.tree.map(lambda g: g.at[1].multiply(100.0), gradient["layers"])}
    updates = {}
    for name, stage, g in (
        ("muon", STAGE, gradient), ("louder", STAGE, louder), ("adamw", replace(STAGE, optimizer="adamw"), gradient)
    ):  # fmt: skip
        optimizer = make_optimizer(stage, 10, 2, 1)
        updates[name] = flatten_dict(jax.jit(optimizer.update)(g, jax.jit(optimizer.init)(params), params)[0])
    assert sum(map(orthogonalised, updates["muon"])) == 7
    for path, found in updates["muon"].items():
        if not orthogonalised(path):
            np.testing.assert_allclose(found, updates["adamw"][path], rtol=1e-5, err_msg=path)
            continue
        np.testing.assert_allclose(found, updates["louder"][path], atol=1e-5, err_msg=path)
        for matrix in matrices(path, found):
            values = np.linalg.svd(matrix, compute_uv=False) / (STAGE.lr * 0.2 * max(matrix.shape) ** 0.5)
            assert values.min() > 0.1 and values.max() < 1.3 and np.median(values) > 0.6, path


def test_loss_falls_and_resumes_bit_for_bit(tmp_path):
    """Four steps on one batch; and two, a checkpoint in a new process's arrays, and two more."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    stage = replace(STAGE, lr=3e-3, batch_size=2)
    teacher = random_params(TEACHER)
    start = jax.jit(lambda: init_student(teacher, STUDENT, jax.random.key(1)))()
    tokens = jax.random.randint(jax.random.key(0), (1, 2, 24), 0, TEACHER.vocab_size)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    optimizer = make_optimizer(stage, 10, 2, 1)
    step = make_step(stage, optimizer, STUDENT, TEACHER, "none")
    params = placement.parameters(STUDENT, jnp.float32, mesh)
    placed = {"params": params, "opt_state": placement.optimizer_state(optimizer, params, mesh)}

    def run(state, steps):
        losses = []
        for _ in range(steps):
            params, opt_state, metrics = step(state["params"], state["opt_state"], teacher, batch)
            state = {"params": params, "opt_state": opt_state}
            losses.append(float(metrics["loss"]))
        return state, losses

    def beginning():
        return {"params": jax.tree.map(jnp.copy, start), "opt_state": jax.jit(optimizer.init)(start)}

    whole, losses = run(beginning(), 4)
    assert losses[3] < 0.9 * losses[0]
    half, _ = run(beginning(), 2)
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(2, half, {})
    _, loaded, _ = checkpoints.latest(lambda extra: placed)
    resumed, again = run(loaded, 2)
    assert again == losses[2:]
    assert jax.tree.structure(resumed) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.parametrize("stage", [replace(STAGE, layers=()), Stage2Config(optimizer="muon", layers=(1,))])
def test_moments_live_with_their_parameters(stage):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    trained = trained_part(placement.parameters(replace(STUDENT, vocab_size=64), jnp.float32, mesh), stage)
    optimizer = make_optimizer(stage, 10, 2, 1)
    state = placement.optimizer_state(optimizer, trained, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(optimizer.init, trained))
    homes = {path: a.sharding for path, a in flatten_dict(trained).items()}
    muon, adam = (s for s in jax.tree.leaves(state, is_leaf=_is_moments) if _is_moments(s))
    for moments, mine in ((muon.mu, True), (adam.mu, False), (adam.nu, False)):
        for path, a in flatten_dict(moments).items():
            assert isinstance(a, optax.MaskedNode) is (orthogonalised(path) is not mine), path
            assert isinstance(a, optax.MaskedNode) or a.sharding == homes[path], path


def _is_moments(state):
    return isinstance(state, (optax.contrib.MuonState, optax.ScaleByAdamState))
