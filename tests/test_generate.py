"""Generation: decoding computes what a full pass does, whatever the batch; sampling, stopping, streaming, errors."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import convert, generate, session
from jaxlin.config import UserError
from jaxlin.generate import Detokenizer, Sampling, serving_params
from jaxlin.model import LanguageModel
from tests.models import TEACHER, random_params, student_of

LENGTHS = (3, 9, 6)
NEW = 6


def make(mixer):
    config = student_of(mixer)
    params = random_params(config)
    rng = np.random.default_rng(0)
    return config, params, [rng.integers(0, config.vocab_size, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def teacher():
    return make("softmax")


@pytest.mark.parametrize("mixer", ["softmax", "gated_deltanet", "mlstm+softmax"])
def test_decoding_is_the_argmax_of_a_full_pass(mixer):
    """Ragged prompts, left padding, one or several chunks of prefill."""
    config, params, prompts = make(mixer)
    answers = generate.generate(config, params, prompts, max_new_tokens=NEW)
    assert answers == generate.generate(config, params, prompts, max_new_tokens=NEW, prefill_chunk=4)
    length = max(LENGTHS) + NEW
    tokens = np.array([p + a + [0] * (length - len(p) - NEW) for p, a in zip(prompts, answers, strict=True)])
    logits = jax.jit(lambda t: LanguageModel(config).apply({"params": params}, t).logits)(tokens)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first = len(prompt) - 1
        assert answer == jnp.argmax(logits[row, first : first + NEW], -1).tolist()


def test_the_batch_does_not_matter(teacher):
    config, params, prompts = teacher
    together = generate.generate(config, params, prompts, max_new_tokens=NEW)
    assert together == [generate.generate(config, params, [p], max_new_tokens=NEW)[0] for p in prompts]
    sampled = generate.generate(config, params, prompts, max_new_tokens=NEW, temperature=1.0, seed=3)
    assert sampled[:1] == generate.generate(config, params, prompts[:1], max_new_tokens=NEW, temperature=1.0, seed=3)
    assert generate.generate(config, params, [], max_new_tokens=NEW) == []


def test_sampling(teacher):
    config, params, prompts = teacher

    def sample(**kw):
        return generate.generate(config, params, prompts, max_new_tokens=NEW, **kw)

    greedy, warm = sample(), dict(temperature=5.0)
    assert sample(**warm, seed=1) == sample(**warm, seed=1) != sample(**warm, seed=2)
    assert sample(**warm, top_k=1) == sample(**warm, top_p=1e-6) == greedy


@pytest.mark.parametrize(
    "sampling, allowed",
    [
        (Sampling(1.0), [0, 1, 2, 3]),
        (Sampling(1.0, top_k=2), [0, 1]),
        (Sampling(1.0, top_p=0.8), [0, 1, 2]),
        (Sampling(1.0, top_p=0.5), [0]),
        (Sampling(1.0, top_k=3, top_p=0.6), [0, 1]),  # 0.5 of 0.9, then 0.25 of 0.9
    ],
)
def test_who_may_be_chosen(sampling, allowed):
    """Frequencies are the renormalised probabilities of those that top_k and top_p leave."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    count = 2000
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.log(jnp.broadcast_to(probabilities, (count, 4)))
    drawn = np.bincount(session.choose(sampling, keys, jnp.uint32(0), logits), minlength=4) / count
    expected = np.where(np.isin(np.arange(4), allowed), probabilities, 0)
    assert not drawn[expected == 0].any()
    np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.04)


def test_stop_ids(teacher):
    config, params, prompts = teacher
    free = generate.generate(config, params, prompts, max_new_tokens=NEW)
    stop = free[1][2]
    stopped = generate.generate(config, params, prompts, max_new_tokens=NEW, stop_ids=[stop])
    assert stopped == [a[: a.index(stop)] if stop in a else a for a in free]
    assert len(stopped[1]) <= 2


def test_a_long_answer_takes_several_blocks(teacher):
    """Counts at and around the block's size; each is the beginning of the longest."""
    config, params, prompts = teacher
    longest = generate.generate(config, params, prompts, max_new_tokens=generate.BLOCK + 2)
    assert [len(a) for a in longest] == [generate.BLOCK + 2] * 3
    for n in (1, generate.BLOCK + 1):
        assert generate.generate(config, params, prompts, max_new_tokens=n) == [a[:n] for a in longest]


def test_stream_is_generate(teacher):
    config, params, _ = teacher
    tokenizer = convert.byte_tokenizer()
    prompt = [5, 6, 7]
    settings = dict(max_new_tokens=20, temperature=1.0, seed=4)
    pieces = list(generate.stream(config, params, tokenizer, prompt, **settings))
    (tokens,) = generate.generate(config, params, [prompt], **settings)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert len(pieces) > 5
    stopped = list(generate.stream(config, params, tokenizer, prompt, **settings, stop_ids=[tokens[3]]))
    assert "".join(stopped) == tokenizer.decode(tokens[: tokens.index(tokens[3])])


def test_characters_come_whole():
    tokenizer = convert.byte_tokenizer()
    text = "naïve 🦙, \N{REPLACEMENT CHARACTER} 漢字!"
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text and detokenizer.flush() == ""
    assert [p for p in pieces if p][:6] == ["n", "a", "ï", "v", "e", " "]

    llama = tokenizer("🦙")["input_ids"]
    broken = [llama[0], llama[1], *tokenizer("a")["input_ids"], llama[0]]  # two that never become complete
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in broken]
    assert pieces == ["", "", "\N{REPLACEMENT CHARACTER}a", ""]
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_serving_params_change_nothing(teacher):
    _, params, prompts = teacher
    config = replace(TEACHER, dtype="bfloat16")
    run = jax.jit(lambda p: LanguageModel(config).apply({"params": p}, jnp.array(prompts[:1])).logits)
    np.testing.assert_array_equal(run(params), run(serving_params(params, config)))

    config = replace(student_of("gla"), dtype="bfloat16")
    small = jax.eval_shape(lambda: serving_params(random_params(config), config))["layers"]["block_0"]
    assert small["mixer"]["q_proj"]["kernel"].dtype == small["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16
    assert small["mixer"]["gk_proj"]["kernel"].dtype == small["input_layernorm"]["weight"].dtype == jnp.float32


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(max_new_tokens=0), "--max-new-tokens 0"),
        (dict(temperature=-1.0), "--temperature -1.0"),
        (dict(temperature=float("nan")), "--temperature nan"),
        (dict(top_k=-1), "--top-k -1"),
        (dict(top_p=0.0), "--top-p 0.0"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
    ],
)
def test_refuses(teacher, change, words):
    settings = dict(prompts=[[1]], max_new_tokens=2) | change
    with pytest.raises(UserError, match=words):
        generate.generate(*teacher[:2], **settings)


def test_refuses_unknown_tokens(teacher):
    with pytest.raises(ValueError, match="not in a vocabulary of 97"):
        generate.generate(*teacher[:2], [[TEACHER.vocab_size]], max_new_tokens=1)


# ---- the command


def call(monkeypatch, *args, stdin=""):
    monkeypatch.setattr(sys, "argv", ["generate", *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    generate.main()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--run", "missing", "--prompt", "a"], "--run missing: no run there"),
        (["--run", "missing"], "the prompt is empty"),
        (["--run", "missing", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "a"], "give either --run DIR or --teacher T"),
        (["--teacher", "demo", "--run", "x", "--prompt", "a"], "give either --run DIR or --teacher T"),
        (["--teacher", "demo", "--prompt", "a", "--teacher-model"], "--teacher-model: only with --run"),
        (["--run", "missing", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0"),
        (["--run", "missing", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    ],
)
def test_command_refuses(monkeypatch, args, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, *args)
