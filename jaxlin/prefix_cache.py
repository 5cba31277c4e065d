"""States of texts that many prompts begin with: system prompts, few-shot examples."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax

from jaxlin.config import UserError

ENTRIES = 32
BYTES = 1 << 30


class PrefixCache:
    """The latest used states, at most `entries` and `bytes` of them together; the longest known prefix is found."""

    def __init__(self, entries: int = ENTRIES, bytes: int = BYTES) -> None:
        if entries < 1 or bytes < 1:
            raise ValueError(f"entries={entries}, bytes={bytes}: must be at least 1")
        self._most, self._most_bytes = entries, bytes
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict()  # the latest used last

    def __len__(self) -> int:
        return len(self._states)

    @property
    def bytes(self) -> int:
        """Of all states together."""
        return sum(map(_bytes, self._states.values()))

    def put(self, prefix: Sequence[int], state: Any) -> None:
        """Keep the state after `prefix`; forget what was not used for longest. Raises UserError for one too large."""
        size, most = _bytes(state), self._most_bytes
        if size > most:
            raise UserError(f"a prefix of {len(prefix)} tokens: its state has {size} bytes, at most {most} are kept")
        self._states[tuple(prefix)] = state
        self._states.move_to_end(tuple(prefix))
        while len(self._states) > self._most or self.bytes > self._most_bytes:
            self._states.popitem(last=False)

    def longest(self, prompt: Sequence[int]) -> tuple[int, Any]:
        """(tokens, state) of the longest prefix that leaves something of the prompt to be read; (0, None) for none."""
        for length in sorted({len(prefix) for prefix in self._states}, reverse=True):
            prefix = tuple(prompt[:length])
            if length < len(prompt) and prefix in self._states:
                self._states.move_to_end(prefix)
                return length, self._states[prefix]
        return 0, None


def common_prefix(texts: Sequence[Sequence[int]]) -> list[int]:
    """What all of them begin with."""
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
    return [tokens[0] for tokens in same]


def _bytes(state: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(state))
