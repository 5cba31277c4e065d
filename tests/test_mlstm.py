"""The chunked mLSTM against the definition: outputs and all gradients, the denominator's and the initial m's too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin import ops
from tests import grid
from tests.grid import Case

op = ops.mlstm
SEGMENTS = ("packed", "single", "left", "right", "middle", "gaps")


def run(case: Case, dtype=jnp.float64, chunk_size: int | None = 16):
    grid.check(op, grid.inputs("mlstm", case), dtype, correlated=case.corr > 0, chunk_size=chunk_size)


def test_float64():
    run(Case())
    for strength in ("strong", "weak", "zero"):
        run(Case(strength=strength, segments="packed"))
    for segments in SEGMENTS:
        run(Case(segments=segments))


def test_float32():
    for strength in ("mixed", "strong", "weak"):
        for corr in (0.0, 0.9, 1.0):
            run(Case(strength=strength, corr=corr, segments="packed"), jnp.float32)
    for segments in SEGMENTS:
        run(Case(segments=segments), jnp.float32)


def test_bfloat16():
    """Numerator and denominator of bfloat16 inputs, where |n.q| does not pass through 0."""
    args = grid.inputs("mlstm", Case(strength="weak", segments="packed"))
    args["q"], args["k"] = np.abs(args["q"]), np.abs(args["k"])
    grid.check(op, args, jnp.bfloat16, chunk_size=16, skip=("dinitial_state2",))
    # The gradient of the initial m is <C, dC> + <n, dn>, here 1.66 - 1.63: it is as exact as these two, no more.
    args = grid.rounded(args, jnp.bfloat16)
    expected = grid.outputs_and_gradients(op, args, jnp.float64, implementation="scan")
    found = grid.outputs_and_gradients(op, args, jnp.bfloat16, implementation="chunked", chunk_size=16)
    term = np.sum(args["initial_state"][1] * expected["dinitial_state1"], axis=-1)
    difference = found["dinitial_state2"] - expected["dinitial_state2"]
    assert np.sqrt(np.mean(difference**2)) < grid.BFLOAT16["state"] * np.sqrt(np.mean(term**2))


def test_shapes():
    run(Case(T=33, H=2, HV=4, K=24, V=40, segments="gaps", state=False))


def test_denominator_gradient_is_there():
    """Without a norm behind it, dropping the gradient of the denominator would be wrong by more than half."""
    args = grid.inputs("mlstm", Case(strength="weak", segments="packed"))
    found = grid.outputs_and_gradients(op, args, jnp.float64, implementation="chunked", chunk_size=16)
    assert np.abs(found["dinitial_state1"]).max() > 1e-3  # n enters through the denominator only


def test_split_and_resume():
    args = grid.inputs("mlstm", Case(T=48, segments="middle"))
    args = jax.tree.map(jnp.asarray, args)
    chunked = jax.jit(functools.partial(op, implementation="chunked", chunk_size=16))
    whole, final = chunked(**args)
    state, parts = args.pop("initial_state"), []
    for t in (slice(0, 24), slice(24, 48)):
        h, state = chunked(**{n: x[:, t] for n, x in args.items()}, initial_state=state)
        parts.append(h)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for found, expected in zip(state, final, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_reruns_are_bit_equal():
    args = grid.inputs("mlstm", Case(segments="gaps"))
    options = dict(implementation="chunked", chunk_size=16)
    first, second = (grid.outputs_and_gradients(op, args, jnp.float32, **options) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_extreme_gates_stay_finite():
    args = grid.inputs("mlstm", Case(segments="packed"))
    args["i"], args["f"] = 60 * np.sign(args["i"]), 80 * np.sign(args["f"])
    found = grid.outputs_and_gradients(op, args, jnp.float32, implementation="chunked", chunk_size=16)
    assert all(np.isfinite(x).all() for x in found.values())
