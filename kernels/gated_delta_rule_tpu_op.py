"""Family B on the TPU: the differentiable call around the forward and the backward kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk, recurrent_step
from jaxlin.kernels import tile_tpu_layout as tiles
from jaxlin.kernels.gated_delta_rule_tpu_bwd import backward
from jaxlin.kernels.gated_delta_rule_tpu_fwd import Inputs, forward
from jaxlin.kernels.recurrent_tpu_step import step
from jaxlin.kernels.tile_tpu_layout import Layout


def pallas(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    *,
    scale: float,
    initial_state: Array,
    segment_ids: Array | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """`gated_delta_rule.chunked` as TPU kernels: same arguments, same results; `chunk_size` changes nothing."""
    del chunk_size
    if q.shape[1] == 1:
        return recurrent_step.gated_delta_rule(step, q, k, v, beta, g, initial_state, segment_ids, scale)
    batch, time, heads, value = v.shape
    layout = tiles.make_layout(batch, time, heads, q.shape[-1], value, tiles.operand_dtype(q, k, v))
    inputs = Inputs(
        **tiles.token_arrays(layout, q, k, v), **tiles.gate_arrays(layout, segment_ids, g),
        beta=tiles.to_rows(layout, *chunk.mask_padding(segment_ids, beta)),
        segments=tiles.segment_rows(layout, segment_ids),
    )  # fmt: skip
    o, s = _delta_rule((layout, scale, q.shape[2]), inputs, tiles.pad_state(layout, initial_state))
    o = o.reshape(batch, time, heads, layout.value)[..., :value].astype(v.dtype)
    return o, s[..., : q.shape[-1], :value]


@chunk.custom_vjp
def _delta_rule(static: tuple[Layout, float, int], x: Inputs, s: Array):
    """static: the layout, the scale, the number of key heads."""
    layout, scale, heads = static
    out = forward(layout, scale, tiles.per_value_head(layout, heads, x), s, save=False)
    return out["o"], out["s"]


def _forward(static, x, s):
    layout, scale, heads = static
    out = forward(layout, scale, tiles.per_value_head(layout, heads, x), s, save=True)
    return (out["o"], out["s"]), (x, checkpoint_name(out["states"], "chunk_states"))


def _backward(static, residuals, cotangents):
    layout, scale, heads = static
    (x, states), (do, ds) = residuals, cotangents
    key_dtype = layout.dtype if heads == layout.heads else jnp.float32  # summed over value heads before it is rounded
    out = backward(layout, scale, tiles.per_value_head(layout, heads, x), states, do, ds, key_dtype)
    dq, dk = (tiles.sum_value_heads(layout, heads, out[n]).astype(layout.dtype) for n in ("dq", "dk"))
    dsegments = jax.tree.map(jnp.zeros_like, x.segments)
    dg, dg_channel = out.get("dg"), out.get("dg_channel")
    return Inputs(dq, dk, out["dv"], out["dbeta"], dg, dg_channel, dsegments), out["ds"]


_delta_rule.defvjp(_forward, _backward)
