"""The seam: checks, default state, choice of implementation, sharding, and transformations of the ops."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxlin import ops, sharding
from jaxlin.config import MeshConfig
from tests import grid
from tests.grid import Case

OPS = ("gated_linear_attention", "gated_delta_rule", "mlstm")
CASE = Case(B=4, T=24, H=2, HV=4, K=8, V=8, segments="gaps", strength="mild")


def arguments(op: str, case: Case = CASE, **changes) -> dict:
    args = {n: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x) for n, x in grid.inputs(op, case).items()}
    ids = args.pop("segment_ids")
    return args | dict(segment_ids=None if ids is None else ids.astype(jnp.int32)) | changes


# ---- checks ----


@pytest.mark.parametrize(
    "op,change,message",
    [
        ("gated_linear_attention", dict(q=jnp.ones((4, 24, 8))), r"q has shape \(4, 24, 8\)"),
        (
            "gated_linear_attention",
            dict(k=jnp.ones((4, 23, 2, 8))),
            r"k has shape \(4, 23, 2, 8\), expected \[B, T, H, K\]",
        ),
        ("gated_linear_attention", dict(v=jnp.ones((4, 24, 3, 8))), "v has 3 heads, not a multiple of the 2"),
        ("gated_linear_attention", dict(v=jnp.ones((4, 24, 4, 0))), "must not be empty"),
        ("gated_linear_attention", dict(g=jnp.ones((4, 24))), r"g has shape \(4, 24\), expected \[HV\] = \(4,\) or"),
        ("gated_linear_attention", dict(segment_ids=jnp.ones((4, 24))), "segment_ids has dtype float32"),
        ("gated_linear_attention", dict(segment_ids=jnp.ones((4, 2), int)), r"segment_ids has shape \(4, 2\)"),
        (
            "gated_linear_attention",
            dict(initial_state=jnp.ones((4, 2, 8, 8))),
            r"initial_state has shape \(4, 2, 8, 8\)",
        ),
        ("gated_linear_attention", dict(normalize=True), r"expected S \(4, 4, 8, 8\), z \(4, 4, 8\)"),
        ("gated_linear_attention", dict(chunk_size=0), "chunk_size is 0"),
        ("gated_linear_attention", dict(implementation="best"), "implementation is 'best'"),
        ("gated_delta_rule", dict(beta=jnp.ones((4, 24, 2))), r"beta has shape \(4, 24, 2\), expected \[B, T, HV\]"),
        ("gated_delta_rule", dict(g=jnp.ones((4,))), r"g has shape \(4,\)"),
        ("mlstm", dict(i=jnp.ones((4, 24, 2))), r"i has shape \(4, 24, 2\)"),
        ("mlstm", dict(f=jnp.ones((4, 24, 2))), r"f has shape \(4, 24, 2\)"),
        ("mlstm", dict(initial_state=jnp.ones((4, 4, 8, 8))), "initial_state has shape"),
    ],
)
def test_bad_arguments_are_named(op, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**arguments(op, **change))


def test_bad_state_of_a_step_is_named():
    x = jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match=r"state has shape \(1, 2, 4\)"):
        ops.gated_linear_attention_step(x, x, x, None, x)


# ---- choice of implementation ----


@pytest.mark.parametrize("op", OPS)
def test_named_pallas_says_why_not(op):
    with pytest.raises(NotImplementedError, match=f"{op} has no Pallas kernel"):
        getattr(ops, op)(**arguments(op), implementation="pallas")


def test_best_falls_back_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(ops, "platform", lambda: "gpu")
    monkeypatch.setattr(ops, "_preference", lambda arrays: ("pallas", "chunked"))
    ops._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ops.gated_linear_attention(**arguments("gated_linear_attention"))
    assert [r.message for r in caplog.records] == [
        "gated_linear_attention: no pallas implementation here (gated_linear_attention has no Pallas kernel for gpu)"
    ]


@pytest.mark.parametrize("op", OPS)
def test_best_is_silent_on_the_cpu_and_one_token_is_one_step(op, caplog):
    args = arguments(op, replace(CASE, T=1, segments="none"))
    best, state = getattr(ops, op)(**args)
    scan, expected = getattr(ops, op)(**args, implementation="scan")
    np.testing.assert_array_equal(best, scan)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert not caplog.records


def test_the_platform_is_the_one_compiled_for():
    assert ops.platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert ops.platform() == "tpu"


# ---- dtypes, default state, steps ----


@pytest.mark.parametrize("op", OPS)
def test_dtypes(op):
    args = arguments(op, CASE)
    for dtype in (jnp.bfloat16, jnp.float32):
        cast = args | {n: args[n].astype(dtype) for n in "qkv"}
        o, state = jax.eval_shape(getattr(ops, op), **cast)
        assert o.dtype == dtype and {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("op", OPS)
def test_default_state_is_zero_and_default_scale_the_root(op):
    args = arguments(op)
    zero = jax.tree.map(jnp.zeros_like, args.pop("initial_state"))
    default = getattr(ops, op)(**args, implementation="scan")
    given = getattr(ops, op)(**args, initial_state=zero, scale=CASE.K**-0.5, implementation="scan")
    jax.tree.map(np.testing.assert_array_equal, default, given)


@pytest.mark.parametrize("op", OPS)
def test_steps_continue_a_chunked_prefill(op):
    args = arguments(op, replace(CASE, segments="none"))
    whole, final = jax.jit(getattr(ops, op))(**args)
    names = [n for n in args if n not in ("initial_state", "segment_ids")]
    _, state = jax.jit(getattr(ops, op))(**{n: args[n][:, :20] for n in names}, initial_state=args["initial_state"])
    step = jax.jit(getattr(ops, f"{op}_step"))
    for t in range(20, CASE.T):
        o, state = step(*(args[n][:, t] for n in names), state)
        np.testing.assert_allclose(o, whole[:, t], rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state, final)


# ---- transformations ----


def value_and_gradients(op: str, args: dict, **options):
    """Of a scalar made of o and the final state, with respect to every float array."""
    segments = args["segment_ids"]
    floats = {n: x for n, x in args.items() if n != "segment_ids"}

    def loss(floats):
        o, state = getattr(ops, op)(**floats, segment_ids=segments, **options)
        return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(state))

    return jax.jit(jax.value_and_grad(loss))(floats)


def close(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize("op", OPS)
def test_sharded_is_single(op):
    args = arguments(op)
    expected = value_and_gradients(op, args)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        close(value_and_gradients(op, args), expected)


def test_sharded_constant_gate_and_sizes_that_do_not_divide():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    for case in (replace(CASE, gate="constant"), replace(CASE, B=2, H=3, HV=3)):
        args = arguments("gated_linear_attention", case)
        expected = value_and_gradients("gated_linear_attention", args)
        with jax.set_mesh(mesh):
            close(value_and_gradients("gated_linear_attention", args), expected)


def test_nothing_is_communicated():
    args = arguments("gated_linear_attention")
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
    spec = jax.sharding.PartitionSpec
    specs = dict(segment_ids=spec("data"), initial_state=spec("data", "tensor"))
    with jax.set_mesh(mesh):
        args = {
            n: jax.device_put(x, jax.NamedSharding(mesh, specs.get(n, spec("data", None, "tensor"))))
            for n, x in args.items()
        }
        text = jax.jit(ops.gated_linear_attention).lower(**args).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("op", OPS)
def test_vmap(op):
    args = arguments(op)
    expected, _ = jax.jit(getattr(ops, op))(**args)

    def one(args):
        return getattr(ops, op)(**jax.tree.map(lambda x: x[None], args))[0][0]

    close(jax.jit(jax.vmap(one))(args), expected)


@pytest.mark.parametrize("op", OPS)
def test_checkpoint(op):
    args = arguments(op)
    segments = args.pop("segment_ids")

    def loss(args):
        return jnp.sum(jnp.sin(getattr(ops, op)(**args, segment_ids=segments)[0]))

    close(jax.jit(jax.grad(jax.checkpoint(loss)))(args), jax.jit(jax.grad(loss))(args))
