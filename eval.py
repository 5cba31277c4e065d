"""Measure a student against its teacher, or a teacher alone: `python3 eval.py --run DIR`. See `--help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from jaxlin.command_line import parse, run_main
from jaxlin.config import DistributedConfig, MeshConfig, UserError


@dataclass(frozen=True)
class Settings:
    """Measure a student against its teacher, or a teacher alone."""

    run: str = ""
    """Run folder of the student."""
    teacher: str = ""
    """Instead of a run: "demo", a Hugging Face name or folder, or a .gguf file."""
    suite: str = "quick"
    """What to measure: quick (minutes, no downloads), one of the benchmarks zero_shot, bear, niah, ifeval, gsm8k, swde
    and longbench, all of them (all), or needles in longer texts (niah_long)."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; empty means all."""
    data: str = ""
    """Folder with the benchmarks' data, in it or in its folder eval; empty takes them from the hub."""
    text: tuple[str, ...] = ()
    """Text to measure perplexity on; empty uses the run's held-out text."""
    limit: int | None = None
    """Samples of each task; by default what the suite chooses."""
    seed: int = 0
    """Seed of what a benchmark chooses at random."""
    chat: tyro.conf.UseCounterAction[int] = 0
    """Put the benchmarks' prompts into the tokenizer's chat template."""
    student_only: tyro.conf.UseCounterAction[int] = 0
    """Leave the run's teacher out of the benchmarks, and of the file that they are written to."""
    predict_only: tyro.conf.UseCounterAction[int] = 0
    """Keep what the models answer to the benchmarks, and do not score it."""
    out: str = ""
    """Folder where the benchmarks' finished tasks are kept; by default the run folder's evaluation, for a teacher
    runs/teacher-NAME/evaluation."""
    batch_tokens: int | None = None
    """Padded tokens in a batch of the benchmarks; by default what suits the device."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices that models and batches are spread over; by default one, or with several processes all."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""
    json: tyro.conf.UseCounterAction[int] = 0
    """End with one line of JSON, without times."""


def main() -> None:
    """Measure, print, and keep the results in the run folder."""
    settings = parse(Settings)  # before JAX is imported: --help and mistakes answer at once
    for flag, value in (("--limit", settings.limit), ("--batch-tokens", settings.batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if settings.student_only and (settings.suite == "quick" or not settings.run):
        raise UserError("--student-only: give --run DIR and a --suite of benchmarks")
    if settings.data and not Path(settings.data).is_dir():
        raise UserError(f"--data {settings.data}: no such folder")

    from jaxlin import processes

    processes.start(settings.distributed)  # before anything asks for devices

    from jaxlin.evaluation.report import as_line, choose_tasks, evaluate, failure, print_results
    from jaxlin.evaluation.subject import open_subject

    choose_tasks(settings.suite, settings.tasks)  # refuses unknown names before anything is loaded
    if settings.suite == "quick":
        subject = open_subject(settings.run, settings.teacher, settings.text, mesh=mesh_of(settings))
        found = evaluate(subject, tasks=settings.tasks, limit=settings.limit)
    else:
        found = benchmark(settings)
    if found["results"]:
        print_results(found)
    if settings.json and processes.is_first():
        print(as_line(found))
    if found.get("failed"):
        raise UserError(failure(found["failed"]))


def benchmark(settings: Settings) -> dict:
    """Measure with a suite of benchmarks."""
    from rich.console import Console

    from jaxlin import processes
    from jaxlin.evaluation import report
    from jaxlin.evaluation.scoring import Budget
    from jaxlin.evaluation.subject import open_subject
    from jaxlin.evaluation.suite import Bars
    from jaxlin.evaluation.task import Options

    bars = Bars(Console(stderr=True, quiet=not processes.is_first()))
    options = Options(
        data=Path(settings.data) if settings.data else None,
        limit=settings.limit,
        seed=settings.seed,
        predict_only=bool(settings.predict_only),
        chat=bool(settings.chat),
        budget=Budget(settings.batch_tokens),
        mesh=mesh_of(settings),
        bar=bars,
    )
    report.check_data(settings.suite, settings.tasks, options)
    subject = open_subject(settings.run, settings.teacher, mesh=options.mesh)
    if settings.student_only:
        subject = subject.student_only()
    if options.chat and not subject.measured.tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {subject.config.teacher} has no chat template")
    try:
        return report.benchmark(subject, settings.suite, options, tasks=settings.tasks, folder=kept_in(settings))
    finally:
        bars.close()


def mesh_of(settings: Settings) -> Any:
    """The mesh to measure on, or None for one device."""
    import jax

    from jaxlin.sharding import make_mesh

    one = settings.mesh == MeshConfig(data=1)
    if one and jax.process_count() == 1:
        return None
    return make_mesh(MeshConfig() if one else settings.mesh)


def kept_in(settings: Settings) -> Path:
    """Where finished tasks are kept."""
    if settings.out:
        return Path(settings.out)
    run = settings.run or f"runs/teacher-{settings.teacher.strip('/').replace('/', '--')}"
    return Path(run) / "evaluation"


if __name__ == "__main__":
    run_main(main)
