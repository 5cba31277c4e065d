"""Look into a student: `python -m jaxlin.inspect --run DIR`. See `--help`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jaxlin.command_line import MEASURED_TEXT, parse, require_folder, run_main
from jaxlin.config import Switch, UserError

FEWEST = 50  # examples: every digit in each fold


@dataclass(frozen=True)
class Settings:
    """Show what each linear-time layer of a student does: gates, effective memory, states over time, and how long a
    needle can be read from the state."""

    run: str = ""
    """Run folder, or a folder that was exported."""
    text: tuple[str, ...] = ()
    """Text to read; empty uses the run's held-out text, or what it trained on where that is too little."""
    sequences: int = 8
    """Sequences for gates, memory and states."""
    length: int = 512
    """Tokens of each."""
    positions: tuple[int, ...] = ()
    """Tokens after which states are looked at; by default 32, 64, 128, ... up to --length."""
    examples: int = 300
    """Sequences with a needle; 0 leaves needles out."""
    distances: tuple[int, ...] = (0, 4, 8, 16, 32, 64, 128)
    """Tokens after the needle at which it is looked for."""
    seed: int = 0
    """Seed of the examples and of projections."""
    out: str = ""
    """Folder for inspection.json and the figures; by default the run folder."""
    json: Switch = 0
    """End with one line of JSON."""


def main() -> None:
    """Measure, print, and keep the results and figures."""
    settings = parse(Settings)  # before JAX is imported: --help and mistakes answer at once
    check(settings)

    from rich.console import Console

    from jaxlin.evaluation.suite import Bars
    from jaxlin.inspect import plots, report
    from jaxlin.inspect.subject import open_subject
    from jaxlin.runs import write_text

    out = Path(settings.out or settings.run)
    subject = open_subject(settings.run, settings.text)
    bars = Bars(Console(stderr=True))
    try:
        found = report.inspect(
            subject,
            sequences=settings.sequences,
            length=settings.length,
            positions=settings.positions or powers(settings.length),
            examples=settings.examples,
            distances=settings.distances,
            seed=settings.seed,
            bar=bars,
        )
    finally:
        bars.close()
    line = json.dumps(found, allow_nan=False)
    write_text(out / "inspection.json", line)
    console = Console()
    report.print_results(found, console)
    console.print(f"wrote {out / 'inspection.json'}", highlight=False)
    try:
        for path in plots.draw(found, out):
            console.print(f"wrote {path}", highlight=False)
    except UserError as error:  # the numbers are there
        console.print(f"no figures: {error}", highlight=False)
    if settings.json:
        print(line)


def check(settings: Settings) -> None:
    """Raises UserError for settings that cannot be meant."""
    if not settings.run:
        raise UserError("--run: give a run folder")
    require_folder("--out", settings.out)
    for flag, value, least in (
        ("--sequences", settings.sequences, 1),
        ("--length", settings.length, 2),
        ("--examples", settings.examples or FEWEST, FEWEST),
        ("--seed", settings.seed, 0),
    ):
        if value < least:
            none = ", or 0 for none" if flag == "--examples" else ""
            raise UserError(f"{flag} {value}: must be at least {least}{none}")
    for flag, values, least in (("--positions", settings.positions, 1), ("--distances", settings.distances, 0)):
        if list(values) != sorted(set(values)) or min(values, default=least) < least:
            raise UserError(f"{flag} {' '.join(map(str, values))}: must be in ascending order, from {least} on")
    if settings.positions and settings.positions[-1] > settings.length:
        raise UserError(
            f"--positions {settings.positions[-1]}: beyond the sequences' {settings.length} tokens; raise --length"
        )
    if settings.examples and not settings.distances:
        raise UserError("--distances: give one or more, or --examples 0")


def powers(length: int) -> tuple[int, ...]:
    """32, 64, 128, ... up to `length`; `length` alone where it is less."""
    return tuple(32 << i for i in range(length.bit_length()) if 32 << i <= length) or (length,)


if __name__ == "__main__":
    run_main(main, called=MEASURED_TEXT)
