"""What the tests of both families of TPU kernels share; the kernels through the seam; strict interpretation."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from jaxlin import ops, sharding
from jaxlin.config import MeshConfig
from tests import grid
from tests.grid import Case

SEGMENTS = ("packed", "single", "left", "right", "middle", "gaps")
CASE = Case(T=70, H=3, HV=3, K=64, V=64, segments="packed")


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    monkeypatch.setenv("JAXLIN_INTERPRET", "tpu")


def run(op: str, case: Case, dtype, normalize: bool = False):
    args = grid.inputs(op, case, normalize)
    grid.check(getattr(ops, op), args, dtype, correlated=case.corr > 0, implementation="pallas")


# ---- the seam ----


def test_needs_a_tpu(monkeypatch):
    monkeypatch.delenv("JAXLIN_INTERPRET")
    x = jnp.ones((1, 8, 1, 64))
    with pytest.raises(NotImplementedError, match="no Pallas kernel for cpu"):
        ops.gated_linear_attention(x, x, x, implementation="pallas")


def test_float64_is_refused():
    with jax.enable_x64(True):
        x = jnp.ones((1, 8, 1, 64), jnp.float64)
        with pytest.raises(NotImplementedError, match="not float64"):
            ops.gated_linear_attention(x, x, x, implementation="pallas")


@pytest.mark.parametrize("op", ("gated_linear_attention", "gated_delta_rule"))
def test_a_tpu_gets_the_kernel(op, monkeypatch):
    """Ahead-of-time plans too: the platform is the mesh's."""
    monkeypatch.delenv("JAXLIN_INTERPRET")
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    arrays = (x, x, x, *([jax.ShapeDtypeStruct((1, 64, 2), jnp.float32)] if op == "gated_delta_rule" else []))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "pallas_call" in str(jax.make_jaxpr(getattr(ops, op))(*arrays))


@pytest.mark.parametrize("op", ("gated_linear_attention", "gated_delta_rule", "mlstm"))
def test_one_token(op):
    """The decode step: the state in place, padding does nothing."""
    case = Case(T=1, H=3, HV=3, K=64, V=24, gate="scalar" if op == "gated_delta_rule" else "channel", segments="gaps")
    run(op, case, jnp.float32, normalize=op == "gated_linear_attention")


@pytest.mark.parametrize("op", ("gated_linear_attention", pytest.param("gated_delta_rule", marks=pytest.mark.slow)))
def test_sharded_is_single(op):
    """Each device runs the kernel on its rows, heads and piece of the sequence."""
    args = grid.inputs(op, Case(B=4, T=24, H=2, HV=2, segments="gaps", strength="mild"))
    expected = grid.outputs_and_gradients(getattr(ops, op), args, jnp.float32, implementation="scan")
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))):
        found = grid.outputs_and_gradients(getattr(ops, op), args, jnp.float32, implementation="pallas")
    for name in expected:
        assert grid.error(found[name], expected[name]) < grid.FLOAT32, name


@pytest.mark.slow
@pytest.mark.parametrize("op", ("gated_linear_attention", "gated_delta_rule", "mlstm"))
def test_split_and_resume_and_rerun(op):
    """A call that starts within the document that the last one ended in carries on from its state; reruns are equal."""
    args = jax.tree.map(jnp.asarray, grid.inputs(op, Case(T=96, K=64, V=64, segments="middle")))
    args = {n: jax.tree.map(lambda x: x.astype(jnp.float32), a) if n != "segment_ids" else a for n, a in args.items()}
    kernel = jax.jit(lambda args: getattr(ops, op)(**args, implementation="pallas"))
    whole, final = kernel(args)
    np.testing.assert_array_equal(kernel(args)[0], whole)
    state, parts = args.pop("initial_state"), []
    for t in (slice(0, 48), slice(48, 96)):
        o, state = kernel({n: x[:, t] for n, x in args.items()} | dict(initial_state=state))
        parts.append(o)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), state, final)


# ---- twenty corners with uninitialised memory as NaN, out-of-bounds reads raised, races detected ----

CORNERS = [
    *[("gated_linear_attention", False, replace(CASE, gate=g)) for g in ("none", "constant", "scalar", "channel")],
    *[("gated_delta_rule", False, replace(CASE, gate=g)) for g in ("none", "scalar", "channel")],
    ("gated_linear_attention", True, replace(CASE, gate="none", segments="gaps")),
    ("mlstm", False, CASE),
    ("mlstm", False, replace(CASE, segments="none", T=257)),
    ("gated_linear_attention", False, Case(T=1, K=64, V=64)),
    ("gated_linear_attention", False, Case(T=257, H=9, HV=9, K=64, V=64, B=1)),
    ("gated_linear_attention", False, Case(T=128, H=17, HV=17, K=64, V=64, B=1, gate="none")),
    ("gated_linear_attention", False, Case(T=130, K=128, V=64, segments="left", gate="channel")),
    ("gated_linear_attention", False, Case(T=130, K=96, V=256, segments="right")),
    ("gated_delta_rule", False, Case(T=257, H=1, HV=3, K=64, V=64, B=1, gate="none", segments="single")),
    ("gated_delta_rule", False, Case(T=130, K=128, V=128, corr=1.0, beta=2.0, gate="channel", segments="gaps")),
    ("gated_delta_rule", False, Case(T=130, K=16, V=40, strength="strong", segments="middle", state=False)),
    ("gated_delta_rule", False, Case(T=130, K=256, V=64, corr=0.9)),
    ("mlstm", False, Case(T=130, K=128, V=128, strength="strong", segments="gaps")),
]


@pytest.mark.slow
@pytest.mark.parametrize("op, normalize, case", CORNERS, ids=lambda x: str(x))
def test_strict(op, normalize, case):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    params = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", num_cores_or_threads=2
    )
    with pltpu.force_tpu_interpret_mode(params):
        run(op, case, jnp.float32, normalize)
    assert not interpret_pallas_call.races.races_found
