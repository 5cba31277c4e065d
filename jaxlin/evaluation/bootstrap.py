"""Intervals of means over examples, by bootstrap: paired where models answered the same prompts.

A resample weighs the examples by independent exponential numbers, normalised (Rubin 1981). Scores have bounds, and an
example that was not drawn might lie there: the lower end of an interval is that of means with one more example at the
lower bound, the upper end of means with one at the upper bound (Gaffke 2005; Learned-Miller and Thomas 2019, arXiv
1905.06208). Up to the noise of resampling, of hits and misses this is Clopper and Pearson's interval: 0 of 100 is at
most 3.6 %. Of paired differences that all have one sign it then decides as the sign test does: five do not, six do.

Means of several tasks are resampled task by task, with one such example in all: 0 of 1,200 is at most 0.3 %, in one
task or in twelve (no other shares of hits make none likelier at the same mean: Hoeffding 1956). Of other scores these
are approximations; of tasks with 20 examples each an end misses the truth in about 3 % of cases instead of 2.5 %.
Numbers without bounds have no such example; their weights are the more uneven, the fewer they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.special import ndtri, stdtrit

Key = TypeVar("Key", bound=Hashable)

DRAWS = 10_000
CHUNK = 1 << 20  # weights drawn at one time
SHARES = (0.0, 1.0)
ROUNDING = 1e-12  # relative: of weighted means of equal numbers


@dataclass(frozen=True)
class Series:
    """Scores of examples. Series of one `pairing` (and so of one length) are drawn from together."""

    values: Sequence[float]
    pairing: Hashable
    bounds: tuple[float, float] | None = SHARES
    """What a score can be at least and at most; None where nobody knows."""


@dataclass(frozen=True)
class Mean:
    """The mean of a series over resamples; arrays are [draws]."""

    values: np.ndarray
    """Of the examples that are there."""
    total: np.ndarray
    """Of their weights, each of which is 1 on average."""
    unseen: np.ndarray
    """Weight of an example that is not there."""
    examples: int
    bounds: tuple[float, float] | None
    pairing: Hashable


@dataclass(frozen=True)
class Draws:
    """A number over resamples, each [draws]: with what was not drawn at its worst, and at its best."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Draws:
        """Of a number without bounds."""
        return cls(values, values)

    @classmethod
    def of_column(cls, parts: Sequence[tuple[float, Mean]]) -> Draws:
        """The sum of means, each times its weight; the weights add up to 1.

        One more example is at either bound: one of all together, where a single one weighs most. Means of one pairing
        have the same examples.
        """
        weights, means = zip(*parts, strict=True)
        values = np.dot(weights, [mean.values for mean in means])
        bounds = [mean.bounds for mean in means if mean.bounds]
        if len(bounds) < len(means):
            return cls.of(values)
        of_examples = {mean.pairing: mean for mean in means}
        weight_of = {key: sum(w for w, mean in parts if mean.pairing == key) for key in of_examples}
        most = max(weight_of[key] / mean.examples for key, mean in of_examples.items())
        total = sum(mean.total for mean in of_examples.values()) / sum(mean.examples for mean in of_examples.values())
        unseen = means[0].unseen * most / total
        low, high = ((values + unseen * np.dot(weights, ends)) / (1 + unseen) for ends in zip(*bounds, strict=True))
        return cls(low, high)

    @classmethod
    def weighted(cls, parts: Iterable[tuple[float, Draws]]) -> Draws:
        """The sum of draws, each times its weight, which is above 0."""
        weights, drawn = zip(*parts, strict=True)
        return cls(np.dot(weights, [d.low for d in drawn]), np.dot(weights, [d.high for d in drawn]))

    def __add__(self, moves: np.ndarray) -> Draws:
        return Draws(self.low + moves, self.high + moves)

    def __sub__(self, other: Draws) -> Draws:
        return Draws(self.low - other.high, self.high - other.low)

    def __truediv__(self, other: Draws) -> Draws:
        """Of numbers above 0."""
        return Draws(self.low / other.high, self.high / other.low)

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """From the lower tail to the upper one; None where the draws are all alike."""
        if all(np.ptp(values) <= ROUNDING * np.abs(values).max() for values in (self.low, self.high)):
            return None
        tail = 50 * (1 - confidence)
        return float(np.percentile(self.low, tail)), float(np.percentile(self.high, 100 - tail))


def resample(series: Mapping[Key, Series], *, draws: int = DRAWS, seed: int = 0) -> dict[Key, Mean]:
    """The mean of each series over `draws` resamples of its examples.

    Resamples depend on the pairing and the seed only, not on what else is drawn.
    """
    paired: dict[tuple[Hashable, bool], list[Key]] = {}
    for key, one in series.items():
        paired.setdefault((one.pairing, one.bounds is None), []).append(key)
    means: dict[Key, Mean] = {}
    for (pairing, unbounded), keys in paired.items():
        values = np.array([series[key].values for key in keys], np.float64)
        digest = hashlib.sha256(repr(pairing).encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8])])
        # One weight decides the ends for few hits: its quantiles, in a random order, have no ragged tails.
        unseen = rng.permutation(-np.log1p(-(np.arange(draws) + 0.5) / draws))
        shape = _shape(values.shape[1]) if unbounded else 1.0
        sums, totals = [], []
        for start in range(0, draws, step := max(1, CHUNK // values.shape[1])):
            weights = rng.standard_gamma(shape, (min(step, draws - start), values.shape[1]))
            sums.append(values @ weights.T)
            totals.append(weights.sum(1))
        total, of_keys = np.concatenate(totals), np.concatenate(sums, axis=1)
        for key, of_key in zip(keys, of_keys, strict=True):
            means[key] = Mean(of_key / total, total, unseen, values.shape[1], series[key].bounds, pairing)
    return means


def _shape(n: int) -> float:
    """Of the Gamma weights with which the interval of a mean of n numbers is as wide as Student's.

    The mean's variance is s^2 / (n shape + 1), s^2 that of the numbers as they are; Student's s^2 / (n - 1).
    """
    return max((n - 1) * (float(ndtri(0.975)) / float(stdtrit(max(n - 1, 1), 0.975))) ** 2 - 1, 0.1) / n


def ranks(draws: Sequence[Draws], confidence: float = 0.95) -> list[tuple[int, int]]:
    """Best and worst rank that each model may have, 1 for the highest mean.

    A model is placed above another only where the interval of their difference is above 0.
    """

    def is_above(a: Draws, b: Draws) -> bool:
        found = (a - b).interval(confidence)
        return found is not None and found[0] > 0

    above = np.array([[is_above(a, b) for b in draws] for a in draws])
    return [(1 + int(above[:, i].sum()), len(draws) - int(above[i].sum())) for i in range(len(draws))]


def rank_text(rank: tuple[int, int]) -> str:
    """A rank, or the range that it is in."""
    return str(rank[0]) if rank[0] == rank[1] else f"{rank[0]} to {rank[1]}"
