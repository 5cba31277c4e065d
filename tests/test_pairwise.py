"""Chunked forms and TPU kernels over a pairwise cover of settings: any two values of any two meet in some case.

Outputs and all gradients against the float64 definition, in float64 and in float32. The corners that have a name, and
bfloat16, are in the tests of each op.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from tests import grid
from tests.grid import Case

SIZES = dict(
    T=[65, 1, 7, 63, 64, 257, 1024],
    K=[64, 16, 32, 96, 128, 256],
    V=[64, 16, 32, 96, 128, 256],
    heads=[(1, 1), (3, 3), (1, 2), (3, 6), (1, 4)],
)
SETTINGS = dict(
    corr=[0.0, 0.9, 0.999, 1.0],
    segments=["packed", "none", "single", "left", "right", "middle", "gaps"],
    state=[True, False],
)
STRENGTHS = ["mixed", "zero", "weak", "mild", "strong"]
FIELDS = {
    "gated_linear_attention": SIZES | SETTINGS | dict(
        gate=["none", "constant", "scalar", "channel"], strength=STRENGTHS, normalize=[False, True]
    ),
    "gated_delta_rule": SIZES | SETTINGS | dict(
        gate=["none", "scalar", "channel"], strength=STRENGTHS, beta=[None, 0.0, 1e-6, 0.5, 1.0, 2.0]
    ),
    "mlstm": SIZES | SETTINGS | dict(strength=STRENGTHS),
}  # fmt: skip
STATES = 2.0**27
"""Elements of all states that the definition keeps for its gradient: 1 GiB in float64."""


def small(point: dict) -> bool:
    sizes = {"T": 1, "K": 16, "V": 16, "heads": (1, 1), "segments": "none"} | point
    return batch(sizes["segments"]) * sizes["T"] * sizes["heads"][1] * sizes["K"] * sizes["V"] <= STATES


def batch(segments: str) -> int:
    return 2 if segments == "gaps" else 1  # of "gaps", the first row is nothing but padding


def cases(op: str) -> list:
    points = grid.pairwise(FIELDS[op], small)
    return [pytest.param(op, p, id=f"{op}-{'-'.join(str(x) for x in p.values())}") for p in points]


def test_every_pair_meets():
    """All pairs but those too large, or that make no sense."""
    for fields in FIELDS.values():
        points = grid.pairwise(fields, small)
        assert len(points) <= 150
        for a, b in ((a, b) for a in fields for b in fields if a < b):
            met = {(repr(p[a]), repr(p[b])) for p in points}
            assert met == {(repr(x), repr(y)) for x in fields[a] for y in fields[b] if small({a: x, b: y})}, (a, b)


def blind_to_q(case: Case, normalize: bool) -> bool:
    """Whether o is a mean of equal values, or of one: then q cancels out of it, and dq is rounding."""
    one_value = case.corr == 1.0 or case.segments == "single" or case.T == 1
    return normalize and (case.strength == "strong" or (one_value and not case.state))


LIMITS = {jnp.float64: grid.FLOAT64, jnp.float32: grid.FLOAT32}


def check(op: str, case: Case, normalize: bool = False, dtypes=tuple(LIMITS), implementation: str = "chunked") -> None:
    args, skip = grid.inputs(op, case, normalize), ("dq",) if blind_to_q(case, normalize) else ()
    for dtype in dtypes:
        grid.check(getattr(ops, op), args, dtype, skip=skip, implementation=implementation)
        if skip:
            found = grid.outputs_and_gradients(getattr(ops, op), args, dtype, implementation=implementation)
            assert np.abs(found["dq"]).max() <= LIMITS[dtype] * np.abs(found["dk"]).max()


def check_point(op: str, point: dict, **options) -> None:
    """One case of the cover."""
    point = dict(point)
    heads, normalize = point.pop("heads"), point.pop("normalize", False)
    check(op, Case(B=batch(point["segments"]), H=heads[0], HV=heads[1], **point), normalize, **options)


@pytest.mark.slow
@pytest.mark.parametrize("op, point", [case for op in FIELDS for case in cases(op)])
def test_pairwise(op, point):
    check_point(op, point)


@pytest.mark.slow
@pytest.mark.parametrize("op, point", [case for op in FIELDS for case in cases(op)])
def test_pairwise_tpu(op, point, monkeypatch):
    """The same cover through the TPU kernels, interpreted."""
    monkeypatch.setenv("JAXLIN_INTERPRET", "tpu")
    check_point(op, point, dtypes=(jnp.float32,), implementation="pallas")


@pytest.mark.slow
@pytest.mark.parametrize("op", FIELDS)
def test_largest_heads(op):
    check(op, Case(B=1, T=70, K=512, segments="packed"))
    check(op, Case(B=1, T=70, V=512, segments="packed"))
