"""Family A on Hopper: what surrounds the kernels, and their derivative (linear attention, RetNet, scalar gates, mLSTM).

The kernels read q, k, v as they are. Here the small things are made ready for them: gates (`gates_gpu`), segment
codes, zeros up to whole chunks and tiles of 64.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlin.kernels import chunk, gates_gpu, recurrent_gpu_step, recurrent_step
from jaxlin.kernels import gated_linear_attention_gpu_split as split
from jaxlin.kernels.gated_linear_attention_gpu_bwd import COLUMNS, OWN, ROWS, WRITES, Cotangents, backward
from jaxlin.kernels.gated_linear_attention_gpu_fwd import (
    ENTER,
    KEEP,
    LEAVE,
    RUN,
    VALID,
    Form,
    Inputs,
    forward,
)
from jaxlin.kernels.gates_gpu import Decays, Gates
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK

LARGEST_KEY, LARGEST_VALUE = 128, 256
"""Head sizes of the kernels: keys of 64 or 128, values of multiples of 64; others are padded."""


def pallas(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    *,
    scale: float,
    normalize: bool = False,
    initial_state: Any = None,
    segment_ids: Array | None = None,
) -> tuple[Array, Array | tuple[Array, Array]]:
    """`gated_linear_attention.chunked` by kernels; initial_state None is zero, and is then not read.

    q, k [B, T, H, K <= 128]; v [B, T, HV, V <= 256], all bfloat16; g None | [HV] | [B, T, HV] | [B, T, HV, K]. Raises
    NotImplementedError for what the kernels do not serve.
    """
    if q.shape[1] == 1:
        return recurrent_step.gated_linear_attention(
            recurrent_gpu_step.step, q, k, v, g, normalize, initial_state, segment_ids, scale
        )
    check(scale, q, k, v)
    if g is not None and g.ndim == 4:
        if normalize:
            raise NotImplementedError("gates are per channel; the GPU kernels have no normaliser with them")
        from jaxlin.kernels.gated_linear_attention_gpu_channel_op import attend as attend_by_channel  # imports this

        return attend_by_channel(scale, q, k, v, g, initial_state, segment_ids)
    if g is not None and g.ndim == 1 and (segment_ids is not None or q.shape[1] % CHUNK):
        g = jnp.broadcast_to(g, v.shape[:3])  # for in padding there is none
    s0, z0 = (initial_state or (None, None)) if normalize else (initial_state, None)
    o, s, z, _ = attend(scale, "sum" if normalize else None, q, k, v, Gates(g), s0, z0, segment_ids)
    return o, (s, z) if normalize else s


def check(scale: float, q: Array, k: Array, v: Array) -> None:
    """Raise NotImplementedError, with the reason, for inputs that these kernels do not take."""
    if scale <= 0:
        raise NotImplementedError(f"scale is {scale}; the GPU kernels have it in an exponent and take positive ones")
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        raise NotImplementedError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; the GPU kernels take bfloat16")
    if q.shape[-1] > LARGEST_KEY or v.shape[-1] > LARGEST_VALUE:
        raise NotImplementedError(
            f"head sizes of keys and values are {q.shape[-1]} and {v.shape[-1]}; the GPU kernels take up to"
            f" {LARGEST_KEY} and {LARGEST_VALUE}"
        )


def segment_codes(segment_ids: Array) -> Array:
    """[B, T] -> [B, N, C] int32 of the bits that the kernels mask by; see `gated_linear_attention_gpu_fwd`."""
    fill = ((0, 0), (0, -segment_ids.shape[1] % CHUNK))
    run = jnp.pad(jnp.cumsum(chunk.segment_starts(segment_ids), axis=1, dtype=jnp.int32), fill, mode="edge")
    valid = jnp.pad(segment_ids != 0, fill)
    run, valid = (x.reshape(x.shape[0], -1, CHUNK) for x in (run, valid))
    last = run[..., -1:]
    carry = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
    bits = ((VALID, valid), (ENTER, run == carry), (LEAVE, run == last), (KEEP, last == carry))
    return RUN * run + sum(bit * flag.astype(jnp.int32) for bit, flag in bits)


def attend(
    scale: float,
    denominator: str | None,
    q: Array,
    k: Array,
    v: Array,
    gates: Gates,
    s0: Array | None,
    z0: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """(o [B, T, HV, V], final S [B, HV, K, V], z [B, HV, K] or None, m [B, HV] or None); K <= 128 and V <= 256."""
    time, key_dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    tile = 64 if key_dim <= 64 else 128  # of values: the backward pass wants whole programs of them
    q, k, v = (fill(x, (0, -time % CHUNK, 0, -x.shape[3] % size)) for x, size in ((q, 64), (k, 64), (v, tile)))
    s0 = None if s0 is None else fill(s0.astype(jnp.float32), (0, 0, -key_dim % 64, -value_dim % tile))
    z0 = None if z0 is None else fill(z0.astype(jnp.float32), (0, 0, -key_dim % 64))
    codes = None if segment_ids is None else segment_codes(segment_ids)
    form = Form(scale, gates.decay is not None, codes is not None, denominator, gates.write is not None)
    o, s, z, m = _attend(form, q, k, v, gates.whole_chunks(), s0, z0, codes)
    return o[:, :time, :, :value_dim], s[:, :, :key_dim, :value_dim], None if z is None else z[:, :, :key_dim], m


def fill(x: Array, amounts: tuple[int, ...]) -> Array:
    """x with zeros behind, so many along each axis."""
    return jnp.pad(x, [(0, n) for n in amounts]) if any(amounts) else x


@chunk.custom_vjp
def _attend(form: Form, q, k, v, gates, s0, z0, codes):
    vectors, m = gates_gpu.vectors(form, gates, codes)
    o, _, final, _ = _forward(form, Inputs(q, k, v, vectors, codes), s0, z0, save=False)
    return o, *final, m


def _attend_fwd(form: Form, *primals):
    gate = any(x.perturbed for x in primals[3] if x is not None)
    q, k, v, gates, s0, z0, codes = values_of(primals)
    vectors, m = gates_gpu.vectors(form, gates, codes)
    x = Inputs(q, k, v, vectors, codes)
    o, l, final, states = _forward(form, x, s0, z0, save=True)  # noqa: E741
    l, states = jax.tree.map(lambda x: checkpoint_name(x, "chunk_states"), (l, states))  # noqa: E741
    kept = o if _needs_dl(form, v) else None
    constant = form.gated and gates.decay.ndim == 1
    given = s0 is not None, z0 is not None
    return (o, *final, m), (x, kept, l, states, given, gate, constant)


def _attend_bwd(form: Form, residuals, cotangents):
    x, o, l, states, (s_given, z_given), gate, constant = residuals  # noqa: E741
    heads, codes = x.q.shape[2], x.codes
    do, ds, dz, _ = present_cotangents(cotangents, x.v)  # m is held constant
    d, parts = Cotangents(do, ds, dz), split.parts_of(x.v)
    dl = None
    if o is not None:
        dl = split.cotangent_of_l(form, x, o, l if parts == 1 else split.join(l, parts, 2), do)
    if parts > 1:
        d = split.ends(form, x, l, dl, d, parts)
        x, dl = split.cut_inputs(x, parts), split.cut(dl, parts, 2)
    d = backward(form, x, l, states, d, gate, dl if x.v.shape[3] > BLOCK else None)
    if parts > 1:
        d = split.join_gradients(d, parts)
    dq, dk = (sum_group(x, heads) for x in (d.q, d.k))
    d_gates = None
    if gate:
        decays, others = Decays(ROWS, COLUMNS, WRITES), (COLUMNS, OWN) if form.write else ()
        d_decay, *d_write = gates_gpu.gradients(d.gates, parts, codes, decays, others)
        d_gates = Gates(d_decay.sum((0, 1)) if constant else d_decay, *d_write)
    return dq, dk, d.v, d_gates, d.s if s_given else None, d.z if z_given else None, None


def _needs_dl(form: Form, v: Array) -> bool:
    """Whether programs of the backward pass cannot find the cotangent of l by themselves."""
    return form.denominator is not None and (split.parts_of(v) > 1 or v.shape[3] > BLOCK)


def _forward(form: Form, x: Inputs, s0: Array | None, z0: Array | None, save: bool):
    """`forward`, over parts of the sequence where there are too few sequences; l and the states stay in parts."""
    parts = split.parts_of(x.v)
    if parts == 1:
        return forward(form, x, s0, z0, save)
    s0, z0 = split.starts(form, x, s0, z0, parts)
    o, l, (s, z), states = forward(form, split.cut_inputs(x, parts), s0, z0, save)  # noqa: E741
    last = slice(parts - 1, None, parts)
    return split.join(o, parts, 1), l, (s[last], None if z is None else z[last]), states


def values_of(primals: tuple) -> tuple:
    """The arguments, which `custom_vjp` with symbolic zeros hands on with whether they are differentiated."""
    return jax.tree.map(
        lambda x: x.value, primals, is_leaf=lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
    )


def present_cotangents(cotangents: tuple, v: Array) -> list[Any]:
    """Those of o, as zeros like v if there are none, and of the final states, None if there are none."""
    do, *states = (None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in cotangents)
    return [jnp.zeros(v.shape, v.dtype) if do is None else do, *states]


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def sum_group(x: Array, heads: int) -> Array:
    """[B, T, several * H, K] -> [B, T, H, K], in float32 and a fixed order."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, -1, x.shape[3]).astype(jnp.float32).sum(3).astype(x.dtype)
