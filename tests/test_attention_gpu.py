"""Softmax attention in bfloat16 on a GPU, cuDNN's where it serves, against float32 products."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import ops, sharding
from jaxlin.config import MeshConfig
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


def both_within(q, k, v, d_y, ids, dtype):
    """Output and gradients of `attend_within`."""
    y, pullback = jax.vjp(lambda *a: attention.attend_within(*a, ids, dtype), *(a.astype(dtype) for a in (q, k, v)))
    return y, *pullback(d_y.astype(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_of_sequences(packed, monkeypatch):
    """On two GPUs: each attends from its piece, in two blocks."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    q, k, v, _, d_y = arguments(512, 0, jnp.bfloat16)
    ids = jnp.broadcast_to(1 + jnp.arange(512) // 200, (2, 512)) if packed else None
    expected = both_within(q, k, v, d_y, ids, "float32")
    monkeypatch.setattr(attention, "CUDNN_QUERY_BLOCK", 128)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(sequence=2), jax.devices()[:2])):
        found = jax.jit(both_within, static_argnums=5)(q, k, v, d_y, ids, "bfloat16")
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


@pytest.mark.parametrize("packed", [False, True])
def test_program_of_pieces(packed, monkeypatch):
    """What a GPU would be given, with no GPU here: cuDNN's calls on a block of queries and all keys, and no scores."""
    monkeypatch.setattr(ops, "platform", lambda: "gpu")
    monkeypatch.setattr(ops, "compute_capability", lambda: "9.0")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(attention, "CUDNN_QUERY_BLOCK", 128)
    q, k, v, _, d_y = arguments(1024, 0, jnp.bfloat16)
    ids = jnp.ones((2, 1024), jnp.int32) if packed else None
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, sequence=2, tensor=2), jax.devices()[:8])):
        traced = jax.jit(both_within, static_argnums=5).trace(q, k, v, d_y, ids, "bfloat16")
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    forward = re.findall(r"@__cudnn\$fmhaScaleBiasSoftmax\(.*: \((.*)\) -> ", text)
    backward = re.findall(r"@__cudnn\$fmhaScaleBiasSoftmaxBackward\(.*: \((.*)\) -> ", text)
    q, k, mask = "tensor<1x128x3x64xbf16>", "tensor<1x1024x1x64xbf16>", "tensor<1x1x128x1024xbf16>"
    assert set(forward) == {", ".join((q, k, k, mask))}
    assert len(backward) == 1 and backward[0].startswith(", ".join((q, k, k))) and mask in backward[0]
    assert "512x1024" not in text and "1024x1024" not in text


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
