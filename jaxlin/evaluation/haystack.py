"""What RULER's prompts are made of: the words that needles are about, and the text that they are hidden in."""

from __future__ import annotations

import bisect
import functools
import importlib.resources
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlin.config import UserError
from jaxlin.evaluation.punkt import INSTALL
from jaxlin.evaluation.records import from_hub

ESSAYS = "baber/paul_graham_essays"  # on the hub


class Pairs(Sequence[str]):
    """Every "first-second", sorted and without repetition, as list(pairs) would be: made only when looked at.

    RULER's six million keys would take 800 MB.
    """

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._second = sorted(set(second))
        self._groups: list[list[str]] = []  # words whose pairs sort among each other's: old, old-fashioned
        for word in sorted(set(first), key=lambda word: word + "-"):
            if self._groups and word.startswith(self._groups[-1][0] + "-"):
                self._groups[-1].append(word)
            else:
                self._groups.append([word])
        sizes = (len(self._pairs(i)) if len(group) > 1 else len(self._second) for i, group in enumerate(self._groups))
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self))[index]
        group = bisect.bisect_right(self._ends, at)
        start = self._ends[group - 1] if group else 0
        if len(self._groups[group]) == 1:
            return f"{self._groups[group][0]}-{self._second[at - start]}"
        return self._pairs(group)[at - start]

    def _pairs(self, group: int) -> list[str]:
        return sorted({f"{first}-{second}" for first in self._groups[group] for second in self._second})


@functools.cache
def word_pairs() -> Pairs:
    """RULER's keys: every adjective-noun of wonderwords' lists. Raises UserError where it is not installed."""
    try:
        lists = importlib.resources.files("wonderwords.assets")
    except ModuleNotFoundError:
        raise UserError(f"this suite needs the package wonderwords: {INSTALL}") from None
    adjectives, nouns = (
        [line.rstrip() for line in lists.joinpath(f"{name}list.txt").read_text("utf-8").splitlines()]
        for name in ("adjective", "noun")
    )
    return Pairs(adjectives, nouns)


def read_haystack(path: Path | None) -> list[str]:
    """The words of the text in `path`, or in the field `text` of its JSON; without a path RULER's, from the hub.

    Raises UserError where it cannot be read.
    """
    if path is None:
        return split_words(" ".join(row["text"] for row in from_hub(ESSAYS, None, "train")))
    try:
        text = path.read_text("utf-8")
        return split_words(json.loads(text)["text"] if path.suffix == ".json" else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object with a text in its field 'text'") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def split_words(text: str) -> list[str]:
    """RULER's words of a haystack."""
    return re.sub(r"\s+", " ", text).split(" ")


@functools.lru_cache(maxsize=64)
def split_sentences(text: str) -> tuple[str, ...]:
    """Split by NLTK's Punkt, as RULER does, once `require_punkt` has found it."""
    import nltk  # pyright: ignore[reportMissingImports] -- of the extra eval

    return tuple(nltk.sent_tokenize(text))
