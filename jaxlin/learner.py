"""One student on its way through the stages: its run folder, its parameters and optimizer state, what is measured."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from jaxlin import placement, sharding
from jaxlin.calibrate import calibrate
from jaxlin.checkpoint import Checkpoints
from jaxlin.config import RunConfig, StageConfig, UserError
from jaxlin.distill import Batch, trained_part
from jaxlin.evaluation.fidelity import fidelity, fidelity_table
from jaxlin.evaluation.language_modeling import compare, put
from jaxlin.metrics import MetricsLog
from jaxlin.mixers import MIXERS
from jaxlin.model_flops import ModelFlops, model_flops
from jaxlin.optimizer import Guarded, make_optimizer, schedule
from jaxlin.runs import Run, Teacher, git_commit, new_run, open_run
from jaxlin.student import init_student, restore_attention
from jaxlin.train_step import make_loss

CALIBRATION_TOKENS = 65_536
MOST_SKIPPED = 8  # in a row: more than chance


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

    def advance(self, tokens: int) -> None:
        """By one step on so many tokens."""
        self.step, self.tokens, self.stage_step = self.step + 1, self.tokens + tokens, self.stage_step + 1


class Learner:
    """A student with all that is its own; the trainer gives it the steps."""

    def __init__(
        self, run: RunConfig, teacher: Teacher, heldout: Mapping[int, Sequence[Batch]], mesh: jax.sharding.Mesh,
        console: Console, name: str,
    ) -> None:  # fmt: skip
        """`heldout` is what each stage is measured on, by number."""
        self.run, self.name = run, name
        """The run as if the student were trained alone, and what lines about it begin with; empty where it is."""
        self._teacher, self._heldout, self._mesh, self._console = teacher, heldout, mesh, console
        self.folder: Run = new_run(run, teacher.config)
        self.config = self.folder.student
        self.checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.keep)
        self.placed = placement.parameters(self.config, run.param_dtype, mesh)
        self.params: Any = None
        self.opt_state: Any = None
        self.metrics: MetricsLog
        # Of the stage that it is in; see `enter`.
        self.optimizer: optax.GradientTransformation
        self.moments: Any = None
        self.flops: ModelFlops
        self._stage: StageConfig
        self._rate: Callable[[Any], Any]
        self._loss: Callable[..., jax.Array]
        self._skipped = 0

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"params": self.params, "opt_state": self.opt_state}

    def abstract_state(self, extra: dict[str, Any]) -> dict[str, Any]:
        """The shapes of a checkpoint: Adam's moments are of the stage it was written in."""
        n = extra["progress"]["stage"]
        stage = {1: self.run.stage1, 2: self.run.stage2, 3: self.run.stage3}[n]
        return {"params": self.placed, "opt_state": self._placed_moments(stage, self._optimizer(stage, 1))}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.params, self.opt_state = state["params"], state["opt_state"]

    def begin(self) -> None:
        """Start from the teacher's weights, or another run's student; says and writes how near to the teacher that is.

        Measured on what the run's last stage is, by which it can be told how far training came.
        """
        self.params = self._another_student() if self.run.init_from else self._from_teacher()
        self._write_card()
        teacher, heldout = self._teacher, self._heldout[max(self._heldout)]
        report = fidelity(teacher.config, teacher.params, self.config, self.params, heldout, mesh=self._mesh)
        self.folder.write("fidelity.json", {**report, "measured_on": self.run.kind(max(self._heldout))})
        if self.name:
            self.say("at initialisation")
        self._console.print(fidelity_table(report))

    def enter(self, stage: StageConfig, steps: int) -> None:
        """Make ready for a stage of so many steps."""
        self.optimizer = self._optimizer(stage, steps)
        self.moments = self._placed_moments(stage, self.optimizer)
        self.flops = model_flops(
            stage, self.config, self._teacher.config, self.placed, self._teacher.params, self.run.data.seq_len,
            self._mesh,
        )  # fmt: skip
        self._stage, self._rate = stage, schedule(stage, steps)
        self._loss = make_loss(stage, self.config, self._teacher.config)
        self._skipped = int(self.opt_state.skipped) if isinstance(self.opt_state, Guarded) else 0

    def start_stage(self, at: Progress) -> None:
        """With new moments, before the stage's first step."""
        self.opt_state = jax.jit(self.optimizer.init, out_shardings=placement.homes(self.moments))(
            trained_part(self.params, self._stage)
        )
        self._skipped = 0
        self._measure(at.stage, at.step + 1)

    def log(self, at: Progress, found: dict[str, jax.Array], shared: dict[str, float]) -> float:
        """Write a step's numbers and those of all students; the loss. Raises UserError where it cannot go on."""
        values = _numbers(found)
        taken = at.stage_step - int(values.get("skipped", 0))  # the schedule waits where steps are skipped
        rate = float(self._stage.lr * self._rate(max(0, taken - 1)))
        self.metrics.write(at.step, at.stage, {**values, "lr": rate, **shared})
        self._report_bad_steps(values, at)
        return values["loss"]

    def end_stage(self, at: Progress) -> None:
        """The stage's loss, and the student against its teacher, on held-out text."""
        self._measure(at.stage, at.step)
        teacher = self._teacher
        heldout = self._heldout[at.stage]
        result = compare(teacher.config, teacher.params, self.config, self.params, heldout, mesh=self._mesh)
        self.metrics.write(at.step, at.stage, {f"heldout_{k}": v for k, v in result.items()})
        self.say(
            f"after stage {at.stage}: KL to the teacher {result['kl']:.4f}, held-out perplexity "
            f"{result['perplexity']:.2f} (teacher {result['teacher_perplexity']:.2f}), "
            f"agreement {result['agreement']:.1%}" + (", on conversations" if self.run.kind(at.stage) != "text" else "")
        )

    def say(self, line: str) -> None:
        """Print a line about this student; see `say`."""
        say(self._console, f"{self.name}: {line}" if self.name else line)

    def _optimizer(self, stage: StageConfig, steps: int) -> optax.GradientTransformation:
        return make_optimizer(stage, steps, self.config.num_hidden_layers, self.config.period)

    def _placed_moments(self, stage: StageConfig, optimizer: optax.GradientTransformation) -> Any:
        return placement.optimizer_state(optimizer, trained_part(self.placed, stage), self._mesh)

    def _from_teacher(self) -> Any:
        """The teacher's weights, new ones where it has none, and norms of the size of its outputs."""
        init = jax.jit(
            lambda teacher, key: jax.tree.map(
                lambda a: a.astype(self.run.param_dtype), init_student(teacher, self.config, key)
            ),
            out_shardings=placement.homes(self.placed),
        )
        params = init(self._teacher.params, jax.random.key(self.run.seed))
        wanted, heldout = min(CALIBRATION_TOKENS, self.run.data.eval_tokens), self._heldout[min(self._heldout)]
        batches = heldout[: max(1, wanted // heldout[0]["tokens"].size)]
        batches = [put(batch, self._mesh) for batch in batches]
        params = calibrate(params, self.config, self._teacher.config, self._teacher.params, batches)
        return jax.device_put(params, placement.homes(self.placed))

    def _another_student(self) -> Any:
        """The newest parameters of the run that this one starts from; the teacher's layers where it has attention."""
        before = open_run(self.run.init_from, "--init-from")

        def place(a: Any, placed: Any) -> jax.Array:
            a = np.asarray(a).astype(placed.dtype)
            return jax.make_array_from_callback(a.shape, placed.sharding, a.__getitem__)

        params = before.params()
        if before.student.mixer == self.config.mixer:
            return jax.tree.map(place, params, self.placed)
        params = jax.tree.map(place, params, placement.parameters(before.student, self.run.param_dtype, self._mesh))
        restore = jax.jit(
            lambda params, teacher: restore_attention(params, before.student, teacher, self.config),
            out_shardings=placement.homes(self.placed),
        )
        return restore(params, self._teacher.params)

    def _measure(self, n: int, step: int) -> None:
        """The stage's loss on held-out text, at its start and end: batches differ more than a stage changes."""
        value = float(self._loss(self.params, self._teacher.params, put(self._heldout[n][0], self._mesh)))
        self.metrics.write(step, n, {"heldout_loss": value})

    def _report_bad_steps(self, values: dict[str, Any], at: Progress) -> None:
        """Stop at a loss that is not finite, or say how many steps were skipped since the last line."""
        n = at.stage
        where = f"stage {n}, step {at.stage_step}"
        whose = f"{self.name}: {where}" if self.name else where
        remedy = f"lower --stage{n}.lr and --stage{n}.lr-new and run again: it resumes from the last checkpoint"
        if "skipped" not in values:
            if not math.isfinite(values["loss"]):
                raise UserError(f"{whose}: the loss is {values['loss']}; {remedy}")
            return
        before, self._skipped = self._skipped, int(values["skipped"])
        if self._skipped > before:
            new = self._skipped - before
            self.say(f"{where}: skipped {new} bad steps since the last line, {self._skipped} in this stage")
        if (in_a_row := int(values["skipped_in_a_row"])) >= MOST_SKIPPED:
            raise UserError(f"{whose}: the last {in_a_row} steps were all skipped as bad; {remedy}")

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
                "init_from": self.run.init_from,
                "git_commit": git_commit(),
                "python": platform.python_version(),
                "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax", "orbax-checkpoint")},
                "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
                "topology": topology_of(self._mesh),
                "teacher_parameters": sum(a.size for a in jax.tree.leaves(self._teacher.params)),
                "student_parameters": sum(a.size for a in jax.tree.leaves(self.params)),
                "state_elements_per_layer": state_elements(self.config),
            },
        )


def say(console: Console, line: str) -> None:
    """Print a line whole, however long, for people and scripts."""
    console.print(line, highlight=False, soft_wrap=True)


def topology_of(mesh: jax.sharding.Mesh) -> str:
    """What a run is spread over."""
    count = jax.process_count()
    return sharding.describe(mesh) + (f" of {count} processes" if count > 1 else "")


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
