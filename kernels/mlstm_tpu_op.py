"""The mLSTM on the TPU: the gates of `mlstm.gates` in XLA, the rest is family A's kernel with a denominator."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxlin.kernels import mlstm
from jaxlin.kernels.gated_linear_attention_tpu_op import attend, step


def pallas(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    *,
    scale: float,
    initial_state: tuple[Array, Array, Array],
    segment_ids: Array | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """`mlstm.chunked` as a TPU kernel: same arguments, same results; `chunk_size` changes nothing."""
    del chunk_size
    g, w, m, (c, n, final_m) = mlstm.gates(i, f, initial_state, segment_ids)
    if q.shape[1] == 1:
        o, (c, n, denominator) = step(q, k, v, g, w, c, n, segment_ids, scale=scale)
        h = o / jnp.maximum(jnp.abs(denominator), jnp.exp(-m[:, 0]))[..., None]
        return h[:, None].astype(v.dtype), (c, n, final_m)
    h, c, n = attend(q, k, v, g, w, m, c, n, segment_ids, scale=scale, denominator="max")
    return h, (c, n, final_m)
