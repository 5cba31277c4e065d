"""Times of the GPU kernels and their variants on one Hopper GPU: python benchmarks/hopper_tune.py --help

One process for each kernel, shape and variant: they compile side by side, then one at a time is timed. A line has the
seconds of compilation, the milliseconds of the forward pass and of both passes, and for each kernel what ptxas says
of registers and spilled bytes. Needs jax and this repository on PYTHONPATH, nothing else. A faster variant still has to
pass the ladder.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CALLS, REPEATS = 20, 7

# variant: (module in jaxlin.kernels, or "options" of the compiler, attribute, value)
VARIANTS: dict[str, tuple] = {
    "as committed": (),
    "A forward 2 stages": ("gated_linear_attention_gpu_fwd", "STAGES", {64: 2, 128: 2}),
    "A forward 4 stages": ("gated_linear_attention_gpu_fwd", "STAGES", {64: 4, 128: 3}),
    "A backward 3 stages": ("gated_linear_attention_gpu_bwd", "STAGES", 3),
    "B forward 3 stages": ("gated_delta_rule_gpu_fwd", "STAGES", 3),
    "B backward 2 stages": ("gated_delta_rule_gpu_bwd", "STAGES", 2),
    "GLA forward 1 stage": ("gated_linear_attention_gpu_channel_fwd", "STAGES", {64: 1, 128: 1}),
    "GLA backward 2 stages": ("gated_linear_attention_gpu_channel_bwd", "STAGES", 2),
    "GLA unrolled": ("tile_gpu_channel", "UNROLL", True),
    "KDA unrolled": ("tile_gpu_channel", "UNROLL", True),
    "KDA forward 2 stages": ("gated_delta_rule_gpu_channel_fwd", "STAGES", 2),
    "KDA backward 2 stages": ("gated_delta_rule_gpu_channel_bwd", "STAGES", 2),
    "no automatic barriers": ("options", "unsafe_no_auto_barriers", True),
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
        if variant.split()[0] in {PROGRAMS[program], "as", "no"}
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: in_process(job, args.timeout), todo))


def in_process(job: tuple[str, str, str], timeout: float) -> None:
    """Run `one` in a process of its own and print its line."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", *job], capture_output=True, text=True, timeout=timeout, env=environment
        )
        output, good = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        output, good = f"{error.stdout}\n{error.stderr}\nno end within {timeout:.0f} s", False
    lines = [line for line in output.splitlines() if line.startswith("ms")] if good else output.splitlines()[-1:]
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
    with lock(fcntl.LOCK_SH):  # many compile side by side
        compiled = [jax.jit(f).lower(*args).compile() for f in (function, both)]
    seconds = time.perf_counter() - start
    with lock(fcntl.LOCK_EX):  # while nobody compiles, one is timed
        times = [milliseconds(f, args) for f in compiled]
    print(f"ms {times[0]:8.3f} {times[1]:8.3f}   compiled in {seconds:.0f} s")


def program(name: str, shape: tuple[int, int, int, int]) -> tuple:
    """(function, arguments); gates differentiated where they vary."""
    import jax
    import jax.numpy as jnp

    from jaxlin.kernels import gated_delta_rule_gpu_op, gated_linear_attention_gpu_op, mlstm_gpu_op

    b, t, h, d = shape
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (jax.random.normal(key, (b, t, h, d), jnp.bfloat16) / 8 for key in keys[:3])
    gate = jax.nn.log_sigmoid(jax.random.normal(keys[3], (b, t, h)) + 3)
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (b, t, h)))
    channels = jax.nn.log_sigmoid(jax.random.normal(keys[5], (b, t, h, d)) + 3)
    a, delta, scale = gated_linear_attention_gpu_op.pallas, gated_delta_rule_gpu_op.pallas, d**-0.5
    return {
        "linear attention": (lambda q, k, v: a(q, k, v, scale=scale)[0], (q, k, v)),
        "scalar gate": (lambda q, k, v, g: a(q, k, v, g, scale=scale)[0], (q, k, v, gate)),
        "mLSTM": (lambda q, k, v, i, f: mlstm_gpu_op.pallas(q, k, v, i, f, scale=scale)[0], (q, k, v, gate, beta + 3)),
        "GLA": (lambda q, k, v, g: a(q, k, v, g, scale=scale)[0], (q, k, v, channels)),
        "DeltaNet": (lambda q, k, v, w: delta(q, k, v, w, None, scale=scale)[0], (q, k, v, beta)),
        "Gated DeltaNet": (lambda q, k, v, w, g: delta(q, k, v, w, g, scale=scale)[0], (q, k, v, beta, gate)),
        "KDA": (lambda q, k, v, w, g: delta(q, k, v, w, g, scale=scale)[0], (q, k, v, beta, channels)),
    }[name]


def milliseconds(compiled, args) -> float:
    """Median time of a call."""
    import jax

    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        out = [compiled(*args) for _ in range(CALLS)]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(times)


@contextlib.contextmanager
def lock(kind: int):
    """Hold the lock that this script's processes share."""
    with open(Path(tempfile.gettempdir()) / "hopper_tune.lock", "w") as file:
        fcntl.flock(file, kind)
        yield


if __name__ == "__main__":
    main()
