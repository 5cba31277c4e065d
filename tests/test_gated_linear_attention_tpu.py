"""The TPU kernels of family A and the mLSTM, interpreted: outputs and all gradients against the definition.

The last of the three heads of 64 has no partner in its pair, and the last chunk has rows past the end.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from tests import grid
from tests.grid import Case
from tests.test_kernels_tpu import CASE, SEGMENTS, interpret, run  # noqa: F401

OP = "gated_linear_attention"


@pytest.mark.parametrize("gate", (pytest.param("none", marks=pytest.mark.slow), "scalar", "channel"))
def test_float32(gate):
    for segments, strength, corr in (("gaps", "mixed", 0.0), ("packed", "strong", 1.0)):
        case = replace(CASE, gate=gate, segments=segments, strength=strength, corr=corr)
        run(OP, case, jnp.float32)


@pytest.mark.parametrize("gate", ("scalar", pytest.param("channel", marks=pytest.mark.slow)))
def test_bfloat16(gate):
    for corr in (0.0, 0.9):
        run(OP, replace(CASE, gate=gate, strength="mild", corr=corr), jnp.bfloat16)


def test_normalized():
    run(OP, replace(CASE, gate="none", segments="gaps"), jnp.float32, normalize=True)


def test_mlstm():
    for strength, segments in (("mixed", "packed"), ("strong", "gaps")):
        run("mlstm", replace(CASE, strength=strength, segments=segments), jnp.float32)


def test_mlstm_whose_least_denominator_vanishes():
    args = grid.inputs("mlstm", replace(CASE, strength="weak", segments="none", state=False))
    grid.check_vanishing_denominator(ops.mlstm, args, jnp.float32, limit=1e-4)


@pytest.mark.slow
def test_mlstm_bfloat16():
    """Where |n.q| does not pass through 0; the gradient of the initial m is a difference of nearly equal sums."""
    args = grid.inputs("mlstm", replace(CASE, strength="weak"))
    args["q"], args["k"] = np.abs(args["q"]), np.abs(args["k"])
    grid.check(ops.mlstm, args, jnp.bfloat16, implementation="pallas", skip=("dinitial_state2",))


def test_more_value_heads_and_a_constant_gate():
    case = Case(T=33, H=2, HV=4, K=24, V=128, gate="constant", segments="none", state=False)
    run(OP, case, jnp.float32)


@pytest.mark.parametrize("op", ("gated_linear_attention", "mlstm"))
@pytest.mark.slow
def test_padding_may_hold_anything(op):
    args = grid.inputs(op, replace(CASE, gate="channel", segments="gaps"))
    clean = grid.outputs_and_gradients(getattr(ops, op), args, jnp.float32, implementation="pallas")
    padding = args["segment_ids"] == 0
    floats = [n for n in ("q", "k", "v", "g", "i", "f") if n in args]
    for name in floats:
        args[name][padding] = np.nan
    dirty = grid.outputs_and_gradients(getattr(ops, op), args, jnp.float32, implementation="pallas")
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name])
        if name == "o" or name[1:] in floats:
            assert not clean[name][padding].any(), name


@pytest.mark.slow
def test_strong_and_weak_gates_in_one_chunk():
    """A cumulative sum would be -3000 and more, and differences of it off by 1e-4."""
    args = grid.inputs(OP, Case(T=128, K=64, V=64, gate="scalar"))
    args["g"] = np.broadcast_to(np.where(np.arange(128)[:, None] % 2, -50.0, -0.1), args["g"].shape)
    grid.check(ops.gated_linear_attention, args, jnp.float32, implementation="pallas")


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
@pytest.mark.parametrize("gate", ("none", "constant", "scalar", "channel", "mlstm", "normalized"))
def test_grid(case, gate):
    op, normalize = "mlstm" if gate == "mlstm" else OP, gate == "normalized"
    case = replace(case, gate="none" if normalize else gate)
    run(op, case, jnp.float32, normalize)
    if gate in ("mlstm", "normalized") or case.strength == "strong":
        return
    if gate == "constant":
        check_constant_gate(case)
    else:
        run(op, case, jnp.bfloat16)


def check_constant_gate(case: Case) -> None:
    """bfloat16, where the gradient of a constant gate, a sum over all tokens, is as exact as its terms and no more.

    The sum may nearly cancel. On the way to dg the definition rounds nothing but do, and still has 1.8 % of it wrong in
    one of the cases, where 1 % is allowed. So the limit is 3 times the definition's error if that is more, as it is in
    float32. The terms, gradients of the same gates given token by token, are held to 1 %, and dg to being their sum.
    """
    args = grid.rounded(grid.inputs(OP, case), jnp.bfloat16)
    by_token = args | dict(g=np.broadcast_to(args["g"], args["v"].shape[:3]))
    check = functools.partial(grid.check, ops.gated_linear_attention, dtype=jnp.bfloat16, correlated=case.corr > 0)
    check(args, implementation="pallas", skip=("dg",))
    check(by_token, implementation="pallas")

    def gradient(x, dtype, implementation):
        return grid.outputs_and_gradients(ops.gated_linear_attention, x, dtype, implementation=implementation)["dg"]

    dg, terms = (gradient(x, jnp.bfloat16, "pallas") for x in (args, by_token))
    assert np.all(np.abs(dg - terms.sum((0, 1))) <= grid.FLOAT32 * np.abs(terms).sum((0, 1)))
    expected = gradient(args, jnp.float64, "scan")
    definition = grid.error(gradient(args, jnp.bfloat16, "scan"), expected)
    limit = grid.BFLOAT16_CORRELATED if case.corr > 0 else grid.BFLOAT16["g"]
    assert grid.error(dg, expected) <= max(limit, grid.FLOAT32_VS_SCAN * definition)


def test_chunk_states_can_be_saved_by_name():
    """Only the states that chunks receive are residuals beyond the inputs."""
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)

    def loss(x):
        return ops.gated_linear_attention(x, x, x, implementation="pallas")[0].astype(jnp.float32).sum()

    policy = jax.checkpoint_policies.save_only_these_names("chunk_states")
    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x))
    assert text.count("name=chunk_states") == 1 and "bf16[1,1,2,1,64,128]" in text
