"""The chunked forms beside the scans that define them: time and memory, forward and backward, mixer by mixer.

Command: `python -m benchmarks.chunked_forms`; on a GPU also linear attention's forward beside the plain chunked loop.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table

from jaxlin import ops
from jaxlin.command_line import parse, run_main

# Mixer -> (op, gates). Gates are per head ("head") or per channel ("channel"), of every token but RetNet's.
MIXERS = {
    "linear_attention": ("gated_linear_attention", None),
    "retnet": ("gated_linear_attention", "constant"),
    "gla": ("gated_linear_attention", "channel"),
    "mlstm": ("mlstm", None),
    "deltanet": ("gated_delta_rule", None),
    "gated_deltanet": ("gated_delta_rule", "head"),
    "kda": ("gated_delta_rule", "channel"),
}
FORWARD_SHAPES = ((32, 512, 32, 64), (8, 2048, 16, 64), (1, 32768, 32, 64))


@dataclass(frozen=True)
class Settings:
    """Time and memory of the chunked forms, over those of the scans."""

    batch: int = 1
    """Sequences."""
    time: int = 4096
    """Tokens of each."""
    heads: int = 9
    """Heads, as many for keys as for values."""
    dim: int = 64
    """Size of keys and of values."""
    repeats: int = 5
    """Timed calls; the median counts."""


def inputs(op: str, gate: str | None, batch: int, length: int, heads: int, dim: int) -> dict[str, jax.Array]:
    """Random arguments of an op, keys of norm 1."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shape = (batch, length, heads, dim)
    q, k, v = (jax.random.normal(next(keys), shape) for _ in range(3))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    found = {"q": q, "k": k, "v": v}
    if op == "gated_delta_rule":
        found["beta"] = jax.nn.sigmoid(jax.random.normal(next(keys), shape[:3]))
    if op == "mlstm":
        found |= {"i": jax.random.normal(next(keys), shape[:3]), "f": 3 + jax.random.normal(next(keys), shape[:3])}
    if gate is not None:
        sizes = {"constant": shape[2:3], "head": shape[:3], "channel": shape}[gate]
        found["g"] = -0.1 * jax.random.uniform(next(keys), sizes)
    return found


def cost(function: Callable, arguments: Any, repeats: int) -> tuple[float, float]:
    """(seconds, bytes of temporary memory) of a call: the median of `repeats`, after one to warm up."""
    compiled = jax.jit(function).lower(arguments).compile()
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), compiled.memory_analysis().temp_size_in_bytes


def gradient(op: str, implementation: str) -> Callable:
    """The op's outputs and all its gradients."""

    def loss(arguments):
        o, state = getattr(ops, op)(**arguments, implementation=implementation)
        return jnp.sum(o * o) + sum(jnp.sum(x) for x in jax.tree.leaves(state))

    return jax.value_and_grad(loss)


def against_scan(settings: Settings, console: Console) -> None:
    s = settings
    table = Table(title=f"forward + backward, B={s.batch} T={s.time} H={s.heads} K=V={s.dim}, float32, {_device()}")
    for heading in ("mixer", "scan, ms", "chunked, ms", "faster", "memory of the scan's"):
        table.add_column(heading, justify="left" if heading == "mixer" else "right")
    for mixer, (op, gate) in MIXERS.items():
        arguments = inputs(op, gate, s.batch, s.time, s.heads, s.dim)
        (scan, scan_bytes), (chunked, chunked_bytes) = (
            cost(gradient(op, implementation), arguments, s.repeats) for implementation in ("scan", "chunked")
        )
        less = f"{chunked_bytes / scan_bytes:.0%}"
        table.add_row(mixer, f"{1e3 * scan:.0f}", f"{1e3 * chunked:.0f}", f"{scan / chunked:.1f}x", less)
    console.print(table)


def plain_loop(arguments: dict[str, jax.Array], chunk: int = 64) -> jax.Array:
    """Linear attention as most would write it first: einsums inside one scan over chunks."""
    q, k, v = (
        x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).transpose(1, 0, 3, 2, 4)
        for x in (arguments["q"], arguments["k"], arguments["v"])
    )

    def step(state, xs):
        q, k, v = xs
        p = jnp.tril(jnp.einsum("bhik,bhjk->bhij", q, k, preferred_element_type=jnp.float32)).astype(v.dtype)
        o = jnp.einsum("bhij,bhjv->bhiv", p, v, preferred_element_type=jnp.float32)
        o += jnp.einsum("bhik,bhkv->bhiv", q, state.astype(q.dtype), preferred_element_type=jnp.float32)
        return state + jnp.einsum("bhjk,bhjv->bhkv", k, v, preferred_element_type=jnp.float32), o.astype(v.dtype)

    state = jnp.zeros((*q.shape[1:3], q.shape[-1], v.shape[-1]), jnp.float32)
    o = lax.scan(step, state, (q, k, v))[1]
    return o.transpose(1, 0, 3, 2, 4).reshape(arguments["v"].shape)


def against_plain_loop(settings: Settings, console: Console) -> None:
    table = Table(title=f"linear attention, forward, bfloat16, {_device()}")
    for heading in ("B, T, H, D", "einsum + scan, ms", "chunked, ms", "faster", "default, ms", "faster"):
        table.add_column(heading, justify="right")
    for shape in FORWARD_SHAPES:
        arguments = {n: x.astype(jnp.bfloat16) for n, x in inputs("gated_linear_attention", None, *shape).items()}
        plain, _ = cost(plain_loop, arguments, 4 * settings.repeats)
        cells = [str(shape), f"{1e3 * plain:.3f}"]
        for implementation in ("chunked", None):  # None: kernels, where there are any
            forward = functools.partial(ops.gated_linear_attention, scale=1.0, implementation=implementation)
            ours, _ = cost(lambda arguments, forward=forward: forward(**arguments)[0], arguments, 4 * settings.repeats)
            cells += [f"{1e3 * ours:.3f}", f"{plain / ours:.1f}x"]
        table.add_row(*cells)
    console.print(table)


def _device() -> str:
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def main() -> None:
    """Measure and print."""
    settings, console = parse(Settings), Console()
    if jax.default_backend() == "gpu":
        against_plain_loop(settings, console)
    against_scan(settings, console)


if __name__ == "__main__":
    run_main(main)
