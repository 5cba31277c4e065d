"""The one loop: steps, metrics, progress, evaluation, save, resume. One student is the case of several with one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from typing import Any

import jax
from rich.console import Console

from jaxlin import placement, processes, sharding
from jaxlin.checkpoint import Checkpoints, latest_of_all, save_all
from jaxlin.command_line import to_json
from jaxlin.config import DistributedConfig, ModelConfig, RunConfig, StageConfig, UserError
from jaxlin.kernels import topology
from jaxlin.learner import Learner, Progress, say, topology_of
from jaxlin.metrics import MetricsLog, progress_bar, require_wandb
from jaxlin.model_flops import together
from jaxlin.runs import Teacher, check_folder, check_init, load_teacher, teacher_config
from jaxlin.student import student_config
from jaxlin.timing import Pace, ProfilerWindow, Stopwatch, parse_window
from jaxlin.train_step import make_step
from jaxlin.training_data import TrainingData

Metrics = tuple[dict[str, jax.Array], ...]  # of each student


class Trainer:
    """Runs the stages of one linearization run, from the start or from its newest checkpoint.

    Students that the run names between commas are trained in lockstep: on the same batches, on forward passes of the
    teacher that they share, each into a run folder as it would have had alone.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.console = Console(quiet=not processes.is_first())
        runs, self.stages = run.students(), run.stages()
        parse_window(run.profile)
        require_wandb(run.wandb)
        resuming = processes.from_first(lambda: self._check_folders(runs))
        processes.require_same("the settings", to_json(replace(run, run_dir="", distributed=DistributedConfig())))
        config = teacher_config(run)
        self._check_layers(config)
        models = (config, *(student_config(own, config) for own in runs))
        if not resuming:
            processes.from_first(lambda: check_init(run, config))
        self.mesh = placement.make_mesh(run.mesh, models, self.stages, run.data.seq_len)
        with jax.set_mesh(self.mesh):
            self.teacher: Teacher = load_teacher(run, self.mesh)
            self.data = TrainingData(run, self.stages, self.teacher.tokenizer, resuming=resuming)
        heldout = self.data.heldout
        for n, batches in heldout.items():
            processes.require_same(f"the texts of stage {n}", sha256(batches[0]["tokens"].tobytes()).hexdigest())
        self.stages = run.stages(self.data.epoch_tokens)
        self.learners = [
            Learner(own, self.teacher, heldout, self.mesh, self.console, own.mixer if len(runs) > 1 else "")
            for own in runs
        ]
        for line in self.data.summary:
            self._say(line)
        if self.data.report:
            for learner in self.learners:
                learner.folder.write("conversations.json", self.data.report)
        self.progress = Progress()

    def _check_layers(self, teacher: ModelConfig) -> None:
        layers = teacher.num_hidden_layers
        for n, stage in self.stages.items():
            if wrong := [i for i in stage.layers if not 0 <= i < layers]:
                raise UserError(f"--stage{n}.layers {wrong[0]}: the teacher's layers are 0 to {layers - 1}")

    def _check_folders(self, runs: tuple[RunConfig, ...]) -> bool:
        """Refuse folders that hold something else, and students that cannot go on together; whether any has begun.

        Writes nothing.
        """
        home = self.run.folder
        if len(runs) > 1 and self.run.run_dir and (home / "config.json").exists():
            raise UserError(
                f"--run-dir {home}: holds a run; for several students give the folder that their run folders go into"
            )
        for run in runs:
            check_folder(run)
        saved = {run.mixer: Checkpoints(run.folder / "checkpoints", keep=run.keep) for run in runs}
        if not self._in_step(list(saved.values())):
            at = ", ".join(f"{mixer} {max(own.steps(), default='none')}" for mixer, own in saved.items())
            raise UserError(
                f"--mixer {self.run.mixer}: they have no checkpoint of one place in common (newest steps: {at}); "
                "leave out those that are ahead, or train those that are behind by themselves"
            )
        return any(own.steps() for own in saved.values())

    def _in_step(self, saved: list[Checkpoints]) -> bool:
        """Whether runs with these checkpoints have a place to go on from together: a common step, or the start."""
        steps = [set(own.steps()) for own in saved]
        common = set.intersection(*steps)
        looked_at = [{max(common)}] * len(saved) if common else steps
        extras = [own.extra(step) for own, some in zip(saved, looked_at, strict=True) for step in some]
        places = [extra["progress"] for extra in extras if extra]
        if common:
            return all(place == places[0] for place in places)
        # A kill between the students' first saves leaves a step that not all have: they start anew.
        n = min(self.stages)
        return all(p["stage"] == n and p["step"] == p["stage_step"] <= self._first_save() for p in places)

    def _first_save(self) -> int:
        """The step at which a run saves for the first time, milestones aside."""
        return min(self.run.save_every, self._steps(self.stages[min(self.stages)]))

    def train(self) -> None:
        """All stages; a finished run trains nothing. Where it was interrupted, another `Trainer` goes on."""
        with jax.set_mesh(self.mesh):
            self._start()
            if self._finished(last := max(self.stages)):
                at = self.progress
                how = f"past stage {last}, in stage {at.stage}" if at.stage > last else "finished already"
                self._say(f"{self._folders()}: {how}, at step {at.step}")
                return
            for learner in self.learners:
                learner.metrics = MetricsLog(learner.run, self.progress.step)
            try:
                for n, stage in self.stages.items():
                    if not self._finished(n):
                        self._run_stage(n, stage)
            finally:
                self.data.close()
                for learner in self.learners:
                    learner.metrics.close()
                    learner.checkpoints.close()

    def _finished(self, n: int) -> bool:
        return n < self.progress.stage or (
            n == self.progress.stage and self.progress.stage_step >= self._steps(self.stages[n])
        )

    def _steps(self, stage: StageConfig) -> int:
        return max(1, round(stage.tokens / self._tokens_per_step(stage)))

    def _tokens_per_step(self, stage: StageConfig) -> int:
        return stage.batch_size * self.run.data.seq_len

    def _start(self) -> None:
        found = latest_of_all(*zip(*((own.checkpoints, own.abstract_state) for own in self.learners), strict=True))
        if found is None:
            processes.from_first(self._check_start)
            for learner in self.learners:
                learner.begin()
            return
        step, saved = found
        for learner, (state, _) in zip(self.learners, saved, strict=True):
            learner.restore(state)
        _, extra = saved[0]  # which is that of all
        self.progress = Progress(**extra["progress"])
        if not self._finished(max(self.stages)):
            self.data.set_state(extra)
            where = f"stage {self.progress.stage}, step {self.progress.stage_step}"
            before, now = extra.get("topology"), topology_of(self.mesh)
            moved = f", saved on {before}, now on {now}" if before not in (None, now) else ""
            self._say(f"resumed at step {step} ({where}) of {self._folders()}{moved}")

    def _check_start(self) -> None:
        """Refuse to start anew beside a student that has got further than a first save."""
        for learner in self.learners:
            if (step := learner.checkpoints.newest()) is None:
                continue
            folder = learner.run.folder
            if step > self._first_save():
                raise UserError(
                    f"--mixer {self.run.mixer}: no step is whole in the checkpoints of all, and {folder} is at step "
                    f"{step}; leave that student out, or remove its folder to start it anew"
                )
            self._say(f"{folder}: starts anew, since not all students have its step {step}")

    def _run_stage(self, n: int, stage: StageConfig) -> None:
        steps, at = self._steps(stage), self.progress
        step = self._enter(n, stage)
        window = ProfilerWindow(self.run.profile, self.learners[0].run.folder / "profile" / f"stage{n}")
        clock, metrics = Stopwatch(), ()
        pace = Pace(clock, at.stage_step, self._tokens_per_step(stage), self._least_seconds())
        with progress_bar(self.console) as bar, closing(window):
            task = bar.add_task(f"stage {n}", total=steps, completed=at.stage_step, numbers="")
            while at.stage_step < steps:
                clock.lap("step")
                batch = self._next_batch(n, stage)
                clock.lap("data" if _is_ready(metrics) else "step")
                with window.step(at.stage_step + 1, metrics):
                    first, metrics = not metrics, self._train_step(step, batch)
                clock.lap("compiling" if first else "step")
                at.advance(self._tokens_per_step(stage))
                if window.after(at.stage_step, metrics):
                    self._say(f"stage {n}: profiler trace in {window.folder}")
                done = at.stage_step == steps
                if at.stage_step % self.run.log_every == 0 or at.stage_step == 1 or done:
                    numbers = self._log(metrics, pace)
                    bar.update(task, numbers=numbers)
                    if not self.console.is_terminal:
                        self._say(f"stage {n}  step {at.stage_step}/{steps}  {numbers}")
                bar.update(task, completed=at.stage_step)
                if done:  # before the save: a run that is killed in between measures again
                    for learner in self.learners:
                        learner.end_stage(at)
                    clock.lap("evaluation")
                milestone = self._is_milestone(self._tokens_per_step(stage))
                if milestone or at.stage_step % self.run.save_every == 0 or done:
                    jax.block_until_ready(metrics)
                    clock.lap("step")
                    self._save(milestone)
                    clock.lap("saving")
        self._report_stage(n, clock)

    def _enter(self, n: int, stage: StageConfig) -> Callable[..., Any]:
        """Every student into stage `n`; the compiled step that they share."""
        for learner in self.learners:
            learner.enter(stage, self._steps(stage))
        if n != self.progress.stage:
            self.progress.stage, self.progress.stage_step = n, 0
            for learner in self.learners:
                learner.start_stage(self.progress)
        optimizers, students, params, moments = zip(
            *((own.optimizer, own.config, own.placed, own.moments) for own in self.learners), strict=True
        )
        return make_step(stage, optimizers, students, self.teacher.config, self.run.remat, placed=(params, moments))

    def _train_step(self, step: Callable[..., Any], batch: dict[str, jax.Array]) -> Metrics:
        """One step of every student on a batch."""
        params, moments = zip(*((own.params, own.opt_state) for own in self.learners), strict=True)
        params, moments, metrics = step(params, moments, self.teacher.params, batch)
        for learner, *state in zip(self.learners, params, moments, strict=True):
            learner.params, learner.opt_state = state
        return metrics

    def _next_batch(self, n: int, stage: StageConfig) -> dict[str, jax.Array]:
        batch = self.data.next(n, stage.batch_size)
        # Micro-batches take every n-th row, so that each has its share of every device's rows.
        split = {k: v.reshape(-1, stage.accumulation, v.shape[-1]).swapaxes(0, 1) for k, v in batch.items()}
        # Every process has the whole batch, and gives its devices their rows: in any mesh, also where rows are whole.
        place = sharding.batch_sharding(self.mesh, axis=1)
        return {k: jax.make_array_from_callback(v.shape, place, v.__getitem__) for k, v in split.items()}

    def _least_seconds(self) -> float:
        """What a token takes at the chips' published rate; NaN where that is not known."""
        return together(learner.flops for learner in self.learners) / topology.published_flops(self.mesh.devices.flat)

    def _log(self, metrics: Metrics, pace: Pace) -> str:
        """Write every student's numbers; those that the progress bar shows."""
        jax.block_until_ready(metrics)
        shared = {"tokens": self.progress.tokens, **pace.take(self.progress.stage_step)}
        losses = [own.log(self.progress, found, shared) for own, found in zip(self.learners, metrics, strict=True)]
        named = (f"{own.name} {loss:.4g}".strip() for own, loss in zip(self.learners, losses, strict=True))
        numbers = f"loss {', '.join(named)}  {shared['tokens_per_second']:,.0f} tokens/s"
        return numbers + (f"  MFU {shared['mfu']:.1%}" if "mfu" in shared else "")

    def _report_stage(self, n: int, clock: Stopwatch) -> None:
        """Where a stage's time went."""
        seconds = clock.take()
        for learner in self.learners:
            learner.metrics.write(self.progress.step, n, {**learner.flops.metrics(), **seconds})
        flops = (f"{own.name} {own.flops}".strip() for own in self.learners)
        self._say(f"stage {n}: {clock.shares()}; {'; '.join(flops)}")

    def _is_milestone(self, tokens_per_step: int) -> bool:
        every = self.run.milestone_tokens
        return bool(every) and self.progress.tokens // every > (self.progress.tokens - tokens_per_step) // every

    def _save(self, milestone: bool) -> None:
        extra = {"progress": vars(self.progress), **self.data.get_state(), "topology": topology_of(self.mesh)}
        runs, states = [own.checkpoints for own in self.learners], [own.state for own in self.learners]
        save_all(runs, self.progress.step, states, extra, milestone=milestone)

    def _folders(self) -> str:
        return ", ".join(str(learner.run.folder) for learner in self.learners)

    def _say(self, line: str) -> None:
        say(self.console, line)


def _is_ready(metrics: Metrics) -> bool:
    """Whether the devices have computed all that they were given."""
    return all(a.is_ready() for a in jax.tree.leaves(metrics))
