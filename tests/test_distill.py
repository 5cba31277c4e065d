"""The stages: gradients, what trains, targets, and the loss scales of the presets, by hand."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxlin import distill, losses
from jaxlin.command_line import preset
from jaxlin.config import Stage1Config, Stage2Config, Stage3Config
from jaxlin.mixers.common import RMSNorm
from jaxlin.model import LanguageModel, blocks
from jaxlin.optimizer import make_optimizer
from jaxlin.train_step import make_step
from tests.models import TEACHER, random_params, student_of

TINY = replace(
    TEACHER, num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
)
STUDENT = student_of("gated_deltanet", teacher=TINY)
BATCH = {
    "tokens": jax.random.randint(jax.random.key(0), (2, 12), 0, TINY.vocab_size),
    "segment_ids": jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3]),
}


def layer(tree, i, period=1):
    """Parameters of layer i out of the stacked ones."""
    return jax.tree.map(lambda a: a[i // period], tree["layers"][f"block_{i % period}"])


@jax.jit
def collected(params):
    """What the teacher's layers compute on BATCH."""
    return LanguageModel(TINY).apply({"params": params}, BATCH["tokens"], segment_ids=BATCH["segment_ids"],
                                     collect=("hidden_states", "mixer_outputs")).collected  # fmt: skip


@pytest.mark.parametrize(
    "stage", [Stage1Config(), Stage2Config(), Stage2Config(post_norm_target=True, train_mlp=False)]
)
@pytest.mark.parametrize("mixer", ["retnet", "gated_deltanet+softmax"])
def test_layer_scan_equals_a_loop_over_layers(stage, mixer):
    """Gradients inside the scan == a plain Python loop over layers on the teacher's hidden states."""
    student = student_of(mixer, teacher=TINY)
    teacher_params, params = random_params(TINY), random_params(student, 7)
    count = distill.counts(BATCH)
    valid = BATCH["segment_ids"] != 0
    seen = collected(teacher_params)
    positions = jnp.array([[*range(7), *range(5)], [*range(9), 0, 0, 0]])

    def total(part):
        merged, value = distill.merge(params, part), 0.0
        for i in range(student.num_hidden_layers):
            block = blocks(student)[i % student.period]
            output, mixed, _ = block.apply({"params": layer(merged, i, student.period)}, seen["hidden_states"][i],
                                           positions=positions, segment_ids=BATCH["segment_ids"])  # fmt: skip
            if isinstance(stage, Stage1Config):
                error = jnp.where(valid[..., None], mixed - seen["mixer_outputs"][i], 0)
                value += jnp.sum(error**2) / (valid.sum() * TINY.hidden_size)
            else:
                target = seen["hidden_states"][i + 1]
                if stage.post_norm_target and i == student.num_hidden_layers - 1:
                    target = RMSNorm(TINY).apply({"params": teacher_params["norm"]}, target)
                norms = jnp.sqrt(jnp.sum((output - target) ** 2, axis=-1) + 1e-12)
                value += jnp.sum(jnp.where(valid, norms, 0)) / valid.sum()
        return value

    part = distill.trained_part(params, stage)
    value, expected = jax.jit(jax.value_and_grad(total))(part)
    gradients = distill.gradient_function(stage, student, TINY, "none")
    found, metrics = jax.jit(gradients)(part, params, teacher_params, BATCH, count)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for path, e in flatten_dict(expected).items():
        np.testing.assert_allclose(flatten_dict(found)[path], e, rtol=1e-4, atol=1e-5 * np.abs(e).max() + 1e-9)


TRAINED = {
    "1": lambda path: "mixer" in path,
    "2": lambda path: path[0] == "layers",
    "2, MLP frozen": lambda path: path[0] == "layers" and "mlp" not in path,
    "3": lambda path: True,
    "1, layer 1 only": lambda path: "mixer" in path,
}


@pytest.mark.parametrize("name", TRAINED)
def test_exactly_the_stages_parameters_change(name):
    stage = {"1": Stage1Config(), "2": Stage2Config(), "2, MLP frozen": Stage2Config(train_mlp=False),
             "3": Stage3Config(), "1, layer 1 only": Stage1Config(layers=(1,))}[name]  # fmt: skip
    stage = replace(stage, warmup=0.0)
    params, teacher_params = random_params(STUDENT, 7), random_params(TINY)
    before = jax.tree.map(np.asarray, params)
    optimizer = make_optimizer(stage, 10, 2, 1)
    step = make_step(stage, (optimizer,), (STUDENT,), TINY, "none")
    opt_state = optimizer.init(distill.trained_part(params, stage))
    (after,), _, _ = step((params,), (opt_state,), teacher_params, jax.tree.map(lambda a: a[None], BATCH))
    after = flatten_dict(after)
    for path, old in flatten_dict(before).items():
        changed = np.asarray(after[path]) != old
        if not TRAINED[name](path):
            assert not changed.any(), path
        elif stage.layers:
            assert not changed[0].any() and changed[1].any(), path
        else:
            assert changed.any(), path


def test_stage_2_targets_the_last_layer_before_the_final_norm():
    """With the teacher's own mixer and weights the loss is zero, unless the post-norm flag is set."""
    params = random_params(TINY)
    for post_norm, expected in ((False, True), (True, False)):
        stage = Stage2Config(post_norm_target=post_norm)
        gradients = distill.gradient_function(stage, TINY, TINY, "none")
        _, metrics = gradients(distill.trained_part(params, stage), params, params, BATCH, distill.counts(BATCH))
        assert bool(metrics["layer_loss"][-1] < 1e-5) is expected
        assert metrics["layer_loss"][0] < 1e-5


def test_loss_scales_of_the_presets():
    """Hand-computed: two tokens of width 2 in each of two layers, errors (3, 4) and (0, 0)."""
    teacher = jnp.zeros((1, 2, 2))
    student = jnp.array([[[3.0, 4.0], [0.0, 0.0]]])
    valid = jnp.ones((1, 2), bool)
    paper, code = preset("paper"), preset("paper_code")
    # Equation 1 sums squares over the width: (9 + 16 + 0) / 2 tokens; the code's mse_loss means over the width too.
    assert losses.attention_output_loss(student, teacher, valid, 2.0, paper.stage1) == 12.5
    assert losses.attention_output_loss(student, teacher, valid, 2.0, code.stage1) == 6.25
    # Equation 3: the norms are 5 and 0.
    np.testing.assert_allclose(losses.hidden_state_loss(student, teacher, valid, 2.0, paper.stage2), 2.5, rtol=1e-5)
    squared = replace(paper.stage2, squared=True, scale="rsqrt_width")
    np.testing.assert_allclose(losses.hidden_state_loss(student, teacher, valid, 2.0, squared), 12.5 / 2**0.5)
    # Equations 2 and 4 average over layers, the code adds them up; L1 may be a subset.
    np.testing.assert_array_equal(distill.layer_weights(paper.stage1, 4), [0.25] * 4)
    np.testing.assert_array_equal(distill.layer_weights(code.stage1, 4), [1] * 4)
    np.testing.assert_array_equal(distill.layer_weights(replace(paper.stage1, layers=(1, 3)), 4), [0, 0.5, 0, 0.5])
    # Equation 6 averages the KL over tokens; the code sums it over the 512 tokens of a sequence: lambda is 512.
    counted = dict(tokens=1024.0, next_tokens=1022.0, sequences=2.0)
    for recipe, kl, ce in (
        (paper, 1 / 1024, 1 / 1022),
        (code, 512 / 1024, 1 / 1022),
        (preset("recommended"), 1 / 1024, 0),
    ):
        np.testing.assert_allclose(losses.loss_weights(**counted, config=recipe.stage3), (kl, ce), rtol=1e-6)


@pytest.mark.parametrize("stage", [Stage1Config(clip=0.0), Stage2Config(clip=1.0), Stage3Config(ce_weight=1.0)])
def test_accumulation_changes_nothing(stage):
    student = student_of("retnet", teacher=TINY)
    params, teacher_params = random_params(student, 7), random_params(TINY)
    results = []
    for pieces in (1, 2):
        s = replace(stage, accumulation=pieces)
        optimizer = make_optimizer(s, 10, 2, 1)
        batch = jax.tree.map(lambda a, n=pieces: a.reshape(n, 2 // n, 12), BATCH)
        start = jax.tree.map(jnp.copy, params)
        (after,), _, (metrics,) = make_step(s, (optimizer,), (student,), TINY, "block")(
            (start,), (optimizer.init(distill.trained_part(params, s)),), teacher_params, batch
        )
        results.append((after, metrics["loss"]))
    (a, loss_a), (b, loss_b) = results
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5)
    # Adam's first step is lr * sign(gradient): only where the gradient is all but zero may rounding show.
    close = [np.mean(np.abs(x - y) < 1e-5) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    assert min(close) > 0.97


@pytest.mark.parametrize("stage", [Stage1Config(), Stage2Config(), Stage3Config(ce_weight=1.0)])
def test_packing_changes_nothing(stage):
    """Documents that share rows give the losses and gradients of the same documents with a row each."""
    tokens, segment_ids = np.asarray(BATCH["tokens"]), np.asarray(BATCH["segment_ids"])
    documents = [row[ids == n] for row, ids in zip(tokens, segment_ids, strict=True) for n in (1, 2)]
    documents = [document for document in documents if len(document)]
    alone = {name: np.zeros((len(documents), 12), np.int32) for name in BATCH}
    for row, document in enumerate(documents):
        alone["tokens"][row, : len(document)] = document
        alone["segment_ids"][row, : len(document)] = 1
    student = student_of("retnet", teacher=TINY)
    params, teacher_params = random_params(student, 7), random_params(TINY)
    gradients = jax.jit(distill.gradient_function(stage, student, TINY, "none"))
    (packed, metrics), (apart, others) = (
        gradients(distill.trained_part(params, stage), params, teacher_params, batch, distill.counts(batch))
        for batch in (BATCH, alone)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), packed, apart)
