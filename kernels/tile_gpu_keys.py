"""Keys and states on Hopper by tiles of 64: head size 128 is two of everything, so that few are alive at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers
from jaxlin.kernels.mosaic_gpu import BLOCK
from jaxlin.kernels.mosaic_gpu_registers import CHUNK


def key_rows(c: int) -> Any:
    """The rows of half c of the keys, of a state."""
    return pl.ds(c * CHUNK, CHUNK)


def over(halves: range, product: Callable[[int, Array | None], Array], total: Array | None = None) -> Array:
    """The sum over halves of the keys of products, each given those before, or `total`, to add to."""
    for c in halves:
        total = product(c, total)
    return total


def load_state(given: dict, name: str, index: tuple[Array, Array, Array], key_dim: int) -> tuple[Array, ...]:
    """A program's share of a state [B, HV, K, V], 64 keys a tile, or zeros where none is given."""
    b, h, w = index
    if name not in given:
        return tuple(registers.zeros(CHUNK, BLOCK) for _ in range(key_dim // CHUNK))
    return tuple(gpu.load(given[name].at[b, h, key_rows(c), gpu.block(w)]) for c in range(key_dim // CHUNK))


def store_state(target: gpu.Ref, state: tuple[Array, ...], index: tuple[Array, Array, Array]) -> None:
    """Write what `load_state` reads."""
    b, h, w = index
    for c, tile in enumerate(state):
        target.at[b, h, key_rows(c), gpu.block(w)][...] = tile


class Member(NamedTuple):
    """A warpgroup of a backward program, which has K of the values: 64 of them and 64 of the keys are its own."""

    team: range  # all of the program, 1 or 2
    me: Any
    w: Any  # the block of values
    row: Any  # of dq and dk, among the programs of all heads
    buffer: dict

    @property
    def alone(self) -> bool:
        return len(self.team) == 1

    @property
    def first(self) -> Any:
        return self.me == 0

    @property
    def values(self) -> Any:
        return gpu.block(self.w)

    @property
    def keys(self) -> Any:
        return key_rows(self.me)

    def meet(self) -> None:
        """Wait for the other, if there is one."""
        if not self.alone:
            gpu.meet(self.buffer["meeting"])

    def tiles(self, slot: Array) -> Tiles:
        """Those of the chunk in `slot`, by addresses found anew."""
        here = registers.unknown_zero(anew=True)
        return Tiles(self, slot + here, here)

    def fetch_states(self, states: gpu.Ref) -> None:
        """Start to copy S [K, V] of a chunk where there is room for one alone; a `stream` does it otherwise."""
        if not self.alone:
            parts = [(states.at[key_rows(c), self.values], self.buffer["states"].at[c, self.me, 0]) for c in self.team]
            gpu.fetch(parts, self.buffer["late"])


class Tiles(NamedTuple):
    """The tiles of a chunk in shared memory.

    Addresses stay in registers until they have been used for the last time, and something else is spilled for them. So
    a part of a chunk in the middle finds its own anew, which leaves less than a third of the spills.
    """

    member: Member
    slot: Array
    here: Array  # 0

    def of(self, m: Any, name: str) -> gpu.Ref:
        """Warpgroup m's tile, or tile m of [tiles, rows, columns]; of four dimensions the second is the slot."""
        x = self.member.buffer[name]
        return x.at[m, self.slot] if len(x.shape) == 4 else x.at[m + self.here]

    def own(self, *names: str) -> list[gpu.Ref]:
        """The warpgroup's own."""
        return [self.of(self.member.me, name) for name in names]

    def all(self, *names: str) -> list[list[gpu.Ref]]:
        """All warpgroups', for each name."""
        return [[self.of(m, name) for m in self.member.team] for name in names]

    def state(self, c: Any, m: Any) -> gpu.Ref:
        """S of half c of the keys and the values of m; two warpgroups leave room for one chunk's alone."""
        return self.member.buffer["states"].at[c, m, self.slot if self.member.alone else self.here]

    def d_state(self, c: Any, m: Any) -> gpu.Ref:
        """dS likewise, as products read it."""
        return self.member.buffer["d_state"].at[c, m + self.here]


def member_of(index: tuple[Any, Any, Any, Any], made: dict, buffer: dict) -> Member:
    """Of (batch, value head, program, warpgroup)."""
    _, h, program, me = index
    team, programs = range(buffer["q"].shape[0]), made["q"].shape[2] // made["v"].shape[2]
    return Member(team, me, program * len(team) + me, h * programs + program, buffer)
