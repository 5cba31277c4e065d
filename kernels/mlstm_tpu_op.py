"""The mLSTM on the TPU: family A's kernels with a stabiliser and a denominator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import chunk, mlstm, recurrent_step, recurrent_tpu_step
from jaxlin.kernels.gated_linear_attention_tpu_op import attend


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
    if q.shape[1] == 1:
        return recurrent_step.mlstm(recurrent_tpu_step.step, q, k, v, i, f, initial_state, segment_ids, scale)
    i, f = chunk.mask_padding(segment_ids, i, f)
    log_f, i = jax.nn.log_sigmoid(f.astype(jnp.float32)), i.astype(jnp.float32)
    c, n = mlstm.start(initial_state, segment_ids)
    m0 = initial_state[2]
    m = lax.stop_gradient(m0)
    h, c, n, m = attend(q, k, v, log_f, i, m, c, n, segment_ids, scale=scale, denominator="max")
    return h, (c, n, mlstm.end(m0, m, segment_ids))
