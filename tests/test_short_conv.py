"""The short convolution: its two ways agree where rows are packed, and bfloat16 is rounded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin.mixers.short_conv import short_conv

ROWS = {
    "segments": [1, 1, 1, 1, 1, 2, 2, 3, 4, 4],
    "padded": [1, 1, 2, 2, 2, 2, 2, 0, 0, 0],
    "one": [1] * 10,
    "nothing": [0] * 10,
}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed_rows_are_shifted(size):
    keys = jax.random.split(jax.random.key(0), 4)
    ids = jnp.array(list(ROWS.values()), jnp.int32)
    x = jax.random.normal(keys[0], (*ids.shape, 2, 3))
    kernel = jax.random.normal(keys[1], (size, 2, 3))
    tail = jax.random.normal(keys[2], (len(ids), size - 1, 2, 3))
    dy = jax.random.normal(keys[3], x.shape)

    def results(packed):
        y, vjp, after = jax.vjp(lambda k, x, t: short_conv(k, x, ids, t, packed=packed), kernel, x, tail, has_aux=True)
        assert after.shape == tail.shape
        return y, after, vjp(dy)

    for a, b in zip(jax.tree.leaves(results(True)), jax.tree.leaves(results(False)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["one", "segments"])
def test_sums_of_bfloat16_are_rounded_once(name, packed):
    keys = jax.random.split(jax.random.key(0), 3)
    ids = None if name == "one" else jnp.array([ROWS[name]], jnp.int32)
    rounded = [
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key, shape in zip(keys, [(4, 2, 8), (1, 10, 2, 8), (1, 3, 2, 8)], strict=True)
    ]
    kernel, x, tail = (a.astype(jnp.float32) for a in rounded)
    conv = jax.jit(short_conv, static_argnames="packed")
    found, after = conv(rounded[0], rounded[1], ids, rounded[2], packed=packed)
    exact, exact_after = conv(kernel, x, ids, tail, packed=packed)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(after, exact_after.astype(jnp.bfloat16))
