"""The chunked gated delta rule against its definition: DeltaNet (no gate), Gated DeltaNet (scalar), KDA (channel)."""

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

CHUNKED = functools.partial(ops.gated_delta_rule, implementation="chunked")
GATES = ("none", "scalar", "channel")
SEGMENTS = ("packed", "single", "left", "right", "middle", "gaps")


def run(case: Case, dtype, chunk_size: int | None = None):
    args = grid.inputs("gated_delta_rule", case)
    grid.check(ops.gated_delta_rule, args, dtype, correlated=case.corr > 0, chunk_size=chunk_size)


@pytest.mark.parametrize("gate", GATES)
def test_float64_is_the_definition(gate):
    default = Case(gate=gate, HV=2, V=24)
    for corr, beta in ((0.0, None), (0.9, 1e-6), (0.999, 0.0), (1.0, 0.5), (0.9, 1.0), (1.0, 2.0)):
        run(replace(default, corr=corr, beta=beta), jnp.float64, chunk_size=16)
    for segments, strength in zip(SEGMENTS, ("mixed", "strong", "weak", "zero", "mild", "mixed"), strict=True):
        run(replace(default, segments=segments, strength=strength, corr=0.5), jnp.float64, chunk_size=16)


@pytest.mark.parametrize("gate", GATES)
def test_float32(gate):
    default = Case(gate=gate, T=130, K=64, V=32, segments="packed")
    for corr, beta in ((0.0, None), (0.9, 1.0), (0.999, None), (1.0, 2.0)):
        for strength in ("mild", "mixed"):
            run(replace(default, corr=corr, beta=beta, strength=strength), jnp.float32)


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16(gate):
    for corr in (0.0, 0.9, 0.999):
        for seed in range(2):
            run(Case(gate=gate, T=130, K=64, V=64, strength="mild", corr=corr, seed=seed), jnp.bfloat16)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=1, H=2, HV=4, V=24),
        Case(T=7, gate="none"),
        Case(T=33, H=2, HV=4, K=24, gate="channel", segments="gaps", state=False),
    ],
    ids=str,
)
def test_shapes(case):
    run(case, jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_long(gate):
    for corr in (0.0, 0.9, 0.999):
        for seed in range(4):
            for strength in ("weak", "mild", "mixed"):
                run(Case(gate=gate, T=512, K=64, V=64, strength=strength, corr=corr, seed=seed), jnp.bfloat16)


@pytest.mark.parametrize("gate", GATES)
def test_chunk_size_changes_nothing(gate):
    args = grid.inputs("gated_delta_rule", Case(gate=gate, segments="packed", T=40))
    with jax.enable_x64(True):
        small, large = (grid.outputs_and_gradients(CHUNKED, args, jnp.float64, chunk_size=c) for c in (8, 64))
    for name, x in small.items():
        assert grid.error(x, large[name]) < 1e-12, name


@pytest.mark.parametrize("gate", GATES)
def test_split_and_resume(gate):
    """[0, t) and then [t, T) from its state is the whole, at a chunk's end or inside a chunk; a rerun is bit-equal."""
    args = grid.inputs("gated_delta_rule", Case(gate=gate, T=40))
    state, split = args.pop("initial_state"), 20
    with jax.enable_x64(True):
        x = {n: jnp.asarray(a) for n, a in args.items() if a is not None}
        step = jax.jit(functools.partial(CHUNKED, chunk_size=16))
        whole, end = step(**x, initial_state=state)
        first, middle = step(**{n: a[:, :split] for n, a in x.items()}, initial_state=state)
        second, resumed = step(**{n: a[:, split:] for n, a in x.items()}, initial_state=middle)
        assert grid.error(np.concatenate([first, second], axis=1), np.asarray(whole)) < 1e-13
        assert grid.error(np.asarray(resumed), np.asarray(end)) < 1e-13
        np.testing.assert_array_equal(step(**x, initial_state=state)[0], whole)


@pytest.mark.parametrize("gate", GATES)
def test_padding_is_exactly_nothing(gate):
    """NaN in padding rows reaches nothing; their outputs and gradients are zero, and the rest does not notice them."""
    args = grid.inputs("gated_delta_rule", Case(gate=gate, T=40, segments="left"))
    pad, floats = 13, ("q", "k", "v", "beta", "g")
    ids = args["segment_ids"]
    assert (ids[:, :pad] == 0).all() and (ids[:, pad:] != 0).all()
    dirty = {n: np.where(ids.reshape(ids.shape + (1,) * (a.ndim - 2)) == 0, np.nan, a) if n in floats else a
             for n, a in args.items() if a is not None}  # fmt: skip
    with jax.enable_x64(True):
        found = grid.outputs_and_gradients(CHUNKED, dirty, jnp.float64, chunk_size=16)
        clean = {n: a[:, pad:] if n in floats else a for n, a in dirty.items()} | {"segment_ids": None}
        expected = grid.outputs_and_gradients(functools.partial(_shifted, pad=pad), clean, jnp.float64, chunk_size=16)
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
    """Loops are as long as the chunks or a substitution; with the states kept, remat does not scan them again."""
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
