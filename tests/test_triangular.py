"""The precision of (I + L)^-1 in float32, and why neither a Neumann product nor Newton-Schulz may replace it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.precision import neumann, newton_schulz
from jaxlin.kernels.triangular import unit_lower_inverse

CHUNK, KEY_DIM = 64, 64


def delta_rule_matrix(corr: float, beta: float, decay: float = 0.0, batch: int = 8) -> np.ndarray:
    """L of the delta rule for unit keys of a given correlation, float64 [batch, C, C]."""
    rng = np.random.default_rng(0)
    k = np.sqrt(1 - corr) * rng.normal(size=(batch, CHUNK, KEY_DIM)) + np.sqrt(corr) * rng.normal(size=KEY_DIM)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    steps = np.arange(CHUNK)[:, None] - np.arange(CHUNK)
    return np.tril(beta * k @ k.swapaxes(-1, -2) * np.exp(decay * np.maximum(steps, 0)), -1)


def relative_error(found, lower: np.ndarray) -> float:
    expected = np.linalg.inv(np.eye(lower.shape[-1]) + lower)
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


# Keys of trained models are correlated. Limits: twice the figures that an emulation of this algorithm gave.
@pytest.mark.parametrize(
    ("corr", "beta", "decay", "limit"),
    [
        (0.0, 0.5, 0.0, 1e-7),
        (0.5, 0.9, 0.0, 2e-7),
        (0.9, 1.0, 0.0, 4e-7),
        (0.9, 2.0, 0.0, 4e-6),
        (0.9, 1.0, -0.1, 2e-7),
        (1.0, 1.0, 0.0, 4e-7),
    ],
)
def test_float32_error_stays_small_for_correlated_keys(corr, beta, decay, limit):
    lower = delta_rule_matrix(corr, beta, decay)
    found = jax.jit(unit_lower_inverse)(lower.astype(np.float32))
    assert relative_error(found, lower.astype(np.float32).astype(np.float64)) < limit


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 128])
def test_every_size_in_float64(size):
    lower = np.tril(np.random.default_rng(size).normal(size=(2, 3, size, size)), -1) / max(size, 4)
    with jax.enable_x64(True):
        found = jax.jit(unit_lower_inverse)(jnp.asarray(lower))
        assert found.dtype == jnp.float64 and relative_error(found, lower) < 1e-14
        assert np.array_equal(found, np.tril(found))


def test_powers_of_l_lose_everything():
    """The two shortcuts that use only large matmuls, on the same matrices: kept as the reason for the slower way."""
    lower = delta_rule_matrix(0.9, 1.0).astype(np.float32)
    exact = lower.astype(np.float64)
    assert relative_error(neumann(lower), exact) > 1 and relative_error(newton_schulz(lower), exact) > 1
