"""Conversations to batches: tokenized once into arrays on disk, whole conversations packed into rows.

A row holds conversations that fit in it, none of them cut, and padding at its end (token 0, segment 0). Each is a
segment of its own: state, convolution and positions start anew, so a loss is what it would be unpacked. Rows have
random access and come in a new order each epoch; where an iterator is, is one number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jaxlin import processes
from jaxlin.arrays import growing_array
from jaxlin.config import DataConfig, UserError
from jaxlin.conversations import Conversation, Renderer, describe_sources, read_conversations
from jaxlin.streams import GROUP, Batch

FOLDER = "conversations"  # in the run folder
PREFETCH = 8  # batches ready ahead of the training loop


@dataclass(frozen=True)
class Prepared:
    """Tokenized conversations, mapped into memory: number i is tokens[ends[i - 1] : ends[i]]."""

    tokens: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    report: dict[str, Any]
    """Counts of what was read, left out and cut, and a hash of it all."""

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, index: int) -> slice:
        """Where conversation `index` is."""
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def lengths(self) -> np.ndarray:
        """Tokens of each conversation."""
        return np.diff(self.ends, prepend=0)

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the conversations to train on, and of those held back: every n-th, n = 1 / fraction."""
        every, period = np.arange(len(self)), max(2, round(1 / fraction))
        heldout = every % period == 0
        return every[~heldout], every[heldout]


def prepare(
    folder: Path, names: Sequence[str], tokenizer: Any, seq_len: int, loss_on: str, *, resuming: bool
) -> Prepared:
    """The conversations of the sources `names`, tokenized into `folder`, a run's, unless they are there already.

    The first process writes them, whole or not at all. Those that are longer than `seq_len` are cut there; those with
    nothing to predict are left out; `report` counts both. A run that resumes keeps what it began with, whatever has
    become of the files. Raises UserError for conversations that cannot be read or rendered, or that are not those that
    a resumed run began with.
    """
    rendered = Renderer(tokenizer, loss_on)
    template = hashlib.sha256(rendered.template.encode()).hexdigest()
    settings = {"names": list(names), "seq_len": seq_len, "loss_on": loss_on, "template": template}
    processes.from_first(lambda: _write(folder, names, rendered, settings, len(tokenizer), resuming))
    home = folder / FOLDER
    tokens, learned, ends = (np.load(home / f"{name}.npy", mmap_mode="r") for name in ("tokens", "learned", "ends"))
    return Prepared(tokens, learned, ends, json.loads((home / "report.json").read_text()))


def share(folder: Path, others: Sequence[Path]) -> None:
    """Give the run folders `others` what `prepare` wrote into `folder`, as links where the disk has them."""
    for other in others:
        home, part = other / FOLDER, other / f"{FOLDER}.part"
        if home.exists():
            continue
        try:
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(folder / FOLDER, part, copy_function=_link)
            part.replace(home)
        except OSError as error:
            raise UserError(f"{home}: cannot be written ({error.strerror or error})") from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write(
    folder: Path, names: Sequence[str], render: Renderer, settings: dict[str, Any], vocabulary: int, resuming: bool
) -> None:
    home, part, is_new = folder / FOLDER, folder / f"{FOLDER}.part", not folder.exists()
    made_from = home / "made_from.json"
    found = json.loads(made_from.read_text()) if made_from.is_file() else {}
    if resuming and found.get("settings") == settings:
        return
    wanted = {"settings": settings, "sources": describe_sources(names)}
    if found == wanted:
        return
    began_with = folder / f"{FOLDER}.json"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        report = _tokenize(part, names, render, settings["seq_len"], vocabulary)
        if resuming and began_with.is_file() and json.loads(began_with.read_text())["sha256"] != report["sha256"]:
            raise UserError(f"--conversations {' '.join(names)}: no longer what the run in {folder} began with")
        (part / "report.json").write_text(json.dumps(report, indent=1))
        (part / "made_from.json").write_text(json.dumps(wanted, indent=1))
        shutil.rmtree(home, ignore_errors=True)
        part.replace(home)
    except OSError as error:
        raise UserError(f"{home}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if is_new and not any(folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def _tokenize(part: Path, names: Sequence[str], render: Renderer, seq_len: int, vocabulary: int) -> dict[str, Any]:
    """Write tokens, learned and ends into `part`; what was read, left out and cut."""
    counts = dict.fromkeys(("read", "without_messages", "nothing_to_learn", "cut", "kept", "tokens", "learned"), 0)
    digest, end = hashlib.sha256(), 0
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    with (
        growing_array(part / "tokens.npy", dtype) as add_tokens,
        growing_array(part / "learned.npy", bool) as add_learned,
        growing_array(part / "ends.npy", np.int64) as add_end,
    ):
        for group in _groups(read_conversations(names)):
            counts["read"] += len(group)
            full = [each for each in group if each.messages]
            counts["without_messages"] += len(group) - len(full)
            for tokens, learned in render(full) if full else ():
                is_cut = len(tokens) > seq_len
                tokens, learned = tokens[:seq_len], learned[:seq_len]
                if not learned[1:].any():  # nothing comes before the first token to predict it from
                    counts["nothing_to_learn"] += 1
                    continue
                end += len(tokens)
                add_tokens(tokens)
                add_learned(learned)
                add_end(np.array([end]))
                digest.update(tokens.tobytes() + learned.tobytes() + end.to_bytes(8))
                counts["kept"] += 1
                counts["cut"] += is_cut
                counts["learned"] += int(learned[1:].sum())
    counts["tokens"] = end
    if counts["kept"] < 2:
        raise UserError(
            f"--conversations {' '.join(names)}: {counts['kept']} of {counts['read']} conversations have something to "
            "learn, at least 2 are needed"
        )
    return {**counts, "sha256": digest.hexdigest()}


def _groups(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while group := list(itertools.islice(conversations, GROUP)):
        yield group


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of conversations, by number, each row of at most `seq_len` tokens: best-fit decreasing.

    The longest first, each into the row where it leaves least room. `available` has a bit for every room that some row
    has, so the smallest one that suffices is its lowest bit from there on.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    available = 0
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        fitting = available >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                available &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            with_room[room - length].append(row)
            available |= 1 << (room - length)
    return rows


@dataclass(frozen=True)
class Rows:
    """Packed rows with random access: {"tokens", "segment_ids": int32 [T], "learned": bool [T]}."""

    conversations: Prepared
    places: list[list[int]]
    seq_len: int

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch:
        tokens, segments = np.zeros((2, self.seq_len), np.int32)
        learned, start = np.zeros(self.seq_len, bool), 0
        for segment, number in enumerate(self.places[index], 1):
            span = self.conversations.span(number)
            here = slice(start, start + span.stop - span.start)
            tokens[here], segments[here] = self.conversations.tokens[span], segment
            learned[here] = self.conversations.learned[span]
            start = here.stop
        return {"tokens": tokens, "segment_ids": segments, "learned": learned}


def training_rows(prepared: Prepared, config: DataConfig) -> Rows:
    """The rows to train on."""
    numbers, _ = prepared.split(config.heldout_fraction)
    return _rows(prepared, numbers, config.seq_len)


def row_batches(rows: Rows, config: DataConfig, *, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless batches [B, T] of `rows`, shuffled anew each epoch; an iterator as that of `data.train_batches`."""
    source = grain.MapDataset.source(rows)
    source = (source.shuffle(seed=seed) if config.shuffle else source).repeat()
    # No threads here: the one at the end reads everything.
    batches = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).batch(batch_size)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH))


def heldout_rows(prepared: Prepared, config: DataConfig, *, batch_size: int) -> list[Batch]:
    """Batches of conversations that are held back, some `config.eval_tokens` tokens; padding fills the last one."""
    _, numbers = prepared.split(config.heldout_fraction)
    numbers = np.random.default_rng(0).permutation(numbers)
    before = np.cumsum(prepared.lengths()[numbers]) - prepared.lengths()[numbers]
    rows = _rows(prepared, numbers[before < config.eval_tokens], config.seq_len)
    blank = {name: np.zeros_like(a) for name, a in rows[0].items()}
    padded = [rows[i] if i < len(rows) else blank for i in range(-(-len(rows) // batch_size) * batch_size)]
    return [
        {name: np.stack([row[name] for row in padded[start : start + batch_size]]) for name in blank}
        for start in range(0, len(padded), batch_size)
    ]


def _rows(prepared: Prepared, numbers: np.ndarray, seq_len: int) -> Rows:
    places = pack(prepared.lengths()[numbers].tolist(), seq_len)
    places.sort(key=min)  # in the order of the files, not the longest first
    return Rows(prepared, [numbers[row].tolist() for row in places], seq_len)


def summary(report: dict[str, Any], rows: Rows, seq_len: int) -> str:
    """What became of the conversations, in one line."""
    lengths = rows.conversations.lengths()
    padding = 1 - sum(int(lengths[row].sum()) for row in rows.places) / (len(rows) * seq_len)
    return (
        f"conversations: {report['kept']:,} of {report['read']:,} kept, {report['tokens']:,} tokens, "
        f"{report['learned']:,} to predict; left out {report['without_messages']:,} without messages and "
        f"{report['nothing_to_learn']:,} with nothing to predict; cut {report['cut']:,} at {seq_len:,} tokens; "
        f"{len(rows):,} rows to train on, {padding:.1%} padding"
    )
