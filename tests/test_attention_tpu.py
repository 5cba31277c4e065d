"""Splash attention, interpreted, against products in float32; on meshes of rows, heads and pieces of sequences too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin.config import MeshConfig
from jaxlin.kernels import hlo_tpu_traffic as hlo
from jaxlin.mixers import attention
from tests.models import mesh_of


def arguments(dtype):
    """q, k, v of 4 and 2 heads, segments and padding, a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, dy = (jax.random.normal(key, (4, 256, 4, 64), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (4, 256, 2, 64), dtype) for key in keys[2:])
    ids = jnp.array([[1] * 256, [1] * 100 + [2] * 156, [1] * 200 + [0] * 56, [1, 2] + [3] * 254], jnp.int32)
    return q, k, v, ids, dy


def both(q, k, v, ids, dy, dtype):
    """Output and gradients."""
    y, pullback = jax.vjp(lambda *a: attention.attend_within(*a, ids, dtype), *(a.astype(dtype) for a in (q, k, v)))
    return y, *pullback(dy.astype(dtype))


MESHES = {
    "1": MeshConfig(),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "1x2x4": MeshConfig(fsdp=2, tensor=4),
    "sequence 2": MeshConfig(sequence=2),
    "2x1x2, sequence 2": MeshConfig(data=2, tensor=2, sequence=2),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_splash_attention(mesh, monkeypatch):
    expected = both(*arguments(jnp.bfloat16), "float32")
    monkeypatch.setenv("JAXLIN_INTERPRET", "tpu")
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        q, *_ = given = arguments(jnp.bfloat16)
        assert attention._has_splash_attention(q, "bfloat16")
        found = jax.jit(both, static_argnums=5)(*given, "bfloat16")
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


def test_traffic(monkeypatch):
    """--plan counts what splash attention moves: here, q, k, v, o and ids once a head, besides its mask's numbers."""
    monkeypatch.setenv("JAXLIN_INTERPRET", "tpu")
    q, k, v, ids, _ = arguments(jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda *a: attention.attend_within(*a, ids, "bfloat16"))(q, k, v).jaxpr
    (call,) = hlo.pallas_calls(jaxpr)
    once = 4 * q.size * 2
    assert once < hlo.block_bytes(call) < 6 * once


def test_choice(monkeypatch):
    monkeypatch.setattr(attention.ops, "platform", lambda: "tpu")
    q = jnp.zeros((1, 256, 4, 64), jnp.bfloat16)
    assert attention._has_splash_attention(q, "bfloat16")
    assert not attention._has_splash_attention(q, "float32")
    assert not attention._has_splash_attention(q[:, :100], "bfloat16")
