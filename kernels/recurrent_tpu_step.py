"""One token on the TPU, all recurrences: the state is read once, updated in VMEM and written in place.

`recurrent_step` has the mathematics.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlin.kernels import chunk
from jaxlin.kernels import tile_tpu_layout as tiles
from jaxlin.kernels.recurrent_step import Token, compose, definition, per_value_head

STATE_BYTES = 1 << 20
"""Of the states in one grid step."""


def step(scale: float, x: Token, s: Array, z: Array | None) -> tuple[Array, Array, Any]:
    """A `recurrent_step.Step`."""
    return compose(_step, scale, x, s, z)


@chunk.custom_vjp
def _step(scale: float, q: Array, k: Array, v: Array, decay: Array, erase: Array | None, s: Array):
    """`definition` as a kernel."""
    return _call(scale, q, k, v, decay, erase, s)


def _forward(scale, *x):
    return _call(scale, *x), x


def _backward(scale, x, cotangents):
    return jax.vjp(functools.partial(definition, scale), *x)[1](cotangents)


_step.defvjp(_forward, _backward)


def _call(scale, q, k, v, decay, erase, s):
    batch, heads, key, value = s.shape
    columns = [q, k, jnp.broadcast_to(decay, (batch, heads, key)), *([] if erase is None else [erase])]
    columns = jnp.stack([per_value_head(x, heads) for x in columns], axis=1).swapaxes(2, 3)  # [B, 3 | 4, K, HV]
    block = min(heads, max(1, STATE_BYTES // (4 * key * -(-value // 128) * 128)))
    states = pl.BlockSpec((1, block, key, value), lambda b, h: (b, h, 0, 0))
    rows = pl.BlockSpec((1, heads, value), lambda b, h: (b, 0, 0))
    o, s = pl.pallas_call(
        functools.partial(_kernel, scale, heads, block),
        grid=(batch, -(-heads // block)),
        in_specs=[pl.BlockSpec((1, *columns.shape[1:]), lambda b, h: (b, 0, 0, 0)), rows, states],
        out_specs=[rows, states],
        out_shape=[jax.ShapeDtypeStruct(v.shape, jnp.float32), jax.ShapeDtypeStruct(s.shape, jnp.float32)],
        input_output_aliases={2: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=tiles.interpreted(),
        name="recurrent_step",
    )(columns, v, s)
    return o, s


def _kernel(scale: float, heads: int, block: int, columns: Any, v: Any, s: Any, o: Any, new: Any) -> None:
    first = pl.program_id(1) * block

    def head(i, _):
        @pl.when(first + i < heads)  # the last block may have fewer heads
        def _():
            own = lax.broadcasted_iota(jnp.int32, columns.shape[2:], 1) == first + i

            def column(n):
                return jnp.sum(jnp.where(own, columns[0, n], 0.0), axis=1, keepdims=True)

            state, value = column(2) * s[0, i], v[0, pl.ds(first + i, 1), :]
            if columns.shape[1] == 4:
                value -= jnp.sum(column(3) * state, axis=0, keepdims=True)
            state += column(1) * value
            new[0, i] = state
            o[0, pl.ds(first + i, 1), :] = scale * jnp.sum(column(0) * state, axis=0, keepdims=True)

    lax.fori_loop(0, block, head, None)
