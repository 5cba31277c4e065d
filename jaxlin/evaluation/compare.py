"""Compare runs: tables in the terminal and in Markdown, and figures.

Command: `python -m jaxlin.evaluation.compare RUN RUN ...`, after `eval.py --run RUN --suite ...` for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from jaxlin.command_line import parse, run_main
from jaxlin.config import UserError
from jaxlin.evaluation import plots
from jaxlin.evaluation.bootstrap import DRAWS, rank_text
from jaxlin.evaluation.columns import FEWEST
from jaxlin.evaluation.comparison import Interval, Line, Model, compare, read, split
from jaxlin.runs import write_text

HEADINGS = ("task", "model", "score", "95 %", "recovery", "95 %", "rank", "paper", "its recovery", "n")


def cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The lines as texts under HEADINGS; a column's name stands once."""
    shown, last = [], ""
    for line in lines:
        shown.append(
            (
                line.column if line.column != last else "",
                line.label,
                f"{100 * line.score:.2f}",
                _range(line.interval),
                "" if line.recovery is None else f"{line.recovery:.1%}",
                _range(line.recovery_interval),
                rank_text(line.rank) if line.rank else "",
                "" if line.paper is None else f"{line.paper.value:.2f}",
                "" if line.paper_recovery is None else f"{line.paper_recovery:.1%}",
                str(line.n),
            )
        )
        last = line.column
    return shown


def _range(limits: Interval | None) -> str:
    return "" if limits is None else f"{100 * limits[0]:.1f} to {100 * limits[1]:.1f}"


def notes(lines: Sequence[Line], models: Sequence[Model]) -> list[str]:
    """What a reader must know of the numbers."""
    found = [
        "Scores and recoveries in percent; intervals by bootstrap over examples, paired where the prompts were the "
        f"same (of hits and misses Clopper and Pearson's); none of fewer than {FEWEST}. A rank is a range unless every "
        "difference that decides it has an interval above or below 0."
    ]
    cited = {(line.paper.table, line.paper.what) for line in lines if line.paper}
    if cited:
        tables = "; ".join(f"{what} (table {table})" for table, what in sorted(cited))
        found.append(
            f"Paper: arXiv 2504.14366: {tables}. Other teachers, text and budgets than here unless they are said to be "
            "the same; it does not say which of the metrics of IFEval and GSM8K it gives."
        )
    said: dict[str, list[str]] = {}
    for model in (model for group in split(models) for model in group):
        for task, result in model.results.items():
            if result.note and task not in said.setdefault(result.note, []):
                said[result.note].append(task)
    return [*found, *(f"{', '.join(tasks)}: {note}." for note, tasks in said.items())]


def markdown(lines: Sequence[Line], remarks: Sequence[str]) -> str:
    """A Markdown table, and the notes under it."""
    rows = [HEADINGS, tuple("---" if i < 2 else "---:" for i in range(len(HEADINGS))), *cells(lines)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return table + "\n\n" + "\n".join(f"- {remark}" for remark in remarks) + "\n"


def table(lines: Sequence[Line]) -> Table:
    """A table for the terminal."""
    found = Table(title="Runs, their teacher and the paper")
    for i, heading in enumerate(HEADINGS):
        found.add_column(heading, justify="left" if i < 2 else "right")
    for row in cells(lines):
        if row[0] and found.row_count:
            found.add_section()
        found.add_row(*row)
    return found


@dataclass(frozen=True)
class Settings:
    """Compare runs by the benchmarks that eval.py measured."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders given to eval.py --out."""
    markdown: Path | None = None
    """Write the table there, as Markdown."""
    plots: Path | None = None
    """Write the figures into this folder."""
    confidence: float = 0.95
    """Of intervals and ranks."""
    draws: int = DRAWS
    """Resamples."""
    seed: int = 0
    """Seed of the resamples."""


def main() -> None:
    """Entry point of `python -m jaxlin.evaluation.compare`."""
    settings = parse(Settings)
    if not settings.runs:
        raise UserError("give one run folder or more")
    if not 0 < settings.confidence < 1:
        raise UserError(f"--confidence {settings.confidence}: must be between 0 and 1")
    if settings.draws < 100:
        raise UserError(f"--draws {settings.draws}: must be at least 100")
    models = [read(folder) for folder in settings.runs]
    lines = compare(models, draws=settings.draws, confidence=settings.confidence, seed=settings.seed)
    remarks = notes(lines, models)
    console = Console()
    console.print(table(lines))
    for remark in remarks:
        console.print(remark, highlight=False)
    if settings.markdown is not None:
        write_text(settings.markdown, markdown(lines, remarks))
    if settings.plots is not None:
        for path in plots.draw(models, settings.plots):
            console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    run_main(main)
