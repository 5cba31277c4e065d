"""Stage 3's loss: the fused KL and CE against full logits, in values, gradients, memory, and over devices."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxlin import distill, losses, sharding
from jaxlin.config import MeshConfig, Stage3Config
from jaxlin.kernels.hlo_tpu_traffic import program_flops
from jaxlin.model import forward, init_params, project
from jaxlin.train_step import make_loss
from tests.models import TEACHER, random_params, student_of

TINY = replace(TEACHER, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
BATCH = {
    "tokens": jax.random.randint(jax.random.key(0), (2, 12), 0, TINY.vocab_size),
    "segment_ids": jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3]),
}
WEIGHTS = losses.LossWeights(kl=jnp.float32(0.3), ce=jnp.float32(0.2))


def from_logits(student, teacher, at, weights, temperature):
    """The loss as its equations say, of [B, T, V] logits."""
    log_s, log_t = (jax.nn.log_softmax(a / temperature) for a in (student, teacher))
    kl = temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), -1)
    ce = -jnp.take_along_axis(jax.nn.log_softmax(student), at.labels[..., None], -1)[..., 0]
    return weights.kl * jnp.sum(kl * at.valid) + weights.ce * jnp.sum(ce * at.has_next)


def naive(student, teacher, student_kernel, teacher_kernel, at, weights, config, *, temperature=1.0, chunk_tokens=0):
    logits = project(student, student_kernel, config), project(teacher, teacher_kernel, config)
    return from_logits(*logits, at, weights, temperature), None


def gradient(loss, config, **options):
    """(loss, sums), gradients of the student's hidden states, its head and the weights."""

    def of(hidden, kernel, weights, teacher, teacher_kernel, at):
        return loss(hidden, teacher, kernel, teacher_kernel, at, weights, config, **options)

    return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True))


def arguments(config, batch, length):
    width, vocabulary = config.hidden_size, config.vocab_size
    keys = jax.random.split(jax.random.key(1), 5)
    hidden, noise = (jax.random.normal(key, (batch, length, width)) for key in keys[:2])
    kernel, change = (0.3 * jax.random.normal(key, (width, vocabulary)) for key in keys[2:4])
    ids = jnp.sort(jax.random.randint(keys[4], (batch, length), 0, 3), descending=True)
    at = losses.targets(jax.random.randint(keys[4], (batch, length), 0, vocabulary), ids)
    teacher = (hidden + 0.5 * noise).astype(config.dtype)
    return hidden.astype(config.dtype), kernel, WEIGHTS, teacher, 0.5 * (kernel + change), at


def relative(found, expected):
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_equals_full_logits(dtype, tolerance, temperature):
    """Loss and every gradient, whatever the chunk; and the sums are those of the function without gradients."""
    config = replace(TINY, dtype=dtype)
    args = arguments(config, 2, 12)
    (expected, _), gradients = gradient(naive, config, temperature=temperature)(*args)
    for size in (4, 24):
        options = dict(temperature=temperature, chunk_tokens=size)
        (value, sums), found = gradient(losses.distillation_loss, config, **options)(*args)
        assert [a.dtype for a in found[:2]] == [config.dtype, "float32"]
        assert relative(value, expected) < tolerance
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
            assert relative(f, e) < tolerance
        hidden, kernel, _, teacher, teacher_kernel, at = args
        plain = losses.logit_sums(hidden, teacher, kernel, teacher_kernel, at, config, **options)
        np.testing.assert_allclose(sums, plain, rtol=1e-6)
        assert 0 < sums.agree <= at.valid.sum()


def test_tied_head_in_bfloat16():
    """One chunk, and an embedding that is the head transposed: XLA for CPUs ran that product only in float32."""
    config = replace(TINY, dtype="bfloat16")
    hidden, kernel, weights, *teacher = arguments(config, 2, 12)

    def of_embedding(loss):
        return jax.jit(jax.grad(lambda e: loss(hidden, teacher[0], e.T, teacher[1], teacher[2], weights, config)[0]))

    expected = of_embedding(naive)(kernel.T)
    assert relative(of_embedding(losses.distillation_loss)(kernel.T), expected) < 1e-2


def test_next_tokens():
    at = losses.targets(BATCH["tokens"], BATCH["segment_ids"])
    assert at.has_next.sum() == 7 - 1 + 5 - 1 + 9 - 1 and at.valid.sum() == 7 + 5 + 9


@pytest.mark.parametrize("tied", [True, False])
def test_through_the_model(tied):
    """Stage 3's gradient for every parameter == that of full logits: a tied head adds to the embedding's."""
    teacher = replace(TINY, tie_word_embeddings=tied)
    student = student_of("softmax", teacher=teacher)
    stage = Stage3Config(ce_weight=0.5, temperature=1.5, chunk_tokens=8)
    params, teacher_params = random_params(student, 7), random_params(teacher)
    count, at = distill.counts(BATCH), losses.targets(BATCH["tokens"], BATCH["segment_ids"])
    weights = losses.loss_weights(**count, config=stage)

    def full(params):
        logits = [forward(c, p, **BATCH).logits for c, p in ((student, params), (teacher, teacher_params))]
        return from_logits(*logits, at, weights, 1.5)

    value, expected = jax.jit(jax.value_and_grad(full))(params)
    gradients = jax.jit(distill.gradient_function(stage, student, teacher, "none"))
    found, metrics = gradients(params, params, teacher_params, BATCH, count)
    assert relative(metrics["loss"], value) < 1e-5
    for path, e in flatten_dict(expected).items():
        assert relative(flatten_dict(found)[path], e) < 1e-5, path


def test_cotangent():
    """The loss may be part of another: its gradients scale."""
    args = arguments(TINY, 2, 12)

    def scaled(*args, **options):
        loss, sums = losses.distillation_loss(*args, **options)
        return jnp.sin(loss), sums

    (value, _), found = gradient(scaled, TINY)(*args)
    (loss, _), expected = gradient(losses.distillation_loss, TINY)(*args)
    assert value == jnp.sin(loss)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, jnp.cos(loss) * e, rtol=1e-5, atol=1e-9), found, expected)


def test_memory_and_products():
    """SmolLM2-135M's head, 16,384 tokens, compiled only: a tenth of the memory of full logits, two thirds of the
    products of recomputing the logits for the backward pass, and a third where only the loss is wanted."""
    config = replace(TINY, hidden_size=576, vocab_size=49152)
    args = jax.eval_shape(lambda: arguments(config, 32, 512))
    product = 2 * 32 * 512 * 576 * 49152
    bytes_of, products = {}, {}
    for loss in (losses.distillation_loss, naive):
        traced = gradient(loss, config).trace(*args)
        bytes_of[loss] = traced.lower().compile().memory_analysis().temp_size_in_bytes
        products[loss] = program_flops(traced.jaxpr) / product
    print({loss.__name__: f"{size / 2**20:,.0f} MiB" for loss, size in bytes_of.items()})
    assert bytes_of[losses.distillation_loss] < bytes_of[naive] / 10  # 649 MiB and 18,432 MiB with jax 0.12
    assert products[losses.distillation_loss] == 4

    values = jax.jit(losses.distillation_loss, static_argnums=6).trace(*[args[i] for i in (0, 3, 1, 4, 5, 2)], config)
    assert program_flops(values.jaxpr) == 2 * product


@pytest.mark.parametrize("noise", [0.3, 0.01])
def test_many_words(noise):
    """Sums over as many words as real vocabularies have are as exact as over few, where the models nearly agree too."""
    config = replace(TINY, hidden_size=64, vocab_size=49152)
    hidden, kernel, _, _, _, at = arguments(config, 2, 16)
    teacher = hidden + noise * jax.random.normal(jax.random.key(5), hidden.shape)
    weights = losses.LossWeights(kl=jnp.float32(1 / 32), ce=jnp.float32(0))
    (_, sums), (found, *_) = gradient(losses.distillation_loss, config)(hidden, kernel, weights, teacher, kernel, at)
    exact = [np.asarray(a, np.float64) for a in (hidden, teacher, kernel)]
    log_s, log_t = (h @ exact[2] for h in exact[:2])
    log_s, log_t = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (log_s, log_t))
    valid = np.asarray(at.valid)[..., None]
    kl = (valid * np.exp(log_t) * (log_t - log_s)).sum()
    assert abs(float(sums.kl) - kl) < 1e-5 * kl + 1e-6 * valid.sum()
    expected = (valid * (np.exp(log_s) - np.exp(log_t)) / 32) @ exact[2].T
    assert relative(found, expected) < (2e-5 if noise > 0.1 else 5e-4)


def test_only_the_loss_computes_no_gradients():
    """What measures the held-out loss does the products of two forward passes."""
    student = student_of("linear_attention", teacher=TINY)
    params = jax.eval_shape(lambda: tuple(init_params(c, jax.random.key(0)) for c in (student, TINY)))
    measured = make_loss(Stage3Config(), student, TINY).trace(*params, BATCH)

    def passes(params, teacher_params, batch):
        return [forward(c, p, **batch).logits for c, p in ((student, params), (TINY, teacher_params))]

    assert program_flops(measured.jaxpr) == program_flops(jax.jit(passes).trace(*params, BATCH).jaxpr)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (1, 1, 8)], ids=str)
def test_vocabulary_over_devices(shape):
    """Rows over data and fsdp, the head over fsdp and tensor: the same numbers, and nowhere a whole row of logits."""
    config = replace(TINY, hidden_size=48, vocab_size=640)
    mesh = sharding.make_mesh(MeshConfig(*shape))
    args = jax.tree.map(np.asarray, arguments(config, 8, 32))
    step = gradient(losses.distillation_loss, config, temperature=2.0, chunk_tokens=16)
    expected = step(*args)
    rows, head, whole = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), ("fsdp", "tensor"), ())
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, (rows, head, whole, rows, head, rows))
        compiled = gradient(losses.distillation_loss, config, temperature=2.0, chunk_tokens=16).lower(*placed).compile()
        found = compiled(*placed)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected)
    assert found[1][1].sharding.shard_shape((48, 640)) == (48 // shape[1], 640 // shape[2])
    sizes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())}
    assert any(640 // shape[2] in s for s in sizes) and not [s for s in sizes if 640 in s]
