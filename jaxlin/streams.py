"""The two datasets that Grain does not have: shards read forward and shuffled, and tokens joined and cut to length.

Grain's own concat-then-split packs the same way, but its state does not survive JSON (tuples become lists, after which
it drops tokens); this one's state is two numbers and the place of its parent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxlin.sources import Document, Shard

Batch = dict[str, np.ndarray]
GROUP = 32  # documents tokenized together
WINDOW_DOCUMENTS = 8192  # a source without random access is shuffled within a window of so many documents
WINDOW_CHARACTERS = 1 << 26  # and of no more text than this


def segment_ids_of(starts: np.ndarray) -> np.ndarray:
    """1, 2, 3, ... for the documents of one sequence, whether or not the first one starts in it."""
    segments = np.cumsum(starts, dtype=np.int32)
    return segments - segments[0] + 1


class Packed(grain.IterDataset):
    """Groups of tokens, joined and cut into sequences of one length."""

    def __init__(self, parent: grain.IterDataset, length: int) -> None:
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(self._parent.__iter__(), self._length)


class _PackedIterator(grain.DatasetIterator):
    """The tokens not yet used always lie in one group, so that the state is its place and how much of it is used."""

    def __init__(self, parent: grain.DatasetIterator, length: int) -> None:
        super().__init__(parent)
        self._length = length
        self._restart(copy.deepcopy(parent.get_state()))

    def _restart(self, place: dict[str, Any]) -> None:
        self._place, self._used = place, 0
        self._group = {"tokens": np.zeros(0, np.int32), "starts": np.zeros(0, bool)}

    def _next_group(self) -> None:
        self._place, self._used = copy.deepcopy(self._parent.get_state()), 0
        self._group = next(self._parent)

    def __next__(self) -> Batch:
        parts, missing = [], self._length
        while missing:
            if self._used == len(self._group["tokens"]):
                self._next_group()
            part = slice(self._used, self._used + missing)
            parts.append((self._group["tokens"][part], self._group["starts"][part]))
            self._used += len(parts[-1][0])
            missing -= len(parts[-1][0])
        tokens, starts = (np.concatenate(column) for column in zip(*parts, strict=True))
        return {"tokens": tokens, "segment_ids": segment_ids_of(starts)}

    def get_state(self) -> dict[str, Any]:
        return {"place": self._place, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["place"])
        self._restart(state["place"])
        if state["used"]:
            self._next_group()
            self._used = state["used"]


class ShardedText(grain.IterDataset):
    """Groups of documents from shards that are read forward, epoch after epoch.

    Shuffling means: the shards in a new order each epoch, and their documents within a window, which an epoch's end
    closes. Worker n of N (`set_slice`) gives groups n, n + N, ..., so that together they give the same order.
    """

    def __init__(self, shards: Sequence[Shard], seed: int, shuffle: bool) -> None:
        super().__init__()
        self._arguments = (shards, seed, shuffle)
        self._slice = slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        self._slice = sl

    def __iter__(self) -> grain.DatasetIterator:
        return _ShardedIterator(*self._arguments, self._slice)


class _ShardedIterator(grain.DatasetIterator):
    """State: where the window starts (epoch, place of the shard in its order, row); groups used of it, and of all."""

    def __init__(self, shards: Sequence[Shard], seed: int, shuffle: bool, part: slice) -> None:
        super().__init__()
        self._shards, self._seed, self._shuffle, self._part = shards, seed, shuffle, part
        self.set_state({"epoch": 0, "shard": 0, "row": 0, "used": 0, "groups": 0})

    def get_state(self) -> dict[str, Any]:
        return dict(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        self._state, self._after = dict(state), (state["epoch"], state["shard"], state["row"])
        self._rows: Iterator[tuple[int, int, Document]] | None = None
        self._window: list[Document] = []
        if state["used"]:
            self._fill()

    def __next__(self) -> list[Document]:
        while True:
            if self._state["used"] * GROUP >= len(self._window):
                epoch, shard, row = self._after
                self._state |= {"epoch": epoch, "shard": shard, "row": row, "used": 0}
                self._fill()
                continue
            used, number = self._state["used"], self._state["groups"]
            self._state |= {"used": used + 1, "groups": number + 1}
            if number % (self._part.step or 1) == self._part.start:
                return self._window[used * GROUP : (used + 1) * GROUP]

    def _fill(self) -> None:
        """Read the window that starts at the state, and find where the next one starts."""
        epoch, shard, row = self._after
        if self._rows is None:
            self._rows = self._read(epoch, shard, row)
        self._window, characters = [], 0
        self._after = (epoch + 1, 0, 0)
        for shard, row, document in self._rows:
            self._window.append(document)
            characters += len(document)
            if len(self._window) == WINDOW_DOCUMENTS or characters >= WINDOW_CHARACTERS:
                self._after = (epoch, shard, row)
                break
        else:
            self._rows = None
        if self._shuffle:
            order = np.random.default_rng((self._seed, *self._place())).permutation(len(self._window))
            self._window = [self._window[i] for i in order]

    def _place(self) -> tuple[int, int, int]:
        return self._state["epoch"], self._state["shard"], self._state["row"]

    def _read(self, epoch: int, shard: int, row: int) -> Iterator[tuple[int, int, Document]]:
        """The documents of an epoch from a place on, each with the place after it."""
        order: Any = range(len(self._shards))
        if self._shuffle:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._shards))
        for place in range(shard, len(order)):
            start = row if place == shard else 0
            for after, document in enumerate(self._shards[order[place]].read(start), start + 1):
                yield place, after, document
