"""Products on Hopper that are in flight together: wgmma runs beside the warps, and a wait for each is what costs.

A chunk of the delta rule is a chain of products. Those of one link do not need each other, so they are issued at once
and waited for once, and what needs none of them (decays, exponentials) is computed before the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array
from jax.experimental import pallas as pl

from jaxlin.kernels import mosaic_gpu as gpu
from jaxlin.kernels import mosaic_gpu_registers as registers


class Product(NamedTuple):
    """a @ b: a bfloat16 in registers or shared memory, b in shared memory; ta, tb transpose."""

    a: Array | gpu.Ref
    b: gpu.Ref
    ta: bool = False
    tb: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.a.shape[1 if self.ta else 0], self.b.shape[0 if self.tb else 1]


class Sum(NamedTuple):
    """start + the products, in float32; a start of None is zero."""

    products: Sequence[Product]
    start: Array | None = None


def dots(*sums: Sum, meanwhile: Callable[[], Array] | None = None, last: bool = False) -> list[Any]:
    """The sums, issued together and waited for once, and what `meanwhile` gives, computed before the wait.

    With `last` no warp goes on before all are done: what the products read may then be written over.
    """
    if gpu.interpreted():
        found = []
        for products, total in sums:
            for a, b, ta, tb in products:
                total = gpu.dot(a, b, total, ta=ta, tb=tb)
            found.append(total)
        return found if meanwhile is None else [*found, meanwhile()]
    starts = [registers.zeros(*products[0].shape) if start is None else start for products, start in sums]
    state = [plgpu.ACC.init(x) for x in starts]
    if meanwhile is not None:
        state.append(registers.zeros(*sums[0].products[0].shape))  # of its type, and written over

    def issue(refs):
        for total, (products, _) in zip(refs, sums, strict=False):
            for a, b, ta, tb in products:
                plgpu.wgmma(total, gpu.transposed(a) if ta else a, gpu.transposed(b) if tb else b)
        if meanwhile is not None:
            refs[-1][...] = meanwhile()

    results = pl.run_state(issue)(state)
    if last:
        gpu.commit()
    return results
