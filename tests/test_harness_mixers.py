"""The harness's model class on the teacher and on every mixer: batches change nothing, decoding is the full pass.

Texts of many lengths go through `loglikelihood`, `loglikelihood_rolling` and `generate_until` alone, in full batches,
and in the other order; what is expected comes from the whole logits of each sequence by itself, with no padding before.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance

from jaxlin import convert
from jaxlin.evaluation import scoring
from jaxlin.evaluation.harness import JaxLM
from jaxlin.evaluation.scoring import continuations
from jaxlin.runs import Teacher
from tests.models import STUDENT_MIXERS, TEACHER, logits, random_params, student_of

BYTES = replace(TEACHER, vocab_size=272, max_position_embeddings=96)
MIXERS = ["softmax", *(pytest.param(mixer, marks=pytest.mark.slow) for mixer in STUDENT_MIXERS)]
STORY = "A linear student reads what its teacher wrote, and forgets what it cannot keep in a state."
PAIRS = [(STORY[:n], STORY[n : n + m]) for n, m in ((3, 2), (16, 20), (33, 1), (60, 20), (8, 9), (45, 30), (70, 4))]
CONTEXTS = [STORY[:n] for n in (2, 9, 31, 32, 40)]
BUDGETS = (16, 1024)  # one sequence at a time; all of a length together
NEW = 33  # tokens


@functools.cache
def model_of(mixer):
    config = BYTES if mixer == "softmax" else student_of(mixer, teacher=BYTES)
    return Teacher(config, random_params(config), convert.byte_tokenizer())


def encode(text):
    return convert.byte_tokenizer()(text)["input_ids"]


def log_probs(model, tokens):
    """Of each next token, [T, V], from a full pass over one sequence, padded on the right so that one shape serves."""
    padded = np.zeros((1, BYTES.max_position_embeddings), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(jax.nn.log_softmax(logits(model.config, model.params, padded)[0]), np.float64)[: len(tokens)]


def expected_of(model, context, continuation):
    """(log-likelihood, greedy) of a continuation."""
    found = log_probs(model, [*context, *continuation])[len(context) - 1 : -1]
    likeliest = found.argmax(-1) == continuation
    return found[np.arange(len(continuation)), continuation].sum(), bool(likeliest.all())


def call(model, method, arguments, budget):
    lm = JaxLM(model=model, batch_tokens=budget, bar=lambda title, total: lambda done: None)
    return getattr(lm, method)([Instance(method, {}, a, i) for i, a in enumerate(arguments)])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_loglikelihood(mixer, shared, monkeypatch):
    """Also where a context is read once, and its continuations from the state after it."""
    model, pairs = model_of(mixer), PAIRS
    if shared:
        monkeypatch.setitem(scoring.WORTH_SHARING, "cpu", 0)
        pairs = [(STORY[:60], end) for end in (" a", " bcd", " efghijkl")] + PAIRS[:2]
    # Spaces at the end of a context move to the continuation: these contexts have none.
    assert not any(context.endswith(" ") for context, _ in pairs)
    expected = [expected_of(model, encode(context), encode(continuation)) for context, continuation in pairs]
    for budget in BUDGETS:
        for order in (slice(None), slice(None, None, -1)):
            found = call(model, "loglikelihood", pairs[order], budget)
            np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected[order]], rtol=0, atol=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected[order]]


@pytest.mark.parametrize("mixer", MIXERS)
def test_rolling(mixer):
    model, texts = model_of(mixer), [(STORY[:n],) for n in (1, 20, 64, 80)]
    start = [model.tokenizer.eos_token_id]
    expected = [expected_of(model, start, encode(text))[0] for (text,) in texts]
    for budget in BUDGETS:
        np.testing.assert_allclose(call(model, "loglikelihood_rolling", texts, budget), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generate_until(mixer):
    """Each token is the likeliest after a full pass over all before it; the likelihoods of the passes agree too."""
    model, settings = model_of(mixer), {"until": [], "max_gen_toks": NEW, "do_sample": False}
    stop = model.tokenizer.eos_token_id
    prompts = [encode(context) for context in CONTEXTS]
    answers = continuations(model, prompts, NEW, stop_ids=(stop,), batch_tokens=BUDGETS[0])
    for prompt, answer in zip(prompts, answers, strict=True):
        following = log_probs(model, [*prompt, *answer])[len(prompt) - 1 :]
        ended = [*answer, stop][:NEW]
        assert following.argmax(-1)[: len(ended)].tolist() == ended
    texts = [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    for budget in BUDGETS:
        for order in (slice(None), slice(None, None, -1)):
            arguments = [(context, settings) for context in CONTEXTS[order]]
            assert call(model, "generate_until", arguments, budget) == texts[order]
