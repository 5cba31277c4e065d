"""Which documents train, and which are held out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxlin.sources import Document, Documents, Shard

Corpus = Documents | list[Shard]


@dataclass(frozen=True)
class _View:
    """Some documents of a corpus: number i is `documents[index(i)]`."""

    documents: Documents
    length: int
    index: Callable[[int], int]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Document:
        return self.documents[self.index(index)]


@dataclass(frozen=True)
class _Halves:
    """A corpus of one document, cut in two: its end, which is then held out, and the rest."""

    whole: Documents
    fraction: float

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Document:
        document = self.whole[0]
        cut = round(len(document) * (1 - min(self.fraction, 0.5)))
        return document[:cut] if index else document[cut:]


def split(corpus: Corpus, fraction: float) -> tuple[Corpus, Iterator[Document]]:
    """The documents to train on, and those held out: every n-th from the first on, n = 1 / fraction and at least 2.

    Held-out documents come in a fixed random order where the corpus has random access. A fraction of 0 holds out none.
    """
    if fraction <= 0:
        return corpus, iter(())
    period = max(2, round(1 / fraction))
    if isinstance(corpus, list):
        heldout = (itertools.islice(shard.read(0), 0, None, period) for shard in corpus)
        training = [Shard(s.name, functools.partial(_read_training, s.read, period)) for s in corpus]
        return training, itertools.chain.from_iterable(heldout)
    if len(corpus) == 1:
        corpus = _Halves(corpus, fraction)
    places = np.random.default_rng(0).permutation(np.arange(0, len(corpus), period))
    training = _View(corpus, len(corpus) - len(places), functools.partial(_nth_training, period))
    return training, (corpus[int(place)] for place in places)


def documents(corpus: Corpus) -> Iterator[Document]:
    """Every document once, in order."""
    if isinstance(corpus, list):
        return itertools.chain.from_iterable(shard.read(0) for shard in corpus)
    return (corpus[index] for index in range(len(corpus)))


def _nth_training(period: int, number: int) -> int:
    return number + number // (period - 1) + 1


def _read_training(read: Callable[[int], Iterator[Document]], period: int, start: int) -> Iterator[Document]:
    first = _nth_training(period, start)
    return (document for place, document in enumerate(read(first), first) if place % period)
