"""Family A's GPU kernels: interpreted on the CPU, lowered for CUDA, and (pytest -m gpu) run on a Hopper GPU.

The interpreter runs the kernels' own bodies, copies, barriers and all, but for wgmma, which is `jnp.dot` there.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from jaxlin.kernels import gated_linear_attention_gpu_split
from tests import grid, hopper
from tests.grid import Case
from tests.hopper import BASE, SEGMENTS, kernels_of


@pytest.fixture
def interpreted(monkeypatch):
    hopper.interpret(monkeypatch)


def run(op: str, case: Case, normalize: bool = False, **options):
    args = grid.inputs(op, case, normalize)
    if op == "mlstm":  # rows whose n.q passes through 0 are ill-conditioned, see test_mlstm.py
        args["q"], args["k"] = np.abs(args["q"]), np.abs(args["k"])
        options |= dict(skip=("dinitial_state2",))
    grid.check(
        getattr(ops, op), args, jnp.bfloat16, correlated=case.corr > 0, **dict(implementation="pallas") | options
    )


# ---- on the CPU, interpreted ----

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(BASE, gate="none", H=2, HV=4, B=2, T=65), marks=slow),
        pytest.param(replace(BASE, gate="constant", HV=4), marks=slow),  # one head alone: a sum close to zero
        replace(BASE, T=65, gate="constant", strength="strong", HV=4, segments="packed"),  # dg is tiny, not lost
        replace(BASE, gate="scalar", strength="mixed", segments="gaps", B=2),
        pytest.param(replace(BASE, gate="scalar", strength="strong", corr=0.9, state=False), marks=slow),
        replace(BASE, T=7, K=16, V=24, segments="packed"),
        pytest.param(replace(BASE, K=128, V=96, segments="packed"), marks=slow),
        replace(BASE, T=130, gate="scalar", strength="mixed", K=128, V=256, segments="gaps"),  # two warpgroups
        pytest.param(replace(BASE, gate="none", K=128, V=128), marks=slow),
        replace(BASE, gate="channel", strength="mixed", segments="gaps", B=2, HV=2),
        replace(BASE, gate="channel", T=7, K=16, V=24, segments="packed"),
        pytest.param(replace(BASE, gate="channel", strength="strong"), marks=slow),
        pytest.param(replace(BASE, gate="channel", strength="zero", corr=0.9, state=False), marks=slow),
        pytest.param(replace(BASE, gate="channel", strength="weak", segments="single"), marks=slow),
        pytest.param(replace(BASE, gate="channel", K=128, V=128, segments="middle"), marks=slow),
    ],
    ids=str,
)
def test_interpreted(case, interpreted):
    run("gated_linear_attention", case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(BASE, gate="none"), marks=slow),
        replace(BASE, gate="none", segments="gaps", B=2),
        replace(BASE, gate="scalar", segments="packed", T=130),
        pytest.param(replace(BASE, gate="none", K=96, V=128), marks=slow),
        pytest.param(replace(BASE, gate="none", K=128, V=256, T=130, segments="gaps"), marks=slow),
    ],
    ids=str,
)
def test_interpreted_normalized(case, interpreted):
    run("gated_linear_attention", case, normalize=True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(BASE, strength="weak"), marks=slow),
        replace(BASE, strength="weak", segments="packed"),
        replace(BASE, strength="weak", T=130, K=128, V=128, HV=2, segments="packed"),
    ],
    ids=str,
)
def test_interpreted_mlstm(case, interpreted):
    run("mlstm", case)


def test_where_the_least_denominator_is_infinite(interpreted):
    """m below -89: e^-m is more than float32 holds, so h is 0 there and nothing has a gradient."""
    args = grid.inputs("mlstm", replace(BASE, strength="weak", T=130, state=False))
    args["i"], args["f"] = args["i"] - 300, args["f"] - 300
    found = grid.outputs_and_gradients(ops.mlstm, args, jnp.bfloat16, implementation="pallas")
    assert all(np.isfinite(x).all() for x in found.values())
    assert not any(found[name].any() for name in ("o", "dq"))


@pytest.mark.parametrize("size", (64, pytest.param(128, marks=slow)))
def test_where_the_least_denominator_vanishes(size, interpreted):
    args = grid.inputs("mlstm", replace(BASE, strength="weak", T=130, K=size, V=size, state=False))
    grid.check_vanishing_denominator(ops.mlstm, args, jnp.bfloat16, limit=1e-2)


@pytest.mark.parametrize("gate", ("scalar", "channel"))
def test_gradient_of_the_final_state_alone(gate, interpreted):
    args = grid.inputs("gated_linear_attention", replace(BASE, gate=gate, T=130, state=False))
    arrays = {name: jnp.asarray(args[name], jnp.bfloat16 if name in "qkv" else jnp.float32) for name in "qkvg"}

    def gradients(**options):
        return jax.grad(lambda x: (ops.gated_linear_attention(**x, **options)[1] ** 2).sum())(arrays)

    found, expected = gradients(implementation="pallas"), gradients(implementation="scan")
    assert not found["q"].any()
    for name in "kvg":
        assert grid.error(np.asarray(found[name], np.float32), np.asarray(expected[name], np.float32)) < 1e-2, name


@pytest.mark.parametrize(
    "form", (pytest.param("constant", marks=slow), "channel", pytest.param("normalize", marks=slow), "mlstm")
)
def test_interpreted_in_parts(form, interpreted, monkeypatch):
    """Long sequences are cut into parts where there are few of them."""
    monkeypatch.setattr(gated_linear_attention_gpu_split, "LEAST_CHUNKS", 1)
    case = replace(BASE, T=256, segments="none" if form == "constant" else "packed")
    if form == "mlstm":
        run("mlstm", replace(case, strength="weak"))
    else:
        gate = "none" if form == "normalize" else form
        run("gated_linear_attention", replace(case, gate=gate, HV=2), normalize=form == "normalize")


PADDED = {
    "scalar": ("gated_linear_attention", "q k v g"),
    "channel": ("gated_linear_attention", "q k v g"),
    "normalize": ("gated_linear_attention", "q k v"),
    "mlstm": ("mlstm", "q k v i f"),
}
"""An op, and its arguments that may hold NaN in padding."""


def check_padding(form: str, **changes):
    op, names = PADDED[form]
    gate = form if form in ("scalar", "channel") else "none"
    case = replace(BASE, gate=gate, segments="gaps", B=2, **changes)
    hopper.check_padding(op, case, names, normalize=form == "normalize")


@pytest.mark.parametrize("form", (*(pytest.param(name, marks=slow) for name in PADDED if name != "mlstm"), "mlstm"))
def test_padding_may_hold_anything(form, interpreted):
    check_padding(form)


# ---- on the CPU, lowered for CUDA ----

B, T, H, HV = 2, 256, 2, 4


def arrays(op: str, gate: str, size: int) -> dict:
    """Abstract arguments of an op."""
    bf16, f32 = (functools.partial(jax.ShapeDtypeStruct, dtype=d) for d in (jnp.bfloat16, jnp.float32))
    found = dict(q=bf16((B, T, H, size)), k=bf16((B, T, H, size)), v=bf16((B, T, HV, size)))
    if op == "mlstm":
        found |= dict(i=f32((B, T, HV)), f=f32((B, T, HV)))
    elif gate != "none":
        found["g"] = f32({"constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, size)}[gate])
    return found


@pytest.mark.parametrize("all_options", (False, True))
@pytest.mark.parametrize("size", (64, 128))
@pytest.mark.parametrize("form", ("none", "constant", "scalar", "channel", "normalize", "mlstm"))
def test_lowers_for_cuda(form, size, all_options, monkeypatch):
    """With all options there are segments, an initial state, and a gradient through the final one."""
    hopper.pretend(monkeypatch)
    op = "mlstm" if form == "mlstm" else "gated_linear_attention"
    args = arrays(op, form if form in ("constant", "scalar", "channel") else "none", size)
    options = dict(normalize=True) if form == "normalize" else {}
    if all_options:
        parts = [(B, HV, size, size), (B, HV, size), (B, HV)][: {"mlstm": 3, "normalize": 2}.get(form, 1)]
        parts = tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in parts)
        args["initial_state"] = parts if len(parts) > 1 else parts[0]
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32) if all_options else None

    def loss(args, ids):
        o, final = getattr(ops, op)(**args, segment_ids=ids, implementation="pallas", **options)
        return o.astype(jnp.float32).sum() + (sum(x.sum() for x in jax.tree.leaves(final)) if all_options else 0)

    kernels = 2 if form == "channel" else 1  # each way
    gates = {"constant": all_options, "scalar": 1, "mlstm": 2}  # for their vectors; one more for their gradients
    forward = kernels + gates.get(form, 0)
    assert kernels_of(loss, args, ids) == forward
    assert kernels_of(jax.grad(loss), args, ids) == forward + kernels + (form in gates)


@pytest.mark.parametrize("form", ("scalar", "channel", "normalize", "mlstm"))
def test_kept_states_save_the_forward_pass(form, monkeypatch):
    """Where "chunk_states" are kept for the backward pass, the forward kernels run once; those of gates again."""
    hopper.pretend(monkeypatch)
    op, options = ("mlstm", {}) if form == "mlstm" else ("gated_linear_attention", dict(normalize=form == "normalize"))
    args = arrays(op, form if form in ("scalar", "channel") else "none", 64)
    policy = jax.checkpoint_policies.save_only_these_names("chunk_states", "recurrence_outputs")

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(v, rest):
        return 2 * getattr(ops, op)(**rest, v=v, implementation="pallas", **options)[0]

    def loss(args):
        rest = {name: x for name, x in args.items() if name != "v"}
        return jax.lax.scan(lambda v, _: (layer(v, rest), None), args["v"], length=2)[0].astype(jnp.float32).sum()

    gates = {"scalar": 3, "mlstm": 5}.get(form, 0)  # and for their gradients
    assert kernels_of(jax.grad(loss), args) == (4 if form == "channel" else 2) + gates


@pytest.mark.parametrize("form", ("none", "scalar", "channel", "normalize"))
def test_parts_lower_for_cuda(form, monkeypatch):
    hopper.pretend(monkeypatch)
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    shape = {"scalar": (1, 1024, 2), "channel": (1, 1024, 2, 64)}.get(form)
    g = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(x, g):
        o, _ = ops.gated_linear_attention(x, x, x, g, normalize=form == "normalize", implementation="pallas")
        return o.astype(jnp.float32).sum()

    assert kernels_of(jax.grad(loss), x, g) == {"channel": 6, "scalar": 5}.get(form, 4)


@pytest.mark.parametrize(
    "change,reason",
    [
        (dict(q=jnp.ones((1, 64, 1, 64))), "float32"),
        (dict(v=jnp.ones((1, 64, 1, 257), jnp.bfloat16)), "up to 128 and 256"),
        (dict(g=jnp.ones((1, 64, 1, 64)), normalize=True), "no normaliser"),
    ],
)
def test_what_is_not_served_is_named(change, reason, interpreted):
    x = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=reason):
        ops.gated_linear_attention(**dict(q=x, k=x, v=x) | change, implementation="pallas")


# ---- on a Hopper GPU ----


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
        corr=[0.9, 1.0],
        state=[False],
    )
    + grid.variations(replace(BASE, B=2, H=4, HV=4, segments="packed", K=128, V=128), **hopper.LARGE_HEADS),
    ids=str,
)
@pytest.mark.parametrize("form", ("none", "constant", "scalar", "channel", "normalize", "mlstm"))
def test_grid(case, form):
    if form == "mlstm":
        run("mlstm", replace(case, strength="weak" if case.strength == "mild" else case.strength))
    else:
        gate = "none" if form == "normalize" else form
        run("gated_linear_attention", replace(case, gate=gate), normalize=form == "normalize")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ("none", "constant", "scalar", "channel", "normalize", "mlstm"))
@pytest.mark.parametrize("size", (64, 128))
def test_grid_in_parts(size, form):
    """One sequence of few heads: parts side by side."""
    case = replace(BASE, T=4096, K=size, V=size, segments="none" if form == "constant" else "packed")
    if form == "mlstm":
        run("mlstm", replace(case, strength="weak"))
    else:
        gate = "none" if form == "normalize" else form
        # The sums over time of two heads' constant gates are near zero, and nobody's bfloat16 has them.
        heads = 4 if form == "constant" else 2
        run("gated_linear_attention", replace(case, gate=gate, HV=heads), normalize=form == "normalize")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ("scalar", "channel", "normalize", "mlstm"))
@pytest.mark.parametrize("size", (64, 128))
def test_reruns_are_bit_equal(size, form):
    op = "mlstm" if form == "mlstm" else "gated_linear_attention"
    gate = form if form in ("scalar", "channel") else "none"
    case = replace(BASE, T=1024, B=4, H=9, HV=9, K=size, V=size, segments="gaps", gate=gate)
    hopper.check_reruns(op, case, normalize=form == "normalize")


@pytest.mark.gpu
@pytest.mark.parametrize("form", PADDED)
@pytest.mark.parametrize("size", (64, 128))
def test_padding_may_hold_anything_on_the_gpu(size, form):
    check_padding(form, K=size, V=size)
