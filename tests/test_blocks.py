"""Walking a recurrence block by block, as CPUs do, changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxlin import ops
from jaxlin.kernels import blocks
from tests import grid
from tests.grid import Case

BASE = dict(T=33, H=2, HV=4, K=16, V=24, B=2)


@pytest.mark.parametrize("tokens", [1, 70], ids=["one head of one row", "one head of both rows"])
@pytest.mark.parametrize(
    ("op", "case", "normalize"),
    [
        ("gated_linear_attention", Case(**BASE, gate="constant"), False),  # its gradient is summed over the batch
        ("gated_linear_attention", Case(**BASE, gate="none", segments="gaps"), True),
        ("gated_linear_attention", Case(**BASE, gate="channel"), False),
        ("mlstm", Case(**BASE, segments="gaps"), False),
        ("gated_delta_rule", Case(**BASE, gate="scalar", segments="gaps"), False),
    ],
    ids=str,
)
def test_against_the_definition(op, case, normalize, tokens, monkeypatch):
    monkeypatch.setattr(blocks, "TOKENS", tokens)
    grid._compiled.cache_clear()  # compiled programs do not know of the change
    jax.clear_caches()
    grid.check(getattr(ops, op), grid.inputs(op, case, normalize), jnp.float64)
    grid._compiled.cache_clear()


def test_blocks_hold_so_many_tokens():
    assert [blocks._largest_divisor(n, limit) for n, limit in ((9, 4), (8, 8), (9, 0), (6, 100))] == [3, 8, 1, 6]


def test_one_block_at_a_time(monkeypatch):
    """The memory that a gradient needs beside its results does not grow with the heads."""
    monkeypatch.setattr(blocks, "TOKENS", 512)

    def temporary(heads):
        x = jnp.zeros((1, 512, heads, 32))
        loss = jax.grad(lambda x: ops.gated_linear_attention(x, x, x, implementation="chunked")[0].sum())
        return jax.jit(loss).lower(x).compile().memory_analysis().temp_size_in_bytes / heads

    assert temporary(8) < 0.5 * temporary(1)


def test_gradient_of_v_takes_the_place_of_the_gradient_of_o(monkeypatch):
    """Beside its results a gradient needs the output (or its gradient) and the states, here half as large: no third."""
    monkeypatch.setattr(blocks, "TOKENS", 512)
    x = [jax.random.normal(jax.random.key(n), (1, 512, 16, 32)) for n in range(3)]
    loss = jax.grad(lambda x: jnp.sum(ops.gated_linear_attention(*x, implementation="chunked")[0] ** 2))
    assert jax.jit(loss).lower(x).compile().memory_analysis().temp_size_in_bytes < 2 * x[0].nbytes
