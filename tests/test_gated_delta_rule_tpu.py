"""The TPU kernels of family B, interpreted: outputs and all gradients against the definition.

The last of the three heads of 64 has no partner in its pair, and the last chunk has rows past the end.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from tests import grid
from tests.grid import Case
from tests.test_kernels_tpu import CASE, SEGMENTS, interpret, run  # noqa: F401

OP = "gated_delta_rule"
GATES = ("none", "scalar", "channel")


@pytest.mark.parametrize("gate", (pytest.param("none", marks=pytest.mark.slow), "scalar", "channel"))
def test_float32(gate):
    for segments, strength, corr, beta in (("gaps", "mixed", 0.0, None), ("packed", "weak", 1.0, 2.0)):
        case = replace(CASE, gate=gate, segments=segments, strength=strength, corr=corr, beta=beta)
        run(OP, case, jnp.float32)


@pytest.mark.parametrize("gate", (pytest.param("scalar", marks=pytest.mark.slow), "channel"))
def test_bfloat16(gate):
    for corr in (0.0, 0.9, 0.999):
        run(OP, replace(CASE, gate=gate, strength="mild", corr=corr), jnp.bfloat16)


@pytest.mark.slow
def test_padding_may_hold_anything():
    args = grid.inputs(OP, replace(CASE, gate="channel", segments="gaps"))
    clean = grid.outputs_and_gradients(ops.gated_delta_rule, args, jnp.float32, implementation="pallas")
    padding = args["segment_ids"] == 0
    for name in ("q", "k", "v", "beta", "g"):
        args[name][padding] = np.nan
    dirty = grid.outputs_and_gradients(ops.gated_delta_rule, args, jnp.float32, implementation="pallas")
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name])
        if "state" not in name:
            assert not clean[name][padding].any(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    grid.variations(
        Case(T=130, H=2, HV=2, K=64, V=64, corr=0.5, segments="packed"),
        T=[1, 7, 63, 64, 65, 257, 1024],
        K=[16, 96, 128, 256],
        V=[32, 96, 128, 256],
        H=[1],
        HV=[4, 8],
        segments=["none", *SEGMENTS],
        strength=["strong", "weak", "zero"],
        corr=[0.0, 0.999, 1.0],
        beta=[0.0, 1e-6, 1.0, 2.0],
        state=[False],
    ),
    ids=str,
)
@pytest.mark.parametrize("gate", GATES)
def test_grid(case, gate):
    case = replace(case, gate=gate)
    run(OP, case, jnp.float32)
    if case.strength == "mild":
        run(OP, case, jnp.bfloat16)
