"""What every stage of a run is trained and measured on: text, or in stage 3 conversations where the run has some."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jaxlin import packing, processes
from jaxlin.config import RunConfig, UserError
from jaxlin.data import heldout_batches, train_batches, training_text
from jaxlin.streams import Batch

FEW = 250_000
"""Tokens that a text is counted up to before training: of a text with fewer it is said how often it is read."""


class TrainingData:
    """The batches of a run's stages, and where they are, which checkpoints hold."""

    def __init__(self, run: RunConfig, stages: Iterable[int], tokenizer: Any, *, resuming: bool) -> None:
        self._run, self._unit = run, math.gcd(*(s.batch_size for s in (run.stage1, run.stage2, run.stage3)))
        self.report: dict[str, Any] = {}
        """What became of the conversations; empty where there are none."""
        self.summary: list[str] = []
        """For people: the same in a line, and how often a short text is read."""
        self.epoch_tokens: int | None = None
        """Token positions of all conversations' rows."""
        kinds = {n: run.kind(n) for n in stages}
        self._iterators: dict[str, grain.DatasetIterator] = {}
        heldout: dict[str, list[Batch]] = {}
        if "text" in kinds.values():
            wanted = sum(stage.tokens for n, stage in run.stages().items() if kinds.get(n) == "text")
            most = min(FEW, wanted // 2)
            corpus, count = training_text(run.text, run.data, tokenizer, most)
            if count < most:
                self.summary.append(f"text: {count:,} tokens to train on, each read {wanted / count:,.1f} times")
            self._iterators["text"] = train_batches(corpus, run.data, tokenizer, batch_size=self._unit, seed=run.seed)
            heldout["text"] = heldout_batches(run.text, run.data, tokenizer, batch_size=heldout_size(run))
        if "conversations" in kinds.values():
            if run.data.heldout_fraction <= 0:
                raise UserError("--data.heldout-fraction 0 keeps back no conversations to evaluate on: raise it")
            folder, *others = (own.folder for own in run.students())
            prepared = _prepare(run, folder, tokenizer, resuming=resuming)
            processes.from_first(lambda: packing.share(folder, others))
            rows = packing.training_rows(prepared, run.data)
            self.report = {**prepared.report, "rows": len(rows)}
            self.summary.append(packing.summary(prepared.report, rows, run.data.seq_len))
            self.epoch_tokens = len(rows) * run.data.seq_len
            self._iterators["conversations"] = packing.row_batches(rows, run.data, batch_size=self._unit, seed=run.seed)
            heldout["conversations"] = packing.heldout_rows(prepared, run.data, batch_size=heldout_size(run))
        self._kinds = kinds
        self.heldout = {n: heldout[kind] for n, kind in kinds.items()}
        """Held-out batches of each stage's kind."""

    def next(self, n: int, batch_size: int) -> Batch:
        """The next batch of stage `n`, [batch_size, T]."""
        parts = [next(self._iterators[self._kinds[n]]) for _ in range(batch_size // self._unit)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint holds of it: JSON."""
        states = {_KEYS[kind]: iterator.get_state() for kind, iterator in self._iterators.items()}
        return {"data": None, **states}

    def set_state(self, extra: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what it knows nothing of starts at its beginning."""
        for kind, iterator in self._iterators.items():
            if extra.get(_KEYS[kind]) is not None:
                iterator.set_state(extra[_KEYS[kind]])

    def close(self) -> None:
        """End the threads and processes."""
        for iterator in self._iterators.values():
            iterator.close()
        self._iterators.clear()  # Grain's complain when they go as late as Python itself


_KEYS = {"text": "data", "conversations": "conversations"}


def _prepare(run: RunConfig, folder: Path, tokenizer: Any, *, resuming: bool) -> packing.Prepared:
    return packing.prepare(
        folder, run.conversations, tokenizer, run.data.seq_len, run.stage3.loss_on, resuming=resuming
    )


def heldout_of_last_stage(run: RunConfig, folder: Path, tokenizer: Any) -> list[Batch]:
    """What a run in `folder` measured its last stage on; conversations that are not there are prepared again."""
    if run.kind(max(run.stages())) == "conversations":
        prepared = _prepare(run, folder, tokenizer, resuming=True)
        return packing.heldout_rows(prepared, run.data, batch_size=heldout_size(run))
    return heldout_batches(run.text, run.data, tokenizer, batch_size=heldout_size(run))


def heldout_size(run: RunConfig) -> int:
    """Sequences in a batch of held-out tokens."""
    return max(1, min(8, run.data.eval_tokens // run.data.seq_len))
