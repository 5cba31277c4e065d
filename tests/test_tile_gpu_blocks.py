"""A warp's own blocks on Hopper beside numpy: interpreted on the CPU, and (pytest -m gpu) as `mma.sync` has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import tile_gpu_blocks as blocks
from jaxlin.kernels.mosaic_gpu_registers import CHUNK, WGMMA
from tests import hopper

OWN = np.kron(np.eye(CHUNK // blocks.SIZE), np.ones((blocks.SIZE, blocks.SIZE)))


def products_and_inverses(index, inputs, outputs, scratch):
    for x, tile in zip(inputs[:2], scratch, strict=True):
        tile[...] = gpu.load_in(x, WGMMA).astype(jnp.bfloat16)
    gpu.commit()
    a, b = (gpu.load_in(tile, WGMMA) for tile in scratch)
    minus = gpu.load_in(inputs[2], WGMMA)
    outputs[0][...] = blocks.as_tile(blocks.of_rows(a, b))
    outputs[1][...] = blocks.as_tile(blocks.of_rows(a, b, blocks.of_tile(minus)))
    outputs[2][...] = blocks.times_rows(blocks.of_tile(a), b)
    outputs[3][...] = blocks.as_tile(blocks.unit_lower_inverses(blocks.of_tile(minus)))


def check():
    random = np.random.default_rng(0)
    a, b = (random.integers(-4, 5, (CHUNK, CHUNK)).astype(np.float32) for _ in range(2))  # products of these are exact
    minus = np.tril(0.3 * random.standard_normal((CHUNK, CHUNK)), -1).astype(np.float32)
    shapes = [jax.ShapeDtypeStruct((CHUNK, CHUNK), jnp.float32)] * 4
    arrays = [jnp.asarray(x) for x in (a, b, minus)]
    found = gpu.launch(products_and_inverses, arrays, shapes, (1,), [gpu.tile(CHUNK, CHUNK)] * 2)
    products, added, combined, inverses = (np.asarray(x) for x in found)
    np.testing.assert_array_equal(products, OWN * (a @ b.T))
    np.testing.assert_allclose(added, OWN * (a @ b.T + minus), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(combined, (OWN * a) @ b)
    exact = OWN * np.linalg.inv(np.eye(CHUNK) - OWN * minus)
    assert np.linalg.norm(inverses - exact) < 4e-3 * np.linalg.norm(exact)


def test_interpreted(monkeypatch):
    hopper.interpret(monkeypatch)
    check()


@pytest.mark.gpu
def test_on_the_gpu():
    check()
