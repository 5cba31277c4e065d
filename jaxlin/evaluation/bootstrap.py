"""Bootstrap intervals of means over examples (Efron 1979): paired where models answered the same prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

DRAWS = 2000
CHUNK = 1 << 20  # examples drawn at one time


@dataclass(frozen=True)
class Series:
    """Scores of examples. Series of one `pairing` (and so of one length) are drawn from together."""

    values: Sequence[float]
    pairing: Hashable


def resample(series: Mapping[Key, Series], *, draws: int = DRAWS, seed: int = 0) -> dict[Key, np.ndarray]:
    """The mean of each series over `draws` resamples of its examples, [draws].

    Resamples depend on the pairing and the seed only, not on what else is drawn.
    """
    paired: dict[Hashable, list[Key]] = {}
    for key, one in series.items():
        paired.setdefault(one.pairing, []).append(key)
    means: dict[Key, np.ndarray] = {}
    for pairing, keys in paired.items():
        values = np.array([series[key].values for key in keys], np.float64)
        digest = hashlib.sha256(repr(pairing).encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8])])
        found = []
        for start in range(0, draws, step := max(1, CHUNK // values.shape[1])):
            chosen = rng.integers(values.shape[1], size=(min(step, draws - start), values.shape[1]))
            found.append(values[:, chosen].mean(-1))
        means |= zip(keys, np.concatenate(found, axis=1), strict=True)
    return means


def interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def ranks(draws: Sequence[np.ndarray], confidence: float = 0.95) -> list[tuple[int, int]]:
    """Best and worst rank that each model may have, 1 for the highest mean.

    A model is placed above another only where the interval of their difference is above 0.
    """
    above = np.array([[interval(a - b, confidence)[0] > 0 for b in draws] for a in draws])
    return [(1 + int(above[:, i].sum()), len(draws) - int(above[i].sum())) for i in range(len(draws))]
