"""Where a run's time goes: a stopwatch for the loop, its pace, and a window of steps for JAX's profiler."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxlin.config import UserError

PARTS = ("data", "compiling", "step", "saving", "evaluation")


class Stopwatch:
    """Seconds of the loop's own thread by what it did; they add up to the time that passed.

    Steps are dispatched and run on, so this thread's time is not the devices'. `data` is waiting for a batch at whose
    end the devices had nothing left to do: at most so long were they idle for it. Waiting that they computed through,
    and waiting for them, is `step`. `compiling` is the first call of a step.
    """

    def __init__(self) -> None:
        self.stage: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._interval: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last lap on `part`."""
        now = time.perf_counter()
        self.stage[part] += now - self._since
        self._interval[part] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last take, as metrics."""
        seconds = {f"seconds_{part}": value for part, value in self._interval.items()}
        self._interval = dict.fromkeys(PARTS, 0.0)
        return seconds

    def shares(self) -> str:
        """The parts of the whole stage, for people: "data 1 %, step 96 %, saving 3 %"."""
        total = sum(self.stage.values()) or 1.0
        return ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in self.stage.items())


class Pace:
    """Tokens a second since the last time it was asked, and of known chips the share of their rate (MFU).

    `least_seconds` is what a token would take at the chips' published rate; NaN where that is not known.
    """

    def __init__(self, clock: Stopwatch, step: int, tokens_per_step: int, least_seconds: float) -> None:
        self._clock, self._step = clock, step
        self._tokens_per_step, self._least_seconds = tokens_per_step, least_seconds

    def take(self, step: int) -> dict[str, float]:
        """Speed up to `step`, whose results are there, and the seconds of each part, as metrics."""
        self._clock.lap("step")
        seconds = self._clock.take()
        speed = (step - self._step) * self._tokens_per_step / sum(seconds.values())
        self._step = step
        found = {"tokens_per_second": speed, **seconds}
        return found if math.isnan(self._least_seconds) else {**found, "mfu": self._least_seconds * speed}


class ProfilerWindow:
    """Writes a trace of the steps `first` to `first + count - 1` of a stage into `folder`."""

    def __init__(self, window: str, folder: Path) -> None:
        self._first, self._count = parse_window(window)
        self.folder = folder
        """Where the trace goes, for TensorBoard or xprof."""
        self._open = False

    @contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        """Around the step `number` of the stage, from 1; `before` are arrays that earlier steps still compute."""
        if number == self._first and self._count:
            jax.block_until_ready(before)
            jax.profiler.start_trace(str(self.folder))
            self._open = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, results: Any) -> bool:
        """Close the window behind its last step, once `results` are there; whether it did."""
        if not self._open or number < self._first + self._count - 1:
            return False
        jax.block_until_ready(results)
        return self.close()

    def close(self) -> bool:
        """Write what was traced; whether anything was."""
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
            return True
        return False


def parse_window(window: str) -> tuple[int, int]:
    """(first step, steps) of "START:COUNT"; (0, 0) of "". Raises UserError."""
    if not window:
        return 0, 0
    found = re.fullmatch(r"(\d+):(\d+)", window)
    if found is None or not int(found[1]) or not int(found[2]):
        raise UserError(f"--profile {window}: give START:COUNT, a step of a stage from 1 and a number of steps (10:3)")
    return int(found[1]), int(found[2])
