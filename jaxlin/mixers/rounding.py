"""Elementwise work of bfloat16 arrays in float32, as PyTorch's kernels do it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array


def rounded_once(function: Callable[..., Any]) -> Callable[..., Array]:
    """`function` of arrays of one dtype in float32 at least, its result rounded to that dtype.

    A loop keeps the arguments alone for its backward pass.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    @functools.wraps(function)
    def wide(*arrays):
        dtype = arrays[0].dtype
        return function(*(a.astype(jnp.promote_types(dtype, jnp.float32)) for a in arrays)).astype(dtype)

    return wide


@rounded_once
def silu(x: Array) -> Array:
    """x sigmoid(x) (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return nn.silu(x)
