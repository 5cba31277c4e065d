"""Measure a student against its teacher, or a teacher alone: `python3 eval.py --run DIR`. See `--help`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxlin.config import UserError, parse, run_main


@dataclass(frozen=True)
class Settings:
    """Measure a student against its teacher, or a teacher alone."""

    run: str = ""
    """Run folder of the student."""
    teacher: str = ""
    """Instead of a run: "demo", a Hugging Face name or folder, or a .gguf file."""
    suite: str = "quick"
    """What to measure: quick."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; empty means all."""
    data: str = ""
    """Folder with the tasks' data, in it or in its folder eval."""
    text: tuple[str, ...] = ()
    """Text to measure perplexity on; empty uses the run's held-out text."""
    limit: int | None = None
    """Samples of each task; by default what the suite chooses."""
    json: tyro.conf.UseCounterAction[int] = 0
    """End with one line of JSON, without times."""


def main() -> None:
    """Measure, print, and keep the results in the run folder."""
    settings = parse(Settings)  # before JAX is imported: --help and mistakes answer at once
    if settings.limit is not None and settings.limit < 1:
        raise UserError(f"--limit {settings.limit}: must be at least 1")
    if settings.data and not Path(settings.data).is_dir():
        raise UserError(f"--data {settings.data}: no such folder")

    from jaxlin.evaluation.report import as_line, choose_tasks, evaluate, print_results
    from jaxlin.evaluation.subject import open_subject

    choose_tasks(settings.suite, settings.tasks)  # refuses unknown names before anything is loaded
    subject = open_subject(settings.run, settings.teacher, settings.text)
    found = evaluate(subject, suite=settings.suite, tasks=settings.tasks, limit=settings.limit)
    print_results(found)
    if settings.json:
        print(as_line(found))


if __name__ == "__main__":
    run_main(main)
