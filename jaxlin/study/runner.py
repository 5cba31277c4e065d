"""Train and measure the trials of a study, each group of students a process: what is there is not done again.

A process that dies costs its own runs, not the study: train.py resumes a run folder by the same command, and eval.py
keeps every finished task.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlin.checkpoint import Checkpoints
from jaxlin.command_line import CONFIG_DIR, parse_run
from jaxlin.config import RunConfig, UserError
from jaxlin.evaluation.report import choose_tasks
from jaxlin.runs import check_folder, milestone_folder, open_run
from jaxlin.study.checks import check_settings, check_sources, check_suites
from jaxlin.study.design import Study, Suite, Trial
from jaxlin.study.locks import Lock, take
from jaxlin.study.results import held_out_lines, kept_results

ROOT = CONFIG_DIR.parent  # where train.py and eval.py are
POLL = 0.1  # seconds between looks at the commands that run
PATIENCE = 120.0  # seconds that a command may take to end when it is told to
MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # of a GPU, by its names in JAX, the newer first


@dataclass(frozen=True)
class Measurement:
    """What eval.py is called for: a suite, of a run's end or of its milestones."""

    suite: Suite
    milestones: bool = False

    @property
    def name(self) -> str:
        """For logs."""
        return self.suite.name + "-milestones" * self.milestones


@dataclass(frozen=True)
class Call:
    """A command of a job, and the trials that it works on."""

    command: list[str]
    trials: Sequence[Trial]
    what: str

    def log(self, out: Path) -> Path:
        """Where its output goes."""
        names = ",".join(trial.cell.mixer for trial in self.trials)
        return out / "logs" / f"{self.trials[0].group}--{names}--{self.what}.log"


ON_MILESTONES = Measurement(Suite("quick", tasks=("held_out",)), milestones=True)  # of every study that keeps some


@dataclass
class Runner:
    """Works on trials of `study` in the folder `out`; `failures` has a line for each that could not be finished."""

    study: Study
    out: Path
    say: Callable[[str], Any] = print
    at_once: int = 1
    """Runs of a group that are measured side by side."""
    failures: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Who has the runs that this job left alone."""
    _planned: set[Measurement] = field(default_factory=set)
    """Those in which the teacher is measured beside one of the runs."""

    def check(self, trials: Iterable[Trial]) -> None:
        """Refuse what train.py or eval.py would in any run of the study, contrasts of what is not measured, and folders
        of `trials` that hold runs with other settings. Writes nothing."""
        check_sources(self.study)
        check_suites(self.study)
        for trial in self.study.trials():
            check_settings(trial.name, self._flags([trial], str(self.out / trial.name)))
        for trial in trials:
            check_folder(self._run(trial))

    def groups(self, trials: Sequence[Trial], together: int) -> list[list[Trial]]:
        """Trials that may be trained at once, at most `together` of them."""
        by_group: dict[str, list[Trial]] = {}
        for trial in trials:
            by_group.setdefault(trial.group, []).append(trial)
        return [found[at : at + together] for found in by_group.values() for at in range(0, len(found), together)]

    def commands(self, trials: Sequence[Trial]) -> Iterator[str]:
        """What `work` would run for this group."""
        done = [trial for trial in trials if not self._untrained(trial)]
        for batch in self._in_step([trial for trial in trials if trial not in done]):
            yield shlex.join(self._train(batch))
        busy = {trial for trial in trials if trial not in done}
        for measurement in self._measurements():
            for trial, with_teacher in self._wanted(trials, measurement):
                busy.add(trial)
                yield shlex.join(self._evaluate(trial, measurement, with_teacher=with_teacher))
        yield from (f"# {trial.name}: done" for trial in trials if trial not in busy)

    def work(self, trials: Sequence[Trial]) -> None:
        """Train what is not trained, then measure what is not measured. Runs that others work on are left to them."""
        locks: dict[Trial, Lock] = {}
        try:
            for trial in trials:
                lock = take(self.out / f"{trial.name}.lock")
                if isinstance(lock, str):
                    self.left.append(lock)
                else:
                    locks[trial] = lock
            for batch in self._in_step([trial for trial in locks if self._untrained(trial)]):
                self._train_together(batch, locks)
            trained = [trial for trial in locks if not self._untrained(trial)]
            for measurement in self._measurements():
                self._measure(trained, measurement, locks)
        finally:
            for lock in locks.values():
                lock.release()

    def _train_together(self, trials: list[Trial], locks: dict[Trial, Lock]) -> None:
        """One process; where it fails, each student alone, so that one does not take the others with it."""
        ((call, code, last),) = self._call([Call(self._train(trials), trials, "train")], locks)
        if code == 0 and not any(map(self._untrained, trials)):
            return
        if len(trials) == 1:
            self._fail(f"{trials[0].name}: train.py ended with exit code {code}: {last} (log: {call.log(self.out)})")
            return
        self.say(f"{', '.join(trial.name for trial in trials)}: exit code {code}: {last}; now one by one")
        for trial in trials:
            self._train_together([trial], locks)

    def _measure(self, trials: Sequence[Trial], measurement: Measurement, locks: dict[Trial, Lock]) -> None:
        calls = [
            Call(self._evaluate(trial, measurement, with_teacher=with_teacher), [trial], measurement.name)
            for trial, with_teacher in self._wanted(trials, measurement)
        ]
        what = f"eval.py --suite {measurement.suite.name}{' --milestones' * measurement.milestones}"
        for call, code, last in self._call(calls, locks):
            if code != 0:
                self._planned.discard(measurement)  # the teacher may not have been measured
                where = f"{call.trials[0].name}: {what}"
                self._fail(f"{where} ended with exit code {code}: {last} (log: {call.log(self.out)})")

    def _fail(self, line: str) -> None:
        self.failures.append(line)
        self.say(line)

    def _call(self, calls: Sequence[Call], locks: dict[Trial, Lock]) -> list[tuple[Call, int, str]]:
        """Run commands, `at_once` of them at a time: each with its exit code and last line, in the order they end."""
        waiting, running, ended = list(calls), list[tuple[Call, subprocess.Popen]](), []
        beside = min(self.at_once, len(calls))
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    call = waiting.pop(0)
                    running.append((call, self._start(call, beside)))
                    for trial in call.trials:
                        locks[trial].share(running[-1][1].pid)
                for call, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((call, process))
                    lines = call.log(self.out).read_text(errors="replace").strip().splitlines()
                    ended.append((call, process.returncode, lines[-1].strip()))
                time.sleep(POLL)
        finally:
            _stop([process for _, process in running])
            signal.signal(signal.SIGTERM, before)
        return ended

    def _start(self, call: Call, beside: int) -> subprocess.Popen:
        """A command, one of `beside` that share the device's memory."""
        environment = dict(os.environ)
        if beside > 1:
            name = next((name for name in MEMORY if name in environment), MEMORY[-1])
            environment[name] = f"{float(environment.get(name, 0.9)) / beside:.3f}"
        log = call.log(self.out)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{', '.join(trial.name for trial in call.trials)}: {call.what} (log: {log})")
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(call.command)}\n".encode())
            file.flush()
            return subprocess.Popen(
                call.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )

    def _in_step(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        """The trials in groups that can go on together: all new, or with a checkpoint of one step in common."""
        found: list[tuple[set[int], list[Trial]]] = []
        for trial in trials:
            steps = set(Checkpoints(self.out / trial.name / "checkpoints", keep=1).steps())
            for at, (common, group) in enumerate(found):
                if common & steps or not (common or steps):
                    found[at] = (common & steps, [*group, trial])
                    break
            else:
                found.append((steps, [trial]))
        return [group for _, group in found]

    def _untrained(self, trial: Trial) -> bool:
        """Whether the run's last stage or the measurement after it is missing."""
        folder = self.out / trial.name
        if not (folder / "evaluation.json").exists():
            return True
        last = max(self._run(trial).stages())
        return not any(line["stage"] == last for line in held_out_lines(folder))

    def _measurements(self) -> list[Measurement]:
        ends = [Measurement(suite) for suite in self.study.suites]
        along = [Measurement(suite, milestones=True) for suite in self.study.suites if suite.milestones]
        return [*ends, ON_MILESTONES, *along] if self.study.milestone_tokens else ends

    def _wanted(self, trials: Sequence[Trial], measurement: Measurement) -> list[tuple[Trial, bool]]:
        """Who is still to be measured, and whether with the teacher: all runs have the same, beside one is enough."""
        missing = [trial for trial in trials if not self._is_measured(trial, measurement)]
        if trials and self._lacks_teacher(measurement):
            self._planned.add(measurement)
            first, *others = missing or trials[:1]
            return [(first, True), *((trial, False) for trial in others)]
        return [(trial, False) for trial in missing]

    def _lacks_teacher(self, measurement: Measurement) -> bool:
        if measurement.milestones or measurement in self._planned:
            return False
        return not any(self._has(self.out / trial.name, measurement.suite, "teacher") for trial in self.study.trials())

    def _is_measured(self, trial: Trial, measurement: Measurement) -> bool:
        """Of milestones, whether those are whose checkpoints are here."""
        folder, suite = self.out / trial.name, measurement.suite
        if not measurement.milestones:
            return self._has(folder, suite, "student")
        if self._untrained(trial):
            return False
        return all(
            self._has(milestone_folder(folder, step), suite, "student") for step in open_run(folder).milestones()
        )

    def _has(self, folder: Path, suite: Suite, model: str) -> bool:
        if suite == ON_MILESTONES.suite:
            return (folder / "evaluation.json").exists()
        kept = kept_results(folder, model)
        wanted = {"limit": suite.limit, "chat": suite.chat, "predict_only": False}
        return all(
            task in kept and all(kept[task].key.get(name) == value for name, value in wanted.items())
            for task in choose_tasks(suite.name, suite.tasks)
        )

    def _run(self, trial: Trial) -> RunConfig:
        return parse_run(self._flags([trial], str(self.out / trial.name)))

    def _train(self, trials: Sequence[Trial]) -> list[str]:
        name = trials[0].name if len(trials) == 1 else trials[0].group
        return [sys.executable, str(ROOT / "train.py"), *self._flags(trials, str(self.out / name))]

    def _flags(self, trials: Sequence[Trial], folder: str) -> list[str]:
        """Of train.py; the trials differ in their mixers alone."""
        first, mixers = trials[0], ",".join(trial.cell.mixer for trial in trials)
        flags = [*self.study.settings, *first.options, "--preset", first.cell.preset, "--mixer", mixers]
        flags += ["--tokens", str(first.cell.tokens), "--seed", str(first.seed), "--run-dir", folder]
        flags += ["--milestone-tokens", str(self.study.milestone_tokens)] if self.study.milestone_tokens else []
        for flag, values in (("--text", self.study.text), ("--data.heldout", self.study.heldout)):
            flags += [flag, *values] if values else []
        return flags

    def _evaluate(self, trial: Trial, measurement: Measurement, *, with_teacher: bool) -> list[str]:
        suite, alone = measurement.suite, not with_teacher and measurement != ON_MILESTONES  # KL needs the teacher
        command = [sys.executable, str(ROOT / "eval.py"), "--run", str(self.out / trial.name), "--suite", suite.name]
        command += ["--tasks", *suite.tasks] if suite.tasks else []
        command += ["--limit", str(suite.limit)] if suite.limit is not None else []
        command += ["--data", self.study.data] if self.study.data and suite != ON_MILESTONES.suite else []
        flags = {"--chat": suite.chat, "--milestones": measurement.milestones, "--student-only": alone}
        return command + [flag for flag, given in flags.items() if given]


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """End commands, and wait until they have: nobody may take their runs before. Being told twice changes nothing."""
    if not processes:
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    """SIGTERM as Ctrl-C: the command ends with us."""
    raise KeyboardInterrupt


def read_shard(text: str) -> tuple[int, int]:
    """I/N as (I, N), 0 <= I < N. Raises UserError."""
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and int(number) < int(count):
        return int(number), int(count)
    raise UserError(f"--shard {text}: give I/N, this job's number from 0 and the number of jobs: 0/4")
