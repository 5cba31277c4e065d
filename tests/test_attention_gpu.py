"""Softmax attention in bfloat16 on a GPU, cuDNN's where it serves, against float32 products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops
from jaxlin.mixers import attention

LENGTHS = {"even": (128, 0), "odd": (129, 0), "after a cache": (64, 66), "a token": (1, 65)}


def arguments(length, cached, dtype):
    """q, k, v, the mask of three segments (the first continues what is cached), a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_y = (jax.random.normal(key, (2, length, 6, 64), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, cached + length, 2, 64), dtype) for key in keys[2:])
    ids = jnp.broadcast_to(1 + jnp.arange(length) * 3 // max(length, 3), (2, length))
    old = jnp.broadcast_to((ids == 1)[:, None, :, None], (2, 1, length, cached))
    return q, k, v, jnp.concatenate([old, attention.causal_mask(length, ids)], axis=-1), d_y


@pytest.mark.gpu
@pytest.mark.parametrize("name", LENGTHS)
def test_attention(name):
    length, cached = LENGTHS[name]
    q, k, v, mask, d_y = arguments(length, cached, jnp.bfloat16)
    assert attention._has_cudnn_attention(q, k, "bfloat16") == (name in ("even", "after a cache"))

    def both(dtype):
        exact = [x.astype(dtype) for x in (q, k, v)]
        y, pullback = jax.vjp(lambda *a: attention.attend(*a, mask, dtype), *exact)
        return y, *pullback(d_y.astype(dtype))

    for found, expected in zip(jax.jit(both, static_argnums=0)("bfloat16"), both("float32"), strict=True):
        found, expected = np.asarray(found, np.float32), np.asarray(expected)
        assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("capability", "length", "dtype", "flash"),
    [
        ("9.0", 128, "bfloat16", True),
        ("12.0", 128, "bfloat16", True),
        ("7.5", 128, "bfloat16", False),
        ("gfx942", 128, "bfloat16", False),
        ("9.0", 129, "bfloat16", False),
        ("9.0", 2, "bfloat16", False),
        ("9.0", 128, "float32", False),
    ],
)
def test_choice(monkeypatch, capability, length, dtype, flash):
    monkeypatch.setattr(ops, "platform", lambda: "gpu")
    monkeypatch.setattr(ops, "compute_capability", lambda: capability)
    q, k, *_ = arguments(length, 0, dtype)
    assert attention._has_cudnn_attention(q, k, dtype) == flash
