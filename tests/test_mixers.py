"""Every mixer: causal, decodes to what it computes in parallel, indifferent to padding and packing."""

from __future__ import annotations

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlin.config import MixerOptions, RunConfig, UserError
from jaxlin.mixers import MIXERS, has_option, own_options, resolve_options
from jaxlin.mixers.common import SILU_NEUTRAL_BIAS, Dense
from jaxlin.mixers.rounding import silu
from jaxlin.model import LanguageModel, forward, init_state
from jaxlin.runs import new_run, open_run
from tests import grid
from tests.models import STUDENT_MIXERS, TEACHER, logits, random_params, student_of

CASES = [*STUDENT_MIXERS, "softmax", "gated_deltanet+softmax"]
QWEN = replace(TEACHER, qk_norm=True, attention_bias=True)
B, T, ROOM = 2, 12, 17
DECODED = 3  # tokens
PADDING = jnp.array([[0, 0, 0, *[1] * T, 0, 0], [0, *[1] * 5, 0, 0, *[1] * (T - 5), 0, 0]])


def padded_with(tokens):
    """[B, ROOM]: the tokens where PADDING has its ones."""
    return jnp.full((B, ROOM), 5).at[jnp.nonzero(PADDING)].set(tokens.reshape(-1))


def decoded(run, config, tokens):
    """Logits of the last tokens [B, DECODED, V]: a padded prefill of those before them, then one by one."""
    out = run(padded_with(tokens), PADDING.at[:, T : T + DECODED].set(0), init_state(config, B, ROOM))
    steps = []
    for t in range(T - DECODED, T):
        out = run(tokens[:, t : t + 1], None, out.state)
        steps.append(out.logits[:, 0])
    return np.stack(steps, axis=1)


@pytest.mark.parametrize(("mixer", "teacher"), [*((mixer, TEACHER) for mixer in CASES), ("gla+softmax", QWEN)])
@pytest.mark.parametrize("preset", ["recommended", pytest.param("paper_code", marks=pytest.mark.slow)])
def test_mixer(mixer, teacher, preset):
    """One model, four properties, through as few compiled shapes as they need: compiling is what takes the time."""
    config = student_of(mixer, preset, teacher)
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(3), (B, T), 0, config.vocab_size)

    @jax.jit
    def run(tokens, segment_ids=None, state=None):
        return LanguageModel(config).apply({"params": params}, tokens, segment_ids=segment_ids, state=state)

    whole = run(tokens).logits
    assert np.isfinite(whole).all()

    # Causal: an output's gradient reaches no later input, and does reach the earliest.
    def at(embeddings):
        embedded = {**params, "embed_tokens": {"embedding": embeddings}}
        out = LanguageModel(config).apply({"params": embedded}, jnp.arange(T)[None], logits=False)
        return out.hidden[0, T // 2].sum()

    gradient = np.asarray(jax.jit(jax.grad(at))(params["embed_tokens"]["embedding"]))
    assert not gradient[T // 2 + 1 : T].any()
    assert gradient[0].any()

    # Padding left, in the middle and right changes nothing.
    ids, padded = PADDING, padded_with(tokens)
    got = run(padded, ids).logits[jnp.nonzero(ids)].reshape(whole.shape)
    np.testing.assert_allclose(got, whole, rtol=2e-4, atol=2e-4)

    # Packed documents do not see each other.
    packed = jnp.full((B, ROOM), 5).at[:, :12].set(jnp.concatenate([tokens[:, :7], tokens[::-1, :5]], axis=1))
    segments = jnp.array([[1] * 7 + [2] * 5 + [0] * (ROOM - 12)] * B)
    got = run(packed, segments).logits
    np.testing.assert_allclose(got[:, :7], whole[:, :7], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(got[:, 7:12], whole[::-1, :5], rtol=2e-4, atol=2e-4)

    np.testing.assert_allclose(decoded(run, config, tokens), whole[:, -DECODED:], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mixer", CASES)
def test_bfloat16_decodes_as_exactly_as_it_computes(mixer):
    """Prefill and decoding in bfloat16 are no further from float32 than one pass in bfloat16 is."""
    exact = student_of(mixer)
    config, params = replace(exact, dtype="bfloat16"), random_params(exact)
    tokens = jax.random.randint(jax.random.key(3), (B, T), 0, config.vocab_size)

    @jax.jit
    def run(tokens, segment_ids=None, state=None):
        return LanguageModel(config).apply({"params": params}, tokens, segment_ids=segment_ids, state=state)

    expected = np.asarray(logits(exact, params, tokens))[:, -DECODED:]
    whole, by_steps = run(tokens).logits[:, -DECODED:], decoded(run, config, tokens)
    rounding = grid.error(np.asarray(whole), expected)
    assert rounding < 0.04
    assert grid.error(by_steps, expected) < 1.5 * rounding


def test_a_neutral_gate_starts_as_one_in_bfloat16():
    """Its bias is no bfloat16 number."""
    config = student_of("gated_deltanet")
    gate = Dense(
        replace(config, dtype="bfloat16"), (3,), ("embed", "heads"), True, wide=True,
        kernel_init=nn.initializers.zeros, bias_init=nn.initializers.constant(SILU_NEUTRAL_BIAS),
    )  # fmt: skip
    y, _ = gate.init_with_output(jax.random.key(0), jnp.ones((2, 4), jnp.bfloat16))
    np.testing.assert_allclose(nn.silu(y), 1, rtol=1e-6)


def test_presets_set_what_a_mixer_reads():
    """And nothing else: options that no preset sets are refused on the command line, others would do nothing."""

    class Read:
        def __init__(self, options, names):
            self.__dict__.update(options=options, names=names)

        def __getattr__(self, name):
            self.names.add(name)
            return getattr(self.options, name)

    x, positions = jnp.zeros((1, 4, TEACHER.hidden_size)), jnp.arange(4)[None]
    for mixer in STUDENT_MIXERS:
        names = {"gqa_bug_compat"}  # `init_student` reads it
        for preset in MIXERS[mixer].PRESETS:
            given = resolve_options(mixer, preset, MixerOptions())
            module = MIXERS[mixer](TEACHER, Read(given, names))
            jax.eval_shape(lambda m=module: m.init(jax.random.key(0), x, positions=positions))
            MIXERS[mixer].init_state(TEACHER, Read(given, names), 1, 1)
            assert own_options(mixer, given) == given
        assert names == {field.name for field in fields(MixerOptions) if has_option(mixer, field.name)}, mixer
    old = replace(student_of("retnet").options[0], decay_rank=16, decay_range=(1.0, 5.0))
    assert own_options("retnet", old) == student_of("retnet").options[0]


def test_a_mixer_may_lack_a_preset(monkeypatch):
    mine = type("Mine", (MIXERS["gla"],), {"PRESETS": {"recommended": MIXERS["gla"].PRESETS["recommended"]}})
    monkeypatch.setitem(MIXERS, "mine", mine)
    with pytest.raises(UserError, match=r"^--preset paper: mine has only recommended$"):
        resolve_options("mine", "paper", MixerOptions())


def test_a_run_whose_mixer_is_not_there(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(MIXERS, "mine", MIXERS["gla"])
        new_run(RunConfig(mixer="mine", run_dir=str(tmp_path)), TEACHER)
        assert open_run(tmp_path).student.mixer == ("mine",)
    with pytest.raises(UserError, match=f"^--run {tmp_path}: its mixer mine is none of softmax, .*; import what"):
        open_run(tmp_path)


def test_a_state_counts_positions():
    config, tokens = student_of("softmax"), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"^positions: not with a state"):
        forward(config, random_params(config), tokens, positions=tokens, state=init_state(config, 1, 4))


def test_mixers_differ():
    """Mixers on the same weights give outputs of their own."""
    tokens = jnp.arange(T)[None]
    outputs = []
    for mixer in STUDENT_MIXERS:
        config = student_of(mixer)
        outputs.append(logits(config, random_params(config), tokens))
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert np.abs(a - b).max() > 1e-2


def test_state_size_is_constant():
    """Only softmax keeps something for every token."""
    for mixer in MIXERS:
        config = student_of(mixer)
        sizes = [
            sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda c=config, n=n: init_state(c, 1, n))))
            for n in (8, 64)
        ]
        assert (sizes[0] == sizes[1]) == (mixer != "softmax")
    assert TEACHER.num_key_value_heads < TEACHER.num_attention_heads  # so that the tests above cover grouped heads


def test_silu_of_bfloat16_is_rounded_once():
    x = jnp.linspace(-8, 8, 1001, dtype=jnp.bfloat16)
    exact, vjp = jax.vjp(nn.silu, x.astype(jnp.float32))
    found, rounded_vjp = jax.vjp(silu, x)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded_vjp(jnp.ones_like(x))[0], vjp(jnp.ones_like(exact))[0].astype(jnp.bfloat16))
