"""Sequences cut over devices: every op, mixer and stage computes what one device does, to rounding."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxlin import ops, sharding
from jaxlin.config import MeshConfig
from tests import grid
from tests.grid import Case

# 8 pieces of 6 tokens; thirds of 16 tokens, so that "left", "middle" and "right" make whole pieces of padding.
CASE = Case(B=2, T=48, H=2, HV=4, K=8, V=12)
OPS = {
    "none": ("gated_linear_attention", replace(CASE, gate="none")),
    "constant": ("gated_linear_attention", replace(CASE, gate="constant")),
    "scalar": ("gated_linear_attention", CASE),
    "channel": ("gated_linear_attention", replace(CASE, gate="channel")),
    "normalized": ("gated_linear_attention", replace(CASE, gate="none")),
    "mlstm": ("mlstm", CASE),
    "delta": ("gated_delta_rule", replace(CASE, gate="none")),
    "gated delta": ("gated_delta_rule", CASE),
    "channel delta": ("gated_delta_rule", replace(CASE, gate="channel")),
}
SEGMENTS = ("packed", "single", "left", "middle", "right", "gaps")
CLOSE = {jnp.float32: 1e-5, jnp.float64: 1e-10}


def some_fast(names, fast):
    """The names as parameters of a test, of which all but `fast` are slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def eight(**axes):
    return sharding.make_mesh(MeshConfig(**axes), jax.devices()[:8])


def check_op(name, dtype, segments, state=True):
    """Outputs, final states and all gradients, of the initial state too, are those of one device.

    What one device itself computes less exactly than that (gradients that nearly vanish, or that a vanishing
    denominator magnifies) may be up to three times as far from the definition in float64 as it is there.
    """
    op, case = getattr(ops, OPS[name][0]), replace(OPS[name][1], segments=segments, state=state)
    args = grid.rounded(grid.inputs(OPS[name][0], case, name == "normalized"), dtype)
    alone = grid.outputs_and_gradients(op, args, dtype, implementation="chunked")
    with jax.set_mesh(eight(sequence=8)):
        found = grid.outputs_and_gradients(op, args, dtype, implementation="chunked")
    if wrong := {n for n in alone if not grid.error(found[n], alone[n]) <= CLOSE[dtype]}:
        exact = grid.outputs_and_gradients(op, args, jnp.float64, implementation="scan")
        limits = {n: CLOSE[dtype] + 3 * grid.error(alone[n], exact[n]) for n in wrong}
        assert {n: e for n in wrong if not (e := grid.error(found[n], exact[n])) <= limits[n]} == {}, segments


@pytest.mark.parametrize("name", some_fast(OPS, ("constant", "normalized", "mlstm", "channel delta")))
def test_ops(name):
    for segments in SEGMENTS:
        check_op(name, jnp.float32, segments)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_ops_in_float64_and_without_states(name):
    for segments in ("none", *SEGMENTS):
        check_op(name, jnp.float64, segments)
        check_op(name, jnp.float32, segments, state=False)


@pytest.mark.parametrize("name", some_fast(OPS, ("scalar", "delta")))
def test_only_maps_of_states_are_gathered(name):
    """No array with a token axis crosses the network, forward or backward."""
    args = grid.inputs(OPS[name][0], replace(CASE, segments="packed"), name == "normalized")
    floats = {n: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x) for n, x in args.items() if n != "segment_ids"}
    normalize = {"normalize": True} if floats.pop("normalize", None) is not None else {}
    ids = jnp.asarray(args["segment_ids"], jnp.int32)

    def loss(floats):
        o, state = getattr(ops, OPS[name][0])(**floats, **normalize, segment_ids=ids)
        return jnp.sum(jnp.sin(o)) + sum(jnp.sum(x) for x in jax.tree.leaves(state))

    mesh = eight(sequence=8)
    with jax.set_mesh(mesh):
        by_token = sharding.layout(2, 48, 2).by_token()
        floats = {
            n: x if n == "initial_state" or x.ndim == 1 else jax.device_put(x, jax.NamedSharding(mesh, by_token))
            for n, x in floats.items()
        }
        text = jax.jit(jax.grad(loss)).lower(floats).compile().as_text()
    pattern = r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
    found = re.findall(r"\[([\d,]+)\]", " ".join(re.findall(pattern, text)))
    moved = [tuple(map(int, sizes.split(","))) for sizes in found]
    assert moved
    assert not [shape for shape in moved if 48 in shape or 6 in shape]
