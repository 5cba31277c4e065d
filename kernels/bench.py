"""Time every op, shape and implementation on this device, with errors beside the speed: python -m jaxlin.kernels.bench

Each row is one op at one shape (B, T, H, D), H heads of q, k and v, bfloat16: median ms over repetitions of a jitted
program that holds several calls, TB/s of the bytes that must move (inputs, outputs; forward+backward: their gradients
too, each once), that as a share of what a copy reaches here, and the relative RMS errors of o and the gradients
against the float32 scan, all on the same inputs. Peers are taken in where they can be imported: `fla`
(flash-linear-attention), `mlstm_kernels`, and `softmax` (cuDNN through JAX).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = ("32x512x32x64", "8x2048x16x128", "32x512x9x64", "1x32768x32x64")
OPS = ("linear_attention", "retention", "mlstm", "deltanet", "gated_deltanet", "gla", "kda")
IMPLEMENTATIONS = ("pallas", "chunked", "fla", "mlstm_kernels", "softmax")
ERROR_TIME, ERROR_HEADS = 1024, 4
"""Errors are measured on the first sequence's beginning: the scan is slow."""


@dataclass(frozen=True)
class Bench:
    """What to time."""

    ops: tuple[str, ...] = OPS
    """Of linear_attention, retention, mlstm, deltanet, gated_deltanet, gla, kda."""
    shapes: tuple[str, ...] = SHAPES
    """BxTxHxD."""
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    """Of pallas, chunked, scan, fla, mlstm_kernels, softmax."""
    calls: int = 5
    """Calls in one program."""
    launches: int = 4
    """Programs between two synchronisations: more hide the cost of launching and waiting."""
    jobs: int = 8
    """Rows compiled at a time."""
    repeats: int = 10
    """Times measured; the median counts."""
    errors: bool = True
    """Whether to measure errors."""
    out: Path | None = None
    """Where to write all rows as JSON."""


# ---- inputs ----


def inputs(op: str, shape: tuple[int, ...], seed: int = 0) -> dict[str, jax.Array]:
    """Arguments as the mixers give them: L2-normalised q and k, mild gates; per-token gates float32."""
    b, t, h, d = shape
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def unit():
        x = jax.random.normal(next(keys), (b, t, h, d))
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(jnp.bfloat16)

    args = dict(q=unit(), k=unit(), v=jax.random.normal(next(keys), (b, t, h, d), jnp.bfloat16))
    gate = functools.partial(jax.random.normal, next(keys), dtype=jnp.float32)
    if op == "retention":
        args["g"] = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(h, dtype=jnp.float32))))
    elif op == "mlstm":
        args |= dict(i=gate((b, t, h)), f=3 + jax.random.normal(next(keys), (b, t, h)))
    elif op in ("gla", "kda"):
        args["g"] = jax.nn.log_sigmoid(gate((b, t, h, d)) + 3)
    elif op == "gated_deltanet":
        args["g"] = jax.nn.log_sigmoid(gate((b, t, h)) + 3)
    if op in ("deltanet", "gated_deltanet", "kda"):
        args["beta"] = jax.nn.sigmoid(jax.random.normal(next(keys), (b, t, h)))
    return args


def minimum_bytes(args: dict[str, jax.Array], backward: bool) -> int:
    """Inputs and o moved once; with `backward` their gradients too."""
    once = sum(x.nbytes for x in args.values()) + args["v"].nbytes
    return once * 2 if backward else once


# ---- implementations: (args -> o) in JAX ----


def ours(op: str, implementation: str) -> Callable[..., jax.Array]:
    from jaxlin import ops

    name = {"mlstm": "mlstm", "linear_attention": "gated_linear_attention", "retention": "gated_linear_attention"}
    name |= {"gla": "gated_linear_attention"}
    function = getattr(ops, name.get(op, "gated_delta_rule"))

    def run(**args):
        if op == "retention":  # its decays are constants
            args["g"] = jax.lax.stop_gradient(args["g"])
        return function(**args, implementation=implementation)[0]

    return run


def softmax(**args: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(args["q"], args["k"], args["v"], is_causal=True, implementation="cudnn")


def compile_jax(function: Callable, args: dict, backward: bool, settings: Bench) -> Callable:
    """A program of several calls, or of calls and their gradients, one after the other."""

    def once(args, cotangent):
        if not backward:
            return function(**args)
        o, vjp = jax.vjp(lambda a: function(**a), args)
        return o, vjp(cotangent)[0]

    @jax.jit
    def program(args, cotangent):
        out = None
        for _ in range(settings.calls):
            out = once(args, cotangent)
            (args, cotangent), out = jax.lax.optimization_barrier(((args, cotangent), out))  # one after the other
        return out

    return program.lower(args, args["v"]).compile()


def time_jax(program: Callable, args: dict, settings: Bench) -> float:
    """Median milliseconds of one of a program's calls."""
    cotangent = jax.random.normal(jax.random.key(9), args["v"].shape, args["v"].dtype)
    times = []
    jax.block_until_ready(program(args, cotangent))
    for _ in range(settings.repeats):
        start = time.perf_counter()
        jax.block_until_ready([program(args, cotangent) for _ in range(settings.launches)])
        times.append((time.perf_counter() - start) / settings.calls / settings.launches * 1e3)
    return statistics.median(times)


def gradients_jax(function: Callable, args: dict) -> dict[str, np.ndarray]:
    """o and the gradients for a fixed cotangent, float32."""

    @jax.jit
    def run(args):
        o, vjp = jax.vjp(lambda a: function(**a), args)
        cotangent = jax.random.normal(jax.random.key(5), o.shape).astype(o.dtype)
        return dict(o=o) | {f"d{name}": x for name, x in vjp(cotangent)[0].items()}

    return {name: np.asarray(x.astype(jnp.float32)) for name, x in run(args).items()}


# ---- peers, in PyTorch ----


def fla(op: str) -> tuple[Callable, tuple[str, ...]]:
    """(function, names of its arguments in order) of flash-linear-attention."""
    module, name, order = {
        "linear_attention": ("linear_attn", "chunk_linear_attn", "q k v"),
        "retention": ("retention", "chunk_retention", "q k v"),
        "gla": ("gla", "chunk_gla", "q k v g"),
        "deltanet": ("delta_rule", "chunk_delta_rule", "q k v beta"),
        "gated_deltanet": ("gated_delta_rule", "chunk_gated_delta_rule", "q k v g beta"),
        "kda": ("kda", "chunk_kda", "q k v g beta"),
    }[op]
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    options = dict(normalize=False) if op == "linear_attention" else {}
    return lambda *args: function(*args, **options)[0], tuple(order.split())


def mlstm_kernels(op: str) -> tuple[Callable, tuple[str, ...]]:
    """The mLSTM of mlstm_kernels, which wants heads before time."""
    if op != "mlstm":
        raise KeyError(op)
    module = importlib.import_module("mlstm_kernels.torch.chunkwise.triton_xl_chunk")

    def function(q, k, v, i, f):
        q, k, v, i, f = (x.transpose(1, 2).contiguous() for x in (q, k, v, i, f))
        return module.mlstm_chunkwise__xl_chunk(q=q, k=k, v=v, i=i, f=f).transpose(1, 2)

    return function, ("q", "k", "v", "i", "f")


TORCH_PEERS = {"fla": fla, "mlstm_kernels": mlstm_kernels}


def to_torch(args: dict[str, jax.Array], order: tuple[str, ...]) -> list[Any]:
    torch = importlib.import_module("torch")
    found = []
    for name in order:
        x = args[name]
        dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
        found.append(torch.from_numpy(np.array(x.astype(jnp.float32))).cuda().to(dtype).requires_grad_())
    return found


def time_torch(function: Callable, args: list[Any], backward: bool, settings: Bench) -> float:
    torch = importlib.import_module("torch")
    cotangent = torch.randn(args[2].shape, device="cuda").to(args[2].dtype)

    def once():
        if not backward:
            with torch.no_grad():
                return function(*args)
        return torch.autograd.grad(function(*args), args, cotangent, allow_unused=True)

    times = []
    for _ in range(3):
        once()
    for _ in range(settings.repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(settings.calls * settings.launches):
            once()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / settings.calls / settings.launches)
    return statistics.median(times)


def gradients_torch(function: Callable, args: list[Any], order: tuple[str, ...]) -> dict[str, np.ndarray]:
    torch = importlib.import_module("torch")
    o = function(*args)
    cotangent = jax.random.normal(jax.random.key(5), tuple(o.shape)).astype(jnp.bfloat16).astype(jnp.float32)
    cotangent = torch.from_numpy(np.array(cotangent)).cuda().to(o.dtype)
    found = dict(o=o) | dict(zip((f"d{n}" for n in order), torch.autograd.grad(o, args, cotangent), strict=True))
    return {name: x.detach().float().cpu().numpy() for name, x in found.items()}


# ---- rows ----


def copy_roof(settings: Bench) -> float:
    """TB/s that a copy of 1 GiB reaches, bytes read and written."""
    x = jnp.arange(1 << 29, dtype=jnp.int32).astype(jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))
    times = []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times) / 1e12


@dataclass
class Row:
    """An op at a shape by an implementation: prepared beside others, then timed by itself. A failure is its text."""

    op: str
    shape: tuple[int, ...]
    implementation: str
    settings: Bench
    failed: str | None = None

    def prepare(self) -> Row:
        """Compile, and measure errors."""
        try:
            if self.implementation in TORCH_PEERS:
                function, order = TORCH_PEERS[self.implementation](self.op)
                self._time = lambda args, backward: time_torch(function, to_torch(args, order), backward, self.settings)
                actual = lambda args: gradients_torch(function, to_torch(args, order), order)  # noqa: E731
            else:
                function = softmax if self.implementation == "softmax" else ours(self.op, self.implementation)
                shapes = jax.eval_shape(functools.partial(inputs, self.op, self.shape))
                programs = [compile_jax(function, shapes, backward, self.settings) for backward in (False, True)]
                self._time = lambda args, backward: time_jax(programs[backward], args, self.settings)
                actual = functools.partial(gradients_jax, function)
            if self.settings.errors and self.implementation != "softmax":
                self.errors = self._errors(actual)
        except Exception as error:  # a peer may fail in any way: the others are still to be timed
            self.failed = one_line(error)
        return self

    def _errors(self, actual: Callable[[dict], dict[str, np.ndarray]]) -> dict[str, float]:
        _, t, h, d = self.shape
        small = inputs(self.op, (1, min(t, ERROR_TIME), min(h, ERROR_HEADS), d), seed=1)
        expected = gradients_jax(ours(self.op, "scan"), {n: x.astype(jnp.float32) for n, x in small.items()})
        return {
            n: float(np.linalg.norm(x - expected[n]) / np.linalg.norm(expected[n])) for n, x in actual(small).items()
        }

    def measure(self, roof: float) -> dict:
        """Times, and all else there is to say."""
        found: dict[str, Any] = dict(op=self.op, shape=self.shape, implementation=self.implementation)
        found |= {} if self.failed is None else dict(failed=self.failed)
        found |= dict(errors=self.errors) if hasattr(self, "errors") else {}
        if self.failed is not None:
            return found
        args = inputs(self.op, self.shape)
        try:
            for name, backward in (("forward", False), ("both", True)):
                ms = self._time(args, backward)
                tbs = minimum_bytes(args, backward) / ms / 1e9
                found |= {f"{name}_ms": ms, f"{name}_tbs": tbs, f"{name}_roof": tbs / roof}
        except Exception as error:
            found["failed"] = one_line(error)
        return found


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def serves(implementation: str, op: str, settings: Bench) -> bool:
    """Whether an implementation has an op; softmax attention is timed beside the first."""
    if implementation == "softmax":
        return op == settings.ops[0]
    return {"fla": op != "mlstm", "mlstm_kernels": op == "mlstm"}.get(implementation, True)


def text(r: dict) -> str:
    """A row for people."""
    head = f"{r['op']:<17}{'x'.join(map(str, r['shape'])):<17}{r['implementation']:<14}"
    for name in ("forward", "both"):
        if f"{name}_ms" in r:
            head += f"{r[f'{name}_ms']:9.3f} ms {r[f'{name}_tbs']:5.2f} TB/s {r[f'{name}_roof']:4.0%}   "
    errors = " ".join(f"{n} {e:.1e}" for n, e in r.get("errors", {}).items())
    return head + errors + (f"  failed: {r['failed']}" if "failed" in r else "")


def main(settings: Bench) -> list[dict]:
    """Time everything, printing as it goes."""
    roof = copy_roof(settings)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, copy {roof:.2f} TB/s (forward, then forward and backward)", flush=True)
    todo = [
        Row(op, shape, implementation, settings)
        for shape in (tuple(map(int, s.split("x"))) for s in settings.shapes)
        for op in settings.ops
        for implementation in settings.implementations
        if serves(implementation, op, settings)
    ]
    with ThreadPoolExecutor(settings.jobs) as pool:  # all is compiled before anything is timed
        list(pool.map(Row.prepare, [one for one in todo if one.implementation not in TORCH_PEERS]))
    rows = []
    for one in todo:
        rows.append((one.prepare() if one.implementation in TORCH_PEERS else one).measure(roof))
        print(text(rows[-1]), flush=True)
        if settings.out is not None:
            about = dict(device=device, jax=jax.__version__, copy_tbs=roof, rows=rows)
            settings.out.write_text(json.dumps(about, indent=1))
    return rows


if __name__ == "__main__":
    from jaxlin.config import parse

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers on torch share the card's memory
    main(parse(Bench))
