"""Tokens/s, MFU and memory of training steps: `python -m benchmarks.training_step --config smollm2_1_7b --stage 3`.

Takes train.py's settings, several students included. The steps are the trainer's own, on random weights and
sequences of random tokens; what it does beside them (data, metrics, saving) is not here.
benchmarks/torch_baseline.py is the same step in PyTorch. Stages run one after the other in one process: give one at
a time for a peak of memory that is its own. A --profile traces COUNT steps more, and prints which kernels the
device's time went to.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxlin import placement
from jaxlin.command_line import parse_run, run_main
from jaxlin.config import RunConfig, StageConfig, UserError
from jaxlin.distill import trained_part
from jaxlin.kernels import topology
from jaxlin.model_flops import model_flops, together
from jaxlin.plan import placed_models, program_bytes
from jaxlin.runs import Teacher, load_teacher
from jaxlin.student import init_student, student_config
from jaxlin.timing import parse_window
from jaxlin.train_step import make_step

WARMUP, STEPS, REPEATS = 3, 5, 5


def measure(run: RunConfig, n: int, stage: StageConfig, teacher: Teacher, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A stage's figures."""
    _, students, (placed, optimizers, moments) = placed_models(run, stage, mesh)

    def init(teacher_params: Any, key: jax.Array) -> Any:
        made = tuple(init_student(teacher_params, student, key) for student in students)
        return jax.tree.map(lambda a: a.astype(run.param_dtype), made)

    def init_moments(params: Any) -> Any:
        each = zip(optimizers, params, strict=True)
        return tuple(optimizer.init(trained_part(own, stage)) for optimizer, own in each)

    params = jax.jit(init, out_shardings=placement.homes(placed))(teacher.params, jax.random.key(run.seed))
    state = jax.jit(init_moments, out_shardings=placement.homes(moments))(params)
    batch = random_batch(stage, run.data.seq_len, teacher.config.vocab_size, mesh)
    step = make_step(stage, optimizers, students, teacher.config, run.remat, placed=(placed, moments))
    began = time.perf_counter()
    compiled = step.lower(params, state, teacher.params, batch).compile()
    compiling = time.perf_counter() - began
    found: Any = None

    def steps(count: int) -> float:
        nonlocal params, state, found
        start = time.perf_counter()
        for _ in range(count):
            params, state, found = compiled(params, state, teacher.params, batch)
        jax.block_until_ready(found)
        return (time.perf_counter() - start) / count

    steps(WARMUP)
    seconds = statistics.median(steps(STEPS) for _ in range(REPEATS))
    tokens = stage.batch_size * run.data.seq_len
    flops = together(
        model_flops(stage, student, teacher.config, own, teacher.params, run.data.seq_len, mesh)
        for student, own in zip(students, placed, strict=True)
    )
    mfu = flops * tokens / seconds / topology.published_flops(mesh.devices.flat)
    device = jax.devices()[0]
    print_kernels(run.profile, steps)
    return {
        "config": run.config,
        "mixer": run.mixer,
        "stage": n,
        "batch_size": stage.batch_size,
        "accumulation": stage.accumulation,
        "remat": run.remat,
        "unroll": getattr(stage, "unroll", False),
        "mesh": dict(mesh.shape),
        "device": f"{mesh.size} x {device.device_kind}",
        "milliseconds": seconds * 1e3,
        "tokens_per_second": tokens / seconds,
        "mfu": None if math.isnan(mfu) else mfu,
        "gflop_per_token": flops / 1e9,
        "planned_gib": program_bytes(compiled.memory_analysis()) / 2**30,
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "loss": [float(own["loss"]) for own in found],
        "compiled_in_seconds": compiling,
        "jax": metadata.version("jax"),
    }


def random_batch(stage: StageConfig, seq_len: int, vocab_size: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Micro-batches [A, B, T] of one document a sequence."""
    shapes = placement.batch(stage, seq_len, mesh)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        tokens = jax.random.randint(key, shapes["tokens"].shape, 0, vocab_size)
        return {"tokens": tokens, "segment_ids": jax.numpy.ones_like(tokens)}

    return jax.jit(make, out_shardings=placement.homes(shapes))(jax.random.key(2))


def print_kernels(window: str, steps: Callable[[int], float]) -> None:
    """Trace steps, and print the device's kernels that took most of a step, one line each."""
    _, count = parse_window(window)
    if not count:
        return
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps(count)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    took, calls = Counter(), Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    took[event.name] += event.duration_ns
                    calls[event.name] += 1
    print(f"{sum(took.values()) / count / 1e6:9.2f} ms of kernels in a step (all devices)")
    for name, nanoseconds in took.most_common(40):
        print(f"{nanoseconds / count / 1e6:9.2f} ms {calls[name] / count:7.0f} x  {name[:120]}")


def main() -> None:
    """A line for people and one of JSON for each stage."""
    run = parse_run()
    if run.teacher_config is None:
        raise UserError(f"--config {run.config}: gives no teacher_config")
    run = replace(run, teacher="random")
    stages = run.stages()
    models = (run.teacher_config, *(student_config(own, run.teacher_config) for own in run.students()))
    mesh = placement.make_mesh(run.mesh, models, stages, run.data.seq_len)
    with jax.set_mesh(mesh):
        teacher = load_teacher(run, mesh)
        for n, stage in stages.items():
            found = measure(run, n, stage, teacher, mesh)
            mfu = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
            memory = f"{found['peak_gib']:.1f} GiB at the peak ({found['planned_gib']:.1f} planned)"
            speed = f"{found['tokens_per_second']:,.0f} tokens/s{mfu}"
            print(f"{run.config}, {run.mixer}, stage {n}, {found['device']}: {speed}, {memory}")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    run_main(main)
