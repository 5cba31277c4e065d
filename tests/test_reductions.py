"""Maxima of several arrays at once, against NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxlin import reductions


def test_maxima():
    """The first of equals, as argmax has it; nothing but -inf gives the first too."""
    a = np.random.default_rng(0).integers(-3, 3, size=(50, 9)).astype("float32")
    b = -a
    a[0] = -np.inf
    for array, found in zip((a, b), reductions.maxima(jnp.asarray(a), jnp.asarray(b)), strict=True):
        np.testing.assert_array_equal(found.value, array.max(-1))
        np.testing.assert_array_equal(found.index, array.argmax(-1))
