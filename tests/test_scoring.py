"""Scoring and decoding many sequences: batches, padding and neighbours never change a result."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxlin import convert
from jaxlin.config import MeshConfig, UserError
from jaxlin.evaluation import scoring
from jaxlin.evaluation.scoring import Budget, continuations, loglikelihoods, padded_length
from jaxlin.runs import Teacher
from jaxlin.sharding import make_mesh, param_shardings
from jaxlin.student import abstract_params
from tests.models import STUDENT_MIXERS, TEACHER, logits, random_params, student_of

MIXERS = ["softmax", *STUDENT_MIXERS]


def model_of(mixer, tokenizer=None):
    config = TEACHER if mixer == "softmax" else student_of(mixer)
    return Teacher(config, random_params(config), tokenizer)


def random_pairs(lengths, seed=0):
    """Pairs of the given (context, continuation) lengths."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, TEACHER.vocab_size, n).tolist() for n in pair) for pair in lengths]


LENGTHS = [(3, 1), (40, 5), (29, 3), (70, 26), (1, 32), (90, 1), (12, 30), (64, 2), (2, 2), (50, 40)]
PAIRS = random_pairs(LENGTHS)


def direct(model, pairs):
    """From the whole logits of each sequence alone, padded on the right so that one shape serves."""
    results = []
    for context, continuation in pairs:
        tokens = np.zeros((1, 96), np.int32)
        sequence = [*context, *continuation]
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
    """Batch size, bucket, neighbours, order: each against every sequence by itself."""
    model = model_of(mixer)
    expected = direct(model, PAIRS)
    assert_same(loglikelihoods(model, PAIRS, batch_tokens=384), expected)
    assert_same(loglikelihoods(model, PAIRS[::-1], batch_tokens=96), expected[::-1])
