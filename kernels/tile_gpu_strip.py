"""Tiles on Hopper that registers load from global memory and store there: what a kernel without products is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers


class Strip(NamedTuple):
    """A tile [rows, columns] that registers load from global memory and store there, without shared memory.

    Each warp has a quarter of the columns and all the rows, so a sum over rows, `jnp.sum(x, 0)`, stays in a warp.
    Rows are a multiple of 16, columns are 16, 32 or 64; a thread has four neighbours of a row (two where there are 16).
    """

    rows: int
    columns: int

    @property
    def layout(self) -> Any:
        per_warp, vector = self.columns // 4, 4 if self.columns > 16 else 2
        height = 32 * vector // per_warp
        tiling = plgpu.Tiling(((height, self.columns), (height, per_warp), (vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)

    def load(self, ref: gpu.Ref) -> Array:
        """The tile as float32."""
        return gpu.load_in(ref, self.layout).astype(jnp.float32)

    def load_rows(self, ref: gpu.Ref) -> Array:
        """A vector [rows] as float32."""
        return gpu.load_in(ref, self.layout.reduce(1)).astype(jnp.float32)

    def load_columns(self, ref: gpu.Ref) -> Array:
        """A vector [columns] as float32."""
        return gpu.load_in(ref, self.layout.reduce(0)).astype(jnp.float32)

    def by_row(self, x: Array, tile: Array) -> Array:
        """The tile with each row times its entry of x [rows], or all of it times a scalar."""
        return (x if x.ndim == 0 else self.over_rows(x)) * tile

    def over_rows(self, x: Array) -> Array:
        """[rows] -> tile: entry r all along row r."""
        return registers.in_layout(lax.broadcast_in_dim(x, tuple(self), [0]), self.layout)

    def over_columns(self, x: Array) -> Array:
        """[columns] -> tile: entry n all along column n."""
        return registers.in_layout(lax.broadcast_in_dim(x, tuple(self), [1]), self.layout)
