"""Measure a student against its teacher, or a teacher alone: `python3 eval.py --run DIR`. See `--help`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlin.command_line import MEASURED_TEXT, parse, require_folder, run_main
from jaxlin.config import DistributedConfig, MeshConfig, Switch, UserError


@dataclass(frozen=True)
class Settings:
    """Measure a student against its teacher, or a teacher alone."""

    run: str = ""
    """Run folder of the student."""
    teacher: str = ""
    """Instead of a run: "demo", a Hugging Face name or folder, or a .gguf file."""
    suite: str = "quick"
    """What to measure: quick (minutes, no downloads), one of the benchmarks zero_shot, bear, niah, ifeval, gsm8k, swde
    and longbench, all of them (all), or needles in shorter and longer texts (niah_short, niah_long)."""
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
    chat: Switch = 0
    """Put the benchmarks' prompts into the tokenizer's chat template."""
    milestones: Switch = 0
    """Measure the run's milestone checkpoints instead of the newest one, each into the run folder's milestones/STEP."""
    student_only: Switch = 0
    """Leave the run's teacher out of the benchmarks, and of the file that they are written to."""
    predict_only: Switch = 0
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
    json: Switch = 0
    """End with one line of JSON, without times."""


def main() -> None:
    """Measure, print, and keep the results in the run folder."""
    settings = parse(Settings)  # before JAX is imported: --help and mistakes answer at once
    for flag, value in (("--limit", settings.limit), ("--batch-tokens", settings.batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if settings.student_only and (settings.suite == "quick" or not settings.run):
        raise UserError("--student-only: give --run DIR and a --suite of benchmarks")
    if settings.milestones and (settings.out or not settings.run):
        raise UserError("--milestones: give --run DIR, into which the results go, and no --out")
    if settings.out and settings.suite == "quick":
        raise UserError("--out: the suite quick is kept in the run folder; give --out to other suites")
    unused = ("data", "seed", "chat", "predict_only", "batch_tokens") if settings.suite == "quick" else ("text",)
    for name in unused:
        if getattr(settings, name):
            raise UserError(f"--{name.replace('_', '-')}: --suite {settings.suite} has no use for it; leave it out")
    if settings.data and not Path(settings.data).is_dir():
        raise UserError(f"--data {settings.data}: no such folder")
    if settings.out:
        require_folder("--out", settings.out)
    elif settings.run and not settings.text:
        require_folder("--run", settings.run, "the results go there: make it writable, or copy it")

    from jaxlin import processes

    processes.start(settings.distributed)  # before anything asks for devices

    from jaxlin.evaluation.report import as_line, choose_tasks, failure, print_results

    choose_tasks(settings.suite, settings.tasks)  # refuses unknown names before anything is loaded
    failed = {}
    for found in quick(settings) if settings.suite == "quick" else benchmark(settings):
        if found["results"]:
            print_results(found)
        if settings.json and processes.is_first():
            print(as_line(found))
        failed |= found.get("failed", {})
    if failed:
        raise UserError(failure(failed))


def quick(settings: Settings) -> Iterator[dict]:
    """Measure with the quick suite."""
    from jaxlin.evaluation.report import evaluate
    from jaxlin.evaluation.subject import open_subject

    opened = open_subject(settings.run, settings.teacher, settings.text, mesh=mesh_of(settings))
    for subject in subjects(settings, opened):
        yield evaluate(subject, tasks=settings.tasks, limit=settings.limit)


def subjects(settings: Settings, opened: Any) -> Iterator[Any]:
    """What is measured: what was opened, or with --milestones each of them."""
    if not settings.milestones:
        yield opened
    elif not (steps := opened.run.milestones()):
        raise UserError(f"--milestones: {settings.run} has none; train with --milestone-tokens N")
    else:
        yield from map(opened.at, steps)


def benchmark(settings: Settings) -> Iterator[dict]:
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
    opened = open_subject(settings.run, settings.teacher, mesh=options.mesh)
    if settings.student_only:
        opened = opened.student_only()
    if options.chat and not opened.measured.tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {opened.config.teacher} has no chat template")
    try:
        for subject in subjects(settings, opened):
            folder = subject.folder / "evaluation" if settings.milestones else kept_in(settings)
            yield report.benchmark(subject, settings.suite, options, tasks=settings.tasks, folder=folder)
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
    run_main(main, called=MEASURED_TEXT, resumes="of a run, the same command goes on with the next task")
