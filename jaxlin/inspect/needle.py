"""Sequences of real text with a needle: the sentence of RULER's needles, about one of ten digits.

All needles are alike but for the digit, and as long: no place after it tells which it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlin.config import UserError
from jaxlin.evaluation.niah import Needle

DIGITS = "0123456789"
KEY = "harbor"
BEFORE = 32  # tokens of text before the needle
FOLDS = 5  # stretches of the text, each of which is tested by what was fitted on the others


@dataclass(frozen=True)
class Examples:
    """tokens [N, T], each with a needle that ends before `end`; labels and folds [N]."""

    tokens: np.ndarray
    end: int
    labels: np.ndarray
    folds: np.ndarray


def needles(tokenizer: Any) -> np.ndarray:
    """The ten needles, [10, n] tokens. Raises UserError for a tokenizer that makes other lengths or no difference."""
    sentences = [f" {Needle('number', KEY, digit).sentence}" for digit in DIGITS]
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sentences]
    if len({len(tokens) for tokens in found}) > 1 or len(set(map(tuple, found))) < len(DIGITS):
        raise UserError(
            "--examples: the tokenizer makes the ten digits' needles of different lengths; give --examples 0"
        )
    return np.array(found, np.int32)


def examples(stream: np.ndarray, tokenizer: Any, distances: Sequence[int], count: int, seed: int) -> Examples:
    """`count` examples, of places in `stream` chosen at random; each fold's lie in a stretch of its own.

    Of a multiple of 50, each fold has every digit as often as any other; else the counts differ by at most one. Raises
    UserError where the text is too short.
    """
    inserted = needles(tokenizer)
    after, window = max(distances), BEFORE + max(distances)
    stretch = len(stream) // FOLDS
    if stretch < window:
        raise UserError(
            f"--distances {after}: a needle's text of {window} tokens does not fit {FOLDS} times into "
            f"{len(stream)} tokens; give more --text, smaller --distances or --examples 0"
        )
    rng = np.random.default_rng(seed)
    folds, labels = np.arange(count) % FOLDS, np.arange(count) // FOLDS % len(DIGITS)
    places = folds * stretch + rng.integers(stretch - window + 1, size=count)
    texts = stream[places[:, None] + np.arange(window)]
    tokens = np.concatenate([texts[:, :BEFORE], inserted[labels], texts[:, BEFORE:]], axis=1)
    return Examples(tokens, BEFORE + inserted.shape[1], labels, folds)
