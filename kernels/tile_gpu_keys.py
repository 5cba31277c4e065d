"""Keys and states on Hopper by tiles of 64: head size 128 is two of everything, so that few are alive at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels.mosaic_gpu import BLOCK, CHUNK


def key_rows(c: int) -> Any:
    """The rows of half c of the keys, of a state."""
    return pl.ds(c * CHUNK, CHUNK)


def over(halves: range, product: Callable[[int, Array | None], Array]) -> Array:
    """The sum over halves of the keys of products, each given those before to add to."""
    total = None
    for c in halves:
        total = product(c, total)
    return total


def load_state(given: dict, name: str, index: tuple[Array, Array, Array], key_dim: int) -> tuple[Array, ...]:
    """A program's share of a state [B, HV, K, V], 64 keys a tile, or zeros where none is given."""
    b, h, w = index
    if name not in given:
        return tuple(gpu.zeros(CHUNK, BLOCK) for _ in range(key_dim // CHUNK))
    return tuple(gpu.load(given[name].at[b, h, key_rows(c), gpu.block(w)]) for c in range(key_dim // CHUNK))


def store_state(target: gpu.Ref, state: tuple[Array, ...], index: tuple[Array, Array, Array]) -> None:
    """Write what `load_state` reads."""
    b, h, w = index
    for c, tile in enumerate(state):
        target.at[b, h, key_rows(c), gpu.block(w)][...] = tile
