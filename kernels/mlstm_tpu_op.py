"""The mLSTM on the TPU: the gates of `mlstm.gates` in XLA, the rest is family A's kernel with a denominator."""

from __future__ import annotations

from jax import Array

from jaxlin.kernels import mlstm
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
    g, w, m, (c, n, final_m) = mlstm.gates(i, f, initial_state, segment_ids)
    h, c, n = attend(q, k, v, g, w, m, c, n, segment_ids, scale=scale, denominator="max")
    return h, (c, n, final_m)
