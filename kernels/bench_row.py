"""One row of `bench`, in a process of its own: python -m jaxlin.kernels.bench_row OP SHAPE IMPLEMENTATION SECONDS

Prints lines "ROW {json}", each with all that is known so far: a crash or a hang loses what came after. Each pass is
tried by itself. Errors are relative RMS errors of the very passes timed against the float32 scan: on the first 1024
tokens and 4 heads of the first sequence, with a cotangent of zero after those tokens, so that the scan of them alone
has the same gradients. `roofs SECONDS` in place of all that measures what the device can do at most.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlin.kernels import bench_ops, bench_torch
from jaxlin.kernels.bench_process import milliseconds, turn

ERROR_TOKENS, ERROR_HEADS = 1024, 4
TIMING_SECONDS = 60.0
"""A process may time for so long, alone on the device."""


class JaxCalls:
    """The passes of one of our or XLA's implementations over given arguments."""

    def __init__(self, op: str, implementation: str, args: dict[str, Array], cotangent: Array):
        run = bench_ops.function(op, implementation)
        passes = dict(forward=lambda args, _: dict(o=run(**args)), both=bench_ops.forward_and_backward(op, run))
        self.passes: dict[str, Any] = {name: jax.jit(function) for name, function in passes.items()}
        self.args, self.cotangent = args, cotangent

    def prepare(self, name: str) -> None:
        self.passes[name] = self.passes[name].lower(self.args, self.cotangent).compile()

    def check(self, name: str, cotangent: Array) -> dict[str, np.ndarray]:
        """What the first sequence gets of a pass."""
        return {n: np.asarray(x)[:1] for n, x in self.passes[name](self.args, cotangent).items()}

    def call(self, name: str) -> Any:
        return self.passes[name](self.args, self.cotangent)

    def wait(self, result: Any) -> None:
        jax.block_until_ready(result)


class StepCalls(JaxCalls):
    """One decoded token through all layers, in one program that is given their states to overwrite."""

    def __init__(self, op: str, implementation: str, args: dict[str, Array], states: list):
        self.program: Any = jax.jit(bench_ops.walk(op, implementation), donate_argnums=0)
        self.args, self.states = args, states

    def prepare(self, name: str) -> None:
        self.program = self.program.lower(self.states, self.args).compile()

    def call(self, name: str) -> Any:
        self.states, o = self.program(self.states, self.args)
        return o


class Blocker:
    """Additions to 1 GiB in place, compiled when made, whose memory is taken when first called."""

    def __init__(self):
        shape = jax.ShapeDtypeStruct((1 << 28,), jnp.int32)
        self.make = jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype)).lower().compile()
        self.add = jax.jit(lambda x: x + 1, donate_argnums=0).lower(shape).compile()
        self.x = None

    def __call__(self) -> Any:
        self.x = self.add(self.make() if self.x is None else self.x)
        return self.x


# ---- rows ----


def measure(op: str, shape_text: str, implementation: str, seconds: float) -> None:
    """One op at one shape (BxTxHxD) by one implementation."""
    row: dict[str, Any] = dict(op=op, shape=shape_text, implementation=implementation, failed={})
    shape = tuple(map(int, shape_text.split("x")))
    peer = implementation in bench_torch.PEERS
    with turn(alone=False, seconds=seconds):
        make = jax.jit(functools.partial(bench_ops.inputs, op, shape))
        args = make()
        cotangent = jax.random.normal(jax.random.key(9), args["v"].shape, args["v"].dtype)
        least = {
            name: dict(
                bytes=bench_ops.minimum_bytes(args, name == "both"),
                flops=bench_ops.minimum_flops(op, shape, name == "both"),
            )
            for name in ("forward", "both")
        }
        calls: Any = (bench_torch.TorchCalls if peer else JaxCalls)(op, implementation, args, cotangent)
        ready = prepare(calls, ("forward", "both"), row)
        masked = jnp.where(jnp.arange(shape[1])[:, None, None] < ERROR_TOKENS, cotangent, 0)
        expected: dict[str, Array] = {}
        try:
            expected = bench_ops.reference(op, beginning(args), beginning(masked))
        except Exception as error:  # the times count without errors
            row["failed"]["errors"] = one_line(error)
        blocker = calls.blocker if peer and calls.device == "cuda" else Blocker() if on_gpu() else None
    with turn(alone=True, seconds=TIMING_SECONDS):
        time_passes(calls, ready, least, blocker, row)
        if ready and expected:  # here, not above: it takes as much memory as a pass does
            check(lambda: errors(beginning(calls.check(ready[-1], masked)), expected), row)


def measure_step(op: str, shape_text: str, implementation: str, seconds: float) -> None:
    """One decoded token of all layers: the shape is step:BATCHxLAYERSxHEADSxD."""
    row: dict[str, Any] = dict(op=op, shape=shape_text, implementation=implementation, failed={})
    b, layers, h, d = map(int, shape_text.removeprefix("step:").split("x"))
    shape = (b, 1, h, d)
    with turn(alone=False, seconds=seconds):
        args = jax.jit(functools.partial(bench_ops.inputs, op, shape))()
        states = jax.jit(functools.partial(bench_ops.states, op, shape, layers))()
        moved = 2 * sum(x.nbytes for x in jax.tree.leaves(states))
        calls = StepCalls(op, implementation, args, states)
        ready = prepare(calls, ("forward",), row)
        if ready:
            check(lambda: step_errors(op, implementation, shape), row)
        blocker = Blocker() if on_gpu() else None
    del states  # the program overwrites them
    with turn(alone=True, seconds=TIMING_SECONDS):
        time_passes(calls, ready, dict(forward=dict(bytes=moved, flops=0)), blocker, row)


def prepare(calls: Any, names: tuple[str, ...], row: dict[str, Any]) -> list[str]:
    """The passes that could be compiled; why the others could not goes into the row."""
    ready = []
    for name in names:
        try:
            calls.prepare(name)
            ready.append(name)
        except Exception as error:  # a peer may fail in any way
            row["failed"][name] = one_line(error)
    emit(row)
    return ready


def time_passes(calls: Any, ready: list[str], least: dict[str, dict], blocker: Any, row: dict[str, Any]) -> None:
    """Time what is ready, and print the row after each."""
    for name in ready:
        try:
            row[name] = milliseconds(functools.partial(calls.call, name), calls.wait, blocker) | least[name]
        except Exception as error:
            row["failed"][name] = one_line(error)
        emit(row)


def check(measured: Callable[[], dict[str, float]], row: dict[str, Any]) -> None:
    """Put errors into the row; the times count without them."""
    try:
        row["errors"] = measured()
    except Exception as error:
        row["failed"]["errors"] = one_line(error)
    emit(row)


def beginning(tree: Any) -> Any:
    """Of arrays [B, T, H, ...] the first sequence's first tokens and heads, float32; of gates [H] the first heads."""
    slices = (slice(1), slice(ERROR_TOKENS), slice(ERROR_HEADS))
    return jax.tree.map(lambda x: x[slices if x.ndim > 1 else slices[-1]].astype(np.float32), tree)


def errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Those of o first."""
    return {n: relative(found[n], expected[n]) for n in sorted(found, key=lambda n: (n != "o", n))}


def step_errors(op: str, implementation: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Of o and the state after one token of one layer."""
    args, (state,) = bench_ops.inputs(op, shape, seed=1), bench_ops.states(op, shape, 1)
    exact = {n: x.astype(jnp.float32) for n, x in args.items()}
    found = jax.jit(bench_ops.step(op, implementation))(args, state)
    expected = jax.jit(bench_ops.step(op, "scan"))(exact, state)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return dict(zip(("o", "state", "n", "m"), (relative(x, y) for x, y in pairs), strict=False))


def relative(x: Any, expected: Any) -> float:
    """The relative RMS error."""
    x, expected = np.asarray(x, np.float32), np.asarray(expected)
    return float(np.linalg.norm(x - expected) / max(np.linalg.norm(expected), 1e-30))


# ---- roofs ----


def roofs(seconds: float) -> None:
    """TB/s of the best copy (x + 1, read and written) and TFLOP/s of a bfloat16 product."""
    sizes, n = ((1 << 28, 1 << 29, 1 << 30, 1 << 31), 8192) if on_gpu() else ((1 << 24,), 512)
    found: dict[str, Any] = dict(device=jax.devices()[0].device_kind, gpus=jax.device_count(), copy_tbs=0.0)
    blocker = Blocker() if on_gpu() else None
    if blocker:
        found["clock"] = "device"
    with turn(alone=True, seconds=seconds):
        add, product = jax.jit(lambda x: x + 1), jax.jit(lambda x, y: x @ y)
        for size in sizes:
            x = jnp.zeros(size // 4, jnp.int32)
            ms = milliseconds(functools.partial(add, x), jax.block_until_ready, blocker)["ms"]
            found["copy_tbs"] = max(found["copy_tbs"], 2 * size / ms / 1e9)
            emit(found)
        x, y = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
        ms = milliseconds(functools.partial(product, x, y), jax.block_until_ready, blocker)["ms"]
        emit(found | dict(matmul_tflops=2 * n**3 / ms / 1e9))


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def emit(row: dict[str, Any]) -> None:
    print("ROW", json.dumps(row), flush=True)


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


if __name__ == "__main__":
    if sys.argv[1] == "roofs":
        roofs(float(sys.argv[2]))
    else:
        op, shape, implementation, limit = sys.argv[1:]
        (measure_step if shape.startswith("step:") else measure)(op, shape, implementation, float(limit))
