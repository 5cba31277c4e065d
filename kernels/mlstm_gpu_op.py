"""The mLSTM on Hopper: family A's kernels with an input gate, and max(|n.q|, e^-m) as denominator inside of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import chunk, mlstm, recurrent_gpu_step, recurrent_step
from jaxlin.kernels.gated_linear_attention_gpu_op import attend, check
from jaxlin.kernels.gates_gpu import Gates


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
    """`mlstm.chunked` by kernels; initial_state None is zero.

    q, k [B, T, H, K <= 128]; v [B, T, HV, V <= 256], all bfloat16; i, f [B, T, HV] pre-activations. Raises
    NotImplementedError for what the kernels do not serve.
    """
    if q.shape[1] == 1:
        return recurrent_step.mlstm(recurrent_gpu_step.step, q, k, v, i, f, initial_state, segment_ids, scale)
    check(scale, q, k, v)
    (f,) = chunk.mask_padding(segment_ids, f)  # of which there is a function; the kernels mask all others
    c, n, m0 = None, None, jnp.zeros(v.shape[:1] + v.shape[2:3], jnp.float32)
    if initial_state is not None:
        (c, n), m0 = mlstm.start(initial_state, segment_ids), initial_state[2]
    gates = Gates(jax.nn.log_sigmoid(f.astype(m0.dtype)), i, lax.stop_gradient(m0))
    o, c, n, m = attend(scale, "max", q, k, v, gates, c, n, segment_ids)
    return o, (c, n, m if initial_state is None else mlstm.end(m0, m, segment_ids))
