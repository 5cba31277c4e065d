"""The mLSTM on Hopper: family A's kernels with an input gate, and max(|n.q|, e^-m) as denominator inside of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import chunk, gates_gpu, recurrent_gpu_step, recurrent_step
from jaxlin.kernels.gated_linear_attention_gpu_op import attend, check
from jaxlin.kernels.mlstm import stabilizer


def pallas(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    *,
    scale: float,
    initial_state: tuple[Array, Array, Array] | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """`mlstm.chunked` by one kernel each way; initial_state None is zero.

    q, k [B, T, H, K <= 128]; v [B, T, HV, V <= 256], all bfloat16; i, f [B, T, HV] pre-activations. Raises
    NotImplementedError for what the kernels do not serve.
    """
    if q.shape[1] == 1:
        return recurrent_step.mlstm(recurrent_gpu_step.step, q, k, v, i, f, initial_state, segment_ids, scale)
    check(scale, q, k, v)
    i, f = chunk.mask_padding(segment_ids, i, f)
    c, n, m0 = (None, None, None) if initial_state is None else initial_state
    start = jnp.zeros(v.shape[:1] + v.shape[2:3], jnp.float32) if m0 is None else m0
    i, log_f = i.astype(start.dtype), jax.nn.log_sigmoid(f.astype(start.dtype))
    before, m = stabilizer(*lax.stop_gradient((i, log_f, start)), segment_ids)
    gates = gates_gpu.by_chunk(segment_ids, log_f + before - m, i - m, m)
    final_m = m[:, -1]
    if m0 is not None:
        rescale = jnp.exp(m0 - lax.stop_gradient(m0))  # 1: the initial m is no constant, it scales C and n
        if segment_ids is not None:  # but a row of nothing but padding hands all three on
            empty = ~jnp.any(segment_ids != 0, axis=1, keepdims=True)
            final_m, rescale = jnp.where(empty, m0, final_m), jnp.where(empty, 1.0, rescale)
        c, n = c * rescale[..., None, None], n * rescale[..., None]
    o, c, n = attend(scale, "max", True, q, k, v, gates, c, n, segment_ids)
    return o, (c, n, final_m)
