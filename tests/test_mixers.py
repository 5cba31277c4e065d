"""Every mixer: causal, decodes to what it computes in parallel, indifferent to padding and packing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin.mixers import MIXERS
from jaxlin.model import LanguageModel, init_state
from tests.models import STUDENT_MIXERS, TEACHER, logits, random_params, student_of

CASES = [(m, p) for m in STUDENT_MIXERS for p in ("recommended", "paper_code")] + [("softmax", "recommended")]
CASES += [("gated_deltanet+softmax", "recommended")]
B, T = 2, 12


def setup(mixer, preset):
    config = student_of(mixer, preset)
    tokens = jax.random.randint(jax.random.key(3), (B, T), 0, config.vocab_size)
    params = random_params(config)
    run = jax.jit(lambda tokens, segment_ids=None, state=None: LanguageModel(config).apply(
        {"params": params}, tokens, segment_ids=segment_ids, state=state))  # fmt: skip
    return config, params, tokens, run


@pytest.mark.parametrize("mixer, preset", CASES)
def test_mixer(mixer, preset):
    """One model, four properties (compiling it is what takes the time)."""
    config, params, tokens, run = setup(mixer, preset)
    whole = run(tokens).logits
    assert np.isfinite(whole).all()

    # Causal: an output's gradient reaches no later input, and does reach the earliest.
    model = LanguageModel(config)

    def at(embeddings, t):
        embedded = {**params, "embed_tokens": {"embedding": embeddings}}
        return model.apply({"params": embedded}, jnp.arange(T)[None], logits=False).hidden[0, t].sum()

    gradient = jax.jit(jax.grad(at))(params["embed_tokens"]["embedding"], T // 2)
    assert not np.asarray(gradient[T // 2 + 1 : T]).any()
    assert np.asarray(gradient[0]).any()

    # Prefill, then decode token by token == one pass.
    state = init_state(config, B, T)
    out = run(tokens[:, : T - 3], None, state)
    pieces = [out.logits]
    for t in range(T - 3, T):
        out = run(tokens[:, t : t + 1], None, out.state)
        pieces.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=2e-4, atol=2e-4)

    # Padding left, middle and right changes nothing, nor does it in a prefill that decoding continues.
    ids = jnp.array([[0, 0, 0, *[1] * T, 0, 0], [0, *[1] * 5, 0, 0, *[1] * (T - 5), 0, 0]])
    padded = jnp.full(ids.shape, 5).at[jnp.nonzero(ids)].set(tokens.reshape(-1))
    got = run(padded, ids).logits[jnp.nonzero(ids)].reshape(whole.shape)
    np.testing.assert_allclose(got, whole, rtol=2e-4, atol=2e-4)
    short = ids.at[0, T + 2].set(0).at[1, T + 2].set(0)  # without each row's last token
    out = run(padded, short, init_state(config, B, ids.shape[1] + 1))
    got = run(tokens[:, -1:], None, out.state).logits[:, 0]
    np.testing.assert_allclose(got, whole[:, -1], rtol=2e-4, atol=2e-4)

    # Packed documents do not see each other.
    packed = jnp.concatenate([tokens[:1, :7], tokens[1:, :5]], axis=1)
    segments = jnp.array([[1] * 7 + [2] * 5])
    got = run(packed, segments).logits
    np.testing.assert_allclose(got[0, :7], whole[0, :7], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(got[0, 7:], whole[1, :5], rtol=2e-4, atol=2e-4)


def test_mixers_differ():
    """Seven mixers on the same weights give seven outputs."""
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
