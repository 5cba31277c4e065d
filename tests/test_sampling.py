"""Sampling: frequencies are the distribution that each setting defines; seeds reproduce; what is out of range."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin.config import UserError
from jaxlin.sampling import Sampling, choose, mark, row_keys, tokens_seen

PROBABILITIES = np.array([0.1, 0.4, 0.02, 0.25, 0.15, 0.08])
COUNT = 20_000
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}  # quantiles of 99.9 %, by degrees of freedom


def drawn(sampling, logits, seen=None):
    """How often each token was chosen, of COUNT."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (COUNT, len(logits)))
    seen = None if seen is None else jnp.broadcast_to(seen, rows.shape)
    tokens = choose(sampling, row_keys(5, range(COUNT)), jnp.full(COUNT, 3, jnp.uint32), rows, seen)
    return np.bincount(tokens, minlength=len(logits))


def assert_follows(counts, expected):
    """Pearson's chi-square test at 99.9 %; what has no probability is never drawn."""
    expected = np.asarray(expected) / np.sum(expected)
    allowed = expected > 0
    assert not counts[~allowed].any()
    freedom = allowed.sum() - 1
    if freedom:
        wanted = COUNT * expected[allowed]
        assert np.sum((counts[allowed] - wanted) ** 2 / wanted) < CHI_SQUARE[freedom]


@pytest.mark.parametrize(
    "sampling, allowed",
    [
        (Sampling(1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(1.0, top_k=2), [1, 3]),
        (Sampling(1.0, top_k=99), [0, 1, 2, 3, 4, 5]),
        (Sampling(1.0, top_p=0.7), [1, 3, 4]),  # 0.4 and 0.25 are not enough
        (Sampling(1.0, top_p=0.39), [1]),
        (Sampling(1.0, top_k=3, top_p=0.8), [1, 3]),  # 0.4 and 0.25 are 0.81 of the 0.8 that three have
        (Sampling(1.0, min_p=0.3), [1, 3, 4]),  # 0.12 at least
        (Sampling(1.0, top_k=2, min_p=0.3), [1, 3]),
        (Sampling(1.0, min_p=1.0), [1]),
    ],
)
def test_who_may_be_chosen(sampling, allowed):
    expected = np.where(np.isin(np.arange(6), allowed), PROBABILITIES, 0)
    assert_follows(drawn(sampling, np.log(PROBABILITIES)), expected)


def test_temperature():
    """It comes before the choice of who may be chosen."""
    expected = PROBABILITIES**2
    assert_follows(drawn(Sampling(0.5), np.log(PROBABILITIES)), expected)
    expected[[0, 2, 5]] = 0  # of the sharpened distribution, 0.8 are the first two, 0.93 the first three
    assert_follows(drawn(Sampling(0.5, top_p=0.9), np.log(PROBABILITIES)), expected)


def test_repetition_penalty():
    """Positive scores are divided, negative ones multiplied; tokens that were not there keep theirs."""
    logits = np.array([2.0, -1.0, 1.0, 0.5, -0.5, 0.0])
    seen = np.array([True, True, False, False, False, True])
    expected = np.exp([1.0, -2.0, 1.0, 0.5, -0.5, 0.0])
    assert_follows(drawn(Sampling(1.0, repetition_penalty=2.0), logits, seen), expected)
    greedy = Sampling(repetition_penalty=2.5)
    assert drawn(greedy, logits, seen)[2] == COUNT  # 1.0 beats 2.0 / 2.5
    assert drawn(Sampling(), logits)[0] == COUNT


def test_transformers_agrees():
    """The processors whose definitions these are, on random scores."""
    torch = pytest.importorskip("torch", reason="transformers' processors need torch")
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(0)
    logits, text = rng.normal(0, 3, (4, 50)).astype(np.float32), rng.integers(0, 50, (4, 20))
    scores = torch.tensor(logits)
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.05),
    ]  # fmt: skip
    for processor in processors:
        scores = processor(torch.tensor(text), scores)
    expected = scores.softmax(-1).numpy()
    sampling = Sampling(0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    count, seen = 4000, tokens_seen(text.tolist(), 50)
    for row in range(4):
        tokens = choose(
            sampling,
            row_keys(row, range(count)),
            jnp.zeros(count, jnp.uint32),
            jnp.broadcast_to(logits[row], (count, 50)),
            jnp.broadcast_to(seen[row], (count, 50)),
        )
        found = np.bincount(tokens, minlength=50) / count
        assert not found[expected[row] == 0].any()
        np.testing.assert_allclose(found, expected[row], atol=5 * 0.5 / count**0.5)


def test_random_numbers():
    """They depend on the seed, the stream and the token's number, and on nothing else."""
    logits = jnp.zeros((3, 1000))

    def sample(seed, streams, numbers):
        keys = row_keys(seed, streams)
        return choose(Sampling(1.0), keys, jnp.array(numbers, jnp.uint32), logits[: len(streams)]).tolist()

    a, b, c = sample(1, [7, 8, 7], [0, 0, 1])
    assert len({a, b, c}) == 3
    assert sample(1, [8, 7], [0, 1]) == [b, c]
    assert sample(2, [7], [0]) != [a]


def test_tokens_seen():
    seen = tokens_seen([[1, 1, 3], []], 4)
    assert seen.tolist() == [[False, True, False, True], [False] * 4]
    seen = mark(jnp.asarray(seen), jnp.array([0, 2]))
    assert seen.astype(int).tolist() == [[1, 1, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(temperature=-1.0), "--temperature -1.0"),
        (dict(temperature=float("nan")), "--temperature nan"),
        (dict(temperature=float("inf")), "--temperature inf"),
        (dict(top_k=-1), "--top-k -1"),
        (dict(top_p=0.0), "--top-p 0.0"),
        (dict(top_p=1.5), "--top-p 1.5"),
        (dict(min_p=-0.1), "--min-p -0.1"),
        (dict(min_p=1.1), "--min-p 1.1"),
        (dict(min_p=float("nan")), "--min-p nan"),
        (dict(repetition_penalty=0.0), "--repetition-penalty 0.0"),
        (dict(repetition_penalty=float("inf")), "--repetition-penalty inf"),
    ],
)
def test_refuses(change, words):
    with pytest.raises(UserError, match=f"^{words}: must be"):
        Sampling(**change)
