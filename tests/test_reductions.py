"""Several reductions at once, against NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import reductions


@pytest.mark.parametrize("axes", [(0,), (0, 1), (2,)], ids=str)
def test_sums(axes):
    terms = {name: np.random.default_rng(i).normal(size=(5, 7, 3)).astype("float32") for i, name in enumerate("abc")}
    found = reductions.sums({name: jnp.asarray(a) for name, a in terms.items()}, axes)
    assert list(found) == list(terms)
    for name, a in terms.items():
        np.testing.assert_allclose(found[name], a.sum(axes), rtol=1e-5, atol=1e-6)


def test_maxima():
    """The first of equals, as argmax has it; nothing but -inf gives the first too."""
    a = np.random.default_rng(0).integers(-3, 3, size=(50, 9)).astype("float32")
    b = -a
    a[0] = -np.inf
    for array, found in zip((a, b), reductions.maxima(jnp.asarray(a), jnp.asarray(b)), strict=True):
        np.testing.assert_array_equal(found.value, array.max(-1))
        np.testing.assert_array_equal(found.index, array.argmax(-1))


def test_nan_is_not_hidden():
    """A loss of NaN logits is NaN, whatever their largest is said to be."""
    logits = jnp.array([[1.0, jnp.nan, 0.5]])
    (largest,) = reductions.maxima(logits)
    assert np.isnan(reductions.sums({"z": jnp.exp(logits - largest.value[:, None])}, (1,))["z"][0])
