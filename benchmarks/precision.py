"""The errors behind kernels/README.md's tables, as Markdown: `python -m benchmarks.precision`.

Errors are the RMS of the difference from the float64 definition over the RMS of what is expected, the largest over the
outputs (o, state) and over the gradients of a few cases of the tests' grid (`tests/grid.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlin import ops
from jaxlin.kernels.triangular import unit_lower_inverse
from tests import grid
from tests.grid import Case

MIXERS = {
    "linear attention": ("gated_linear_attention", "none", True),
    "RetNet": ("gated_linear_attention", "constant", False),
    "GLA": ("gated_linear_attention", "channel", False),
    "mLSTM": ("mlstm", "", False),
    "DeltaNet": ("gated_delta_rule", "none", False),
    "Gated DeltaNet": ("gated_delta_rule", "scalar", False),
    "KDA": ("gated_delta_rule", "channel", False),
}
CORRELATIONS = (0.0, 0.9, 0.999)
SEEDS = 2


def errors(op: str, case: Case, normalize: bool, dtype: jnp.dtype, implementation: str) -> tuple[float, float]:
    """The largest error of the outputs and of the gradients."""
    args = grid.rounded(grid.inputs(op, case, normalize), dtype)
    if op == "mlstm":  # where n.q passes through 0 the output itself is ill-conditioned
        args["q"], args["k"] = np.abs(args["q"]), np.abs(args["k"])
    expected = grid.outputs_and_gradients(getattr(ops, op), args, jnp.float64, implementation="scan")
    found = grid.outputs_and_gradients(getattr(ops, op), args, dtype, implementation=implementation)
    outputs = {"o"} | {n for n in expected if n.startswith("state")}
    skipped = {"dinitial_state2"}  # of the mLSTM's m: the difference of two sums, see tests/test_mlstm.py
    largest = [
        max(grid.error(found[n], expected[n]) for n in names)
        for names in (sorted(outputs), sorted(expected.keys() - outputs - skipped))
    ]
    return largest[0], largest[1]


def op_table() -> None:
    """Chunked forms, and the definition itself with inputs of the same dtype."""
    print("| mixer | keys' correlation | float32: scan | float32: chunked | bfloat16: scan | bfloat16: chunked |")
    print("|---|---|---|---|---|---|")
    for mixer, (op, gate, normalize) in MIXERS.items():
        for correlation in CORRELATIONS:
            case = Case(T=256, K=64, V=64, gate=gate, strength="mild", corr=correlation, state=True, segments="packed")
            cells = []
            for dtype, implementation in (
                (jnp.float32, "scan"),
                (jnp.float32, "chunked"),
                (jnp.bfloat16, "scan"),
                (jnp.bfloat16, "chunked"),
            ):
                o, d = np.max(
                    [
                        errors(op, Case(**{**vars(case), "seed": seed}), normalize, dtype, implementation)
                        for seed in range(SEEDS)
                    ],
                    axis=0,
                )
                cells.append(f"{o:.1e}, {d:.1e}")
            print(f"| {mixer} | {correlation:g} | {' | '.join(cells)} |", flush=True)


def inverse_table() -> None:
    """Ways to (I + L)^-1 for the L of 64 keys, beta = 1, in float32."""
    ways: dict[str, Callable] = {
        "substitution and merging": unit_lower_inverse,
        "Neumann product": neumann,
        "Newton-Schulz": newton_schulz,
    }
    print(f"\n| keys' correlation | {' | '.join(ways)} |")
    print("|---|" + "---|" * len(ways))
    for correlation in (*CORRELATIONS, 1.0):
        k = grid.inputs("gated_delta_rule", Case(B=1, T=64, K=64, corr=correlation, beta=1.0))["k"][0, :, 0]
        lower = np.tril(k @ k.T, -1)
        exact = np.linalg.inv(np.eye(64) + lower)
        found = (np.asarray(jax.jit(way)(jnp.asarray(lower, jnp.float32)), np.float64) for way in ways.values())
        cells = (grid.error(x, exact) for x in found)
        print(f"| {correlation:g} | {' | '.join(f'{x:.0e}' for x in cells)} |")


def neumann(lower: jax.Array) -> jax.Array:
    """(I - L)(I + L^2)(I + L^4) ...: exact on paper, since L^64 = 0."""
    identity = jnp.eye(lower.shape[-1])
    inverse, power = identity - lower, lower
    for _ in range(5):
        power = power @ power
        inverse = inverse @ (identity + power)
    return inverse


def newton_schulz(lower: jax.Array) -> jax.Array:
    """X <- X (2 I - A X) from X = I: the remainder L becomes L^2, L^4 ... L^64 = 0."""
    identity = jnp.eye(lower.shape[-1])
    inverse = identity
    for _ in range(6):
        inverse = inverse @ (2 * identity - (identity + lower) @ inverse)
    return inverse


if __name__ == "__main__":
    op_table()
    inverse_table()
