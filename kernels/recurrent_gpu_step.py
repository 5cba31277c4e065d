"""One token on Hopper, all recurrences, in one launch: the state is read once, updated in registers, written in place.

The place may be inside the states of all layers: a copy of one layer's, out and back in, would be twice its traffic.

A program has one (b, value head) and a block of the values' columns, which are independent of each other. It loads
everything straight from global memory: that the loads take long is hidden by the programs beside it, several an SM.
Bound by bandwidth: 32 KiB of traffic for a state of 64 x 64, 16 KiB of it in flight for every program; the rest (q, k,
v, gates, o) adds 2 to 4 percent. Sums over the state's rows stay within a warp, so there is no shared memory at all.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import chunk
from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.gated_linear_attention import NORMALIZER_EPS
from jaxlin.kernels.in_stack import InStack
from jaxlin.kernels.recurrent_step import Token, compose, definition
from jaxlin.kernels.tile_gpu_strip import Strip

LARGEST = 256
"""Of the head sizes, which are multiples of 16."""


@chunk.custom_vjp
def step(scale: float, x: Token, s: Any, z: Array | None) -> tuple[Array, Any, Any]:
    """A `recurrent_step.Step`, whose S may be `InStack`. Raises NotImplementedError for what it does not serve."""
    return _call(scale, x, s, z)


def _forward(scale, x, s, z):
    return _call(scale, x, s, z), (x, s, z)


def _backward(scale, primals, cotangents):
    return jax.vjp(functools.partial(_definition, scale), *primals)[1](cotangents)


def _definition(scale: float, x: Token, s: Any, z: Array | None) -> tuple[Array, Any, Any]:
    """What the kernel computes."""
    o, new, z = compose(definition, scale, x, s.read() if isinstance(s, InStack) else s, z)
    return o, s.write(new) if isinstance(s, InStack) else new, z


step.defvjp(_forward, _backward)


def check(x: Token, s: Array) -> None:
    """Raise NotImplementedError, with the reason, for inputs that the kernel does not take; s [L, B, HV, K, V]."""
    if any(a.dtype not in (jnp.bfloat16, jnp.float32) for a in (x.q, x.k, x.v)) or s.dtype != jnp.float32:
        raise NotImplementedError(
            f"q, k, v and the state are {x.q.dtype}, {x.k.dtype}, {x.v.dtype} and {s.dtype}; the GPU step takes"
            " bfloat16 or float32, and a float32 state"
        )
    if any(n % 16 or n > LARGEST for n in s.shape[3:]):
        raise NotImplementedError(
            f"head sizes of keys and values are {s.shape[3]} and {s.shape[4]}; the GPU step takes multiples of 16 up"
            f" to {LARGEST}"
        )


def columns_of(key: int, value: int) -> int:
    """Columns of a program's block: 32 registers a thread for the state where that leaves a row 128 bytes."""
    sizes = (64, 32, 16) if key <= 64 else (32, 16)
    return next(n for n in sizes if value % n == 0)


def _call(scale: float, x: Token, s: Any, z: Array | None) -> tuple[Array, Any, Any]:
    own = s if isinstance(s, InStack) else InStack(s[None], jnp.zeros((), jnp.int32))
    check(x, own.stack)
    _, batch, heads, key, value = own.stack.shape
    strip = Strip(key, columns_of(key, value))
    named = {n: a for n, a in (x._asdict() | dict(z=z, layer=own.layer[None])).items() if a is not None}
    out = [jax.ShapeDtypeStruct(x.v.shape, x.v.dtype)]
    if z is not None:
        out.append(jax.ShapeDtypeStruct(z.shape, z.dtype))
    body = functools.partial(_kernel, scale, strip, heads // x.q.shape[1], tuple(named))
    body.__name__ = "recurrent_step"
    grid = (batch, heads, value // strip.columns)
    o, *z_new, stack = gpu.launch(body, list(named.values()), out, grid, state=own.stack)
    new = InStack(stack, own.layer) if isinstance(s, InStack) else stack[0]
    return o, new, z_new[0] if z_new else None


def _kernel(scale: float, strip: Strip, group: int, names: tuple, index: Any, inputs: Any, out: Any, _: Any):
    batch, head, block = index
    *arrays, state = inputs
    x = dict(zip(names, arrays, strict=True))
    columns = pl.ds(block * strip.columns, strip.columns)
    key_head = jax.lax.div(head, jnp.int32(group))
    own = state.at[x["layer"][0], batch, head, :, columns]

    s = strip.load(own)
    q, k = (strip.load_rows(x[n].at[batch, key_head]) for n in "qk")
    v = strip.load_columns(x["v"].at[batch, head, columns])
    decay = None
    if "g" in x:
        g = x["g"]
        constant, channel = len(g.shape) == 1, len(g.shape) == 3
        decay = jnp.exp(strip.load_rows(g.at[batch, head]) if channel else g[head] if constant else g[batch, head])
        s = strip.by_row(decay, s)
    if "w" in x:
        k = jnp.exp(x["w"][batch, head]) * k
    if "beta" in x:
        v = x["beta"][batch, head] * (v - jnp.sum(strip.by_row(k, s), 0))
    s = s + strip.by_row(k, strip.over_columns(v))
    gpu.store(own, s)

    q = scale * q
    o = jnp.sum(strip.by_row(q, s), 0)
    if "z" in x:
        z = strip.load_rows(x["z"].at[batch, head])
        z = (z if decay is None else decay * z) + k
        gpu.store(out[1].at[batch, head], z)  # the same from every block
        l = jnp.sum(strip.over_rows(q * z), 0)  # noqa: E741 (in every column, where o needs it)
        o = o / (jnp.maximum(jnp.abs(l), x["floor"][batch, head]) if "floor" in x else l + NORMALIZER_EPS)
    gpu.store(out[0].at[batch, head, columns], o)
