"""Gates per head on Hopper, outside of the kernels: by chunk, as the vectors that kernels read, and their gradients.

Half a million numbers, so what counts is how many kernels XLA makes of it, but not that alone: products in full float32
precision are slow, and all of them as one, [8192, 320] by [320, 128] with its zeros, took 0.1 ms (H200, jax 0.11.2).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxlin.kernels import chunk
from jaxlin.kernels.gated_linear_attention_gpu_fwd import MIN_GATE, Form
from jaxlin.kernels.mosaic_gpu_registers import CHUNK

LOG2_E = 1 / math.log(2)
ONWARD = np.tril(np.ones((CHUNK, CHUNK), np.float32))
"""What a token's sum takes, column by column: the token and all behind it."""


def by_chunk(segment_ids: Array | None, *arrays: Array) -> Array:
    """[B, T, HV] of each -> [B, HV, N, R, C] float32 of all, zero in padding and behind the end."""
    arrays = chunk.mask_padding(segment_ids, *(x.astype(jnp.float32) for x in arrays))
    return _laid_out(*(jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK), (0, 0))) for x in arrays))


@jax.custom_vjp
def _laid_out(*arrays: Array) -> Array:
    x = jnp.stack(arrays)
    return x.reshape(*x.shape[:2], -1, CHUNK, x.shape[3]).transpose(1, 4, 2, 0, 3)


def _laid_out_bwd(_, d: Array) -> tuple[Array, ...]:
    """Cut first: what is cut out of all of it laid out back would be a kernel more for each."""
    rows = (d[..., r, :].transpose(0, 2, 3, 1) for r in range(d.shape[3]))
    return tuple(x.reshape(x.shape[0], -1, x.shape[3]) for x in rows)


_laid_out.defvjp(lambda *arrays: (_laid_out(*arrays), None), _laid_out_bwd)


def vectors(form: Form, gates: Array | None) -> Array | None:
    """What the kernels read, [..., R, C], from what the form has of log decays, log input gates, m, beta [..., R, C].

    b, c = b - w, log2 of the least denominator e^-m, beta; the first three in powers of two.
    """
    if gates is None or not form.gated:
        return gates
    given = iter(jnp.moveaxis(gates, -2, 0))
    found = [_sums(LOG2_E * jnp.maximum(next(given), MIN_GATE), ONWARD.T)]
    if form.write:
        found.append(found[0] - LOG2_E * jnp.maximum(next(given), MIN_GATE))
    if form.denominator == "max":
        found.append(-LOG2_E * next(given))
    return jnp.stack([*found, *given], axis=-2)


def vector_of(sums: Array, at: int) -> Array:
    """Vector `at` [..., C] of what a kernel sums in a chunk."""
    return sums[..., at * CHUNK : (at + 1) * CHUNK]


def gradient_of_decays(sums: Array, rows: int, columns: int, writes: int, channels: int) -> Array:
    """dg [..., C] from what a kernel sums in a chunk, vectors [C] by number and behind the last of them channels.

    At each token: vector `rows` less vector `columns` from it on, vector `writes` before it, and all channels.
    """
    later = _sums(vector_of(sums, rows) - vector_of(sums, columns), ONWARD)
    earlier = _sums(vector_of(sums, writes), 1 - ONWARD)
    return later + earlier + sums[..., channels * CHUNK :].sum(-1, keepdims=True)


def _sums(x: Array, chosen: np.ndarray) -> Array:
    """[..., C] -> [..., C]: for each column of `chosen`, of zeros and ones, the sum of the entries it has ones for."""
    return jnp.matmul(x, chosen, precision=lax.Precision.HIGHEST)
