"""What `bench` times in JAX: inputs, ours and XLA's implementations, the least there is to move and to compute.

Shapes are (B, T, H, D): H heads of q, k and v alike. `args` are an op's arrays by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

FAMILIES = {
    "linear_attention": "gated_linear_attention",
    "retention": "gated_linear_attention",
    "gla": "gated_linear_attention",
    "mlstm": "mlstm",
    "deltanet": "gated_delta_rule",
    "gated_deltanet": "gated_delta_rule",
    "kda": "gated_delta_rule",
}
CONSTANTS = {"retention": ("g",)}
"""Arguments that nobody differentiates."""
CHUNK = 64
"""Tokens of a chunk, where products are counted."""


def inputs(op: str, shape: Sequence[int], seed: int = 0) -> dict[str, Array]:
    """Arguments as the mixers give them: bfloat16, L2-normalised q and k; mild gates, those a token has float32."""
    b, t, h, d = shape
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    normal = lambda *size: jax.random.normal(next(keys), size)  # noqa: E731

    def unit(x: Array) -> Array:
        return x if op == "softmax" else x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    args = dict(q=unit(normal(b, t, h, d)), k=unit(normal(b, t, h, d)), v=normal(b, t, h, d))
    args = {name: x.astype(jnp.bfloat16) for name, x in args.items()}
    if op == "retention":
        args["g"] = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(h, dtype=jnp.float32))))
    elif op == "mlstm":
        args |= dict(i=normal(b, t, h), f=3 + normal(b, t, h))
    elif op in ("gla", "kda"):
        args["g"] = jax.nn.log_sigmoid(3 + normal(b, t, h, d))
    elif op == "gated_deltanet":
        args["g"] = jax.nn.log_sigmoid(3 + normal(b, t, h))
    if FAMILIES.get(op) == "gated_delta_rule":
        args["beta"] = jax.nn.sigmoid(normal(b, t, h))
    return args


def function(op: str, implementation: str) -> Callable[..., Array]:
    """(**args) -> o."""
    if op == "softmax":

        def softmax(q: Array, k: Array, v: Array) -> Array:
            kind = "cudnn" if implementation == "cudnn" else "xla"
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kind)

        return softmax
    from jaxlin import ops

    run = functools.partial(getattr(ops, FAMILIES[op]), implementation=implementation)
    return lambda **args: run(**args)[0]


def forward_and_backward(op: str, run: Callable[..., Array]) -> Callable[[dict[str, Array], Array], dict[str, Array]]:
    """(args, cotangent of o) -> o and the gradients, by name."""

    def both(args: dict[str, Array], cotangent: Array) -> dict[str, Array]:
        constant = {name: x for name, x in args.items() if name in CONSTANTS.get(op, ())}
        varying = {name: x for name, x in args.items() if name not in constant}
        o, vjp = jax.vjp(lambda varying: run(**varying, **constant), varying)
        return dict(o=o) | {f"d{name}": x for name, x in vjp(cotangent.astype(o.dtype))[0].items()}

    return both


def reference(op: str, args: dict[str, Array], cotangent: Array) -> dict[str, Array]:
    """o and the gradients by the definition in float32: the scan over time; softmax attention by XLA."""
    args = {name: x.astype(jnp.float32) for name, x in args.items()}
    with jax.default_matmul_precision("highest"):
        both = forward_and_backward(op, function(op, "xla" if op == "softmax" else "scan"))
        return jax.jit(both)(args, cotangent)


def step(op: str, implementation: str) -> Callable:
    """(args of one token, T = 1, state) -> (o [B, 1, H, D], state): one decoded token of one layer."""
    from jaxlin import ops

    def default(state, **args):
        token = {name: x[:, 0] if x.ndim > 1 else x for name, x in args.items()}
        token |= {} if op == "mlstm" or "g" in args else dict(g=None)
        o, state = getattr(ops, f"{FAMILIES[op]}_step")(**token, state=state)
        return o[:, None], state

    def named(state, **args):
        return getattr(ops, FAMILIES[op])(**args, initial_state=state, implementation=implementation)

    run = default if implementation == "default" else named
    return lambda args, state: run(state, **args)


def states(op: str, shape: Sequence[int], layers: int) -> list:
    """Every layer's state, float32, as after some tokens."""
    b, _, h, d = shape
    keys = jax.random.split(jax.random.key(7), layers)
    state = lambda key: jax.random.normal(key, (b, h, d, d)) / 8  # noqa: E731
    if op != "mlstm":
        return [state(key) for key in keys]
    return [(state(key), jnp.ones((b, h, d)), jnp.zeros((b, h))) for key in keys]


def walk(op: str, implementation: str) -> Callable:
    """(states of the layers, args of one token) -> (states, o): each layer's o is the next one's v, as in a model."""
    layer = step(op, implementation)

    def program(states: list, args: dict[str, Array]) -> tuple[list, Array]:
        after = []
        for state in states:
            o, state = layer(args, state)
            args = args | dict(v=o)
            after.append(state)
        return after, args["v"]

    return program


# ---- the least there is to do ----


def minimum_bytes(args: dict[str, Array], backward: bool) -> int:
    """Inputs and o moved once; with `backward` their gradients too."""
    once = sum(x.nbytes for x in args.values()) + args["v"].nbytes
    return once * 2 if backward else once


def minimum_flops(op: str, shape: Sequence[int], backward: bool) -> float:
    """Of matrix products, in chunks of CHUNK tokens (softmax: of all pairs); the backward pass has twice as many.

    By token and head, C tokens a chunk: q k^T and P v; q S and k^T v; the delta rule has k k^T, T u and k S besides and
    the inverse T of C^3 / 3 multiplications a chunk.
    """
    b, t, h, d = shape
    if op == "softmax":
        forward = 2 * t * d  # two products over half of the pairs
    elif FAMILIES[op] == "gated_delta_rule":
        forward = 8 * CHUNK * d + 6 * d * d + 2 * CHUNK**2 / 3
    else:
        forward = 4 * CHUNK * d + 4 * d * d
    return math.prod((b, t, h)) * forward * (3 if backward else 1)
