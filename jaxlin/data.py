"""Text to batches: documents -> tokens -> packed sequences -> batches, in one Grain pipeline.

Documents are shuffled anew each epoch, tokenized in groups and joined into one endless stream, which is cut every
`seq_len` tokens: no padding, nothing dropped, the rest of an epoch continues into the next. Each document ends with the
end-of-text token, which belongs to it, and is a segment of its own. The order depends on the text and the seed only,
not on `workers`, devices or processes: each process reads all, and gives its devices their rows. The iterator's state
is a small dict, and continues bit for bit.

Prepare a large corpus once: `python -m jaxlin.data --text PATH... --teacher demo --out tokens.npy`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from jaxlin.arrays import growing_array
from jaxlin.command_line import parse, run_main
from jaxlin.config import DataConfig, UserError
from jaxlin.drafts import draft
from jaxlin.sources import Document, Field, open_text
from jaxlin.split import Corpus, documents, split
from jaxlin.streams import GROUP, Batch, Packed, ShardedText, segment_ids_of

PREFETCH = 8  # batches ready ahead of the training loop


class TrainingText(NamedTuple):
    """Documents to train on, and how many tokens they have, counted up to some number."""

    corpus: Corpus
    tokens: int


def training_text(text: Sequence[str], config: DataConfig, tokenizer: Any, most: int = 0) -> TrainingText:
    """The documents of `text` that `heldout_batches` leaves; tokens are counted until there are `most`, or a sequence.

    Raises UserError for text that cannot be read or is too short.
    """
    corpus, _ = split(_open(text, config, tokenizer), 0 if config.heldout else config.heldout_fraction)
    tokenize, count = _Tokenize(tokenizer, config.separate_documents), 0
    for document in documents(corpus):  # a wrong field is met here, before training starts
        count += len(tokenize([document])["tokens"])
        if count >= max(most, config.seq_len):
            break
    if count < config.seq_len:
        raise UserError(
            f"--text {_names(text)}: {count} tokens to train on are fewer than one sequence of {config.seq_len};"
            " give more text or lower --data.seq-len"
        )
    return TrainingText(corpus, count)


def train_batches(
    corpus: Corpus,
    config: DataConfig,
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int,
) -> grain.DatasetIterator:
    """Endless batches {"tokens": int32 [B, T], "segment_ids": int32 [B, T]}, the same in every process.

    Segments count from 1 in each sequence. `get_state()` gives a JSON-able dict, `set_state()` continues from one,
    `close()` ends the threads and processes. Raises UserError for text that cannot be read.
    """
    tokenize = _Tokenize(tokenizer, config.separate_documents)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if isinstance(corpus, list):
        groups: Any = ShardedText(corpus, seed, config.shuffle).map(tokenize)
    else:
        source = grain.MapDataset.source(corpus)
        groups = (source.shuffle(seed=seed) if config.shuffle else source).repeat().batch(GROUP, batch_fn=list)
        # No threads here: the workers, or the one thread at the end, run everything before them.
        groups = groups.map(tokenize).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if config.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl's flags, which jaxlin does not use
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
        groups = groups.mp_prefetch(options, worker_init_fn=_one_thread)
    batches = Packed(groups, config.seq_len).batch(batch_size, drop_remainder=True)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH))


def heldout_batches(text: Sequence[str], config: DataConfig, tokenizer: Any, *, batch_size: int) -> list[Batch]:
    """Batches like those of `train_batches`, of at most `config.eval_tokens` tokens that it never gives.

    They come from `config.heldout`, or else from every n-th document of `text`, n = 1 / heldout_fraction, and are the
    same on every process. What the text does not fill is padding: token 0, segment 0.
    """
    if config.heldout:
        heldout = documents(_open(config.heldout, config, tokenizer, "--data.heldout"))
    elif config.heldout_fraction > 0:
        _, heldout = split(_open(text, config, tokenizer), config.heldout_fraction)
    else:
        raise UserError("--data.heldout-fraction 0 keeps back no text: raise it or give --data.heldout")
    tokenize, length = _Tokenize(tokenizer, config.separate_documents), config.seq_len
    wanted = max(1, config.eval_tokens // length) * length
    groups, count = [], 0
    while count < wanted and (group := list(itertools.islice(heldout, GROUP))):
        groups.append(tokenize(group))
        count += len(groups[-1]["tokens"])
    if not count:
        raise UserError(f"--data.heldout {_names(config.heldout or text)}: there is no text to evaluate on")
    tokens, starts = (np.concatenate([group[key] for group in groups])[:wanted] for key in ("tokens", "starts"))
    rows = -(-len(tokens) // length)
    batches = np.zeros((2, -(-rows // batch_size), batch_size, length), np.int32)
    batches[0].reshape(-1)[: len(tokens)] = tokens
    for row, segments in enumerate(batches[1].reshape(-1, length)[:rows]):
        part = starts[row * length : (row + 1) * length]
        segments[: len(part)] = segment_ids_of(part)
    return [{"tokens": tokens, "segment_ids": segments} for tokens, segments in zip(*batches, strict=True)]


def _names(text: Sequence[str]) -> str:
    return " ".join(text) or "(none: Python's own reference)"


def _open(
    text: Sequence[str], config: DataConfig, tokenizer: Any, flag: str = "--text", remedy: str = Field.remedy
) -> Corpus:
    from jaxlin.convert import end_of_text_id

    field = Field(config.text_field, flag=flag, remedy=remedy)
    return open_text(text, field, end_of_text=end_of_text_id(tokenizer), vocab_size=len(tokenizer))


@dataclass(frozen=True)
class _Tokenize:
    """Documents to {"tokens": int32 [N], "starts": bool [N], true where a document starts}."""

    tokenizer: Any
    separate: bool
    begin: np.ndarray = field(init=False)
    end: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        from jaxlin.convert import begin_ids, end_of_text_id

        object.__setattr__(self, "begin", np.array(begin_ids(self.tokenizer), np.int32))
        object.__setattr__(self, "end", np.array([end_of_text_id(self.tokenizer)], np.int32))

    def __call__(self, group: Sequence[Document]) -> Batch:
        texts = [document for document in group if isinstance(document, str)]
        new = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        parts = [np.asarray(next(new) if isinstance(d, str) else d, np.int32) for d in group]
        parts = [part for part in parts if len(part)]
        if self.separate:
            parts = [np.concatenate([self._beginning(part), part, self.end]) for part in parts]
        tokens = np.concatenate([np.zeros(0, np.int32), *parts])
        starts = np.zeros(len(tokens), bool)
        if self.separate and parts:
            starts[np.cumsum([0] + [len(part) for part in parts[:-1]])] = True
        return {"tokens": tokens, "starts": starts}

    def _beginning(self, part: np.ndarray) -> np.ndarray:
        """What the document lacks before it: prepared files may have it."""
        return self.begin[: int(part[0] not in self.begin)]


def _one_thread(worker: int, workers: int) -> None:
    """Worker processes share the cores: none of them starts threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass(frozen=True)
class Prepare:
    """Tokenize text once, into a file that training maps into memory."""

    out: Path
    """The .npy file to write: uint16 or uint32 token ids; an end-of-text token after each document, and before it what
    the tokenizer begins texts with."""
    text: tuple[str, ...] = ()
    """Text, as for training; empty uses Python's own documentation."""
    teacher: str = "demo"
    """Whose tokenizer: "demo", a Hugging Face name or folder, or a .gguf file."""
    text_field: str = "text"
    """Field of a record that holds its text."""


def prepare(settings: Prepare, tokenizer: Any) -> tuple[int, int]:
    """Write `settings.out`, whole or not at all; returns the numbers of documents and of tokens in it."""
    if settings.out.suffix != ".npy":
        raise UserError(f"--out {settings.out}: the name must end in .npy")
    config = DataConfig(text_field=settings.text_field)
    every = documents(_open(settings.text, config, tokenizer, remedy="; set --text-field"))
    tokenize = _Tokenize(tokenizer, separate=True)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    counts = np.zeros(2, int)
    try:
        with draft(settings.out) as part, growing_array(part, dtype) as append:
            while group := list(itertools.islice(every, GROUP)):
                tokens = tokenize(group)
                append(tokens["tokens"])
                counts += (int(tokens["starts"].sum()), len(tokens["tokens"]))
            if not counts[1]:
                raise UserError(f"--text {' '.join(settings.text)}: holds no text; nothing was written")
    except OSError as error:
        raise UserError(f"--out {settings.out}: cannot be written ({error.strerror})") from error
    return int(counts[0]), int(counts[1])


def main() -> None:
    """Entry point of `python -m jaxlin.data`."""
    from jaxlin.convert import load_tokenizer

    settings, began = parse(Prepare), time.perf_counter()
    count, tokens = prepare(settings, load_tokenizer(settings.teacher))
    rate = tokens / (time.perf_counter() - began)
    print(f"{settings.out}: {tokens:,} tokens of {count:,} documents, {rate:,.0f} tokens/s")


if __name__ == "__main__":
    run_main(main)
