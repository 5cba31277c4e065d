"""The one loop: steps, metrics, progress, evaluation, save, resume."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from jaxlin import placement, processes, sharding
from jaxlin.calibrate import calibrate
from jaxlin.checkpoint import Checkpoints
from jaxlin.config import DistributedConfig, ModelConfig, RunConfig, StageConfig, UserError
from jaxlin.data import heldout_batches, train_batches
from jaxlin.distill import trained_part
from jaxlin.evaluation.fidelity import fidelity, fidelity_table
from jaxlin.evaluation.language_modeling import compare, put
from jaxlin.kernels import topology
from jaxlin.metrics import MetricsLog, progress_bar
from jaxlin.mixers import MIXERS
from jaxlin.model_flops import model_flops
from jaxlin.optimizer import Guarded, make_optimizer, schedule
from jaxlin.runs import Run, Teacher, check_folder, git_commit, load_teacher, new_run, teacher_config, to_json
from jaxlin.student import init_student, student_config
from jaxlin.timing import ProfilerWindow, Stopwatch, parse_window
from jaxlin.train_step import make_loss, make_step

CALIBRATION_TOKENS = 65_536
MOST_SKIPPED = 8  # in a row: more than chance
log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps of the whole run."""
    tokens: int = 0
    """Token positions trained on."""
    stage: int = 0
    """The stage that `stage_step` counts in; 0 before the first."""
    stage_step: int = 0
    """Steps of that stage."""


class Trainer:
    """Runs the stages of one linearization run, from the start or from its newest checkpoint."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.console = Console(quiet=not processes.is_first())
        self.stages = run.stages()
        parse_window(run.profile)
        processes.from_first(lambda: check_folder(run))
        processes.require_same("the settings", to_json(replace(run, run_dir="", distributed=DistributedConfig())))
        config = teacher_config(run)
        self._check_layers(config)
        self.mesh = placement.make_mesh(run.mesh, (config, student_config(run, config)), self.stages, run.data.seq_len)
        with jax.set_mesh(self.mesh):
            self.teacher: Teacher = load_teacher(run, self.mesh)
            self.unit = math.gcd(*(s.batch_size for s in (run.stage1, run.stage2, run.stage3)))
            self.data = train_batches(run.text, run.data, self.teacher.tokenizer, batch_size=self.unit, seed=run.seed)
            size = max(1, min(8, run.data.eval_tokens // run.data.seq_len))
            self.heldout = heldout_batches(run.text, run.data, self.teacher.tokenizer, batch_size=size)
        processes.require_same("the texts", sha256(self.heldout[0]["tokens"].tobytes()).hexdigest())
        self.folder: Run = new_run(run, self.teacher.config)
        self.student = self.folder.student
        self.checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.keep)
        self.placed = placement.parameters(self.student, run.param_dtype, self.mesh)
        self.progress = Progress()
        self.params: Any = None
        self.opt_state: Any = None

    def _check_layers(self, teacher: ModelConfig) -> None:
        layers = teacher.num_hidden_layers
        for n, stage in self.stages.items():
            if wrong := [i for i in stage.layers if not 0 <= i < layers]:
                raise UserError(f"--stage{n}.layers {wrong[0]}: the teacher's layers are 0 to {layers - 1}")

    def train(self) -> None:
        """All stages; a finished run trains nothing."""
        with jax.set_mesh(self.mesh):
            self._start()
            if self._finished(max(self.stages)):
                self._say(f"{self.run.folder}: finished already, at step {self.progress.step}")
                return
            self.metrics = MetricsLog(self.run.folder, self.progress.step)
            try:
                for n, stage in self.stages.items():
                    if not self._finished(n):
                        self._run_stage(n, stage)
            finally:
                self.metrics.close()
                self.data.close()
                self.checkpoints.close()

    def _finished(self, n: int) -> bool:
        return n < self.progress.stage or (
            n == self.progress.stage and self.progress.stage_step >= self._steps(self.stages[n])
        )

    def _steps(self, stage: StageConfig) -> int:
        return max(1, round(stage.tokens / (stage.batch_size * self.run.data.seq_len)))

    def _start(self) -> None:
        found = self.checkpoints.latest(self._abstract_state)
        if found is not None:
            step, state, extra = found
            self.params, self.opt_state = state["params"], state["opt_state"]
            self.progress = Progress(**extra["progress"])
            self.data.set_state(extra["data"])
            if not self._finished(max(self.stages)):
                where = f"stage {self.progress.stage}, step {self.progress.stage_step}"
                before, now = extra.get("topology"), self._topology()
                moved = f", saved on {before}, now on {now}" if before not in (None, now) else ""
                self._say(f"resumed at step {step} ({where}) of {self.run.folder}{moved}")
            return
        init = jax.jit(
            lambda teacher, key: jax.tree.map(
                lambda a: a.astype(self.run.param_dtype), init_student(teacher, self.student, key)
            ),
            out_shardings=placement.homes(self.placed),
        )
        self.params = init(self.teacher.params, jax.random.key(self.run.seed))
        self._calibrate()
        self._write_card()
        report = fidelity(
            self.teacher.config, self.teacher.params, self.student, self.params, self.heldout, mesh=self.mesh
        )
        self.folder.write("fidelity.json", report)
        self.console.print(fidelity_table(report))

    def _topology(self) -> str:
        """What the run is spread over."""
        count = jax.process_count()
        return sharding.describe(self.mesh) + (f" of {count} processes" if count > 1 else "")

    def _abstract_state(self, extra: dict[str, Any]) -> dict[str, Any]:
        """The shapes of a checkpoint: Adam's moments are of the stage it was written in."""
        n = extra["progress"]["stage"]
        stage = {1: self.run.stage1, 2: self.run.stage2, 3: self.run.stage3}[n]
        return {"params": self.placed, "opt_state": self._placed_moments(stage, self._optimizer(stage, 1))}

    def _placed_moments(self, stage: StageConfig, optimizer: optax.GradientTransformation) -> Any:
        return placement.optimizer_state(optimizer, trained_part(self.placed, stage), self.mesh)

    def _calibrate(self) -> None:
        wanted = min(CALIBRATION_TOKENS, self.run.data.eval_tokens)
        batches = self.heldout[: max(1, wanted // self.heldout[0]["tokens"].size)]
        batches = [put(batch, self.mesh) for batch in batches]
        params = calibrate(self.params, self.student, self.teacher.config, self.teacher.params, batches)
        self.params = jax.device_put(params, placement.homes(self.placed))

    def _optimizer(self, stage: StageConfig, steps: int) -> optax.GradientTransformation:
        return make_optimizer(stage, steps, self.student.num_hidden_layers, self.student.period)

    def _run_stage(self, n: int, stage: StageConfig) -> None:
        steps = self._steps(stage)
        optimizer = self._optimizer(stage, steps)
        moments = self._placed_moments(stage, optimizer)
        loss = make_loss(stage, self.student, self.teacher.config)
        if n != self.progress.stage:
            self.progress.stage, self.progress.stage_step = n, 0
            self.opt_state = jax.jit(optimizer.init, out_shardings=placement.homes(moments))(
                trained_part(self.params, stage)
            )
            self._measure(n, loss, self.progress.step + 1)
        step_fn = make_step(
            stage, optimizer, self.student, self.teacher.config, self.run.remat, placed=(self.placed, moments)
        )
        flops = model_flops(
            stage, self.student, self.teacher.config, self.placed, self.teacher.params, self.run.data.seq_len, self.mesh
        )
        chip = topology.chip_of(jax.devices()[0])
        peak = chip.bf16_tflops * 1e12 * self.mesh.size if chip else math.nan
        rate = schedule(stage, steps)
        tokens_per_step = stage.batch_size * self.run.data.seq_len
        since = self.progress.stage_step
        skipped = int(self.opt_state.skipped) if isinstance(self.opt_state, Guarded) else 0
        window = ProfilerWindow(self.run.profile, self.run.folder / "profile" / f"stage{n}")
        clock, first = Stopwatch(), True
        metrics: dict[str, Any] = {}
        with progress_bar(self.console) as bar, closing(window):
            task = bar.add_task(f"stage {n}", total=steps, completed=self.progress.stage_step, numbers="")
            while self.progress.stage_step < steps:
                clock.lap("step")
                batch = self._next_batch(stage)
                idle = all(a.is_ready() for a in metrics.values())
                clock.lap("data" if idle else "step")
                with window.step(self.progress.stage_step + 1, metrics):
                    self.params, self.opt_state, metrics = step_fn(
                        self.params, self.opt_state, self.teacher.params, batch
                    )
                clock.lap("compiling" if first else "step")
                first = False
                p = self.progress
                p.step, p.tokens, p.stage_step = p.step + 1, p.tokens + tokens_per_step, p.stage_step + 1
                done = p.stage_step == steps
                if window.after(p.stage_step, metrics):
                    self._say(f"stage {n}: profiler trace in {window.folder}")
                if p.stage_step % self.run.log_every == 0 or p.stage_step == 1 or done:
                    values = _numbers(metrics)
                    clock.lap("step")
                    seconds = clock.take()
                    speed = (p.stage_step - since) * tokens_per_step / sum(seconds.values())
                    since = p.stage_step
                    # The schedule waits where steps are skipped.
                    taken = p.stage_step - int(values.get("skipped", 0))
                    values |= {"lr": float(stage.lr * rate(max(0, taken - 1))), "tokens": p.tokens}
                    values |= {"tokens_per_second": speed, **seconds}
                    if chip:
                        values["mfu"] = sum(flops) * speed / peak
                    self.metrics.write(p.step, n, values)
                    skipped = self._report_bad_steps(values, n, skipped)
                    numbers = f"loss {values['loss']:.4g}  {speed:,.0f} tokens/s"
                    numbers += f"  MFU {values['mfu']:.1%}" if chip else ""
                    bar.update(task, numbers=numbers)
                    if not self.console.is_terminal:
                        self._say(f"stage {n}  step {p.stage_step}/{steps}  {numbers}")
                bar.update(task, completed=p.stage_step)
                milestone = self._is_milestone(tokens_per_step)
                if done:  # before the save: a run that is killed in between measures again
                    self._measure(n, loss, p.step)
                    self._evaluate(n)
                    clock.lap("evaluation")
                if milestone or p.stage_step % self.run.save_every == 0 or done:
                    jax.block_until_ready(metrics)
                    clock.lap("step")
                    self._save(milestone)
                    clock.lap("saving")
        self.metrics.write(self.progress.step, n, {**flops.metrics(), **clock.take()})
        self._say(f"stage {n}: {clock.shares()}; {flops}")

    def _next_batch(self, stage: StageConfig) -> dict[str, jax.Array]:
        parts = [next(self.data) for _ in range(stage.batch_size // self.unit)]
        batch = {k: np.concatenate([p[k] for p in parts]) for k in ("tokens", "segment_ids")}
        # Micro-batches take every n-th row, so that each has its share of every device's rows.
        split = {k: v.reshape(-1, stage.accumulation, v.shape[-1]).swapaxes(0, 1) for k, v in batch.items()}
        # Every process has the whole batch, and gives its devices their rows: in any mesh, also where rows are whole.
        place = sharding.batch_sharding(self.mesh, axis=1)
        return {k: jax.make_array_from_callback(v.shape, place, v.__getitem__) for k, v in split.items()}

    def _report_bad_steps(self, values: dict[str, Any], n: int, before: int) -> int:
        """Stop at a loss that is not finite, or say how many steps were skipped since there were `before`."""
        where = f"stage {n}, step {self.progress.stage_step}"
        remedy = f"lower --stage{n}.lr and --stage{n}.lr-new and run again: it resumes from the last checkpoint"
        if "skipped" not in values:
            if not math.isfinite(values["loss"]):
                raise UserError(f"{where}: the loss is {values['loss']}; {remedy}")
            return 0
        skipped, in_a_row = int(values["skipped"]), int(values["skipped_in_a_row"])
        if skipped > before:
            self._say(f"{where}: skipped {skipped - before} bad steps since the last line, {skipped} in this stage")
        if in_a_row >= MOST_SKIPPED:
            raise UserError(f"{where}: the last {in_a_row} steps were all skipped as bad; {remedy}")
        return skipped

    def _is_milestone(self, tokens_per_step: int) -> bool:
        every = self.run.milestone_tokens
        return bool(every) and self.progress.tokens // every > (self.progress.tokens - tokens_per_step) // every

    def _save(self, milestone: bool) -> None:
        extra = {"progress": vars(self.progress), "data": self.data.get_state(), "topology": self._topology()}
        state = {"params": self.params, "opt_state": self.opt_state}
        self.checkpoints.save(self.progress.step, state, extra, milestone=milestone)

    def _measure(self, n: int, loss: Callable[..., jax.Array], step: int) -> None:
        """The stage's loss on held-out text, at its start and end: batches differ more than a stage changes."""
        value = float(loss(self.params, self.teacher.params, put(self.heldout[0], self.mesh)))
        self.metrics.write(step, n, {"heldout_loss": value})

    def _evaluate(self, n: int) -> None:
        """The student against its teacher on held-out text."""
        result = compare(
            self.teacher.config, self.teacher.params, self.student, self.params, self.heldout, mesh=self.mesh
        )
        self.metrics.write(self.progress.step, n, {f"heldout_{k}": v for k, v in result.items()})
        self._say(
            f"after stage {n}: KL to the teacher {result['kl']:.4f}, held-out perplexity "
            f"{result['perplexity']:.2f} (teacher {result['teacher_perplexity']:.2f}), "
            f"agreement {result['agreement']:.1%}"
        )

    def _say(self, line: str) -> None:
        """Print a line whole, however long, for people and scripts."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def _write_card(self) -> None:
        """What was run: versions, hardware, sizes. The settings are in config.json."""
        device = jax.devices()[0]
        self.folder.write(
            "card.json",
            {
                "command": " ".join(sys.argv),
                "preset": self.run.preset,
                "mixer": self.run.mixer,
                "teacher": self.run.teacher,
                "git_commit": git_commit(),
                "python": platform.python_version(),
                "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax", "orbax-checkpoint")},
                "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
                "topology": self._topology(),
                "teacher_parameters": sum(a.size for a in jax.tree.leaves(self.teacher.params)),
                "student_parameters": sum(a.size for a in jax.tree.leaves(self.params)),
                "state_elements_per_layer": state_elements(self.student),
            },
        )


def state_elements(student) -> list[int]:
    """Numbers of one sequence's recurrent state, layer by layer; for softmax, what each token adds."""

    def size(mixer, options):
        state = jax.eval_shape(lambda: MIXERS[mixer].init_state(student, options, 1, 1))
        return sum(a.size for a in jax.tree.leaves(state.get("memory", (state.get("k"), state.get("v")))))

    period = [size(m, o) for m, o in zip(student.mixer, student.options, strict=True)]
    return period * (student.num_hidden_layers // student.period)


def _numbers(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    """Metrics as floats and lists; sums of squares become the NMSE of each layer."""
    values = {k: np.asarray(v, np.float64) for k, v in metrics.items()}
    if "error" in values:
        values["layer_nmse"] = values.pop("error") / values.pop("power")
    return {k: v.tolist() for k, v in values.items()}
