"""The engine: a prompt's continuation is the same alone, beside others, and from a remembered prefix."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxlin import convert, decoding
from jaxlin.config import UserError
from jaxlin.decoding import BLOCK
from jaxlin.engine import Engine
from jaxlin.sampling import Sampling
from jaxlin.session import Session
from tests.models import TEACHER, random_params, student_of

LENGTHS = (3, 40, 1, 9, 17, 33)
MOST = (5, 2 * BLOCK + 3, 1, 40, BLOCK, 2)  # new tokens
ROOM = 96
WARM = Sampling(1.0, top_k=20, repetition_penalty=1.3)


@functools.cache
def make(mixer):
    config = student_of(mixer)
    rng = np.random.default_rng(1)
    return config, random_params(config), [rng.integers(0, config.vocab_size, n).tolist() for n in LENGTHS]


def serve(mixer, slots, **settings):
    return Engine(*make(mixer)[:2], slots=slots, room=ROOM, pad_to=16, **settings)


def alone(mixer, sampling, prompt, most, seed=0):
    """Token by token."""
    config, params, _ = make(mixer)
    session = Session(config, params, seed=seed, room=ROOM)
    session.read(prompt)
    return list(session.stream(sampling, most))


@pytest.mark.parametrize("mixer", ["gated_deltanet", "softmax", pytest.param("mlstm+softmax", marks=pytest.mark.slow)])
def test_what_stands_beside_changes_nothing(mixer):
    """Prompts of all lengths, more than slots: greedy; and sampled, with the same random numbers."""
    prompts = make(mixer)[2]
    for sampling in (Sampling(), WARM):
        busy = serve(mixer, 4, sampling=sampling)
        numbers = [busy.submit(p, most, stream=0) for p, most in zip(prompts, MOST, strict=True)]
        found = {piece.number: piece.completion for piece in busy.stream() if piece.completion}
        assert sorted(found) == numbers
        for number, prompt, most in zip(numbers, prompts, MOST, strict=True):
            assert found[number].tokens == alone(mixer, sampling, prompt, most)
            assert found[number].reason == "length" and found[number].text == ""


def test_order_and_stream():
    """Results are in the order of the prompts, pieces add up to them, and more may be submitted on the way."""
    prompts = make("gla")[2]
    busy = serve("gla", 2, sampling=WARM, seed=3)
    together = [c.tokens for c in busy.run(prompts, 20, streams=range(6))]
    assert together == [c.tokens for c in serve("gla", 2, sampling=WARM, seed=3).run(prompts, 20)]
    assert len({tuple(tokens[:5]) for tokens in together}) == 6

    pieces: dict[int, list[int]] = {}
    later = serve("gla", 2, sampling=WARM, seed=3)
    for prompt in prompts[:3]:
        later.submit(prompt, 20)
    rest = iter(prompts[3:])
    for piece in later.stream():
        pieces.setdefault(piece.number, []).extend(piece.tokens)
        if piece.completion is not None:
            assert piece.completion.tokens == pieces[piece.number]
            for prompt in rest:
                later.submit(prompt, 20)
                break
    assert [pieces[n] for n in range(6)] == together


def test_ends():
    """Stop tokens, stop strings and a caller's own end; each ends its own sequence."""
    prompts, tokenizer = make("gla")[2], convert.byte_tokenizer()
    free = [c.tokens for c in serve("gla", 3).run(prompts, 20)]
    stop = free[0][4]
    stopped = serve("gla", 3, stop_ids=[stop]).run(prompts, 20)
    for completion, tokens in zip(stopped, free, strict=True):
        assert completion.tokens == (tokens[: tokens.index(stop)] if stop in tokens else tokens)
        assert completion.reason == ("stop" if stop in tokens else "length")

    texts = [tokenizer.decode(tokens) for tokens in free]
    string = texts[0][3:5]
    speaking = serve("gla", 3, stop=[string], tokenizer=tokenizer)
    numbers = [speaking.submit(prompt, 20) for prompt in prompts]
    shown, found = dict.fromkeys(numbers, ""), {}
    for piece in speaking.stream():
        shown[piece.number] += piece.text
        assert string not in shown[piece.number]
        found[piece.number] = piece.completion
    for number, text in enumerate(texts):
        assert found[number].text == shown[number] == text.partition(string)[0]
        assert found[number].reason == ("stop" if string in text else "length")
        assert tokenizer.decode(found[number].tokens) == shown[number]

    short = serve("gla", 3, finished=lambda tokens: len(tokens) > 3).run(prompts, 2 * BLOCK)
    assert [len(c.tokens) for c in short] == [1 + BLOCK] * 6


@pytest.mark.parametrize("mixer", ["gated_deltanet", "softmax"])
def test_remembered_prefixes(mixer):
    """The longest known prefix is read once; tokens are the same, logits up to float32's rounding."""
    config, _, prompts = make(mixer)
    shared = prompts[1]
    texts = [[*shared, *p] for p in prompts[2:5]] + [[*shared[:9], 5], prompts[0]]
    plain = serve(mixer, 4, sampling=WARM).run(texts, 20)
    knowing = serve(mixer, 4, sampling=WARM)
    knowing.remember(shared[:9])
    knowing.remember(shared)
    assert knowing.run(texts, 20) == plain

    length, state = knowing._prefixes.longest(texts[0])
    assert length == len(shared)
    fresh, resumed = Session(config, make(mixer)[1], room=ROOM), Session(config, make(mixer)[1], room=ROOM)
    fresh.read(texts[0])
    resumed._state, resumed.length = jax.tree.map(lambda a: a.copy(), state), length
    resumed.read(texts[0][length:])
    np.testing.assert_allclose(resumed.logits, fresh.logits, rtol=0, atol=1e-5)


def test_few_programs():
    """Lengths and groups of all sizes are read by few programs, and one decodes."""
    prompts = make("retnet")[2]
    before = decoding.decode._cache_size()
    busy = serve("retnet", 3)
    busy.run([*prompts, *prompts[::-1], *prompts], 7)
    assert decoding.decode._cache_size() == before + 1


@pytest.mark.parametrize(
    "prompt, most, error, words",
    [
        ([], 1, UserError, "prompt 0 is empty"),
        ([1], 0, UserError, "--max-new-tokens 0"),
        ([1] * 90, 7, UserError, "prompt 0 and its continuation have 97 tokens, room is 96"),
        ([1, TEACHER.vocab_size], 1, ValueError, "ids 1 to 97 are not in a vocabulary of 97"),
    ],
)
def test_refuses_prompts(prompt, most, error, words):
    with pytest.raises(error, match=words):
        serve("softmax", 2).submit(prompt, most)


def test_refuses_settings():
    with pytest.raises(ValueError, match="slots=0"):
        serve("gla", 0)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        serve("gla", 1, stop=["a"])
    with pytest.raises(UserError, match='--stop ""'):
        serve("gla", 1, stop=[""], tokenizer=convert.byte_tokenizer())
    with pytest.raises(UserError, match="the prefix is empty"):
        serve("gla", 1).remember([])
