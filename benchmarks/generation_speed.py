"""Reading and writing speed of the seven students and their teacher, by length and batch (the paper's figure 3).

`python -m benchmarks.generation_speed --config smollm2_1_7b --out speed.json`: random weights, in bfloat16. A cell is a
mixer, a length and a batch: a prompt of that length is really read, then BLOCK tokens a call are written after it, as
`jaxlin.generate` does. Times are medians of calls, without compiling. Students read in chunks of --chunk tokens, so one
program a batch serves all lengths; the teacher reads whole prompts, through flash attention where the device has it,
into a cache as long as is needed. The file is written after every cell, and the same command goes on with what is
missing: "not run" is what --seconds did not reach, "OOM" what does not fit. Cells of the three ratios come first.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import generation_report
from jaxlin.command_line import load_config_file, parse, preset, run_main
from jaxlin.config import ModelConfig, UserError
from jaxlin.decoding import BLOCK, decode, exchange, first_tokens
from jaxlin.mixers import MIXERS
from jaxlin.model import init_params, init_state
from jaxlin.runs import write_text
from jaxlin.sampling import GREEDY, row_keys
from jaxlin.session import prefill, serving_params
from jaxlin.student import student_config

TEACHER = "softmax"
BLOCKS = 6  # calls of BLOCK tokens; the first does not count
ROOM = (BLOCKS + 1) * BLOCK  # tokens of the teacher's cache beyond the prompt
PREFILL_TOKENS = 65_536  # that the teacher reads in one call, at most, if that is a row or more
LARGE = 1 << 20  # tokens of a cell that comes after the smaller ones
QUICK = 1.0  # seconds; what is read in less is read three times
WARM_UP = 2  # calls: the first compiles, the second is the one in which XLA records its command buffers


@dataclass(frozen=True)
class Settings:
    """Measure generation."""

    config: str = "smollm2_1_7b"
    """Config file whose teacher's shape is measured."""
    mixers: tuple[str, ...] = tuple(MIXERS)
    """Mixers; "softmax" is the teacher."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Tokens of a prompt."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Sequences read and written together; the teacher's largest at 32k tokens is sought among 1, 2, 4, ... too."""
    dtype: str = "bfloat16"
    """Compute dtype."""
    chunk: int = 2048
    """Tokens of a prompt that a student reads in one call."""
    seconds: float = 540.0
    """After this time no cell is begun."""
    out: str = "generation_speed.json"
    """Where the results go; a file that is there is continued."""
    unroll: bool = False
    """Without a loop over layers; see `jaxlin.session.serving_params`."""
    plot: str = ""
    """A figure of them, PNG or PDF; needs matplotlib."""

    def check(self) -> None:
        """Refuse what cannot be measured."""
        for name in self.mixers:
            if name not in MIXERS:
                raise UserError(f"--mixers {name}: choose among {', '.join(MIXERS)}")
        for flag, values in (("lengths", self.lengths), ("batches", self.batches), ("chunk", (self.chunk,))):
            if not values or min(values) < 1:
                raise UserError(f"--{flag} {' '.join(map(str, values))}: give numbers of at least 1")
        for length in self.lengths:
            if length % min(length, self.chunk):
                raise UserError(f"--lengths {length}: must be a multiple of --chunk {self.chunk}, or smaller")


class Cell(NamedTuple):
    """What is measured at a time."""

    mixer: str
    length: int
    batch: int


class Model:
    """One mixer's model on the device, and how it reads and writes."""

    def __init__(self, mixer: str, settings: Settings) -> None:
        run = load_config_file(settings.config, preset("recommended"))
        if (teacher := run.teacher_config) is None:
            raise UserError(f"--config {settings.config}: gives no teacher_config")
        self.config = student_config(replace(run, mixer=mixer, dtype=settings.dtype), teacher)
        self.params = _random_params(self.config, settings.unroll)
        self._chunk = settings.chunk

    def measure(self, length: int, batch: int) -> dict[str, float]:
        """The figures of one cell."""
        tokens = np.random.default_rng(length).integers(0, self.config.vocab_size, (batch, length), dtype=np.int32)
        read = self._read_whole if self.config.mixer == (TEACHER,) else self._read_in_chunks
        for _ in range(WARM_UP):
            logits = state = None
            logits, state = read(tokens, warm_up=True)
        reading = []
        while len(reading) < 3 and sum(reading) < QUICK:
            logits = state = None  # before the next ones are allocated
            began = time.perf_counter()
            logits, state = jax.block_until_ready(read(tokens, warm_up=False))
            reading.append(time.perf_counter() - began)
        size = sum(a.nbytes for a in jax.tree.leaves(state)) / batch
        carry = first_tokens(GREEDY, logits, row_keys(0, range(batch)), None, state)
        writing = []
        for _ in range(BLOCKS):
            began = time.perf_counter()
            written, carry = decode(self.config, GREEDY, BLOCK, self.params, carry)
            jax.block_until_ready((written, carry))
            writing.append(time.perf_counter() - began)
        step = statistics.median(writing[1:]) / BLOCK
        return {
            "prefill_seconds": statistics.median(reading),
            "prefill_tokens_per_second": batch * length / statistics.median(reading),
            "decode_ms_per_token": 1e3 * step,
            "decode_tokens_per_second": batch / step,
            "state_bytes_per_sequence": size,
            "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0),
        }

    def _read_in_chunks(self, tokens: np.ndarray, *, warm_up: bool) -> tuple[jax.Array, Any]:
        """A student's reading; `warm_up` is a chunk."""
        chunk = min(tokens.shape[1], self._chunk)
        tokens = tokens[:, :chunk] if warm_up else tokens
        state = _empty(self.config, len(tokens), 1)
        return self._prefill(state, tokens, chunk, fresh=False)  # one program for the first chunk and the others

    def _read_whole(self, tokens: np.ndarray, *, warm_up: bool) -> tuple[jax.Array, Any]:
        """The teacher's reading: as many rows at a time as make PREFILL_TOKENS."""
        batch, length = tokens.shape
        rows = min(batch, max(PREFILL_TOKENS // length, 1))
        rows = next(n for n in range(rows, 0, -1) if batch % n == 0)
        found: list[jax.Array] = []
        state = None if rows == batch else _empty(self.config, batch, length + ROOM)
        for start in range(0, rows if warm_up else batch, rows):
            part = _empty(self.config, rows, length + ROOM)
            logits, part = self._prefill(part, tokens[start : start + rows], length, fresh=True)
            state = part if state is None else exchange(state, part, np.arange(start, start + rows))
            found.append(logits)
        return jnp.concatenate(found), state

    def _prefill(self, state: Any, tokens: np.ndarray, chunk: int, *, fresh: bool) -> tuple[jax.Array, Any]:
        return prefill(self.config, self.params, state, tokens, None, chunk, fresh)


@jax.jit(static_argnums=(0, 1))
def _random_params(config: ModelConfig, unroll: bool) -> Any:
    return serving_params(init_params(config, jax.random.key(0)), config, unroll=unroll)


@jax.jit(static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, batch: int, room: int) -> Any:
    return init_state(config, batch, room)


def cells(settings: Settings, found: dict[Cell, dict[str, Any]]) -> Iterator[Cell]:
    """What is to be measured, the most needed first; `found` has the results of those before, by the time."""
    marks, asked = generation_report.MARKS, {(n, b) for n in settings.lengths for b in settings.batches}
    first = [(marks.long, 1), *((length, 1) for length in marks.flat)]
    for needed in (first, [marks.served]):
        yield from (Cell(mixer, *at) for mixer in settings.mixers for at in needed if at in asked)
    if TEACHER in settings.mixers and marks.long in settings.lengths:
        for i in reversed(range(max(settings.batches).bit_length())):
            cell = Cell(TEACHER, marks.long, 1 << i)
            yield cell
            if found[cell]["status"] != "OOM":
                yield from (Cell(mixer, marks.long, 1 << i) for mixer in settings.mixers)
                break
    rest = [Cell(mixer, *at) for mixer in settings.mixers for at in asked]
    place = settings.mixers.index
    yield from sorted(rest, key=lambda c: (c.length * c.batch > LARGE, place(c.mixer), c.batch, c.length))


def too_large(cell: Cell, found: dict[Cell, dict[str, Any]]) -> bool:
    """Whether something no larger has run out of memory."""
    return any(
        other.mixer == cell.mixer and other.batch <= cell.batch and other.length <= cell.length
        for other, figures in found.items()
        if figures.get("status") == "OOM"
    )


class Bench:
    """The results so far, and the model that is on the device."""

    def __init__(self, settings: Settings) -> None:
        """Continues the file of `settings.out`. Raises UserError for one of another shape, dtype, chunk or device."""
        device = jax.local_devices()[0].device_kind
        self._settings, self._path = settings, Path(settings.out)
        self._about = {"config": settings.config, "dtype": settings.dtype, "chunk": settings.chunk, "device": device,
                       "jax": metadata.version("jax"), "unroll": settings.unroll}  # fmt: skip
        self.found: dict[Cell, dict[str, Any]] = {}
        self._model: tuple[str, Model] | None = None
        if self._path.exists():
            try:
                old = {"unroll": False, **json.loads(self._path.read_text())}  # files from before there was a choice
                self.found = {Cell(c.pop("mixer"), c.pop("length"), c.pop("batch")): c for c in old["cells"]}
                other = [name for name, value in self._about.items() if old.get(name) != value]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"--out {settings.out}: holds something else; choose another file") from None
            if other:
                raise UserError(
                    f"--out {settings.out}: was measured with {other[0]} {old.get(other[0])}, now "
                    f"{self._about[other[0]]}; choose another file"
                )
            self.found = {cell: figures for cell, figures in self.found.items() if figures["status"] != "not run"}

    def run(self) -> dict[str, Any]:
        """Measure what is missing, within the time; all results."""
        began = time.perf_counter()
        for cell in cells(self._settings, self.found):
            if cell in self.found and self.found[cell]["status"] != "not run":
                continue
            if time.perf_counter() - began > self._settings.seconds:
                self.found[cell] = {"status": "not run"}
                continue
            start = time.perf_counter()
            self.found[cell] = {"status": "OOM"} if too_large(cell, self.found) else self._measure(cell)
            self._write()
            seconds = time.perf_counter() - start
            print(generation_report.line(cell, self.found[cell]), f"({seconds:.0f} s)", flush=True)
        return self._write()

    def _measure(self, cell: Cell) -> dict[str, Any]:
        try:
            if self._model is None or self._model[0] != cell.mixer:
                self._model = None
                gc.collect()
                self._model = cell.mixer, Model(cell.mixer, self._settings)
            return {"status": "measured", **self._model[1].measure(cell.length, cell.batch)}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        gc.collect()  # only now is the failed call's memory free: the error held its frames
        return {"status": "OOM"}

    def _write(self) -> dict[str, Any]:
        rows = [{**cell._asdict(), **figures} for cell, figures in self.found.items()]
        results = {**self._about, "cells": rows, "ratios": generation_report.ratios(self.found)}
        write_text(self._path, json.dumps(results, indent=1))
        return results


def main() -> None:
    """A line a cell, then a table, the ratios and a figure."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # read when the device is first asked for
    settings = parse(Settings)
    settings.check()
    bench = Bench(settings)
    results = bench.run()
    generation_report.show(bench.found, results)
    if settings.plot:
        generation_report.draw(bench.found, results, Path(settings.plot))


if __name__ == "__main__":
    run_main(main)
