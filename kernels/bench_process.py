"""Timing on a shared device: a process for each thing timed, made ready side by side, timed one at a time.

**A time** is what 20 calls add to the wall time of additions to 1 GiB that are issued before them, all waited for
once, over 20; medians of seven. It is the same for JAX (a jitted program of one call) and PyTorch (an eager call). The
calls are issued while the device is busy with the additions, so that no time of the host is left in it: launching a JAX
program costs the host tens of microseconds, eager Triton kernels and their autograd hundreds, and starting the first
call and waiting for the last some 200, of which each of 20 has 10. Nobody wins by quicker Python. Several calls in one
program would do for JAX alone: XLA compiles each copy again, and a loop may hoist its body or copy what it carries.

**Turns**: whoever compiles, tunes or checks holds the lock with others, whoever times holds it alone, and goes first.
There is a lock for each CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CALLS, REPEATS = 20, 7
MOST_SECONDS = 0.4
"""What slower calls may take between two synchronisations: fewer than CALLS are issued then."""
SETTLE = 0.5
"""Seconds before timing: the process that timed before gives its memory back as it ends, which stalls the device."""
HOST_BOUND = 0.8
"""Share of the time spent issuing from which the host is taken to be what limits."""


# ---- in the process that times ----


@contextlib.contextmanager
def turn(alone: bool, seconds: float) -> Iterator[None]:
    """Hold the lock; a process that holds it for more than `seconds` prints where it is and ends, hung in C or not.

    Nobody begins to compile while somebody waits to time: else those who are ready would wait for ever new compilers.
    """
    name = Path(tempfile.gettempdir()) / f"jaxlin_timing{os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    with open(f"{name}.waiting", "w") as waiting, open(f"{name}.lock", "w") as lock:
        fcntl.flock(waiting, fcntl.LOCK_SH if alone else fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(waiting, fcntl.LOCK_UN)
        faulthandler.dump_traceback_later(seconds, exit=True)  # waiting does not count
        if alone:
            time.sleep(SETTLE)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def milliseconds(
    call: Callable[[], Any], wait: Callable[[Any], Any], blocker: Callable[[], Any] | None = None
) -> dict[str, float]:
    """`ms` of the device for a call; `host_ms`, wall time a call, too where the host took longer to issue it.

    `wait(result)` returns when the last call issued is done; `blocker()` issues work of the device that costs the host
    next to nothing. Without it `ms` is wall time.
    """

    def run(calls: int, blocks: int = 0) -> tuple[float, float]:
        result, start = None, time.perf_counter()
        for _ in range(blocks):
            result = blocker() if blocker else None
        for _ in range(calls):
            result = call()  # the result before is let go, so that results do not fill the memory
        issued = time.perf_counter()
        wait(result)
        return issued - start, time.perf_counter() - start

    def median(calls: int, blocks: int = 0) -> tuple[float, float]:
        issued, total = zip(*(run(calls, blocks) for _ in range(REPEATS)), strict=True)
        return statistics.median(issued), statistics.median(total)

    run(2)
    calls = max(1, min(CALLS, int(MOST_SECONDS / run(1)[1])))
    issued, total = median(calls)
    wall = total / calls * 1e3
    if blocker is None:
        return dict(ms=wall)
    run(0, 2)
    blocks = min(100, 2 + math.ceil(1.5 * issued / (run(0, 8)[1] / 8)))
    queued = median(calls, blocks)[1] - median(0, blocks)[1]
    found = dict(ms=queued / calls * 1e3 if 0 < queued < 1.1 * total else wall)  # else the additions were disturbed
    return found | (dict(host_ms=wall) if issued >= HOST_BOUND * total else {})


# ---- in the process that starts those ----


def in_process(command: list[str], timeout: float, **environment: str) -> tuple[bool, str]:
    """Whether a command ended well, and all that it printed. It is killed after `timeout` seconds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=os.environ | environment
        )
    except subprocess.TimeoutExpired as error:
        printed = "\n".join(_text(stream) for stream in (error.stdout, error.stderr))
        return False, f"{printed}\nno end within {timeout:.0f} s"
    return done.returncode == 0, f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}"


def why(output: str) -> str:
    """A failed process in a line: its limit of time, or the last it printed that looks like an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("Timeout (") or "Error" in line.split(":")[0]]
    return (named[-1:] or lines[-1:] or ["no output"])[0][:200]


def _text(stream: bytes | str | None) -> str:
    """What a killed process printed comes as bytes, also where text was asked for."""
    return stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""
