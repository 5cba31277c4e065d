"""A study's results without what is large: `python -m jaxlin.study.collect --out runs/STUDY --to FOLDER`.

What the report is made of, and what tells the study that a run is done: settings, cards, measurements. Of
metrics.jsonl all held-out numbers stay and about a hundred other lines; of local paths the last part. So another
machine's runs come home, as one file where --to ends in .tar.gz, and several machines' into one folder.
"""

from __future__ import annotations

import bisect
import io
import json
import math
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlin.command_line import parse, run_main
from jaxlin.config import UserError
from jaxlin.drafts import draft
from jaxlin.runs import without_local_paths, write_text
from jaxlin.study.results import StudyResults, TrialResults, read_study

OF_RUN = ("config.json", "model.json", "card.json", "fidelity.json", "conversations.json")
LINES = 100  # of a run's log
ARCHIVE = ".tar.gz"


def collect(out: Path, to: Path) -> int:
    """Write the results of the study in `out` to the folder or .tar.gz `to`; their bytes, not compressed.

    What a folder holds besides stays. Raises UserError without a study, or where `to` cannot be written.
    """
    found = read_study(out)
    if to.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--to {to}: inside --out {out}; choose another place")
    texts = dict(_texts(found))
    if to.name.endswith(ARCHIVE):
        _archive(texts, to)
    else:
        for name, text in texts.items():
            write_text(to / name, text)
    return sum(len(text.encode()) for text in texts.values())


def _texts(found: StudyResults) -> Iterator[tuple[str, str]]:
    """The files, by name relative to the study's folder."""
    yield "study.json", _small(without_local_paths(json.loads((found.out / "study.json").read_text())))
    for run in found.trials:
        for path in (run.folder / name for name in OF_RUN):
            if path.exists():
                yield found.source(path), _small(without_local_paths(json.loads(path.read_text())))
        if (path := run.folder / "metrics.jsonl").exists():
            yield found.source(path), "".join(thinned(path.read_text().splitlines(keepends=True)))
        suites = [suite.name for suite in found.study.suites]
        for measured in (run, *run.milestones.values()):
            for path in _measurements(measured, suites):
                yield found.source(path), _small(_whole_numbers(json.loads(path.read_text())))


def _measurements(run: TrialResults, suites: Sequence[str]) -> Iterator[Path]:
    """evaluation.json, the suites' tables, and the newest result of every task, without what was answered."""
    tables = [run.folder / "evaluation.json", *(run.folder / "evaluation" / f"{suite}.json" for suite in suites)]
    yield from (path for path in tables if path.exists())
    yield from (kept.path for of_model in run.kept.values() for kept in of_model.values())


def thinned(lines: Sequence[str]) -> list[str]:
    """A log's whole lines without most of those of training steps.

    The step before a measurement stays: it says of how many tokens the measurement is.
    """
    whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    steps = [at for at, (_, values) in enumerate(whole) if "loss" in values]
    kept = set(steps[:: max(1, math.ceil(len(steps) / LINES))])
    for at, (_, values) in enumerate(whole):
        if "heldout_kl" in values:
            kept.update(steps[: bisect.bisect(steps, at)][-1:])
    return [line for at, (line, values) in enumerate(whole) if "loss" not in values or at in kept]


def _whole_numbers(value: Any) -> Any:
    """Hits and misses as 1 and 0: half as long as 1.0 and 0.0."""
    if isinstance(value, dict):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _small(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


def _archive(texts: dict[str, str], to: Path) -> None:
    """The files as one, in a folder of the archive's name and of no user; whole or not at all."""
    folder = to.name.removesuffix(ARCHIVE)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with draft(to) as part, part.open("wb") as file, tarfile.open(to.name, "w:gz", fileobj=file) as archive:
            for name, text in texts.items():
                content = text.encode()
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size, member.mtime = len(content), int(time.time())
                archive.addfile(member, io.BytesIO(content))
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written ({error.strerror})") from error


@dataclass(frozen=True)
class Settings:
    """Collect a study's results without its checkpoints."""

    out: Path
    """Folder of the study."""
    to: Path
    """Folder to write them to, which may hold others' already, or a new file that ends in .tar.gz."""


def main() -> None:
    """Entry point of `python -m jaxlin.study.collect`."""
    settings = parse(Settings)
    size = collect(settings.out, settings.to)
    print(f"wrote {settings.to}: {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    run_main(main)
