"""What the tests of the GPU kernels share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from tests import grid
from tests.grid import Case

BASE = Case(T=257, K=64, V=64, B=1, strength="mild")
"""Five chunks: more than any kernel has in flight."""
SEGMENTS = ("packed", "single", "left", "right", "middle", "gaps")
LARGE_HEADS = dict(
    T=[7, 65, 1024], V=[64, 256], HV=[8], segments=["none", "gaps"], strength=["strong"], corr=[0.9], state=[False]
)
"""What is varied at head size 128, where programs of the backward passes are two warpgroups. With four heads: of three
the sums over time of constant gates are so near zero that the definition itself has 2 % of them wrong in bfloat16."""


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the ops interpret their GPU kernels."""
    monkeypatch.setenv("JAXLIN_INTERPRET", "gpu")


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the ops take the platform for a Hopper GPU, to lower for it."""
    monkeypatch.setattr(ops, "platform", lambda: "gpu")
    monkeypatch.setattr(ops, "compute_capability", lambda: "9.0")


def kernels_of(function, *args) -> int:
    """How many Mosaic GPU kernels a function holds, after lowering for CUDA."""
    return lowered(function, *args).count("custom_call @mosaic_gpu")


def lowered(function, *args) -> str:
    """The module of a function lowered for CUDA."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def check_reruns(op: str, case: Case, normalize: bool = False) -> None:
    """Assert that four runs agree in every bit."""
    args = grid.inputs(op, case, normalize)
    first, *others = (
        grid.outputs_and_gradients(getattr(ops, op), args, jnp.bfloat16, implementation="pallas") for _ in range(4)
    )
    for other in others:
        for name in first:
            np.testing.assert_array_equal(first[name], other[name], err_msg=name)


def check_padding(op: str, case: Case, names: str, normalize: bool = False) -> None:
    """Assert that NaN in padding changes nothing, and that o and gradients are zero there."""
    args = grid.inputs(op, case, normalize)
    clean = grid.outputs_and_gradients(getattr(ops, op), args, jnp.bfloat16, implementation="pallas")
    padding = args["segment_ids"] == 0
    for name in names.split():
        args[name][padding] = np.nan
    dirty = grid.outputs_and_gradients(getattr(ops, op), args, jnp.bfloat16, implementation="pallas")
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name], err_msg=name)
        if name == "o" or name.removeprefix("d") in names.split():
            assert not clean[name][padding].any()
