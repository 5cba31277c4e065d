"""A small needle in a haystack, after RULER's S-NIAH-1 (Hsieh et al. 2024, arXiv 2404.06654, table 2): no downloads.

A number is hidden in a text that repeats itself, and asked for at the end. Lengths are of the whole prompt, in tokens.
`ruler.py` makes RULER's own prompts, from the same sentences.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlin.config import UserError

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
BEFORE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
AFTER = "\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
PREFIX = "The special magic {kind} for {key} mentioned in the provided text is"  # how the answer begins
_WORDS = """
anchor basket beacon canyon castle cellar cherry circus cobalt copper cricket dagger desert dragon engine falcon
feather forest garden guitar hammer harbor helmet island jacket jungle kettle ladder lantern lemon magnet maple marble
meadow mirror needle nickel orange orchid oyster paddle parrot pepper pillow planet pocket puzzle rabbit ribbon rocket
saddle salmon shovel silver spider temple ticket timber tunnel turtle velvet violin walnut window
"""
WORDS = tuple(_WORDS.split())
ANSWER_TOKENS = 16  # room for a number of seven digits, one token each, and a few words
BATCH = 16  # prompts answered together


@dataclass(frozen=True)
class Needle:
    """What is hidden: the `kind` ("number" or "uuid") of magic `value` for `key`."""

    kind: str
    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The needle."""
        return NEEDLE.format(kind=self.kind, key=self.key, value=self.value)

    def question(self, context: str) -> str:
        """`context` between the instruction and the question."""
        return BEFORE.format(kind=self.kind) + context + AFTER.format(kind=self.kind, key=self.key)

    @property
    def prefix(self) -> str:
        """The part of the answer that the prompt gives."""
        return PREFIX.format(kind=self.kind, key=self.key)


@dataclass(frozen=True)
class Sample:
    """One question."""

    prompt: str
    tokens: list[int]
    value: str

    def answered(self, text: str) -> bool:
        """Whether `text` holds the value, in either case."""
        return self.value.lower() in text.lower()


# Prompts to continuations, as token ids.
Answer = Callable[[list[list[int]]], list[list[int]]]


def magic_number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def samples(tokenizer: Any, length: int, count: int, seed: int = 0) -> list[Sample]:
    """`count` questions of at most `length` tokens, as long as whole sentences allow; the same for the same seed.

    Raises UserError where `length` has no room for the question itself.
    """
    return [_sample(tokenizer, length, random.Random(f"{seed} {length} {i}")) for i in range(count)]


def _sample(tokenizer: Any, length: int, rng: random.Random) -> Sample:
    needle = Needle("number", rng.choice(WORDS), magic_number(rng))
    depth = rng.random()

    def prompt(sentences: int) -> str:
        haystack = [NOISE[i % len(NOISE)] for i in range(sentences)]
        haystack.insert(round(depth * sentences), needle.sentence)
        return f"{needle.question(' '.join(haystack))} {needle.prefix}"

    def encode(sentences: int) -> list[int]:
        return tokenizer(prompt(sentences), add_special_tokens=False, verbose=False)["input_ids"]

    # Every sentence is at least a token, so `length` sentences are too many.
    fitting = bisect.bisect_right(range(length + 1), length, key=lambda n: len(encode(n))) - 1
    if fitting < 0:
        raise UserError(f"a needle-in-a-haystack prompt of {length} tokens: the question alone is {len(encode(0))}")
    return Sample(prompt(fitting), encode(fitting), needle.value)


def shortest(tokenizer: Any) -> int:
    """A length that has room for any question."""
    needle = Needle("number", max(WORDS, key=len), "9999999")
    texts = (needle.sentence, needle.question(""), " " + needle.prefix)
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) + 8


def score(answer: Answer, tokenizer: Any, length: int, count: int, seed: int = 0) -> float:
    """The share of `count` questions of `length` tokens whose number appears in the answer."""
    questions = samples(tokenizer, length, count, seed)
    right = 0
    for start in range(0, count, BATCH):
        batch = questions[start : start + BATCH]
        for question, tokens in zip(batch, answer([q.tokens for q in batch]), strict=True):
            right += question.answered(tokenizer.decode(tokens, skip_special_tokens=True))
    return right / count


def scores(
    answer: Answer, tokenizer: Any, lengths: Sequence[int], count: int, seed: int = 0
) -> dict[str, float | None]:
    """`score` by length; None where the question has no room."""
    room = shortest(tokenizer)
    return {str(n): score(answer, tokenizer, n, count, seed) if n >= room else None for n in lengths}
