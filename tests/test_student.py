"""The start of a student: what it keeps of the teacher, and what passes through unchanged."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlin.calibrate import calibrate
from jaxlin.command_line import preset
from jaxlin.config import MixerOptions, UserError
from jaxlin.mixers import resolve_options
from jaxlin.mixers.common import SILU_NEUTRAL_BIAS, ShortConv, TokenMixer
from jaxlin.model import LanguageModel
from jaxlin.student import expand_kv, init_student, student_config
from tests.models import STUDENT_MIXERS, TEACHER, logits, random_params, student_of

TOKENS = jax.random.randint(jax.random.key(3), (2, 10), 0, TEACHER.vocab_size)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "linear_attention"])
def test_expanded_heads_equal_native_heads(mixer):
    """Repeating key/value heads in the weights == repeating them in the activations."""
    teacher_params = random_params(TEACHER)
    results = []
    for expand in (False, True):
        config = student_of(mixer, expand_kv=expand)
        params = init_student(teacher_params, config, jax.random.key(0))
        heads = TEACHER.num_attention_heads if expand else TEACHER.num_key_value_heads
        assert params["layers"]["block_0"]["mixer"]["k_proj"]["kernel"].shape[2] == heads
        results.append(logits(config, params, TOKENS))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def test_expand_kv():
    """Whole heads are repeated; the authors' unrolling takes 32 rows for a head, which at size 64 mixes two."""
    value = jnp.arange(2 * 64.0).reshape(2, 64)
    np.testing.assert_array_equal(expand_kv(value, 6), np.repeat(value, 3, axis=0))
    halves = [value[0, :32], value[0, 32:], value[1, :32], value[1, 32:]]
    wrong = [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3), (3, 3)]
    expected = np.stack([np.concatenate([halves[a], halves[b]]) for a, b in wrong])
    np.testing.assert_array_equal(expand_kv(value, 6, bug_compat=True), expected)


def test_copies_what_the_teacher_has():
    """Everything but the mixers' new parameters is the teacher's; a hybrid's softmax layers are the teacher's whole."""
    teacher = replace(TEACHER, qk_norm=True, attention_bias=True, attention_out_bias=True)
    teacher_params = random_params(teacher)
    params = init_student(teacher_params, student_of("gated_deltanet+softmax", teacher=teacher), jax.random.key(0))
    old, new = teacher_params["layers"]["block_0"], params["layers"]
    for i, block in enumerate(("block_0", "block_1")):
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i::2]), new[block][name], old[name])
        for name, leaves in old["mixer"].items():
            jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i::2]), new[block]["mixer"][name], leaves)
    assert set(new["block_1"]["mixer"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], teacher_params["embed_tokens"]["embedding"])
    softmax = replace(teacher, mixer=("softmax", "softmax"), options=(MixerOptions(),) * 2)
    same = init_student(teacher_params, softmax, jax.random.key(0))
    np.testing.assert_allclose(
        logits(softmax, same, TOKENS), logits(teacher, teacher_params, TOKENS), rtol=1e-5, atol=1e-5
    )


def test_no_array_is_the_teachers_own():
    """A training step gives its student's away."""
    teacher_params = random_params(TEACHER)
    params = init_student(teacher_params, student_of("gla"), jax.random.key(0))
    jax.jit(lambda params: params, donate_argnums=0)(params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher_params))


def test_names_that_are_copied_belong_to_the_teacher():
    teacher_params = random_params(TEACHER)
    with pytest.raises(ValueError, match=r"_norm/weight has shape \(2, 16\), .* the teacher, which has no such"):
        init_student(teacher_params, replace(student_of("gla"), qk_norm=True), jax.random.key(0))
    with pytest.raises(ValueError, match=r"shape \(2, .*32\), .* the teacher, which has one of shape \(2, .*16\)"):
        init_student(teacher_params, replace(student_of("gla"), head_dim=32), jax.random.key(0))


class PassThrough(TokenMixer):
    """A mixer without a recurrence: its output is v."""

    @nn.compact
    def __call__(self, x, *, positions, segment_ids=None, state=None):
        _, _, v, _ = self.qkv(x, positions, segment_ids, state)
        return self.output(v, x), None


@pytest.mark.parametrize("mixer", STUDENT_MIXERS)
def test_convolution_gate_and_norm_pass_through(mixer):
    """At initialisation, `recommended` lets v through convolution and gate, and a norm takes the size only."""
    options = resolve_options(mixer, "recommended", MixerOptions(rope="none"))
    bare = replace(options, conv_size=0, out_norm="none", out_gate="none")
    x = jax.random.normal(jax.random.key(0), (2, 6, TEACHER.hidden_size))
    positions = jnp.arange(6)[None]
    module = PassThrough(TEACHER, options)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x, positions=positions))["params"]
    if options.out_norm == "calibrated":
        v = jnp.einsum("btd,dhk->bthk", x, params["v_proj"]["kernel"]).repeat(2, axis=2)
        size = jnp.sqrt(jnp.mean(v**2, axis=-1, keepdims=True))
        got, _ = module.apply({"params": params}, x, positions=positions)
        expected = jnp.einsum("bthk,hkd->btd", v / size, params["o_proj"]["kernel"])
    else:
        got, _ = module.apply({"params": params}, x, positions=positions)
        expected, _ = PassThrough(TEACHER, bare).apply({"params": params}, x, positions=positions)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_neutral_values():
    assert abs(nn.silu(SILU_NEUTRAL_BIAS) - 1) < 1e-7
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 3))
    options = MixerOptions(conv_size=4, conv_init="identity", conv_activation="none")
    y, _ = ShortConv(TEACHER, options).init_with_output(jax.random.key(0), x, None, None)[0]
    np.testing.assert_array_equal(x, y)


def test_calibration_sets_the_teachers_scale():
    """A calibrated norm's weight is the size of the teacher's attention heads by channel; nothing else moves."""
    teacher_params = random_params(TEACHER)
    config = student_of("deltanet+linear_attention")
    params = init_student(teacher_params, config, jax.random.key(0))
    batch = {"tokens": TOKENS, "segment_ids": jnp.ones_like(TOKENS).at[1, 7:].set(0)}
    calibrated = calibrate(params, config, TEACHER, teacher_params, [batch, batch])
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), params, calibrated)
    where = [jax.tree_util.keystr(path) for path, c in jax.tree.leaves_with_path(changed) if c]
    assert where == ["['layers']['block_0']['mixer']['o_norm']['weight']"]
    _, seen = LanguageModel(TEACHER).apply(
        {"params": teacher_params}, TOKENS, segment_ids=batch["segment_ids"], mutable=["intermediates"]
    )
    heads = seen["intermediates"]["layers"]["block_0"]["mixer"]["heads"][0][::2]
    rows = heads[:, *jnp.nonzero(batch["segment_ids"])]
    weight = calibrated["layers"]["block_0"]["mixer"]["o_norm"]["weight"]
    np.testing.assert_allclose(weight, np.sqrt(np.mean(rows**2, axis=1)), rtol=1e-5)


def test_fla_heads():
    """Merged heads keep the width; a width that they do not divide is refused."""
    teacher = replace(TEACHER, hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    run = replace(preset("paper_code"), mixer="retnet")
    with pytest.raises(UserError, match=r"--model\.heads fla: .* do not divide the width 90"):
        student_config(run, replace(teacher, head_dim=15))
    config = student_config(run, replace(teacher, head_dim=16, mixer=("softmax",)))
    assert config.mixer == ("retnet",) and config.dtype == run.dtype
