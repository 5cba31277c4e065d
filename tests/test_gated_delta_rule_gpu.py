"""Family B's GPU kernels: interpreted on the CPU, lowered for CUDA, and (pytest -m gpu) run on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxlin import ops
from jaxlin.kernels import gated_linear_attention_gpu_split
from tests import grid, hopper
from tests.grid import Case
from tests.hopper import BASE, SEGMENTS, kernels_of

slow = pytest.mark.slow


@pytest.fixture
def interpreted(monkeypatch):
    hopper.interpret(monkeypatch)


def run(case: Case):
    args = grid.inputs("gated_delta_rule", case)
    grid.check(ops.gated_delta_rule, args, jnp.bfloat16, correlated=case.corr > 0, implementation="pallas")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(BASE, gate="none"), marks=slow),
        replace(BASE, T=65, gate="scalar", strength="strong", segments="packed"),  # dg is tiny, not lost
        replace(BASE, gate="scalar", strength="mixed", segments="gaps", B=2),
        pytest.param(replace(BASE, gate="scalar", corr=1.0, beta=2.0, segments="packed", HV=2), marks=slow),
        pytest.param(replace(BASE, gate="scalar", K=128, V=128), marks=slow),
        replace(BASE, T=130, gate="scalar", strength="mixed", K=128, V=256, segments="gaps"),  # two warpgroups
        pytest.param(replace(BASE, gate="none", K=128, V=128, segments="packed"), marks=slow),
        replace(BASE, T=7, K=16, V=24, gate="none", corr=0.9, beta=0.0, state=False),
        replace(BASE, gate="channel", strength="mixed", segments="gaps", B=2, HV=2),
        replace(BASE, gate="channel", T=7, K=16, V=24, corr=0.9, beta=0.0, state=False),
        pytest.param(replace(BASE, gate="channel", strength="strong"), marks=slow),
        pytest.param(replace(BASE, gate="channel", strength="weak"), marks=slow),
        pytest.param(replace(BASE, gate="channel", corr=1.0, beta=2.0, segments="packed", HV=2), marks=slow),
        pytest.param(replace(BASE, gate="channel", strength="zero", segments="single"), marks=slow),
        pytest.param(replace(BASE, gate="channel", K=128, V=128, segments="middle"), marks=slow),
    ],
    ids=str,
)
def test_interpreted(case, interpreted):
    run(case)


@slow
@pytest.mark.parametrize(
    "case", [Case(gate="none"), *(Case(gate=gate, HV=2, segments="packed") for gate in ("scalar", "channel"))], ids=str
)
def test_interpreted_in_parts(case, interpreted, monkeypatch):
    monkeypatch.setattr(gated_linear_attention_gpu_split, "LEAST_CHUNKS", 1)
    run(replace(case, T=256, K=64, V=64, B=1, strength="mild"))


@slow
@pytest.mark.parametrize("gate", ("scalar", "channel"))
def test_padding_may_hold_anything(gate, interpreted):
    hopper.check_padding("gated_delta_rule", replace(BASE, gate=gate, segments="gaps", B=2), "q k v beta g")


@pytest.mark.parametrize("segments", (False, True))
@pytest.mark.parametrize("gate", ("none", "scalar", "channel"))
@pytest.mark.parametrize("size", (64, 128))
def test_lowers_for_cuda(size, gate, segments, monkeypatch):
    hopper.pretend(monkeypatch)
    q, v = (jax.ShapeDtypeStruct((2, 256, heads, size), jnp.bfloat16) for heads in (2, 4))
    beta = jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32) if segments else None

    def loss(args, ids):
        o, final = ops.gated_delta_rule(*args, segment_ids=ids, initial_state=s0(args), implementation="pallas")
        return o.astype(jnp.float32).sum() + final.sum()

    def s0(args):
        return jnp.zeros((2, 4, size, size)) + args[3][0, 0, 0]

    g = {"none": None, "scalar": beta, "channel": jax.ShapeDtypeStruct((2, 256, 4, size), jnp.float32)}[gate]
    args = (q, q, v, beta, g)
    assert kernels_of(loss, args, ids) == 3  # gates, what needs no state, the walk
    assert kernels_of(jax.grad(loss), args, ids) == (6 if gate == "channel" else 5)


def test_barriers_behind_kernels(monkeypatch):
    """Without them XLA runs a kernel again where a loop keeps its output (`mosaic_gpu.launch`)."""
    hopper.pretend(monkeypatch)
    q, beta = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 256, 2), jnp.float32)
    program = hopper.lowered(lambda *args: ops.gated_delta_rule(*args, implementation="pallas"), q, q, q, beta)
    assert program.count("stablehlo.optimization_barrier") == program.count("custom_call @mosaic_gpu") == 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    grid.variations(
        replace(BASE, B=2, H=3, HV=3, segments="packed"),
        T=[1, 7, 63, 64, 65, 1024],
        K=[16, 32, 96, 128],
        V=[16, 32, 96, 128, 256],
        HV=[6, 12],
        segments=["none", *SEGMENTS],
        strength=["weak", "mixed", "strong", "zero"],
        corr=[0.9, 0.999, 1.0],
        beta=[0.0, 1e-6, 0.5, 1.0, 2.0],
        state=[False],
    )
    + grid.variations(replace(BASE, B=2, H=4, HV=4, segments="packed", K=128, V=128), **hopper.LARGE_HEADS),
    ids=str,
)
@pytest.mark.parametrize("gate", ("none", "scalar", "channel"))
def test_grid(case, gate):
    run(replace(case, gate=gate))


@pytest.mark.parametrize("gate", ("scalar", "channel"))
@pytest.mark.parametrize("size", (64, 128))
def test_parts_lower_for_cuda(size, gate, monkeypatch):
    hopper.pretend(monkeypatch)
    x = jax.ShapeDtypeStruct((1, 1024, 2, size), jnp.bfloat16)
    beta = jax.ShapeDtypeStruct((1, 1024, 2), jnp.float32)
    g = jax.ShapeDtypeStruct((1, 1024, 2, size), jnp.float32) if gate == "channel" else beta

    def loss(x, beta, g):
        return ops.gated_delta_rule(x, x, x, beta, g, implementation="pallas")[0].astype(jnp.float32).sum()

    assert kernels_of(jax.grad(loss), x, beta, g) == (9 if gate == "channel" else 8)  # none for gradients of gates


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ("none", "scalar", "channel"))
@pytest.mark.parametrize("size", (64, 128))
def test_grid_in_parts(size, gate):
    run(replace(BASE, T=4096, K=size, V=size, HV=2, segments="packed", gate=gate))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ("none", "scalar", "channel"))
@pytest.mark.parametrize("size", (64, 128))
def test_reruns_are_bit_equal(size, gate):
    case = replace(BASE, T=1024, B=4, H=9, HV=9, K=size, V=size, segments="gaps", gate=gate)
    hopper.check_reruns("gated_delta_rule", case)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ("scalar", "channel"))
def test_padding_may_hold_anything_on_the_gpu(gate):
    hopper.check_padding("gated_delta_rule", replace(BASE, gate=gate, segments="gaps", B=2), "q k v beta g")
