"""One token on the TPU, all recurrences: the state is read once, updated in VMEM and written in place.

    S <- diag(decay) S + k (v - erase^T S)^T ;   o = scale S^T q

with v and erase = k already times beta for the delta rule, and no erase for gated linear attention.
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

STATE_BYTES = 1 << 20
"""Of the states in one grid step."""


@chunk.custom_vjp
def step(scale: float, q: Array, k: Array, v: Array, decay: Array, erase: Array | None, s: Array):
    """(o [B, HV, V], s) in float32.

    q, k, erase [B, H or HV, K]; v [B, HV, V]; decay [B, HV, 1 or K]; s [B, HV, K, V].
    """
    return _call(scale, q, k, v, decay, erase, s)


def definition(scale: float, q: Any, k: Any, v: Array, decay: Array, erase: Any, s: Array):
    """`step` in XLA, whose derivative serves both."""
    q, k, erase = (None if x is None else _per_value_head(x, s.shape[1]) for x in (q, k, erase))
    s = decay[..., None] * s
    if erase is not None:
        v = v - jnp.einsum("bhk,bhkv->bhv", erase, s, precision=lax.Precision.HIGHEST)
    s = s + k[..., None] * v[..., None, :]
    return scale * jnp.einsum("bhk,bhkv->bhv", q, s, precision=lax.Precision.HIGHEST), s


def _forward(scale, *x):
    return _call(scale, *x), x


def _backward(scale, x, cotangents):
    return jax.vjp(functools.partial(definition, scale), *x)[1](cotangents)


step.defvjp(_forward, _backward)


def _per_value_head(x: Array, heads: int) -> Array:
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def _call(scale, q, k, v, decay, erase, s):
    batch, heads, key, value = s.shape
    columns = [q, k, jnp.broadcast_to(decay, (batch, heads, key)), *([] if erase is None else [erase])]
    columns = jnp.stack([_per_value_head(x, heads) for x in columns], axis=1).swapaxes(2, 3)  # [B, 3 | 4, K, HV]
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
