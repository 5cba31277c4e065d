"""Muon beside AdamW: which parameters it moves, how, where its state lives, that it resumes; and steps that are bad."""

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
from jaxlin.config import MeshConfig, Stage1Config, Stage2Config, Stage3Config
from jaxlin.distill import trained_part
from jaxlin.optimizer import decay_rule, make_optimizer, skip_bad_steps
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
    step = make_step(stage, (optimizer,), (STUDENT,), TEACHER, "none")
    params = placement.parameters(STUDENT, jnp.float32, mesh)
    placed = {"params": params, "opt_state": placement.optimizer_state(optimizer, params, mesh)}

    def run(state, steps):
        losses = []
        for _ in range(steps):
            (params,), (opt_state,), (metrics,) = step((state["params"],), (state["opt_state"],), teacher, batch)
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


def test_only_aligned_layers_move():
    """In periods of more than ten layers too, whose blocks do not come in the order of their numbers."""
    teacher = replace(TEACHER, num_hidden_layers=12)
    params = random_params(student_of("+".join(["retnet", "gla"] * 6), teacher=teacher))
    for layer in (1, 2, 11):
        stage = Stage1Config(layers=(layer,), warmup=0.0)
        trained = trained_part(params, stage)
        optimizer = make_optimizer(stage, 10, 12, 12)
        updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trained), optimizer.init(trained), trained)
        moved = {name for name, tree in updates["layers"].items() if any(np.any(a) for a in jax.tree.leaves(tree))}
        assert moved == {f"block_{layer}"}


@pytest.mark.parametrize("feature_map", ["hedgehog", "hadamard"])
def test_feature_maps_decay(feature_map):
    params = flatten_dict(random_params(student_of("linear_attention", feature_map=feature_map)))
    decayed = {path[-2:] for path in params if decay_rule("matrices")(path, None) and "mixer" in path}
    projections = {(f"{name}_proj", "kernel") for name in "qkvo"}
    maps = {
        "hedgehog": {("mixer", f"{name}_feature_map") for name in "qk"},
        "hadamard": {(f"{name}_feature_map_{i}", "kernel") for name in "qk" for i in (1, 2)},
    }
    assert decayed == projections | maps[feature_map]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("bad", ["loss", "gradient", "spike"])
def test_a_bad_step_changes_nothing_but_its_count(bad):
    """Parameters, moments and schedule after it are those of the run that never saw it."""
    params = {"layers": {"block_0": {"mixer": {"q_proj": {"kernel": jnp.ones((2, 3, 4))}}}}}
    stage = replace(STAGE, optimizer="adamw", schedule="cosine", on_bad_step="skip", spike_factor=5.0)
    optimizer = make_optimizer(stage, 100, 2, 1)
    update = jax.jit(lambda g, state, loss: optimizer.update(g, state, params, loss=loss))
    good = [jax.tree.map(lambda p, i=i: p * (1 + 0.1 * (i % 3)), params) for i in range(18)]
    state = optimizer.init(params)
    for g in good:
        updates, state = update(g, state, 1.0)
        assert np.any(updates["layers"]["block_0"]["mixer"]["q_proj"]["kernel"])
    assert state.skipped == 0
    g, loss = {
        "loss": (good[0], jnp.nan),
        "gradient": (jax.tree.map(lambda g: g.at[0, 0, 0].set(jnp.inf), good[0]), 1.0),
        "spike": (jax.tree.map(lambda g: 8 * g, good[0]), 1.0),
    }[bad]
    updates, after = update(g, state, loss)
    same(updates, jax.tree.map(jnp.zeros_like, params))
    assert (after.skipped, after.in_a_row) == (1, 1)
    same((after.inner, after.norms), (state.inner, state.norms))
    expected, _ = update(good[1], state, 1.0)
    updates, later = update(good[1], after, 1.0)
    same(updates, expected)
    assert (later.skipped, later.in_a_row) == (1, 0)


def test_a_spike_is_a_step_where_nobody_asked():
    """Spikes count from the 16th step on, and never without a factor."""
    params = {"layers": {"block_0": {"norm": {"weight": jnp.ones((2, 3))}}}}
    for factor, steps, skipped in ((0.0, 20, 0), (5.0, 15, 0), (5.0, 16, 1)):
        optimizer = skip_bad_steps(optax.sgd(0.1), factor)
        update = jax.jit(lambda g, state, o=optimizer: o.update(g, state, params, loss=1.0)[1])
        state = optimizer.init(params)
        for _ in range(steps):
            state = update(params, state)
        assert update(jax.tree.map(lambda p: 9 * p, params), state).skipped == skipped


def test_a_step_with_nan_is_counted_in_its_metrics():
    """A teacher that is NaN once: the student is left as it was, and the step says so."""
    stage = Stage1Config(batch_size=1, on_bad_step="skip")
    params, teacher = random_params(STUDENT, 7), random_params(TEACHER)
    tokens = jnp.ones((1, 1, 8), jnp.int32)
    optimizer = make_optimizer(stage, 10, 2, 1)
    step = make_step(stage, (optimizer,), (STUDENT,), TEACHER, "none")
    state, before = optimizer.init(trained_part(params, stage)), jax.tree.map(np.asarray, params)
    params = jax.tree.map(jnp.copy, params)  # the step takes the place of its arguments
    for broken, skipped, in_a_row in ((True, 1, 1), (True, 2, 2), (False, 2, 0)):
        given = jax.tree.map(lambda a: a * jnp.nan, teacher) if broken else teacher
        (params,), (state,), (metrics,) = step((params,), (state,), given, {"tokens": tokens, "segment_ids": tokens})
        assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (skipped, in_a_row)
        assert bool(jnp.isfinite(metrics["loss"])) is not broken
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, before)
        assert any(jax.tree.leaves(changed)) is not broken


def _is_moments(state):
    return isinstance(state, (optax.contrib.MuonState, optax.ScaleByAdamState))
