"""The seam between the mixers and their implementations: checks, default state, choice of implementation, shard_map.

Shapes: B batch, T time, H query/key heads, HV value heads (HV % H == 0), K key dim, V value dim. `g` is the LOG decay,
<= 0 and finite. States and sums have dtype promote_types(input, float32). Segments: see `jaxlin.recurrence`.

`implementation`: "scan" (the definition), "chunked" (XLA, any device), "pallas" (TPU and GPU kernels), or None for the
best the platform has. A named one that cannot run raises NotImplementedError with the reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from jaxlin import recurrence, sequence_parallel, sharding
from jaxlin.kernels import gated_delta_rule as _delta_rule_kernel
from jaxlin.kernels import gated_linear_attention as _linear_attention_kernel
from jaxlin.kernels import mlstm as _mlstm_kernel
from jaxlin.kernels.in_stack import is_in_stack, on_copy

Implementation = Literal["scan", "chunked", "pallas"]
State = Float[Array, "B HV K V"]
NormalizedState = tuple[State, Float[Array, "B HV K"]]
MLSTMState = tuple[State, Float[Array, "B HV K"], Float[Array, "B HV"]]

_CHUNKED = {
    "gated_linear_attention": _linear_attention_kernel.chunked,
    "gated_delta_rule": _delta_rule_kernel.chunked,
    "mlstm": _mlstm_kernel.chunked,
}
_log = logging.getLogger(__name__)


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, " HV"] | Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: State | NormalizedState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T HV V"], State | NormalizedState]:
    """S_t = e^{g_t} S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t: linear attention, RetNet (g [HV]), GLA (g per channel).

    With `normalize`, o_t is divided by scale z_t.q_t + eps, z the running sum of k, and the state is (S, z).
    `scale` defaults to K ** -0.5. Returns (o, final_state); differentiable in every array, through both.
    Raises ValueError for shapes that do not fit, NotImplementedError for a named implementation that cannot run.
    """
    dims = _check_qkv(q, k, v)
    _check_gate(g, dims, allow_constant=True)
    shapes = _state_shapes(dims, "S", "z") if normalize else _state_shapes(dims, "S")
    state = _state(initial_state, shapes, q, k, v)
    options = dict(scale=_scale(scale, dims), normalize=normalize)
    arrays = dict(q=q, k=k, v=v, g=g, segment_ids=_check_segments(segment_ids, dims))
    return _run("gated_linear_attention", arrays, state, options, chunk_size, implementation, initial_state is None)


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "B T HV"],
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T HV V"], State]:
    """S_t = (I - beta_t k_t k_t^T) e^{g_t} S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    DeltaNet (g None), Gated DeltaNet (g per head), KDA (g per channel). Keys should be L2-normalised: with
    beta |k|^2 > 2 the state grows without bound. `scale` defaults to K ** -0.5. Returns (o, final_state).
    """
    dims = _check_qkv(q, k, v)
    _check_shape("beta", beta, dims, "B T HV")
    _check_gate(g, dims, allow_constant=False)
    state = _state(initial_state, _state_shapes(dims, "S"), q, k, v)
    arrays = dict(q=q, k=k, v=v, beta=beta, g=g, segment_ids=_check_segments(segment_ids, dims))
    options = dict(scale=_scale(scale, dims))
    return _run("gated_delta_rule", arrays, state, options, chunk_size, implementation, initial_state is None)


def mlstm(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    i: Float[Array, "B T HV"],
    f: Float[Array, "B T HV"],
    *,
    scale: float | None = None,
    initial_state: MLSTMState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T HV V"], MLSTMState]:
    """h_t = C_t^T q_t / max(|n_t.q_t|, e^{-m_t}), the stabilised matrix LSTM (Beck et al. 2024); i, f pre-activations.

    The state is (C, n, m); gradients stop at every m but the initial one. `scale` (default K ** -0.5) multiplies q.
    """
    dims = _check_qkv(q, k, v)
    _check_shape("i", i, dims, "B T HV")
    _check_shape("f", f, dims, "B T HV")
    state = _state(initial_state, _state_shapes(dims, "C", "n", "m"), q, k, v)
    arrays = dict(q=q, k=k, v=v, i=i, f=f, segment_ids=_check_segments(segment_ids, dims))
    options = dict(scale=_scale(scale, dims))
    return _run("mlstm", arrays, state, options, chunk_size, implementation, initial_state is None)


def gated_linear_attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, " HV"] | Float[Array, "B HV"] | Float[Array, "B HV K"] | None,
    state: State | NormalizedState,
    *,
    scale: float | None = None,
    normalize: bool = False,
) -> tuple[Float[Array, "B HV V"], State | NormalizedState]:
    """One token of `gated_linear_attention`, same state."""
    dims = _check_qkv(q, k, v, time=False)
    _check_gate(g, dims, allow_constant=True)
    shapes = _state_shapes(dims, "S", "z") if normalize else _state_shapes(dims, "S")
    state = _state(state, shapes, q, k, v, name="state")
    options = dict(scale=_scale(scale, dims), normalize=normalize)
    return _run_step("gated_linear_attention", dict(q=q, k=k, v=v, g=g), state, options)


def gated_delta_rule_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    beta: Float[Array, "B HV"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None,
    state: State,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B HV V"], State]:
    """One token of `gated_delta_rule`, same state."""
    dims = _check_qkv(q, k, v, time=False)
    _check_shape("beta", beta, dims, "B HV")
    _check_gate(g, dims, allow_constant=False)
    state = _state(state, _state_shapes(dims, "S"), q, k, v, name="state")
    return _run_step("gated_delta_rule", dict(q=q, k=k, v=v, beta=beta, g=g), state, dict(scale=_scale(scale, dims)))


def mlstm_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    i: Float[Array, "B HV"],
    f: Float[Array, "B HV"],
    state: MLSTMState,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B HV V"], MLSTMState]:
    """One token of `mlstm`, same state."""
    dims = _check_qkv(q, k, v, time=False)
    _check_shape("i", i, dims, "B HV")
    _check_shape("f", f, dims, "B HV")
    state = _state(state, _state_shapes(dims, "C", "n", "m"), q, k, v, name="state")
    return _run_step("mlstm", dict(q=q, k=k, v=v, i=i, f=f), state, dict(scale=_scale(scale, dims)))


# ---- checks ----


def _check_qkv(q: Array, k: Array, v: Array, time: bool = True) -> dict[str, int]:
    """Sizes by name, from q, k and v."""
    axes = "B T H K" if time else "B H K"
    for name, x in (("q", q), ("v", v)):
        if x.ndim != len(axes.split()):
            raise ValueError(f"{name} has shape {x.shape}, expected {axes if name == 'q' else axes[:-3] + 'HV V'}")
    dims = dict(zip(axes.split(), q.shape, strict=True)) | {"HV": v.shape[-2], "V": v.shape[-1]}
    _check_shape("k", k, dims, axes)
    _check_shape("v", v, dims, "B T HV V" if time else "B HV V")
    if dims["HV"] % dims["H"]:
        raise ValueError(f"v has {dims['HV']} heads, not a multiple of the {dims['H']} heads of q and k")
    if 0 in dims.values():
        raise ValueError(f"q, k and v must not be empty: q has shape {q.shape}, v has shape {v.shape}")
    return dims


def _check_shape(name: str, x: Array, dims: dict[str, int], axes: str) -> None:
    expected = tuple(dims[a] for a in axes.split())
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, expected [{axes.replace(' ', ', ')}] = {expected}")


def _check_gate(g: Array | None, dims: dict[str, int], allow_constant: bool) -> None:
    if g is None:
        return
    forms = ["B T HV", "B T HV K"] if "T" in dims else ["B HV", "B HV K"]
    forms = ["HV", *forms] if allow_constant else forms
    if g.shape not in [tuple(dims[a] for a in axes.split()) for axes in forms]:
        allowed = " or ".join(f"[{a.replace(' ', ', ')}] = {tuple(dims[x] for x in a.split())}" for a in forms)
        raise ValueError(f"g has shape {g.shape}, expected {allowed}")


def _check_segments(segment_ids: Array | None, dims: dict[str, int]) -> Array | None:
    if segment_ids is None:
        return None
    _check_shape("segment_ids", segment_ids, dims, "B T")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}, expected integers (0 is padding)")
    return segment_ids


def _scale(scale: float | None, dims: dict[str, int]) -> float:
    return dims["K"] ** -0.5 if scale is None else scale


def _state_shapes(dims: dict[str, int], *names: str) -> dict[str, tuple[int, ...]]:
    axes = {"S": "B HV K V", "C": "B HV K V", "z": "B HV K", "n": "B HV K", "m": "B HV"}
    return {name: tuple(dims[a] for a in axes[name].split()) for name in names}


def _state(state: Any, shapes: dict[str, tuple[int, ...]], *inputs: Array, name: str = "initial_state") -> Any:
    """The given state, checked and cast to the accumulation dtype, or zeros."""
    dtype = recurrence.accumulation_dtype(*inputs)
    if state is None:
        parts = tuple(jnp.zeros(shape, dtype) for shape in shapes.values())
    else:
        found = jax.tree.map(lambda a: a.stack.shape[1:] if is_in_stack(a) else a.shape, state, is_leaf=is_in_stack)
        if found != (tuple(shapes.values()) if len(shapes) > 1 else shapes["S"]):
            expected = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
            raise ValueError(f"{name} has shape {found}, expected {expected}")
        parts = jax.tree.leaves(state, is_leaf=is_in_stack)
        parts = tuple(part if is_in_stack(part) else part.astype(dtype) for part in parts)
    return parts[0] if len(shapes) == 1 else parts


# ---- choice of implementation ----


def _run(
    op: str, arrays: dict, state: Any, options: dict, chunk_size: int | None, implementation: str | None, fresh: bool
):
    """The op by the named implementation or the best one; `fresh` says that the state is zeros nobody gave."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    if sharding.time_axis(arrays["q"].shape[1]) is not None:
        fresh = False  # all pieces but the first start from a state
        return on_copy(lambda s: _choose(op, arrays, s, options, chunk_size, implementation, fresh), state)
    return _choose(op, arrays, state, options, chunk_size, implementation, fresh)


def _choose(
    op: str, arrays: dict, state: Any, options: dict, chunk_size: int | None, implementation: str | None, fresh: bool
):
    if implementation is not None:
        return _sharded(op, _find(op, implementation, fresh), arrays, state, options, chunk_size)
    for name in _preference(arrays):
        try:
            return _sharded(op, _find(op, name, fresh), arrays, state, options, chunk_size)
        except NotImplementedError as error:
            _log_once(f"{op}: no {name} implementation here ({error})")
    raise AssertionError("the scan always runs")


def _run_step(op: str, arrays: dict, state: Any, options: dict) -> tuple[Array, Any]:
    """The op's best implementation for one token, given without the time axis."""
    constant = ("g",) if arrays.get("g") is not None and arrays["g"].ndim == 1 else ()
    arrays = {n: x if x is None or n in constant else x[:, None] for n, x in arrays.items()}
    o, state = _run(op, arrays, state, options, None, None, fresh=False)
    return o[:, 0], state


def _preference(arrays: dict) -> tuple[str, ...]:
    """The best first. Chunks have nothing to gain from one step."""
    kernels = ("pallas",) if platform() in ("tpu", "gpu") else ()
    return (*kernels, "scan") if arrays["q"].shape[1] == 1 else (*kernels, "chunked", "scan")


def platform() -> str:
    """The platform compiled for: the mesh's (which may be that of an ahead-of-time topology), else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _find(op: str, implementation: str, fresh: bool) -> Callable:
    """The function (arrays, state, options, chunk_size) -> (o, final_state) of a named implementation."""
    if implementation == "scan":
        definition = getattr(recurrence, op)
        return lambda arrays, state, options, _: on_copy(
            lambda s: definition(**arrays, **options, initial_state=s), state
        )
    if implementation == "chunked":
        chunked = functools.partial(_CHUNKED[op], by_block=platform() == "cpu")
        return lambda arrays, state, options, size: on_copy(
            lambda s: chunked(**arrays, **options, initial_state=s, chunk_size=size), state
        )
    if implementation == "pallas":
        kernel = _pallas(op, fresh)
        return lambda arrays, state, options, _: kernel(**arrays, **options, state=state)
    raise ValueError(f"implementation is {implementation!r}, expected 'scan', 'chunked', 'pallas' or None")


def interpreted() -> str | None:
    """The platform whose kernels JAXLIN_INTERPRET (tpu or gpu) asks to interpret, on whatever device."""
    return os.environ.get("JAXLIN_INTERPRET") or None


def _pallas(op: str, fresh: bool) -> Callable:
    """The Pallas kernel of the platform compiled for, or of the one that is interpreted."""
    target = interpreted() or platform()
    if target == "tpu":
        kernel = importlib.import_module(f"jaxlin.kernels.{op}_tpu_op").pallas
        return lambda *, state, **arguments: on_copy(lambda s: kernel(**arguments, initial_state=s), state)
    if target == "gpu" and (interpreted() or compute_capability().startswith("9.")):
        kernel = importlib.import_module(f"jaxlin.kernels.{op}_gpu_op").pallas  # Mosaic GPU is not on every platform

        def run(*, state, **arguments):
            call = functools.partial(kernel, **arguments)
            if arguments["q"].shape[1] == 1:  # the step overwrites states where they are
                return call(initial_state=None if fresh else state)
            return on_copy(lambda s: call(initial_state=None if fresh else s), state)

        return run
    capability = f" of compute capability {compute_capability()}" if target == "gpu" and compute_capability() else ""
    raise NotImplementedError(f"{op} has no Pallas kernel for {target}{capability}")


def compute_capability() -> str:
    """Of the GPU compiled for, "9.0" for Hopper; empty where that is unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return "9.0" if any(name in device.device_kind for name in ("H100", "H200", "H800", "H20")) else ""
    return getattr(jax.devices()[0], "compute_capability", "")


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)


# ---- sharding ----


def _sharded(op: str, function: Callable, arrays: dict, state: Any, options: dict, chunk_size: int | None):
    """Run `function` on each device's own rows, heads and piece of the sequence.

    Nothing is communicated but what pieces do to states (`sequence_parallel`), where sequences are cut at all.
    """
    batch, length, heads, _ = arrays["q"].shape
    layout = sharding.layout(batch, length, heads)
    absent = {name: x for name, x in arrays.items() if x is None}
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def run(arrays, state):
        return function(arrays | absent, state, options, chunk_size)

    def local(arrays, state):
        if layout is None or layout.time is None:
            o, final = run(arrays, state)
        else:
            state, final = sequence_parallel.states(op, run, arrays, state, layout.time)
            o, _ = run(arrays, state)
        # With it, who keeps "chunk_states" for the backward pass need not run the op again to go on from its output.
        return checkpoint_name(o, "recurrence_outputs"), final

    if layout is None:
        return local(arrays, state)
    specs = dict.fromkeys(arrays, layout.by_token(layout.heads))
    if "g" in arrays and arrays["g"].ndim == 1:
        specs["g"] = P(layout.heads)
    if "segment_ids" in arrays:
        specs["segment_ids"] = layout.by_token()
    state_specs = jax.tree.map(lambda s: _state_spec(s, layout), state, is_leaf=is_in_stack)
    out_specs = specs["q"], state_specs
    mapped = jax.shard_map(local, in_specs=(specs, state_specs), out_specs=out_specs, check_vma=False)
    return mapped(arrays, state)


def _state_spec(state: Any, layout: sharding.Layout) -> Any:
    """How one array of a state is laid out, which may be in the stack of all layers'."""
    if not is_in_stack(state):
        return P(layout.batch, layout.heads)
    return state._replace(stack=P(None, layout.batch, layout.heads), layer=P())
