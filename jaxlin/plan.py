"""What a run takes on devices that need not be here: every stage's step, compiled, measured and timed on paper.

Several students are planned as they are trained, with one step for all of them.

    python train.py --config smollm2_1_7b --plan v5e:4x4 --mesh.fsdp 16
    python train.py --config smollm2_1_7b --plan h100:8 --mesh.fsdp 8
    python train.py --config smollm2_1_7b --plan gpu

No parameter is loaded or made. TPUs need `pip install 'jaxlin[tpu]'` and no TPU, H100s and H200s `'jaxlin[gpu]'` and no
GPU; `gpu` plans for the GPUs of this host.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlin import placement, sharding
from jaxlin.config import MeshConfig, ModelConfig, RunConfig, StageConfig, UserError
from jaxlin.distill import trained_part
from jaxlin.kernels import hlo_tpu_traffic as hlo
from jaxlin.kernels import topology, topology_gpu
from jaxlin.kernels.hlo_program import Collective, Program
from jaxlin.optimizer import make_optimizer
from jaxlin.student import student_config
from jaxlin.train_step import make_step

GPU_SHARE = 0.75
"""Share of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""
EFFICIENCY = 0.5
"""Share of the published rates that forecasts of time assume of whichever takes longest, the rest hidden behind it."""


class Target(NamedTuple):
    """What to plan for."""

    devices: Sequence[Any]
    chip: topology.Chip
    hbm_gib: float
    """Memory of one device that a program may use."""
    described: str


class Step(NamedTuple):
    """One stage's optimizer step, compiled."""

    memory: float
    """GiB on each device at most: parameters, optimizer state, temporaries, code."""
    flops: float
    """Matrix products a token, the teacher's and recomputed ones included."""
    hbm: float
    """Bytes a token that all devices together move through HBM."""
    collectives: dict[str, Collective]
    """What each device sends to others in a step, by kind."""
    kernels: dict[str, int]
    """Pallas calls in the compiled program, by name; one inside a loop over layers counts once."""
    seconds: float
    """To compile."""
    problem: str
    """Why the step cannot run there; empty where it can."""

    def milliseconds(self, chip: topology.Chip, tokens: float) -> dict[str, float]:
        """Of a step at the chip's published rates, for `tokens` on each device: products, memory, network."""
        sent = sum(x.sent for x in self.collectives.values())
        return {
            "matrix products": self.flops * tokens / chip.bf16_tflops / 1e9,
            "HBM": self.hbm * tokens / chip.hbm_gb_per_s / 1e6,
            "network": sent / chip.network_gb_per_s / 1e6,
        }


def plan(run: RunConfig) -> bool:
    """Print what each stage takes on `run.plan`, a TPU topology, GPUs or "gpu"; whether all of them fit."""
    if run.teacher_config is None:
        raise UserError(f"--plan: --config {run.config} gives no teacher_config to plan with")
    goal, stages = _target(run.plan), run.stages()
    students = _students(run, run.teacher_config)
    models = (run.teacher_config, *students)
    mesh = placement.make_mesh(run.mesh, models, stages, run.data.seq_len, goal.devices)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"{run.config}, {run.mixer}, {run.preset}: {goal.described}, mesh {axes}")
    if len(students) > 1:
        held = held_bytes(run, mesh) / 2**30
        print(f"{len(students)} students at once: with the teacher and their moments {held:.1f} GiB on each device")
    print()
    _row("stage", "tokens a step", "GiB a device", "of", "GFLOP a token", "HBM MB a token", "Pallas calls", "compiled")
    _row(*["---"] * 8)
    steps = {}
    for n, stage in stages.items():
        step = steps[n] = compile_step(run, stage, mesh, goal)
        calls = ", ".join(f"{count} {name}" for name, count in step.kernels.items())
        _row(
            n, f"{stage.batch_size * run.data.seq_len:,}", f"{step.memory:.1f}", f"{goal.hbm_gib:.0f}",
            f"{step.flops / 1e9:.1f}", f"{step.hbm / 1e6:.1f}", calls, f"{step.seconds:.0f} s",
        )  # fmt: skip
        if step.problem:
            print(f"\nstage {n}: {step.problem}\n", flush=True)
    large = [n for n, step in steps.items() if np.isnan(step.memory) or step.memory > goal.hbm_gib]
    if len(large) < len(steps):
        _print_times(run, goal, mesh, {n: step for n, step in steps.items() if n not in large})
    if large:
        _print_nearest(run, goal, mesh, large)
    return not any(step.problem for step in steps.values())


def _target(name: str) -> Target:
    if name == "gpu":
        devices = jax.devices()
        device, chip = devices[0], topology.chip_of(devices[0])
        if device.platform != "gpu":
            raise UserError(f"--plan gpu: JAX finds no GPU here, only {device.platform}; pip install 'jaxlin[gpu]'")
        if chip is None:
            raise UserError(f"--plan gpu: the rates of {device.device_kind} are not known (kernels/topology.py)")
        limit = (device.memory_stats() or {}).get("bytes_limit", chip.hbm_gib * 2**30) / 2**30
        versions = f"jax {importlib.metadata.version('jax')}"
        return Target(devices, chip, limit, f"{len(devices)} x {device.device_kind}; {versions}")
    absent = topology_gpu if name.split(":")[0] in topology.GPUS else topology
    try:
        chip, devices = absent.chip(name), absent.devices(name)
    except ValueError as error:
        others = f", GPUs as {', '.join(f'{gpu}:8' for gpu in topology.GPUS)}, or gpu"
        raise UserError(f"--plan {error}{others if 'must be one of' in str(error) else ''}") from None
    compiler, share = "libtpu", 1.0
    if absent is topology_gpu:
        compiler = topology_gpu.compiler() or ""
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", compiler))
    return Target(devices, chip, share * chip.hbm_gib, f"{name} ({versions})")


def compile_step(run: RunConfig, stage: StageConfig, mesh: jax.sharding.Mesh, goal: Target) -> Step:
    """The step of a stage as the trainer runs it, for a mesh of devices that need not exist."""
    teacher, students, placed = placed_models(run, stage, mesh)
    params, optimizers, moments = placed
    step = make_step(stage, optimizers, students, teacher, run.remat, placed=(params, moments))
    teacher_params = placement.parameters(teacher, teacher.dtype, mesh)
    batch = placement.batch(stage, run.data.seq_len, mesh)
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = step.trace(params, moments, teacher_params, batch)
    tokens = stage.batch_size * run.data.seq_len
    flops = hlo.program_flops(traced.jaxpr) / tokens
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        nan = float("nan")
        return Step(nan, flops, nan, {}, {}, time.perf_counter() - started, str(error).splitlines()[0])
    seconds = time.perf_counter() - started
    text = compiled.as_text() or ""
    memory = program_bytes(compiled.memory_analysis()) / 2**30
    kernels, problem = Counter(hlo.kernel_names(text)), ""
    traffic: dict[str, float] = {}
    if goal.devices[0].platform == "tpu":
        traffic = {hlo.call_name(call): hlo.block_bytes(call) for call in hlo.pallas_calls(traced.jaxpr.jaxpr)}
        if all(name.startswith("splash") for name in kernels) and any(map(_has_kernels, students)):
            problem = "no Pallas call of a student is in the compiled program"
    if memory > goal.hbm_gib:
        problem = f"needs {memory:.1f} GiB on each device, which has {goal.hbm_gib:.1f}"
    program = Program(text)
    hbm = program.hbm_bytes(traffic) * mesh.size / tokens
    return Step(memory, flops, hbm, program.collectives(), dict(kernels), seconds, problem)


def placed_models(
    run: RunConfig, stage: StageConfig, mesh: jax.sharding.Mesh
) -> tuple[ModelConfig, tuple[ModelConfig, ...], Any]:
    """Teacher, students, and their (parameters, optimizers, states of those) in their places."""
    assert run.teacher_config is not None
    teacher = replace(run.teacher_config, dtype=run.dtype)
    students = _students(run, teacher)
    params = tuple(placement.parameters(student, run.param_dtype, mesh) for student in students)
    optimizers = tuple(make_optimizer(stage, 1, student.num_hidden_layers, student.period) for student in students)
    moments = tuple(
        placement.optimizer_state(optimizer, trained_part(own, stage), mesh)
        for optimizer, own in zip(optimizers, params, strict=True)
    )
    return teacher, students, (params, optimizers, moments)


def _students(run: RunConfig, teacher: ModelConfig) -> tuple[ModelConfig, ...]:
    return tuple(student_config(own, teacher) for own in run.students())


# ---- time ----


def _print_times(run: RunConfig, goal: Target, mesh: jax.sharding.Mesh, steps: dict[int, Step]) -> None:
    """Each stage's time at the published rates, and a forecast for its budget."""
    print()
    if run.epochs is not None and run.tokens is None and 3 in steps:
        print("Stage 3 has the tokens of --stage3.tokens here: what --epochs counts is not read.\n")
    _row("stage", "products, ms a step", "HBM, ms", "network, ms", "slowest", "tokens/s", "tokens", "hours")
    _row(*["---"] * 8)
    hours, tokens, stages = 0.0, 0, run.stages()
    for n, step in steps.items():
        stage = stages[n]
        size = stage.batch_size * run.data.seq_len
        times = step.milliseconds(goal.chip, size / mesh.size)
        slowest = max(times, key=lambda name: times[name])
        speed = size / (times[slowest] / 1e3) * EFFICIENCY
        hours, tokens = hours + stage.tokens / speed / 3600, tokens + stage.tokens
        numbers = (f"{t:.0f}" if t >= 10 else f"{t:.2g}" for t in times.values())
        _row(n, *numbers, slowest, f"{speed:,.0f}", f"{stage.tokens:,}", f"{stage.tokens / speed / 3600:.1f}")
    if steps.keys() == stages.keys():
        print(f"\n{tokens:,} tokens: {hours:.1f} hours, if the slowest runs at {EFFICIENCY:.0%} of its published rate")
    if mesh.size > 1:
        print("\nSent by each device in a step, GB (collectives):")
        for n, step in steps.items():
            kinds = (f"{kind} {x.sent / 1e9:.2f} ({x.calls:,.0f})" for kind, x in step.collectives.items())
            print(f"stage {n}: {', '.join(kinds)}")


# ---- memory ----


def _print_nearest(run: RunConfig, goal: Target, mesh: jax.sharding.Mesh, large: list[int]) -> None:
    """For stages that are too large: a mesh of the same devices that holds them, compiled to make sure."""
    found = leanest_mesh(run, goal.devices, mesh)
    hint = f"more devices, or a larger --stage{large[0]}.accumulation, would take less on each"
    if found is None:
        print(f"\nNo other mesh of these {mesh.size} devices holds less on each; {hint}.")
        return
    flags = f"--mesh.data {found.data} --mesh.fsdp {found.fsdp} --mesh.tensor {found.tensor}"
    flags += f" --mesh.sequence {found.sequence}" if found.sequence > 1 else ""
    print(f"\nThe mesh of these {mesh.size} devices that holds least on each is {flags}:", flush=True)
    other = sharding.make_mesh(found, goal.devices)
    fits = True
    for n in large:
        step = compile_step(run, run.stages()[n], other, goal)
        print(f"stage {n}: {step.problem or f'fits, {step.memory:.1f} of {goal.hbm_gib:.0f} GiB'}", flush=True)
        fits &= not step.problem
    if not fits:
        print(f"Without room there either: {hint}.")


def leanest_mesh(run: RunConfig, devices: Sequence[Any], but: jax.sharding.Mesh) -> MeshConfig | None:
    """The factorisation of `devices` with the least parameters and moments on each; None where `but` has that.

    Among equals the one that splits the batch most, and so the activations. Pieces of sequences stay as they are: they
    hold whole parameters.
    """
    stages, count = run.stages(), len(devices) // run.mesh.sequence
    sizes: dict[MeshConfig, tuple[float, int]] = {}
    for data in sharding.divisors(count):
        for fsdp in sharding.divisors(count // data):
            config = MeshConfig(data, fsdp, count // data // fsdp, run.mesh.sequence)
            try:
                mesh = sharding.make_mesh(config, devices)
                placement.check_batches(stages, mesh)
                sizes[config] = held_bytes(run, mesh), config.tensor
            except UserError:  # it does not divide the batch or an axis
                continue
    # Within a few percent they are equal: small parameters alone are split by heads but not by width.
    least = min((size for size, _ in sizes.values()), default=0.0)
    lean = {config: tensor for config, (size, tensor) in sizes.items() if size <= 1.05 * least}
    best = min(lean, key=lambda config: lean[config], default=None)
    return None if best == MeshConfig(**but.shape) else best


def held_bytes(run: RunConfig, mesh: jax.sharding.Mesh) -> float:
    """Bytes on each device of all models' parameters and of the last stage's moments, which are the most."""

    def size(tree: Any) -> float:
        shards = ((a.sharding.shard_shape(a.shape), a.dtype) for a in jax.tree.leaves(tree))
        return sum(float(np.prod(shape, dtype=float)) * dtype.itemsize for shape, dtype in shards)

    stages = run.stages()
    teacher, _, (params, _, moments) = placed_models(run, stages[max(stages)], mesh)
    return size(placement.parameters(teacher, teacher.dtype, mesh)) + size(params) + size(moments)


def program_bytes(memory: Any) -> int:
    """Of a compiled program: what is given back in place of an argument counts once."""
    return (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip


def _has_kernels(student: ModelConfig) -> bool:
    return set(student.mixer) != {"softmax"}


def _row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
