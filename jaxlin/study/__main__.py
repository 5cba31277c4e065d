"""Run a study and write its report: `python -m jaxlin.study --config configs/study_135m.py`. See `--help`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from jaxlin.command_line import parse, require_folder, run_main
from jaxlin.config import Switch, UserError
from jaxlin.study.design import chosen, load_study, with_sources


@dataclass(frozen=True)
class Settings:
    """Train and measure the runs of a study, as far as they are not, and write its report."""

    config: str
    """Study config: a path, or a name in configs/."""
    out: Path | None = None
    """Folder of the study; runs/CONFIG where none is given."""
    text: tuple[str, ...] = ()
    """Training text, as train.py's; by default the study's."""
    heldout: tuple[str, ...] = ()
    """Held-out text; by default the study's."""
    data: str = ""
    """Folder with the benchmarks' data; by default the study's."""
    only: tuple[str, ...] = ()
    """Runs, groups (PRESET-BUDGET-sSEED), those of all seeds (PRESET-BUDGET), cells (PRESET-BUDGET/MIXER) or mixers; by
    default all."""
    shard: str = "0/1"
    """I/N: this is job I of N, from 0, and takes every N-th group."""
    together: int = 4
    """Students trained in one process, which share the teacher's forward passes and the device's memory."""
    evaluations: int = 1
    """Students of a group that are measured side by side, each in a process of its own on the same devices."""
    dry_run: Switch = 0
    """Print the commands of what is missing, and run nothing."""
    report: Switch = 0
    """Write the report of what is there, and run nothing."""
    speed: Path | None = None
    """For the report: the JSON file of `python -m benchmarks.generation_speed`."""


def main() -> None:
    """Entry point of `python -m jaxlin.study`."""
    settings = parse(Settings)
    for flag, value in (("together", settings.together), ("evaluations", settings.evaluations)):
        if value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    study = load_study(settings.config)
    study = with_sources(study, settings.text, settings.heldout, settings.data)
    trials = chosen(study, settings.only)
    out = settings.out or Path("runs") / Path(settings.config).stem
    require_folder("--out", out)

    from jaxlin.study.report import write_report
    from jaxlin.study.results import write_design
    from jaxlin.study.runner import Runner, read_shard

    number, count = read_shard(settings.shard)
    runner = Runner(study, out, say=lambda line: print(line, flush=True), at_once=settings.evaluations)
    if not settings.report:
        runner.check(trials)
        every = runner.groups(trials, settings.together)
        groups = every[number::count]
        if not groups:
            print(f"--shard {settings.shard}: nothing to do, there are {len(every)} groups of runs")
        if settings.dry_run:
            for group in groups:
                print(*runner.commands(group), sep="\n")
            return
        write_design(study, out)
        for group in groups:
            runner.work(group)
    for path in write_report(out, settings.speed):
        print(f"wrote {path}")
    if runner.left:
        print("left to other jobs:", *runner.left, sep="\n  ")
    if runner.failures:
        print("failed:", *runner.failures, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, called={"--run-dir": "--out"}, resumes="the same command goes on")
