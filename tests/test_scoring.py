"""Scoring and decoding many sequences: batches, padding and neighbours never change a result."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxlin import generate
from jaxlin.config import MeshConfig, UserError
from jaxlin.evaluation import scoring
from jaxlin.evaluation.scoring import Budget, continuations, loglikelihoods, padded_length
from jaxlin.runs import Teacher
from jaxlin.sharding import make_mesh, param_shardings
from jaxlin.student import abstract_params
from tests.models import STUDENT_MIXERS, TEACHER, logits, random_params, student_of

FAST = ("softmax", "gated_deltanet")
MIXERS = [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in ["softmax", *STUDENT_MIXERS]]
DECODING = ["softmax", *(pytest.param(m, marks=pytest.mark.slow) for m in STUDENT_MIXERS)]
# Those of 49 to 64 tokens, and those of up to 32 that follow, fill batches of two shapes: 2 x 64 and 4 x 32.
LENGTHS = [(40, 12), (29, 3), (3, 1), (12, 20), (32, 33), (1, 32), (50, 14), (20, 5), (60, 1), (10, 9), (2, 2), (17, 1)]


def model_of(mixer):
    config = TEACHER if mixer == "softmax" else student_of(mixer)
    return Teacher(config, random_params(config), None)


def random_pairs(lengths, seed=0):
    """Pairs of the given (context, continuation) lengths."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, TEACHER.vocab_size, n).tolist() for n in pair) for pair in lengths]


PAIRS = random_pairs(LENGTHS)
PROMPTS = [context for context, _ in PAIRS if len(context) in (1, 3, 29, 32)]  # one batch of 4 x 32
NEW = 1 + 2 * generate.BLOCK  # tokens


@functools.cache
def direct(mixer):
    """From the whole logits of each sequence alone, padded on the right so that one shape serves."""
    model, results = model_of(mixer), []
    for context, continuation in PAIRS:
        sequence = [*context, *continuation]
        tokens = np.zeros((1, 65), np.int32)
        tokens[0, : len(sequence)] = sequence
        log = np.asarray(jax.nn.log_softmax(logits(model.config, model.params, tokens)[0]), np.float64)
        log = log[len(context) - 1 : len(sequence) - 1]
        results.append((log[np.arange(len(log)), continuation].sum(), bool((log.argmax(-1) == continuation).all())))
    return results


def assert_same(found, expected):
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=0, atol=1e-4)
    assert [b for _, b in found] == [b for _, b in expected]


@pytest.mark.parametrize("mixer", MIXERS)
def test_batches_change_nothing(mixer):
    """Neighbours, batch size, padding and order: two rows of 64 tokens or four of 32, against each sequence alone."""
    model, expected = model_of(mixer), direct(mixer)
    assert_same(loglikelihoods(model, PAIRS, batch_tokens=128), expected)
    assert_same(loglikelihoods(model, PAIRS[:3:-1], batch_tokens=130), expected[:3:-1])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["softmax", *STUDENT_MIXERS])
def test_buckets_change_nothing(mixer, monkeypatch):
    """Longer padding, whole batches, rows of padding only, and other widths of the head."""
    model, expected = model_of(mixer), direct(mixer)
    assert_same(loglikelihoods(model, PAIRS, batch_tokens=1024), expected)
    monkeypatch.setattr(scoring, "padded_length", lambda n: 96)
    monkeypatch.setattr(scoring, "HEAD_TOKENS", 8)
    assert_same(loglikelihoods(model, PAIRS, batch_tokens=192), expected)


@pytest.mark.parametrize("mixer", DECODING)
def test_sharing_changes_nothing(mixer, monkeypatch):
    """Contexts that are read once, for several continuations; beside pairs that stand alone."""
    model = model_of(mixer)
    (context, long), (other, singles), *rest = random_pairs([(50, 12), (60, 4), (2, 3), (20, 1)])
    pairs = [(context, long[:n]) for n in (1, 5, 12, 3)] + [(other, [token]) for token in singles] + rest
    pairs = pairs[::2] + pairs[1::2]
    groups, alone = scoring._share(pairs, 256)
    assert [len(group) for group in groups] == [4, 4] and sorted(pairs[i] for i in alone) == sorted(rest)
    assert scoring._share(pairs, 257) == ([], list(range(10)))
    expected, seen = loglikelihoods(model, pairs, batch_tokens=128), []
    monkeypatch.setitem(scoring.WORTH_SHARING, "cpu", 0)
    assert_same(loglikelihoods(model, pairs, batch_tokens=128, progress=seen.append), expected)
    assert sum(seen) == 10


def test_greedy_and_order():
    """A continuation that greedy decoding gives is greedy, one that ends otherwise is not; neither moves the other."""
    model = model_of("softmax")
    answers = continuations(model, PROMPTS, NEW, stop_ids=(), batch_tokens=128)
    answers = [a[: 1 if len(p) > 16 else 17] for p, a in zip(PROMPTS, answers, strict=True)]
    other = [[*answer[:-1], (answer[-1] + 1) % TEACHER.vocab_size] for answer in answers]
    pairs = [pair for p, a, o in zip(PROMPTS, answers, other, strict=True) for pair in ((p, a), (p, o))]
    found = loglikelihoods(model, pairs, batch_tokens=128)
    assert [greedy for _, greedy in found] == [True, False] * len(PROMPTS)
    assert all(right > wrong for (right, _), (wrong, _) in zip(found[::2], found[1::2], strict=True))


def test_progress_and_nothing():
    model, seen = model_of("softmax"), []
    loglikelihoods(model, PAIRS, batch_tokens=128, progress=seen.append)
    assert sum(seen) == len(PAIRS) and len(seen) > 1
    assert loglikelihoods(model, []) == []


def on_mesh(model):
    """The model spread over eight devices, and their mesh."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    shardings = param_shardings(abstract_params(model.config), mesh)
    return Teacher(model.config, jax.tree.map(jax.device_put, model.params, shardings), None), mesh


def test_on_a_mesh():
    model, mesh = on_mesh(model_of("softmax"))
    chosen = [i for i, (context, continuation) in enumerate(PAIRS) if len(context) + len(continuation) <= 33]
    found = loglikelihoods(model, [PAIRS[i] for i in chosen], batch_tokens=256, mesh=mesh)
    assert_same(found, [direct("softmax")[i] for i in chosen])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", FAST)
def test_continuations_on_a_mesh(mixer):
    alone = continuations(model_of(mixer), PROMPTS, NEW, stop_ids=(), batch_tokens=128)
    model, mesh = on_mesh(model_of(mixer))
    assert continuations(model, PROMPTS, NEW, stop_ids=(), batch_tokens=256, mesh=mesh) == alone


@pytest.mark.parametrize("mixer", DECODING)
def test_continuations(mixer):
    """Those of each prompt alone; a stop token ends its own row and no other."""
    model = model_of(mixer)
    alone = [generate.generate(model.config, model.params, [p], max_new_tokens=NEW)[0] for p in PROMPTS]
    assert continuations(model, PROMPTS, NEW, stop_ids=(), batch_tokens=128) == alone
    stop = alone[0][2]
    until = [a[: a.index(stop)] if stop in a else a for a in alone]
    assert continuations(model, PROMPTS, NEW, stop_ids=(stop,), batch_tokens=128) == until


class Spelling:
    """A tokenizer for which token 65 is the letter A."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def test_stop_strings():
    """What comes after a stop string is not waited for: the first block that holds it is the last."""
    model = model_of("softmax")
    model = Teacher(model.config, model.params, Spelling())
    whole = continuations(model, PROMPTS, NEW, stop_ids=(), batch_tokens=128)
    stop = "".join(map(chr, whole[0][1:3]))
    found = continuations(model, PROMPTS, NEW, stop_strings=(stop,), stop_ids=(), batch_tokens=128)
    for tokens, expected in zip(found, whole, strict=True):
        text = "".join(map(chr, expected))
        assert tokens == expected[: len(tokens)]
        assert stop in text or len(tokens) == NEW
        assert text.partition(stop)[0] == "".join(map(chr, tokens)).partition(stop)[0]
    assert len(found[0]) < NEW


def out_of_memory(largest):
    """`_in_batches` on a device where more than `largest` rows do not fit; gives the rows that were tried."""
    tried = []

    def run(chosen, length, rows):
        tried.append((len(chosen), length, rows))
        if rows > largest:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    return tried, run


def test_out_of_memory(capsys):
    tried, run = out_of_memory(4)
    budget = Budget(64 * 16)
    scoring._in_batches([60] * 9 + [10] * 3, budget, 1, run, None)
    assert tried == [(12, 64, 16), (8, 64, 8), (4, 64, 4), (4, 64, 4), (4, 64, 4)]
    assert capsys.readouterr().err == "note: 16 sequences of 64 tokens are too much memory; halving the batch\n"
    scoring._in_batches([60], budget, 1, run, None)  # remembers
    assert tried[-1] == (1, 64, 4) and not capsys.readouterr().err

    _, run = out_of_memory(0)
    with pytest.raises(UserError, match="out of memory: a sequence of 64 tokens does not fit"):
        scoring._in_batches([60], Budget(64), 1, run, None)

    def broken(chosen, length, rows):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        scoring._in_batches([60], Budget(64), 1, broken, None)


def test_padded_lengths(monkeypatch):
    found = sorted({padded_length(n) for n in range(1, 4097)})
    assert found == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert all(n <= padded_length(n) < max(2 * n, 17) for n in range(1, 4097))
    monkeypatch.setattr(scoring, "HALF_STEPS", {})  # as on an accelerator
    assert sorted({padded_length(n) for n in range(1, 1025)}) == [16, 32, 64, 128, 256, 384, 512, 768, 1024]
    assert all(n <= padded_length(n) < max(2 * n, 17) for n in range(1, 4097))


@pytest.mark.parametrize(
    "pair, words",
    [
        (([], [1]), "context 1 is empty"),
        (([1], []), "continuation 1 is empty"),
        (([1], [TEACHER.vocab_size]), "of pair 1 are not in a vocabulary of 97"),
        (([-1], [1]), "ids -1 to 1 of pair 1"),
    ],
)
def test_bad_pairs(pair, words):
    with pytest.raises(ValueError, match=words):
        loglikelihoods(model_of("softmax"), [PAIRS[0], pair])


def test_bad_budget():
    with pytest.raises(UserError, match="--batch-tokens 0: must be at least 1"):
        Budget(0)
