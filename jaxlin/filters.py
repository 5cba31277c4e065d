"""Which responses, and which prompts, are not worth learning from: loops, repetition, things said before."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

LOOP_PERIOD = 64  # the longest loop that is looked for, in tokens
LOOP_TURNS = 3  # times that it must have come round, and
LOOP_TOKENS = 48  # tokens that it must fill, so that a short list is none
NGRAM = 4  # words that are compared with those elsewhere in a response
SHINGLE = 3  # words that are compared with another prompt's
BANDS, ROWS = 16, 4  # of a MinHash signature: prompts with one band in common are compared
PRIME = (1 << 31) - 1


def normalized(text: str) -> str:
    """`text` with nothing that makes no difference: case, and how much white space there is."""
    return " ".join(text.casefold().split())


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the tokens end in one piece over and over: a model that finds no end."""
    for period in range(1, min(LOOP_PERIOD, len(tokens) // LOOP_TURNS) + 1):
        size = max(LOOP_TURNS * period, LOOP_TOKENS)
        if size <= len(tokens) and list(tokens[-size:-period]) == list(tokens[len(tokens) - size + period :]):
            return True
    return False


def repetition(text: str) -> float:
    """The share of word n-grams (n = NGRAM) that were there before, from 0 to below 1."""
    words = normalized(text).split()
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class NearDuplicates:
    """Texts seen so far, and whether a new one is about the same (MinHash with banding; Broder 1997).

    Two texts are when the Jaccard index of their sets of word triples is at least `threshold`: candidates are found by
    their signatures, then compared exactly. Of pairs at 0.8 the signatures find 99.98 %. 1 means equal triples.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        random = np.random.default_rng(0)
        self._a, self._b = random.integers(1, PRIME, (2, BANDS * ROWS, 1), dtype=np.int64)
        self._seen: list[np.ndarray] = []
        self._buckets: dict[tuple[int, bytes], list[int]] = {}

    def add(self, text: str) -> bool:
        """Whether a text like it was seen; if not, it is from now on."""
        shingles = _shingles(text)
        signature = ((self._a * shingles + self._b) % PRIME).min(axis=1).reshape(BANDS, ROWS)
        keys = [(i, band.tobytes()) for i, band in enumerate(signature)]
        candidates = {index for key in keys for index in self._buckets.get(key, [])}
        if any(_jaccard(shingles, self._seen[index]) >= self._threshold for index in candidates):
            return True
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._seen))
        self._seen.append(shingles)
        return False


def _shingles(text: str) -> np.ndarray:
    """The hashes of a text's word n-grams (n = SHINGLE), each once; of all its words where it is shorter."""
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    pieces = [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]
    return np.unique(np.array([zlib.crc32(piece.encode()) & PRIME for piece in pieces], np.int64))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
