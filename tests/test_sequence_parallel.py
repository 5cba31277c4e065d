"""Sequences cut over devices: every op, mixer and stage computes what one device does, to rounding."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops, sharding
from jaxlin.config import MeshConfig
from jaxlin.mixers.short_conv import short_conv
from jaxlin.model import forward
from tests import grid
from tests.grid import Case
from tests.models import STUDENT_MIXERS, random_params, student_of

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


# ---- mixers ----


def numbers(config, dtype):
    """Hidden states and the gradient of every parameter, by name, on packed rows, of which one begins with padding."""
    ids = grid.segment_ids("packed", 2, 48, np.random.default_rng(0))
    ids[0, :7] = 0
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, ids.shape)
    # In float32 whatever the dtype: with x64 other numbers would be drawn. Of seeds 0 and 1 a segment's first output,
    # (q . k) v, has in GLA or RetNet a q . k near 0, whose sign is all that its norm leaves: rounding counts tenfold.
    drawn = random_params(config, seed=2)
    with jax.enable_x64(dtype == jnp.float64):
        config = replace(config, dtype=dtype.dtype.name)
        params = jax.tree.map(lambda a: np.asarray(a, dtype), drawn)

        def loss(params):
            out = forward(config, params, jnp.asarray(tokens), segment_ids=jnp.asarray(ids, jnp.int32), logits=False)
            return jnp.sum(jnp.sin(out.hidden)), out.hidden

        found = jax.jit(jax.grad(loss, has_aux=True))(params)
    return {jax.tree_util.keystr(path): np.asarray(a, np.float64) for path, a in jax.tree.leaves_with_path(found)}


@pytest.mark.parametrize("mixer", some_fast([*STUDENT_MIXERS, "retnet+softmax"], ("retnet+softmax",)))
def test_mixers(mixer):
    """Short convolutions and rotary positions too: four pieces and two shares are as near to float64 as one device."""
    config = student_of(mixer)
    exact, alone = numbers(config, jnp.float64), numbers(config, jnp.float32)
    with jax.set_mesh(eight(tensor=2, sequence=4)):
        found = numbers(config, jnp.float32)
    errors = {n: (grid.error(found[n], exact[n]), grid.error(alone[n], exact[n])) for n in exact}
    assert {n: e for n, e in errors.items() if not e[0] <= 3 * e[1] + CLOSE[jnp.float32]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", STUDENT_MIXERS)
@pytest.mark.parametrize("preset", ["recommended", "paper_code"])
def test_mixers_in_float64(mixer, preset):
    """More pieces than rows, each of fewer tokens than a convolution and its past have."""
    config = student_of(mixer, preset)
    alone = numbers(config, jnp.float64)
    with jax.set_mesh(eight(sequence=8)):
        found = numbers(config, jnp.float64)
    errors = {n: grid.error(found[n], alone[n]) for n in alone}
    assert {n: e for n, e in errors.items() if not e <= CLOSE[jnp.float64]} == {}


# ---- short convolution ----


def test_short_convolution():
    """Pieces of two tokens, or of padding alone: a convolution reaches over several; tails and gradients too."""
    batch, length, size = 3, 16, 4
    rng = np.random.default_rng(0)
    x, tail = (jnp.asarray(rng.normal(size=(batch, n, 2, 3)), jnp.float32) for n in (length, size - 1))
    kernel = jnp.asarray(rng.normal(size=(size, 2, 3)), jnp.float32)
    ids = jnp.asarray([[1] * 3 + [0] * 5 + [1] * 8, [0] * 4 + [2] * 5 + [1] * 3 + [0] * 4, [0] * length], jnp.int32)

    def run(ids):
        def loss(arrays):
            y, new_tail = short_conv(*arrays[:2], ids, arrays[2])
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(new_tail)), (y, new_tail)

        return jax.jit(jax.grad(loss, has_aux=True))((kernel, x, tail))

    for segment_ids in (None, ids):
        alone = run(segment_ids)
        with jax.set_mesh(eight(sequence=8)):
            found = run(segment_ids)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, alone)
