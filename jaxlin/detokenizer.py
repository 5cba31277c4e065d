"""Tokens to text as they come: characters whole, and nothing of a stop string nor after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxlin.config import UserError

CONTEXT = 8
"""Tokens of a prompt that decide how the text after it begins: SentencePiece's have no space at the start of a text."""


class Detokenizer:
    """Tokens to text, one at a time. A token may hold a part of a character: it waits for the rest."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """`before` are the tokens of a text that goes on, all of it shown."""
        self.whole = True
        """Whether every token so far has been given out."""
        self._tokenizer = tokenizer
        # The last complete piece, for what comes after it, and what is not yet complete.
        self._tokens: list[int] = list(before[-CONTEXT:])
        self._context = len(self._tokens)  # how many of them are that piece
        self._shown = len(self._decode(self._tokens))  # characters of their text that were given out

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        self.whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # what an unfinished character decodes to
        piece = text[self._shown : len(text) if self.whole else -1]
        self._shown += len(piece)
        if self.whole:
            self._tokens = self._tokens[self._context :]
            self._context, self._shown = len(self._tokens), len(self._decode(self._tokens))
        return piece

    def flush(self) -> str:
        """What is left: a character that never became complete."""
        return self._decode(self._tokens)[self._shown :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextUntil:
    """A `Detokenizer` whose text ends before the first of some stop strings.

    What may be the beginning of a stop string is held back until it is known to be none. Of several that end with the
    same token the one that begins first counts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        """The text goes on from the tokens `before`. Raises UserError for an empty stop string."""
        check_stops(stops)
        self.text = ""
        """All that was given out."""
        self.stopped = False
        """Whether a stop string was found: no further token counts."""
        self.kept = 0
        """Tokens whose text lies wholly before the stop string; all, where none was found."""
        self._detokenizer, self._stops = Detokenizer(tokenizer, before), tuple(stops)
        self._held = ""
        self._count = 0
        self._ends: list[tuple[int, int]] = []  # (tokens, characters) where both end together, in what is held

    def push(self, token: int) -> str:
        """The text that is certain to stay and that was not before `token`."""
        if self.stopped:
            return ""
        self._count += 1
        return self._add(self._detokenizer.push(token), whole=self._detokenizer.whole)

    def flush(self) -> str:
        """What was held back, at the end of the tokens."""
        if self.stopped:
            return ""
        piece = self._add(self._detokenizer.flush(), whole=True)
        if self.stopped:
            return piece
        self.kept = self._count
        return piece + self._give(len(self._held))

    def _add(self, piece: str, *, whole: bool) -> str:
        self._held += piece
        length = len(self.text) + len(self._held)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = len(self.text) + min(found)
        else:
            if whole:
                self._ends.append((self._count, length))
            end = length - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        while self._ends and self._ends[0][1] <= end:
            self.kept = self._ends.pop(0)[0]
        return self._give(end - len(self.text))

    def _give(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece


def check_stops(stops: Iterable[str]) -> None:
    """Refuse a stop string that every text holds."""
    if any(not stop for stop in stops):
        raise UserError('--stop "": an empty stop string would end every text at once; leave it out')


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with, but is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
