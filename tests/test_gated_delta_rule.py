"""The chunked gated delta rule against its definition: DeltaNet (no gate), Gated DeltaNet (scalar), KDA (channel)."""

from __future__ import annotations

import functools

import grid
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import Case

from jaxlin import ops

CHUNKED = functools.partial(ops.gated_delta_rule, implementation="chunked")

# Corners first: each case carries several of them. The slow ones are single variations, sizes and more seeds.
FLOAT64 = [
    Case(gate="none", segments="gaps", HV=2, V=24),
    Case(gate="none", corr=1.0, beta=2.0, T=130),
    Case(gate="none", segments="single", T=7, beta=0.5),
    Case(gate="scalar", segments="packed", T=130, H=2, HV=4, V=24, corr=0.9),
    Case(gate="scalar", strength="strong", segments="left", corr=0.999, beta=1.0),
    Case(gate="scalar", strength="weak", T=1, beta=2.0),
    Case(gate="channel", segments="gaps", HV=2, K=24),
    Case(gate="channel", segments="middle", T=130, corr=1.0, beta=2.0),
    Case(gate="channel", strength="strong", segments="right", beta=0.0, T=64),
]
FLOAT32 = [
    Case(gate="none", corr=0.9, beta=1.0, T=130, K=64, V=64),
    Case(gate="scalar", corr=0.999, T=130, K=64, V=64, segments="packed"),
    Case(gate="channel", corr=1.0, T=130, K=64, V=64),
]
BFLOAT16 = [
    Case(gate=gate, corr=corr, T=130, K=64, V=64, H=2, HV=2) for gate in ("none", "scalar", "channel") for corr in (0, 0.9)
]
SLOW = [
    case
    for gate in ("none", "scalar", "channel")
    for case in grid.variations(
        Case(gate=gate, H=3, HV=3, K=32, V=32, T=257),
        T=[63, 64, 65, 1024],
        HV=[6, 12],
        K=[128],
        V=[256],
        corr=[0.9, 0.999, 1.0],
        beta=[0.0, 1e-6, 0.5, 1.0, 2.0],
        segments=["packed", "single", "left", "middle", "right", "gaps"],
        strength=[] if gate == "none" else ["zero", "weak", "mild", "strong"],
        state=[False],
    )
]


@pytest.mark.parametrize("case", FLOAT64, ids=str)
def test_float64_is_the_definition(case):
    grid.check(ops.gated_delta_rule, grid.inputs("gated_delta_rule", case), jnp.float64, chunk_size=16)


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32(case):
    grid.check(ops.gated_delta_rule, grid.inputs("gated_delta_rule", case), jnp.float32)


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16(case):
    args = grid.inputs("gated_delta_rule", case)
    grid.check(ops.gated_delta_rule, args, jnp.bfloat16, correlated=case.corr > 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_grid(case, dtype):
    grid.check(ops.gated_delta_rule, grid.inputs("gated_delta_rule", case), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_seeds(gate, seed):
    for corr in (0, 0.9, 0.999):
        case = Case(gate=gate, strength="mild", corr=corr, T=512, K=64, V=64, H=2, HV=2, seed=seed)
        args = grid.inputs("gated_delta_rule", case)
        grid.check(ops.gated_delta_rule, args, jnp.bfloat16, correlated=corr > 0)


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_chunk_size_changes_nothing(gate):
    args = grid.inputs("gated_delta_rule", Case(gate=gate, segments="packed", T=70))
    with jax.enable_x64(True):
        small, large = (grid.outputs_and_gradients(CHUNKED, args, jnp.float64, chunk_size=c) for c in (8, 128))
    for name, x in small.items():
        assert grid.error(x, large[name]) < 1e-12, name


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_split_and_resume(gate):
    """[0, 64) and then [64, 150) from its state: at a chunk's end bit for bit, and reruns too."""
    args = grid.inputs("gated_delta_rule", Case(gate=gate, T=150, K=32, V=32))
    state = jnp.asarray(args.pop("initial_state"), jnp.float32)
    x = {n: jnp.asarray(a, jnp.float32) for n, a in args.items() if a is not None}
    run = jax.jit(CHUNKED)
    whole, end = run(**x, initial_state=state)
    first, middle = run(**{n: a[:, :64] for n, a in x.items()}, initial_state=state)
    second, resumed = run(**{n: a[:, 64:] for n, a in x.items()}, initial_state=middle)
    np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), whole)
    np.testing.assert_array_equal(resumed, end)
    np.testing.assert_array_equal(run(**x, initial_state=state)[0], whole)


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_padding_is_exactly_nothing(gate):
    """NaN in padding rows reaches nothing; their outputs and gradients are zero, and the rest does not notice them."""
    args = grid.inputs("gated_delta_rule", Case(gate=gate, T=40, segments="left"))
    pad, floats = 13, ("q", "k", "v", "beta", "g")
    ids = args["segment_ids"]
    assert (ids[:, :pad] == 0).all() and (ids[:, pad:] != 0).all()
    dirty = {n: np.where(ids.reshape(ids.shape + (1,) * (a.ndim - 2)) == 0, np.nan, a) if n in floats else a
             for n, a in args.items() if a is not None}  # fmt: skip
    with jax.enable_x64(True):
        found = grid.outputs_and_gradients(CHUNKED, dirty, jnp.float64)
        clean = {n: a[:, pad:] if n in floats else a for n, a in dirty.items() if n != "segment_ids"}
        expected = grid.outputs_and_gradients(functools.partial(_shifted, pad=pad), clean, jnp.float64)
    for name, x in found.items():
        if "state" not in name:
            assert not x[:, :pad].any(), name
            x = x[:, pad:]
        reference = expected[name][:, pad:] if name == "o" else expected[name]
        assert grid.error(x, reference) < 1e-12, name


def _shifted(*, pad, **args):
    """The op without its padding, the output shifted back so that both meet the same cotangent."""
    o, state = CHUNKED(**args)
    return jnp.pad(o, ((0, 0), (pad, 0), (0, 0), (0, 0))), state


def test_beta_zero_keeps_the_state():
    args = grid.inputs("gated_delta_rule", Case(gate="none", beta=0.0, T=70))
    state = args["initial_state"].astype(np.float32)
    args = {n: jnp.asarray(a, jnp.float32) for n, a in args.items() if a is not None} | {"initial_state": state}
    np.testing.assert_array_equal(CHUNKED(**args)[1], state)


def test_no_loop_over_time_and_one_state_scan_each_way():
    """Loops have the length of the chunks or of a substitution; with the states kept, remat does not scan them again."""
    x = jnp.ones((1, 1024, 1, 16))
    policy = jax.checkpoint_policies.save_only_these_names("chunk_states")

    def loss(q, k, v, beta, g):
        return jnp.sum(CHUNKED(q, k, v, beta, g)[0])

    def scans(f):
        jaxpr = jax.make_jaxpr(jax.grad(f, argnums=(0, 1, 2, 3, 4)))(x, x, x, x[..., 0], -x[..., 0])
        return sorted(_loop_lengths(jaxpr.jaxpr))

    chunks, substitution = 1024 // 64, 15
    assert scans(loss) == [substitution, chunks, chunks]
    assert scans(jax.checkpoint(loss, policy=policy)).count(chunks) == 2


def _loop_lengths(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"]
        assert eqn.primitive.name != "while"
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                yield from _loop_lengths(getattr(sub, "jaxpr", sub))
