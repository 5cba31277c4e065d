"""The GPU kernel for one token: interpreted on the CPU, lowered for CUDA, and (pytest -m gpu) run on a Hopper GPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from jaxlin.kernels.in_stack import InStack, is_in_stack
from tests import grid, hopper
from tests.grid import Case

A, B, M = OPS = ("gated_linear_attention", "gated_delta_rule", "mlstm")
FORMS = [
    *[(A, gate) for gate in ("none", "constant", "scalar", "channel", "normalize")],
    *[(B, gate) for gate in ("none", "scalar", "channel")],
    (M, "none"),
]
FORMS_OF_TYPES = [(form, (jnp.float32, jnp.bfloat16)[i % 2]) for i, form in enumerate(FORMS)]
CASE = Case(T=1, B=3, H=2, HV=4, K=32, V=64, strength="mild")


def run(form: tuple[str, str], dtype, case: Case):
    op, gate = form
    normalize = gate == "normalize"
    args = grid.inputs(op, replace(case, gate="scalar" if normalize else gate), normalize)
    if op == M:  # see test_gated_linear_attention_gpu.py
        args["q"], args["k"] = np.abs(args["q"]), np.abs(args["k"])
    grid.check(getattr(ops, op), args, dtype, implementation="pallas")


# ---- on the CPU, interpreted ----


@pytest.mark.parametrize("form,dtype", FORMS_OF_TYPES)
def test_interpreted(form, dtype, monkeypatch):
    hopper.interpret(monkeypatch)
    run(form, dtype, CASE)


@pytest.mark.parametrize(
    "form,change",
    [
        ((A, "normalize"), dict(K=16, V=256, segments="gaps")),  # four blocks of columns, padding
        ((B, "channel"), dict(K=96, V=48, segments="gaps")),
        ((M, "none"), dict(K=16, V=16, state=False)),
    ],
)
def test_interpreted_shapes(form, change, monkeypatch):
    hopper.interpret(monkeypatch)
    run(form, jnp.float32, replace(CASE, **change))


def check_in_stack(form: tuple[str, str]):
    """A state among those of three layers changes as it would alone, and no other does."""
    op, gate = form
    normalize = gate == "normalize"
    args = grid.inputs(op, replace(CASE, gate="scalar" if normalize else gate), normalize)
    args = {n: x if n == "normalize" or x is None else jax.tree.map(jnp.asarray, x) for n, x in args.items()}
    state = args.pop("initial_state")
    first, *rest = jax.tree.leaves(state)
    stack = jnp.stack([first + 1, first, first - 1])
    stacked = InStack(stack, jnp.int32(1))
    step = jax.jit(functools.partial(getattr(ops, op), **args, implementation="pallas"))
    o, new = step(initial_state=state)
    o_in_stack, new_in_stack = step(initial_state=(stacked, *rest) if rest else stacked)
    np.testing.assert_array_equal(o_in_stack, o)
    (found, _), *others = jax.tree.leaves(new_in_stack, is_leaf=is_in_stack)
    np.testing.assert_array_equal(found[1], jax.tree.leaves(new)[0])
    np.testing.assert_array_equal(found[::2], stack[::2])
    for one, other in zip(others, jax.tree.leaves(new)[1:], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", [(A, "normalize"), (B, "scalar"), (M, "none")])
def test_interpreted_in_a_stack(form, monkeypatch):
    hopper.interpret(monkeypatch)
    check_in_stack(form)


# ---- on the CPU, lowered for CUDA ----


def arguments(form: tuple[str, str], sizes: tuple[int, ...], dtype, time: bool) -> tuple[dict, object]:
    """Abstract arguments of an op (or of its step) and its state."""
    op, gate = form
    batch, heads, value_heads, key, value = sizes
    f32, step = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), (1,) if time else ()
    q = jax.ShapeDtypeStruct((batch, *step, heads, key), dtype)
    v = jax.ShapeDtypeStruct((batch, *step, value_heads, value), dtype)
    per_head = f32((batch, *step, value_heads))
    s, z = f32((batch, value_heads, key, value)), f32((batch, value_heads, key))
    args = dict(q=q, k=q, v=v)
    if op == M:
        return args | dict(i=per_head, f=per_head), (s, z, f32((batch, value_heads)))
    if op == B:
        args["beta"] = per_head
    shapes = dict(constant=(value_heads,), channel=(*per_head.shape, key), none=None)
    shape = shapes.get(gate, per_head.shape)
    args["g"] = None if shape is None else f32(shape)
    return args, (s, z) if gate == "normalize" else s


@pytest.mark.parametrize("sizes", [(64, 32, 32, 64, 64), (2, 2, 4, 128, 256), (2, 1, 2, 256, 16)], ids=str)
@pytest.mark.parametrize("form,dtype", FORMS_OF_TYPES)
def test_lowers_for_cuda(form, dtype, sizes, monkeypatch):
    """Unasked; the kernel overwrites the state that it is given."""
    hopper.pretend(monkeypatch)
    op, gate = form
    options = dict(normalize=True) if gate == "normalize" else {}
    args, state = arguments(form, sizes, dtype, time=True)
    run = functools.partial(getattr(ops, op), **options)
    text = hopper.lowered(lambda args, state: run(**args, initial_state=state), args, state)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text

    args, state = arguments(form, sizes, dtype, time=False)
    run = functools.partial(getattr(ops, f"{op}_step"), **options)
    assert hopper.kernels_of(lambda args, state: run(**args, state=state), args, state) == 1


def test_what_is_not_served_is_scanned(monkeypatch, caplog):
    hopper.interpret(monkeypatch)
    monkeypatch.setattr(ops, "platform", lambda: "gpu")
    ops._log_once.cache_clear()
    x = jnp.ones((1, 1, 1, 24))
    with pytest.raises(NotImplementedError, match="multiples of 16 up to 256"):
        ops.gated_linear_attention(x, x, x, implementation="pallas")
    ops.gated_linear_attention(x, x, x)
    ops.gated_linear_attention(x, x, x)
    (record,) = caplog.records
    assert "no pallas implementation here" in record.message


# ---- on a Hopper GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    grid.variations(
        replace(CASE, B=9, K=64),
        K=[16, 96, 256],
        V=[16, 96, 256],
        HV=[8],
        segments=["gaps"],
        strength=["strong"],
        state=[False],
    ),
    ids=str,
)
@pytest.mark.parametrize("form,dtype", FORMS_OF_TYPES)
def test_grid(form, dtype, case):
    run(form, dtype, case)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_in_a_stack(form):
    check_in_stack(form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_donated_state_is_overwritten(form):
    """Eight steps in place, against the scan."""
    op, gate = form
    normalize = gate == "normalize"
    case = replace(CASE, T=8, B=64, H=32, HV=32, K=64, gate="scalar" if normalize else gate)
    args = {n: x for n, x in grid.inputs(op, case, normalize).items() if n not in ("segment_ids", "normalize")}
    args = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), args)
    state, options = args.pop("initial_state"), dict(normalize=True) if normalize else {}
    expected, final = jax.jit(functools.partial(getattr(ops, op), implementation="scan", **options))(
        **args, initial_state=state
    )
    step = jax.jit(
        lambda args, state: getattr(ops, op)(**args, initial_state=state, implementation="pallas", **options),
        donate_argnums=1,
    )
    for t in range(case.T):
        given = jax.tree.leaves(state)[0]
        now = {n: x if n == "g" and gate == "constant" else x[:, t : t + 1] for n, x in args.items()}
        o, state = step(now, state)
        assert given.is_deleted()
        assert grid.error(np.asarray(o[:, 0]), np.asarray(expected[:, t])) < 1e-4
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        assert grid.error(np.asarray(found), np.asarray(wanted)) < 1e-4
