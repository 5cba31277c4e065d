"""Compile every TPU kernel, forward and backward, for real TPU targets, without a TPU: `libtpu` is a compiler too.

    python -m jaxlin.kernels.compile_check --target v5e:2x2 v5p:2x2x1 v6e:2x2

prints for each program its VMEM, the HBM bytes inside and around the kernels, its flops and the time that the chip's
bandwidth and matmul rate allow, and fails where VMEM is short, HBM traffic is far above the floor, a Pallas call is
missing, or XLA copies or transposes an array as large as q or the state. Needs `pip install jaxlin[tpu]`, and no TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from jaxlin import command_line, config, ops, sharding
from jaxlin.kernels import hlo_tpu_traffic as hlo
from jaxlin.kernels import topology

SCOPED_VMEM = 16 << 20
"""What the compiler gives one kernel unless asked for more; every chip has at least four times as much."""
MAX_VMEM = 0.8
MAX_FORWARD, MAX_BOTH, MAX_DECODE = 1.3, 1.6, 1.4
"""HBM bytes over the floor: every input, output and gradient once, and the saved states, as HBM holds them."""


class Mixer(NamedTuple):
    op: str
    gate: str = "none"  # none | constant | scalar | channel
    normalize: bool = False


MIXERS = {
    "linear_attention": Mixer("gated_linear_attention", normalize=True),
    "retnet": Mixer("gated_linear_attention", "constant"),
    "gla": Mixer("gated_linear_attention", "channel"),
    "mlstm": Mixer("mlstm"),
    "deltanet": Mixer("gated_delta_rule"),
    "gated_deltanet": Mixer("gated_delta_rule", "scalar"),
    "kda": Mixer("gated_delta_rule", "channel"),
}
SHAPES = {"135m": (8, 2048, 9, 64), "360m": (8, 2048, 15, 64), "1.7b": (8, 2048, 32, 64), "d128": (8, 2048, 16, 128)}
"""Batch per device, tokens, heads, head size."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compile, and for what."""

    target: tuple[str, ...] = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    mixer: tuple[str, ...] = tuple(MIXERS)
    shape: tuple[str, ...] = tuple(SHAPES)
    segments: bool = False
    """With packed segments (compiling the masks takes XLA several seconds more)."""
    jobs: int = os.cpu_count() or 1
    """Processes that compile side by side."""


class Report(NamedTuple):
    """One compiled program: a forward pass, or a forward and a backward one."""

    vmem: int
    hbm: int
    floor: int
    flops: float
    passes: float
    seconds: float
    problems: list[str]


def main(settings: Settings) -> int:
    """Compile and print; the number of programs with problems."""
    for name, known in (("mixer", MIXERS), ("shape", SHAPES)):
        if unknown := set(getattr(settings, name)) - set(known):
            raise config.UserError(f"--{name} {' '.join(sorted(unknown))}: expected any of {', '.join(known)}")
    try:
        for target in settings.target:
            topology.chip(target)
    except ValueError as error:
        raise config.UserError(f"--target {error}") from None
    cases = list(itertools.product(settings.target, settings.shape, settings.mixer))
    print(f"{'target':12} {'shape':5} {'mixer':17} {'pass':17} {'VMEM':>9} {'HBM':>9} {'x floor':>7} {'GFLOP':>7}"
          f" {'memory':>9} {'matmul':>9} {'compiled':>8}")  # fmt: skip
    passed = failed = 0
    with ProcessPoolExecutor(settings.jobs, mp_context=get_context("spawn")) as pool:
        check = functools.partial(compile_case, segments=settings.segments)
        for (target, shape, mixer), reports in zip(cases, pool.map(check, *zip(*cases, strict=True)), strict=True):
            for name, report in reports.items():
                print(line(target, shape, mixer, name, report), flush=True)
                failed += bool(report.problems)
                passed += not report.problems
    print(f"{passed} of {passed + failed} programs passed")
    return failed


def line(target: str, shape: str, mixer: str, name: str, r: Report) -> str:
    """One row of the table, with its problems behind it."""
    chip = topology.chip(target)
    memory, matmul = r.hbm / chip.hbm_gb_per_s / 1e3, r.passes / chip.bf16_tflops / 1e6
    row = (
        f"{target:12} {shape:5} {mixer:17} {name:17} {r.vmem / 2**20:5.1f} MiB {r.hbm / 1e6:6.0f} MB"
        f" {r.hbm / r.floor:7.2f} {r.flops / 1e9:7.1f} {memory:6.0f} us {matmul:6.0f} us {r.seconds:6.1f} s"
    )
    return "\n".join([row, *(f"    FAILED: {problem}" for problem in r.problems)])


def compile_case(target: str, shape: str, mixer: str, segments: bool) -> dict[str, Report]:
    """The forward program of a mixer, the forward and backward one, and the one of a single token."""
    devices = topology.devices(target)
    mesh = sharding.make_mesh(config.MeshConfig(), devices)
    with jax.set_mesh(mesh):
        arrays, forward = program(MIXERS[mixer], SHAPES[shape], len(devices), segments)

        def both(arrays, do):
            out, vjp = jax.vjp(lambda floats: forward(arrays | floats), {n: x for n, x in arrays.items() if n != "ids"})
            zeros = jax.tree.map(jnp.zeros_like, out[1])
            return out, vjp((do, zeros))[0]

        programs = {
            "forward": _compile(forward, (arrays,), mesh),
            "forward, backward": _compile(both, (arrays, arrays["v"]), mesh),
            "decode": _compile(*decode(MIXERS[mixer], SHAPES[shape], len(devices)), mesh, donate=0),
        }
    limits = (MAX_FORWARD, MAX_BOTH, MAX_DECODE)  # index maps are evaluated on this machine, outside the target's mesh
    return {name: _report(x, limit, mesh.size) for (name, x), limit in zip(programs.items(), limits, strict=True)}


def program(mixer: Mixer, shape: tuple[int, int, int, int], shards: int, segments: bool):
    """The arguments, as matmuls would produce them ([B, T, H * K]), and the function of them."""
    batch, time_, heads, size = shape
    batch *= shards
    tokens, per_head = ((batch, time_, heads * size), jnp.bfloat16), ((batch, time_, heads), jnp.float32)
    arrays: dict[str, Any] = dict(q=tokens, k=tokens, v=tokens)
    if mixer.op == "gated_delta_rule":
        arrays["beta"] = per_head
    if mixer.op == "mlstm":
        arrays |= dict(i=per_head, f=per_head)
    gates = dict(constant=((heads,), jnp.float32), scalar=per_head, channel=(tokens[0], jnp.float32))
    if mixer.gate != "none":
        arrays["g"] = gates[mixer.gate]
    if segments:
        arrays["ids"] = ((batch, time_), jnp.int32)
    options: dict[str, Any] = dict(normalize=True) if mixer.normalize else {}

    def forward(x):
        x = dict(x)
        options["segment_ids"], options["initial_state"] = x.pop("ids", None), x.pop("state", None)
        x = {n: a.reshape(batch, time_, heads, size) if a.shape == tokens[0] else a for n, a in x.items()}
        o, state = getattr(ops, mixer.op)(**x, **options, implementation="pallas")
        return o.reshape(tokens[0]), state

    return {n: jax.ShapeDtypeStruct(*x) for n, x in arrays.items()}, forward


def decode(mixer: Mixer, shape: tuple[int, int, int, int], shards: int):
    """One token: the function (state, arrays) -> (o, state), and its arguments."""
    batch, _, heads, size = shape
    arrays, forward = program(mixer, (batch, 1, heads, size), shards, segments=False)
    state = jax.eval_shape(forward, arrays)[1]
    return lambda state, arrays: forward(arrays | dict(state=state)), (state, arrays)


class Program(NamedTuple):
    arguments: Any
    traced: Any
    text: str  # HLO
    seconds: float


def _compile(function: Any, arguments: Any, mesh: jax.sharding.Mesh, donate: int | tuple = ()) -> Program:
    started = time.perf_counter()

    def placed(x):  # row major, and split by rows of the batch where there is one
        spec = PartitionSpec(sharding.BATCH_AXES) if x.ndim > 1 else PartitionSpec()
        return Format(Layout(tuple(range(x.ndim))), NamedSharding(mesh, spec))

    outputs = jax.tree.map(placed, jax.eval_shape(function, *arguments))
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x)), arguments)
    traced = jax.jit(function, out_shardings=outputs, donate_argnums=donate).trace(*arguments)
    text = traced.lower().compile().as_text() or ""
    return Program(arguments, traced, text, time.perf_counter() - started)


def _report(program: Program, limit: float, shards: int) -> Report:
    arguments, traced, text, seconds = program
    calls = list(hlo.pallas_calls(traced.jaxpr.jaxpr))
    kernels, around = hlo.entry(text)
    leaves = [*jax.tree.leaves(arguments), *jax.tree.leaves(traced.out_info)]
    floor = sum(hlo.stored_bytes(x.shape, np.dtype(x.dtype)) // (shards if x.ndim > 1 else 1) for x in leaves)
    floor += sum(hlo.states_bytes(call) for call in calls)
    large = max(hlo.stored_bytes(x.shape, np.dtype(jnp.bfloat16)) for x in leaves if x.ndim > 2) // shards
    vmem = max((kernel.vmem for kernel in kernels), default=0)
    hbm = sum(x.bytes for x in around) + sum(hlo.block_bytes(call) for call in calls)
    problems = []
    if len(kernels) != len(calls) or not calls:
        problems.append(f"{len(calls)} Pallas calls were traced, {len(kernels)} are in the compiled program")
    if vmem > MAX_VMEM * SCOPED_VMEM:
        problems.append(f"{vmem / 2**20:.1f} MiB of VMEM, the limit is {MAX_VMEM:.0%} of {SCOPED_VMEM >> 20} MiB")
    if hbm > limit * floor:
        problems.append(f"HBM traffic is {hbm / floor:.2f} times the floor, the limit is {limit}")
    problems += [f"XLA copies {x.name}, {x.bytes / 1e6:.0f} MB" for x in around if x.moves and x.bytes >= large]
    flops, passes = (sum(hlo.flops(call, count_passes) for call in calls) for count_passes in (False, True))
    return Report(vmem, hbm, floor, flops, passes, seconds, problems)


if __name__ == "__main__":
    command_line.run_main(lambda: sys.exit(1 if main(command_line.parse(Settings)) else 0))
