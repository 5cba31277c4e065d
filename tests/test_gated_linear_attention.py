"""Chunked gated linear attention against the definition: outputs and all gradients, through the final state too."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from jaxlin import ops
from tests import grid
from tests.grid import Case

op = ops.gated_linear_attention
GATES = ("none", "constant", "scalar", "channel")
SEGMENTS = ("packed", "single", "left", "right", "middle", "gaps")


def run(case: Case, dtype=jnp.float64, normalize: bool = False, chunk_size: int | None = 16, **options):
    args = grid.inputs("gated_linear_attention", case, normalize)
    grid.check(op, args, dtype, correlated=case.corr > 0, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("gate", GATES)
def test_float64(gate):
    run(Case(gate=gate))
    for strength in ("strong", "weak", "zero"):
        run(Case(gate=gate, strength=strength, segments="packed"))
    for segments in SEGMENTS:
        run(Case(gate=gate, segments=segments))


@pytest.mark.parametrize("gate", GATES)
def test_float32(gate):
    for strength in ("mixed", "strong", "weak"):
        for corr in (0.0, 0.9, 1.0):
            run(Case(gate=gate, strength=strength, corr=corr, segments="packed"), jnp.float32)
    for segments in SEGMENTS:
        run(Case(gate=gate, segments=segments), jnp.float32)


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16(gate):
    for corr in (0.0, 0.9):
        run(Case(gate=gate, strength="mild", corr=corr, segments="packed"), jnp.bfloat16)


@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
def test_normalized(dtype):
    for segments in ("gaps", "packed", "left"):
        run(Case(gate="none", segments=segments), dtype, normalize=True)


def test_normalizer_of_repeated_heads():
    """One chunk, zero initial state: some versions of XLA for CPUs got the denominator wrong (DECISIONS.md, 15)."""
    case = Case(B=1, T=63, K=96, V=64, HV=2, gate="none", segments="single", state=False)
    args = grid.inputs("gated_linear_attention", case, normalize=True)
    grid.check(op, args, jnp.float32, skip=("dq",))  # o = v, whatever q is


@pytest.mark.parametrize(
    "case",
    [
        Case(T=1, H=2, HV=4, V=24),
        Case(T=33, H=2, HV=4, K=24, V=40, gate="channel", segments="gaps", state=False),
    ],
    ids=str,
)
def test_shapes(case):
    run(case)


@pytest.mark.parametrize("gate", ("scalar", "channel"))
def test_chunk_size_does_not_matter(gate):
    args = grid.inputs("gated_linear_attention", Case(T=37, gate=gate, segments="packed"))
    sizes = (4, 24, 64)
    found = [grid.outputs_and_gradients(op, args, jnp.float64, implementation="chunked", chunk_size=c) for c in sizes]
    for other in found[1:]:
        for name in other:
            np.testing.assert_allclose(other[name], found[0][name], rtol=1e-11, atol=1e-12, err_msg=name)


def test_small_and_large_decays_in_one_chunk_keep_float32_accuracy():
    """Many strong decays make the cumulative sum -1600 and more: differences of it would be off by 1e-4."""
    args = grid.inputs("gated_linear_attention", Case(T=64, gate="scalar"))
    args["g"] = np.broadcast_to(np.where(np.arange(64)[:, None] % 2, -50.0, -0.1), args["g"].shape)
    grid.check(op, args, jnp.float32, chunk_size=64)


@pytest.mark.parametrize("gate", ("constant", "channel"))
def test_split_and_resume(gate):
    """A call that starts within the document that the last one ended in carries on from its state."""
    args = grid.inputs("gated_linear_attention", Case(T=48, gate=gate, segments="middle"))
    args = {n: None if x is None else jnp.asarray(x) for n, x in args.items()}
    chunked = jax.jit(functools.partial(op, implementation="chunked", chunk_size=16))
    whole, final = chunked(**args)
    state, parts = args.pop("initial_state"), []
    for t in (slice(0, 24), slice(24, 48)):
        o, state = chunked(**{n: x if x.ndim == 1 else x[:, t] for n, x in args.items()}, initial_state=state)
        parts.append(o)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)


def test_reruns_are_bit_equal():
    args = grid.inputs("gated_linear_attention", Case(gate="scalar", segments="gaps"))
    options = dict(implementation="chunked", chunk_size=16)
    first, second = (grid.outputs_and_gradients(op, args, jnp.float32, **options) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_padding_may_hold_anything():
    args = grid.inputs("gated_linear_attention", Case(gate="channel", segments="gaps"))
    clean = grid.outputs_and_gradients(op, args, jnp.float32, implementation="chunked", chunk_size=16)
    padding = args["segment_ids"] == 0
    for name in "qkvg":
        args[name][padding] = np.nan
    dirty = grid.outputs_and_gradients(op, args, jnp.float32, implementation="chunked", chunk_size=16)
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name])
        if name in ("o", "dq", "dk", "dv", "dg"):
            assert not clean[name][padding].any()


def test_nothing_runs_once_per_token():
    x, g = jnp.ones((1, 512, 1, 16)), -jnp.ones((1, 512, 1))

    def loss(x, g):
        return op(x, x, x, g, segment_ids=jnp.ones((1, 512), int), implementation="chunked")[0].sum()

    assert max(scan_lengths(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, g).jaxpr)) == 8


def scan_lengths(jaxpr) -> list[int]:
    """Lengths of all scans in a jaxpr, nested ones included; a while loop counts as endless."""
    lengths = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            lengths.append(equation.params["length"])
        elif equation.primitive.name == "while":
            lengths.append(1 << 30)
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                lengths += scan_lengths(getattr(sub, "jaxpr", sub))
    return lengths


def test_chunk_states_can_be_saved_by_name():
    x = jnp.ones((1, 128, 1, 16))
    policy = jax.checkpoint_policies.save_only_these_names("chunk_states")
    f = jax.checkpoint(lambda x: op(x, x, x, implementation="chunked")[0].sum(), policy=policy)
    kept = [aval.shape for aval, _ in saved_residuals(f, x)]
    assert (2, 1, 1, 16, 16) in kept
    np.testing.assert_allclose(jax.grad(f)(x), jax.grad(lambda x: op(x, x, x)[0].sum())(x), rtol=1e-5)
