"""Softmax attention of sequences that are cut over devices, in blocks of queries, against products of one device."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import sharding
from jaxlin.config import MeshConfig
from jaxlin.mixers import attention
from tests.models import mesh_of

MESHES = {
    "sequence 2": MeshConfig(sequence=2),
    "sequence 4": MeshConfig(sequence=4),
    "data 2, sequence 2": MeshConfig(data=2, sequence=2),
    "sequence 2, tensor 2": MeshConfig(sequence=2, tensor=2),
    "sequence 2, tensor 4": MeshConfig(sequence=2, tensor=4),  # more than key heads
}
ROWS, LENGTH, HEADS, KEY_HEADS, DIM = 2, 96, 4, 2, 8
IDS = jnp.array([[1] * 40 + [2] * 1 + [3] * 55, [0] * 5 + [1] * 45 + [2] * 16 + [0] * 30], jnp.int32)


def arguments(length=LENGTH, dim=DIM, dtype=jnp.float32):
    """q, k, v and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (ROWS, length, heads, dim), dtype)
        for key, heads in zip(keys, (HEADS, KEY_HEADS, KEY_HEADS, HEADS), strict=True)
    )


def both(q, k, v, dy, ids, dtype):
    """Output and gradients, as the softmax mixer attends."""

    def attend(q, k, v):
        k, v = sharding.whole_sequences(k), sharding.whole_sequences(v)
        return attention.attend_within(q, k, v, ids, dtype)

    y, pullback = jax.vjp(attend, *(a.astype(dtype) for a in (q, k, v)))
    return y, *pullback(dy.astype(dtype))


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("mesh", MESHES)
def test_blocks_of_queries(mesh, ids, monkeypatch):
    """Also where a piece is no whole number of blocks."""
    expected = both(*arguments(), ids, "float32")
    monkeypatch.setattr(attention, "QUERY_BLOCK", 20)
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        found = jax.jit(both, static_argnums=5)(*arguments(), ids, "float32")
    assert_close(found, expected, 1e-6)


def test_bfloat16(monkeypatch):
    """Gradients of keys and values, sums over many blocks, are about as far from exact as those of one product."""
    given = arguments(dtype=jnp.bfloat16)
    expected, alone = both(*given, IDS, "float32"), both(*given, IDS, "bfloat16")
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    with jax.set_mesh(mesh_of(MESHES["sequence 2"])):
        found = jax.jit(both, static_argnums=5)(*given, IDS, "bfloat16")
    assert_close(found, expected, 1e-2)
    for a, b, exact in zip(found, alone, expected, strict=True):
        a, b, exact = (np.asarray(x, np.float64) for x in (a, b, exact))
        assert np.linalg.norm(a - exact) < 1.6 * np.linalg.norm(b - exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_linear(dtype):
    """Forward and backward the scores of one block of queries are the largest array of a device's program."""

    def bytes_of(length):
        given = jax.eval_shape(lambda: arguments(length, 16))
        ids = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
        with jax.set_mesh(mesh_of(MeshConfig(data=2, sequence=4))):
            compiled = jax.jit(both, static_argnums=5).lower(*given, ids, dtype).compile()
        shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, sizes.split(","))) for sizes in shapes) == HEADS * attention.QUERY_BLOCK * length
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) < 2.2 * bytes_of(2048)
