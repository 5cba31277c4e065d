"""RULER's single-needle tasks S-NIAH-1, 2 and 3 (Hsieh et al. 2024, arXiv 2404.06654, table 2).

Prompts are those of lm-eval 0.4.13's `niah_single_1` to `niah_single_3` for the same seed, tokenizer, word lists and
haystack, one length a run. The numbers that choose a prompt's contents come from one generator in a fixed order, so
that order is part of the definition. Two things to know about it:

- The haystack grows by 500 words (S-NIAH-2, 3). Where not even 500 fit, as at 512 tokens, it is a single word, and the
  task hardly more than copying the needle.
- `length` counts the prompt without the first words of the answer, which it ends with, and 128 tokens for the answer.
"""

from __future__ import annotations

import bisect
import functools
import importlib.resources
import itertools
import json
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlin.config import UserError
from jaxlin.evaluation.niah import NOISE, Needle, Sample, magic_number
from jaxlin.evaluation.records import from_hub

ANSWER_TOKENS = 128
COUNT = 500  # questions of each length
LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of the essay's sentences
ESSAYS = "baber/paul_graham_essays"  # on the hub
INSTALL = "pip install wonderwords nltk"


@dataclass(frozen=True)
class Variant:
    """One of the tasks: what repeats, and what is hidden in it."""

    essay: bool
    kind: str


VARIANTS = {
    "niah_single_1": Variant(essay=False, kind="number"),
    "niah_single_2": Variant(essay=True, kind="number"),
    "niah_single_3": Variant(essay=True, kind="uuid"),
}


def samples(
    variant: Variant,
    tokenizer: Any,
    length: int,
    count: int = COUNT,
    *,
    seed: int = 0,
    keys: Sequence[str],
    essay: Sequence[str] = (),
) -> list[Sample]:
    """`count` questions of at most `length` tokens; the first ones are the same for every `count`.

    Args:
        variant: one of VARIANTS.
        tokenizer: counts and encodes tokens, with the special tokens that it adds by itself.
        length: tokens of prompt and answer.
        keys: words to choose the needle's from, `word_pairs()` for RULER's.
        essay: the haystack's words, for variants that need them.

    Raises:
        UserError: `length` has no room for a question, or `essay` too few words for it.
    """
    rng = random.Random(seed)
    draw = functools.partial(_draw, variant, rng, keys, essay)
    repeats = 5 if length < 4096 else 25
    step = 500 if variant.essay else repeats
    size = _haystack_size(draw, tokenizer, length, step, len(essay) if variant.essay else length)
    return [_fitting(draw, tokenizer, length, size, step) for _ in range(count)]


def _haystack_size(draw: Callable, tokenizer: Any, length: int, step: int, most: int) -> int:
    """How many units of haystack, of `most` that there are, a prompt of `length` tokens holds: n x `step`, else 1."""
    size, tokens = step, 0
    while tokens + ANSWER_TOKENS < length:
        needle, text = draw(size)
        tokens = _count(tokenizer, text + needle.value)
        if tokens + ANSWER_TOKENS > length:
            size -= step
            break
        if size > most:
            raise UserError(f"--haystack: {most} words are too few for prompts of {length} tokens")
        size += step
    return max(size, 1)


def _fitting(draw: Callable, tokenizer: Any, length: int, size: int, step: int) -> Sample:
    """A question with `size` units of haystack, or fewer where its needle is longer than that leaves room for."""
    while size > 0:
        needle, text = draw(size)
        if _count(tokenizer, text) + ANSWER_TOKENS <= length:
            prompt = text + needle.prefix
            return Sample(prompt, tokenizer(prompt, verbose=False)["input_ids"], needle.value)
        size -= step
    raise UserError(f"a needle-in-a-haystack prompt of {length} tokens: no room for the question and its answer")


def _draw(
    variant: Variant, rng: random.Random, keys: Sequence[str], essay: Sequence[str], size: int
) -> tuple[Needle, str]:
    """A needle and its question, in a haystack of `size` words or repetitions."""
    key = rng.choice(keys)
    value = magic_number(rng) if variant.kind == "number" else str(uuid.UUID(int=rng.getrandbits(128), version=4))
    needle = Needle(variant.kind, key, value)
    if variant.essay:
        sentences = _sentences(" ".join(essay[:size]).strip())
        at = int(len(sentences) * (rng.sample(DEPTHS, 1)[0] / 100))
        context = " ".join([" ".join(sentences[:at]), needle.sentence, " ".join(sentences[at:])])
    else:
        units = [" ".join(NOISE)] * size
        units.insert(rng.sample(range(size), 1)[0], needle.sentence)
        context = "\n".join(units)
    rng.sample(range(1), 1)  # RULER chooses which of its needles to ask for, even of one
    return needle, needle.question(context)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


@functools.lru_cache(maxsize=64)
def _sentences(text: str) -> tuple[str, ...]:
    """Split by NLTK's Punkt, as RULER does."""
    try:
        import nltk
    except ImportError:
        raise UserError(f"the needle tasks with essays need nltk: {INSTALL}") from None
    try:
        return tuple(nltk.sent_tokenize(text))
    except LookupError:
        raise UserError(
            "the needle tasks with essays need NLTK's punkt_tab: run `python -m nltk.downloader punkt_tab`, "
            "or set NLTK_DATA to a folder that holds it"
        ) from None


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
        raise UserError(f"the needle tasks need wonderwords: {INSTALL}") from None
    adjectives, nouns = (
        [line.rstrip() for line in lists.joinpath(f"{name}list.txt").read_text("utf-8").splitlines()]
        for name in ("adjective", "noun")
    )
    return Pairs(adjectives, nouns)


def essay_words(path: str) -> list[str]:
    """The haystack in `path` (text, or RULER's JSON with a field `text`) as words; without a path RULER's, from the hub.

    Raises UserError where it cannot be read.
    """
    if not path:
        return _words(" ".join(row["text"] for _, row in from_hub(ESSAYS, "train")))
    try:
        text = Path(path).read_text("utf-8")
        return _words(json.loads(text)["text"] if path.endswith(".json") else text)
    except UnicodeDecodeError as error:
        raise UserError(f"--haystack {path}: not UTF-8 text (byte {error.start}); convert it first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--haystack {path}: not a JSON object with a field 'text'") from error
    except OSError as error:
        raise UserError(f"--haystack {path}: cannot be read ({error.strerror or error})") from error


def _words(text: str) -> list[str]:
    return re.sub(r"\s+", " ", text).split(" ")
