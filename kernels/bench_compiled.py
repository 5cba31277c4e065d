"""What `bench` times, compiled for a GPU that is not here: what XLA does around the kernels, and what all of it moves.

    python -m jaxlin.kernels.bench_compiled --target h200:1 --ops mlstm --shapes 1x32768x32x64 --around 5

A row is a forward pass, or a forward and a backward one: its kernels and the bytes of their operands and results, XLA's
own and theirs, and the time that a copy of all those bytes would take at the published bandwidth. `--around` lists what
XLA does besides, the most first. Needs `pip install 'jaxlin[gpu]'`, and no GPU.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlin import command_line, config, sharding
from jaxlin.kernels import bench, bench_ops, topology_gpu
from jaxlin.kernels.hlo_program import Program


@dataclass(frozen=True)
class Settings:
    """What to compile, and for what."""

    target: str = "h200:1"
    """A GPU, as --plan names it."""
    ops: tuple[str, ...] = tuple(bench_ops.FAMILIES)
    """Of linear_attention, retention, mlstm, deltanet, gated_deltanet, gla, kda."""
    shapes: tuple[str, ...] = bench.SHAPES
    """BxTxHxD."""
    around: int = 0
    """Of XLA's own kernels, list so many."""


class Moved(NamedTuple):
    """One kernel of a program, in all its runs."""

    bytes: float
    ours: bool
    runs: float
    name: str
    shape: str


def main(settings: Settings) -> None:
    """Compile and print."""
    if unknown := set(settings.ops) - bench_ops.FAMILIES.keys():
        raise config.UserError(f"--ops {' '.join(sorted(unknown))}: expected any of {', '.join(bench_ops.FAMILIES)}")
    try:
        chip, device = topology_gpu.chip(settings.target), topology_gpu.devices(settings.target)[0]
    except ValueError as error:
        raise config.UserError(f"--target {error}") from None
    print(f"{'op':17}{'shape':15}{'pass':8}{'kernels':>8}{'MB':>7}{'around':>8}{'MB':>7}{'at bandwidth':>14}")
    for op in settings.ops:
        for shape in settings.shapes:
            for name, text in programs(op, tuple(map(int, shape.split("x"))), device).items():
                moved = traffic(text)
                ours, other = ([x for x in moved if x.ours is mine] for mine in (True, False))
                size, around = (sum(x.bytes for x in part) / 1e6 for part in (ours, other))
                microseconds = (size + around) / chip.hbm_gb_per_s * 1e3
                print(f"{op:17}{shape:15}{name:8}{len(ours):8}{size:7.0f}{sum(x.runs for x in other):8.0f}{around:7.0f}"
                      f"{microseconds:11.0f} us", flush=True)  # fmt: skip
                for x in other[: settings.around]:
                    print(f"    {x.bytes / 1e6:7.1f} MB  {x.name}  {x.shape[:80]}")


def programs(op: str, shape: tuple[int, ...], device: Any) -> dict[str, str]:
    """The compiled programs' text."""
    mesh = sharding.make_mesh(config.MeshConfig(), [device])  # which says what is compiled for
    place = NamedSharding(mesh, PartitionSpec())
    arrays = jax.eval_shape(functools.partial(bench_ops.inputs, op, shape))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arrays)
    run = bench_ops.function(op, "pallas")
    both = bench_ops.forward_and_backward(op, run)
    with jax.set_mesh(mesh):
        compiled = dict(
            forward=jax.jit(lambda args: run(**args)).lower(args), both=jax.jit(both).lower(args, args["v"])
        )
        return {name: program.compile().as_text() or "" for name, program in compiled.items()}


def traffic(text: str) -> list[Moved]:
    """All kernels of a program, the most bytes first."""
    program, found = Program(text), []
    for name in program.scheduled & program.runs.keys():
        for x in program.computations[name].values():
            if size := program.moved(name, x):
                ours = bool(re.search('custom_call_target="mosaic_gpu', x.rest))
                found.append(Moved(size * program.runs[name], ours, program.runs[name], x.name, x.shape))
    return sorted(found, key=lambda x: -x.bytes)


if __name__ == "__main__":
    command_line.run_main(lambda: main(command_line.parse(Settings)))
