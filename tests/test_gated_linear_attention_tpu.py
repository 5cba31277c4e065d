"""The TPU kernels of family A and the mLSTM, interpreted: outputs and all gradients against the definition."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from tests import grid
from tests.grid import Case

SEGMENTS = ("packed", "single", "left", "right", "middle", "gaps")


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    monkeypatch.setenv("JAXLIN_INTERPRET", "tpu")


def run(op: str, case: Case, dtype, normalize: bool = False, **options):
    args = grid.inputs(op, case, normalize)
    options = dict(implementation="pallas") | options
    grid.check(getattr(ops, op), args, dtype, correlated=case.corr > 0, **options)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("gate", ("none", "scalar"))
def test_heads_of_64_in_pairs_the_last_alone(gate, dtype):
    for segments in ("gaps", "packed"):
        run("gated_linear_attention", Case(T=70, H=3, HV=3, K=64, V=64, gate=gate, segments=segments), dtype)


def test_strong_and_weak_gates():
    for strength in ("strong", "weak", "zero"):
        case = Case(T=70, H=3, HV=3, K=64, V=64, strength=strength, corr=0.9, segments="packed")
        run("gated_linear_attention", case, jnp.float32)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_normalized(dtype):
    case = Case(T=70, H=2, HV=2, K=64, V=64, gate="none", segments="gaps")
    run("gated_linear_attention", case, dtype, normalize=True)


def test_mlstm():
    for strength, segments in (("mixed", "packed"), ("strong", "gaps")):
        run("mlstm", Case(T=70, H=3, HV=3, K=64, V=64, strength=strength, segments=segments), jnp.float32)


def test_mlstm_bfloat16():
    """Where |n.q| does not pass through 0; the gradient of the initial m is a difference of nearly equal sums."""
    args = grid.inputs("mlstm", Case(T=70, H=3, HV=3, K=64, V=64, strength="weak", segments="packed"))
    args["q"], args["k"] = np.abs(args["q"]), np.abs(args["k"])
    grid.check(ops.mlstm, args, jnp.bfloat16, implementation="pallas", skip=("dinitial_state2",))


def test_more_value_heads_and_a_constant_gate():
    case = Case(T=33, H=2, HV=4, K=24, V=128, gate="constant", segments="packed", state=False)
    run("gated_linear_attention", case, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    grid.variations(
        Case(T=130, H=2, HV=2, K=64, V=64, segments="packed"),
        T=[1, 7, 63, 64, 65, 257, 1024],
        K=[16, 96, 128, 256],
        V=[32, 96, 128, 256],
        H=[1],
        HV=[4, 8],
        segments=["none", *SEGMENTS],
        strength=["strong", "weak", "zero"],
        corr=[0.9, 1.0],
        state=[False],
    ),
    ids=str,
)
@pytest.mark.parametrize("gate", ("none", "constant", "scalar", "mlstm", "normalized"))
def test_grid(case, gate):
    op = "mlstm" if gate == "mlstm" else "gated_linear_attention"
    normalize = gate == "normalized"
    case = grid.replace(case, gate="none" if normalize else gate)
    run(op, case, jnp.float32, normalize)
    if op != "mlstm":
        run(op, case, jnp.bfloat16, normalize)
