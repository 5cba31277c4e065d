"""Time every op, shape and implementation on this device, with errors beside the speed: python -m jaxlin.kernels.bench

A row is one op at one shape (B, T, H, D), H heads of q, k and v, bfloat16, by one implementation, in a process of its
own that may crash or hang without harm to others; it is printed when it ends, and `--out` has all rows so far as JSON.
Rows are compiled side by side and timed one at a time (`bench_process.py` says how), on several GPUs those of a shape
on one of them: kernels, then the peers, flash-linear-attention and mlstm_kernels, then what XLA makes. The op `softmax`
is softmax attention (cuDNN through JAX). `--steps` are the decode steps of whole models. `--from` reads earlier results
instead of timing; `--markdown` and `--plot` show them (`bench_report.py`). Neither needs a device.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlin.kernels import bench_report
from jaxlin.kernels.bench_process import in_process, why

SHAPES = ("32x512x32x64", "8x2048x16x128", "32x512x9x64", "1x32768x32x64")
OPS = ("linear_attention", "retention", "mlstm", "deltanet", "gated_deltanet", "gla", "kda", "softmax")
IMPLEMENTATIONS = ("pallas", "chunked", "cudnn", "fla", "mlstm_kernels")
PACKAGES = ("jax", "torch", "triton", "flash-linear-attention", "mlstm_kernels")
BACKSTOP = 1200.0
"""Seconds until a process is killed that neither ended nor got its turn."""


@dataclass(frozen=True)
class Bench:
    """What to time, and where to show it."""

    ops: tuple[str, ...] = OPS
    """Of linear_attention, retention, mlstm, deltanet, gated_deltanet, gla, kda, softmax."""
    shapes: tuple[str, ...] = SHAPES
    """BxTxHxD."""
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    """Of pallas, chunked, scan; cudnn, xla (for softmax); fla, mlstm_kernels."""
    steps: tuple[str, ...] = ("64x24x32x64",)
    """Decode steps, BATCHxLAYERSxHEADSxD; by default SmolLM2-1.7B's."""
    step_implementations: tuple[str, ...] = ("pallas", "default", "scan")
    """Of pallas, scan, chunked (the op, one token) and default (ops.*_step)."""
    jobs: int = 0
    """Processes at a time; 0 takes one and a half for each core."""
    timeout: float = 150
    """Seconds a process may take to compile."""
    peer_timeout: float = 400
    """The same for peers, whose Triton kernels are tuned."""
    deadline: float = 0
    """Seconds after which no row is started and those under way are ended; 0 is never."""
    out: Path | None = None
    """Folder for bench.json and the output of rows that failed."""
    from_: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Show these results instead of timing; of a row that several have, the last that was timed counts."""
    markdown: Path | None = None
    """File for the tables."""
    plot: Path | None = None
    """File for the plot, .png or .svg (needs matplotlib)."""


@dataclass(frozen=True)
class Job:
    """A row to be measured."""

    op: str
    shape: str
    implementation: str

    def limit(self, settings: Bench) -> float:
        return settings.peer_timeout if self.implementation in bench_report.PEERS else settings.timeout

    def run(self, settings: Bench, until: float, gpu: str | None = None) -> tuple[dict[str, Any], str]:
        """(the row, all that its process printed); `gpu` as CUDA_VISIBLE_DEVICES names it."""
        row: dict[str, Any] = dict(op=self.op, shape=self.shape, implementation=self.implementation, failed={})
        start = time.monotonic()
        if until <= start:
            return row | dict(failed=dict(row="not started before the deadline")), ""
        limit = self.limit(settings)
        good, output = child([self.op, self.shape, self.implementation, str(limit)], self, until - start, gpu)
        row = (last_row(output) or row) | dict(seconds=round(time.monotonic() - start, 1))
        if not good:
            row["failed"] = {**row["failed"], "row": why(output)}
        return row, output


def child(arguments: list[str], job: Job | None, timeout: float, gpu: str | None = None) -> tuple[bool, str]:
    """Run bench_row; a peer's process has its arrays from JAX on the CPU, and tunes for its shape alone."""
    environment = dict(XLA_PYTHON_CLIENT_PREALLOCATE="false", TF_CPP_MIN_LOG_LEVEL="2")
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if job is not None and job.implementation in bench_report.PEERS:
        cache = os.environ.get("TRITON_CACHE_DIR") or Path(tempfile.gettempdir()) / "jaxlin_triton"
        environment |= dict(JAX_PLATFORMS="cpu", TRITON_CACHE_DIR=str(Path(cache) / job.shape))
    command = [sys.executable, "-m", "jaxlin.kernels.bench_row", *arguments]
    return in_process(command, min(timeout, BACKSTOP), **environment)


def last_row(output: str) -> dict[str, Any] | None:
    """What a process knew when it last said so."""
    for line in reversed(output.splitlines()):
        if line.startswith("ROW {") and line.endswith("}"):  # the last may be cut
            return json.loads(line[4:])
    return None


def gpu_of_each(shapes: Sequence[str], count: int) -> dict[str, str]:
    """The GPU, as CUDA_VISIBLE_DEVICES names it, of each shape: what is compared is measured on one card."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return {shape: names[place % len(names)] for place, shape in enumerate(shapes)}


def serves(implementation: str, op: str) -> bool:
    """Whether an implementation has an op."""
    if op == "softmax" or implementation in ("cudnn", "xla"):
        return op == "softmax" and implementation in ("cudnn", "xla")
    return {"fla": op != "mlstm", "mlstm_kernels": op == "mlstm"}.get(implementation, True)


def jobs(settings: Bench) -> list[list[Job]]:
    """All rows, in groups that are measured one after the other.

    Who compiles longest comes last, for they hold up whoever waits to be timed: peers, then forms through XLA, whose
    programs kept 32 cores busy for minutes.
    """
    every = [
        Job(op, shape, implementation)
        for implementation in settings.implementations
        for shape in settings.shapes
        for op in settings.ops
        if serves(implementation, op)
    ]
    every += [
        Job(op, f"step:{shape}", implementation)
        for shape in settings.steps
        for implementation in settings.step_implementations
        for op in settings.ops
        if op != "softmax"
    ]
    peers = [job for job in every if job.implementation in bench_report.PEERS]
    slow = [job for job in every if job.implementation in ("chunked", "scan", "xla")]
    return [[job for job in every if job not in peers + slow], peers, slow]


class Results:
    """Rows as they come: printed, and written to `out`."""

    def __init__(self, about: dict[str, Any], out: Path | None):
        self.about, self.rows, self.out = about, [], out
        self.lock = threading.Lock()
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any], output: str) -> None:
        with self.lock:
            self.rows.append(row)
            print(bench_report.line(row, self.about), flush=True)
            if self.out is None:
                return
            if row["failed"]:
                name = "_".join((row["op"], row["shape"].replace(":", "_"), row["implementation"]))
                (self.out / f"failed_{name}.log").write_text(output[-100_000:])
            self.write()

    def write(self) -> None:
        """Replace bench.json whole: whoever reads it while rows come finds all that there are."""
        assert self.out is not None
        file = self.out / "bench.json"
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dict(about=self.about, rows=self.rows), indent=1))
        part.replace(file)


def versions() -> dict[str, str]:
    """Of what is timed, where it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure(settings: Bench) -> dict[str, Any]:
    """Time everything: {"about": the device and its roofs, "rows": [...]}."""
    start = time.monotonic()
    until = start + settings.deadline if settings.deadline else float("inf")
    good, output = child(["roofs", str(settings.timeout)], None, min(settings.timeout, until - start))
    about: dict[str, Any] = dict(device="unknown device") | (last_row(output) or {}) | dict(versions=versions())
    print(bench_report.heading(about) + ("" if good else f" (the roofs failed: {why(output)})"), flush=True)
    results = Results(about, settings.out)
    shapes = (*settings.shapes, *(f"step:{shape}" for shape in settings.steps))
    gpu_of = gpu_of_each(shapes, about.get("gpus", 1))
    for group in jobs(settings):
        with ThreadPoolExecutor(settings.jobs or max(2, (os.cpu_count() or 2) * 3 // 2)) as pool:
            list(pool.map(lambda job: results.add(*job.run(settings, until, gpu_of[job.shape])), group))
    print(f"{len(results.rows)} rows in {time.monotonic() - start:.0f} s", flush=True)
    return dict(about=about, rows=results.rows)


def read(files: Sequence[Path]) -> dict[str, Any]:
    """Results of several runs as one. Later rows replace earlier ones, unless nothing was timed in them.

    about["runs"]: for each of several files the heading of its run, and how many rows are its.
    """
    runs = [json.loads(file.read_text()) for file in files]
    last: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for row in run["rows"]:
            key = (row["op"], row["shape"], row["implementation"])
            if key not in last or "forward" in row:
                last[key] = (number, row)
    about = {key: value for run in runs for key, value in run["about"].items()}
    if len(runs) > 1:
        of = Counter((number, row["implementation"]) for number, row in last.values())
        about["runs"] = [
            (bench_report.heading(run["about"]), {name: count for (i, name), count in of.items() if i == number})
            for number, run in enumerate(runs)
        ]
    return dict(about=about, rows=[row for _, row in last.values()])


def in_order(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row belongs on a page: rows come as they end. What is not listed above comes last."""
    lists = ((row["shape"], SHAPES), (row["op"], OPS), (row["implementation"], IMPLEMENTATIONS))
    return tuple(names.index(name) if name in names else len(names) for name, names in lists)


def main(settings: Bench) -> dict[str, Any]:
    """Time or read, then show."""
    results = read(settings.from_) if settings.from_ else measure(settings)
    results["rows"].sort(key=in_order)
    if settings.markdown is not None:
        settings.markdown.write_text(bench_report.markdown(results))
    if settings.plot is not None:
        bench_report.draw(results, settings.plot)
    return results


if __name__ == "__main__":
    from jaxlin.command_line import parse, run_main

    run_main(lambda: main(parse(Bench)))
