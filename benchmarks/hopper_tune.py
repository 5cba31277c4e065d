"""Times of the GPU kernels and their variants on one Hopper GPU: python benchmarks/hopper_tune.py --help

One process for each kernel, shape and variant: they compile side by side, then one at a time is timed. A line has the
seconds of compilation, the milliseconds of the forward pass and of both passes, and for each kernel what ptxas says
of registers and spilled bytes. Needs jax and this repository on PYTHONPATH, nothing else. A faster variant still has to
pass the ladder.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxlin.kernels.bench_process import in_process, milliseconds, turn, why

LIMIT = 600
"""Seconds that a process may compile, or time: its parent ends it sooner."""

# variant: (module in jaxlin.kernels, or "options" of the compiler, attribute, value)
VARIANTS: dict[str, tuple] = {
    "as committed": (),
    "A forward, two programs, 2 stages": ("gated_linear_attention_gpu_fwd", "STAGES", {64: 2, 128: 2}),
    "A forward, three programs, 3 stages": ("gated_linear_attention_gpu_fwd", "LIGHT_STAGES", 3),
    "A forward, two programs, 4 stages": ("gated_linear_attention_gpu_fwd", "STAGES", {64: 4, 128: 3}),
    "A backward 3 stages": ("gated_linear_attention_gpu_bwd", "STAGES", 3),
    "B forward 3 stages": ("gated_delta_rule_gpu_fwd", "STAGES", 3),
    "B backward 1 stage": ("gated_delta_rule_gpu_bwd", "STAGES", 1),
    "GLA walk 1 stage": ("gated_linear_attention_gpu_channel_walk", "STAGES", 1),
    "GLA walk 3 stages": ("gated_linear_attention_gpu_channel_walk", "STAGES", 3),
    "GLA backward 2 stages": ("gated_linear_attention_gpu_channel_bwd", "STAGES", 2),
    "GLA unrolled": ("tile_gpu_channel", "UNROLL", True),
    "KDA unrolled": ("tile_gpu_channel", "UNROLL", True),
    "KDA walk 2 stages": ("gated_delta_rule_gpu_channel_walk", "STAGES", 2),
    "KDA adjoint 2 stages": ("gated_delta_rule_gpu_channel_walk", "ADJOINT_STAGES", 2),
    "automatic barriers": ("options", "unsafe_no_auto_barriers", False),
}
PROGRAMS = {
    "linear attention": "A",
    "scalar gate": "A",
    "mLSTM": "A",
    "GLA": "GLA",
    "DeltaNet": "B",
    "Gated DeltaNet": "B",
    "KDA": "KDA",
}
"""Each with what the names of its variants begin with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["32x512x32x64", "1x32768x32x64"], help="BxTxHxD")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--variants", nargs="+", default=["as committed"], choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=150, help="seconds a process may take")
    parser.add_argument("--one", nargs=3, help="time one program, shape and variant in this process")
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    todo = [
        (program, shape, variant)
        for shape, program, variant in itertools.product(args.shapes, args.programs, args.variants)
        if variant.split()[0] in {PROGRAMS[program], "as", "automatic"}
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: line(job, args.timeout), todo))


def line(job: tuple[str, str, str], timeout: float) -> None:
    """Run `one` in a process of its own and print its line."""
    environment = dict(XLA_PYTHON_CLIENT_PREALLOCATE="false", MOSAIC_GPU_DUMP_PTXAS="1")
    good, output = in_process([sys.executable, __file__, "--one", *job], timeout, **environment)
    lines = [line for line in output.splitlines() if line.startswith("ms")] if good else [why(output)]
    spills = re.findall(r"(\d+) bytes spill stores", output)
    registers = re.findall(r"Used (\d+) registers", output)
    compiled = " ".join(f"{r}r/{s}b" for r, s in zip(registers, spills, strict=False))
    program, shape, variant = job
    print(f"{shape:<15}{program:<18}{variant:<24}{' '.join(lines)[:150]}  {compiled}", flush=True)
    if not good and "OUT" in os.environ:
        (Path(os.environ["OUT"]) / f"failed_{'_'.join(job).replace(' ', '_')}.log").write_text(output)


def one(name: str, shape: str, variant: str) -> None:
    """Compile and time here."""
    import jax
    import jax.experimental.pallas.mosaic_gpu as plgpu

    change = VARIANTS[variant]
    if change and change[0] == "options":
        params = plgpu.CompilerParams
        plgpu.CompilerParams = lambda **options: params(**(options | {change[1]: change[2]}))
    elif change:
        import importlib

        setattr(importlib.import_module(f"jaxlin.kernels.{change[0]}"), *change[1:])
    function, args = program(name, tuple(map(int, shape.split("x"))))

    def both(*args):
        o, vjp = jax.vjp(function, *args)
        return vjp(o)

    start = time.perf_counter()
    with turn(alone=False, seconds=LIMIT):  # many compile side by side
        compiled = [jax.jit(f).lower(*args).compile() for f in (function, both)]
    seconds = time.perf_counter() - start
    with turn(alone=True, seconds=LIMIT):  # while nobody compiles, one is timed
        times = [milliseconds(functools.partial(f, *args), jax.block_until_ready)["ms"] for f in compiled]
    print(f"ms {times[0]:8.3f} {times[1]:8.3f}   compiled in {seconds:.0f} s")


def program(name: str, shape: tuple[int, int, int, int]) -> tuple:
    """(function, arguments); gates differentiated where they vary."""
    from jaxlin.kernels import bench_ops, gated_delta_rule_gpu_op, gated_linear_attention_gpu_op, mlstm_gpu_op

    a, b, scale = gated_linear_attention_gpu_op.pallas, gated_delta_rule_gpu_op.pallas, shape[-1] ** -0.5
    op, names, function = {
        "linear attention": ("linear_attention", "q k v", a),
        "scalar gate": ("gated_deltanet", "q k v g", a),
        "mLSTM": ("mlstm", "q k v i f", mlstm_gpu_op.pallas),
        "GLA": ("gla", "q k v g", a),
        "DeltaNet": ("deltanet", "q k v beta", lambda q, k, v, beta, scale: b(q, k, v, beta, None, scale=scale)),
        "Gated DeltaNet": ("gated_deltanet", "q k v beta g", b),
        "KDA": ("kda", "q k v beta g", b),
    }[name]
    args = bench_ops.inputs(op, shape)
    return lambda *args: function(*args, scale=scale)[0], tuple(args[name] for name in names.split())


if __name__ == "__main__":
    main()
