"""What a run takes on TPUs that are not here: every stage's step, compiled by the TPU's own compiler.

    python train.py --config smollm2_1_7b --plan v5e:4x4 --mesh.fsdp 16

No parameter is loaded or made. Needs `pip install 'jaxlin[tpu]'`.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from jaxlin import placement
from jaxlin.config import ModelConfig, RunConfig, StageConfig, UserError
from jaxlin.distill import trained_part
from jaxlin.kernels import hlo_tpu_traffic as hlo
from jaxlin.kernels import topology
from jaxlin.optimizer import make_optimizer
from jaxlin.student import student_config
from jaxlin.train_step import make_step


class Step(NamedTuple):
    """One stage's optimizer step, compiled."""

    memory: float
    """GiB on each device at most: parameters, optimizer state, temporaries, code."""
    flops: float
    """Matrix products a token, the teacher's and recomputed ones included."""
    kernels: dict[str, int]
    """Pallas calls in the compiled program, by name; one inside a loop over layers counts once."""
    seconds: float
    """To compile."""
    problem: str
    """Why the step cannot run there; empty where it can."""


def plan(run: RunConfig) -> bool:
    """Print what each stage takes on the topology `run.plan`; whether all of them fit."""
    if run.teacher_config is None:
        raise UserError(f"--plan: --config {run.config} gives no teacher_config to plan with")
    try:
        chip, devices = topology.chip(run.plan), topology.devices(run.plan)
    except ValueError as error:
        raise UserError(f"--plan {error}") from None
    stages = run.stages()
    mesh = placement.make_mesh(run.mesh, (run.teacher_config, student_config(run, run.teacher_config)), stages, devices)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"{run.config}, {run.mixer}, {run.preset}: {run.plan}, mesh {axes}; {versions}\n")
    print("| stage | tokens a step | GiB a device | of | GFLOP a token | ms a step at peak | Pallas calls | compiled |")
    print("|---|---|---|---|---|---|---|---|")
    fits = True
    for n, stage in stages.items():
        step = compile_step(run, stage, mesh)
        tokens = stage.batch_size * run.data.seq_len
        peak = step.flops * tokens / mesh.size / chip.bf16_tflops / 1e9
        calls = ", ".join(f"{count} {name}" for name, count in step.kernels.items())
        row = (
            n, f"{tokens:,}", f"{step.memory:.1f}", f"{chip.hbm_gib:g}", f"{step.flops / 1e9:.1f}", f"{peak:.0f}",
            calls, f"{step.seconds:.0f} s",
        )  # fmt: skip
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        if step.problem:
            print(f"\nstage {n}: {step.problem}\n", flush=True)
        fits &= not step.problem
    return fits


def compile_step(run: RunConfig, stage: StageConfig, mesh: jax.sharding.Mesh) -> Step:
    """The step of a stage as the trainer runs it, for a mesh of devices that need not exist."""
    assert run.teacher_config is not None
    teacher = replace(run.teacher_config, dtype=run.dtype)
    student = student_config(run, teacher)
    params = placement.parameters(student, run.param_dtype, mesh)
    optimizer = make_optimizer(stage, 1, student.num_hidden_layers, student.period)
    placed = params, placement.optimizer_state(optimizer, trained_part(params, stage), mesh)
    step = make_step(stage, optimizer, student, teacher, run.remat, placed=placed)
    teacher_params = placement.parameters(teacher, teacher.dtype, mesh)
    batch = placement.batch(stage, run.data.seq_len, mesh)
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = step.trace(*placed, teacher_params, batch)
    flops = hlo.program_flops(traced.jaxpr) / (stage.batch_size * run.data.seq_len)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Step(float("nan"), flops, {}, time.perf_counter() - started, str(error).splitlines()[0])
    seconds = time.perf_counter() - started
    kernels = Counter(hlo.kernel_names(compiled.as_text()))
    problem = "" if kernels or not _has_kernels(student) else "no Pallas call is in the compiled program"
    return Step(_bytes(compiled.memory_analysis()) / 2**30, flops, dict(kernels), seconds, problem)


def _bytes(memory: Any) -> int:
    """Of a compiled program: what is given back in place of an argument counts once."""
    return (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip


def _has_kernels(student: ModelConfig) -> bool:
    return set(student.mixer) != {"softmax"}
