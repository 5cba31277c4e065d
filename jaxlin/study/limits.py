"""What was not run, and what may not be concluded: said by the study itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxlin.study.design import short
from jaxlin.study.estimates import Estimates
from jaxlin.study.results import StudyResults
from jaxlin.study.tables import UNDECIDED, title_of

PAPER_TOKENS = 3_000_000_000
FEW_SEEDS = 3


def limits(estimates: Estimates) -> list[str]:
    """One sentence or two each."""
    found = estimates.found
    return [*_missing(found), *_seeds(found), *_budgets(found), *_teacher(found), *_mixed(found), *_open(estimates),
            *found.study.notes]  # fmt: skip


def _missing(found: StudyResults) -> Iterator[str]:
    there = {run.trial.name: run for run in found.trials}
    names = [trial.name for trial in found.study.trials()]
    if absent := [name for name in names if name not in there]:
        yield f"Not run: {', '.join(absent)}."
    if unfinished := [name for name in names if name in there and not there[name].held_out]:
        yield f"Not finished, and measured only as far as they came: {', '.join(unfinished)}."
    for suite in found.study.suites:
        without = [name for name in names if name in there and not _has_suite(there[name].folder, suite.name)]
        if without:
            yield f"Suite {suite.name} was not measured on {', '.join(without)}."
        if suite.limit is not None:
            yield f"Suite {suite.name} was measured on the first {suite.limit} examples of each task, not on all."
    bare = [run.trial.name for run in found.trials if run.held_out and not run.milestones]
    if found.study.milestone_tokens and bare:
        yield f"No milestone was measured of {', '.join(bare)}: figure 2 has their ends alone."
    if not found.study.suites:
        yield "No benchmark was measured: nothing is known beyond held-out text."


def _has_suite(folder: Path, suite: str) -> bool:
    return (folder / "evaluation" / f"{suite}.json").exists()


def _seeds(found: StudyResults) -> Iterator[str]:
    seeds: dict[str, set[int]] = {}
    for run in found.trials:
        seeds.setdefault(run.trial.cell.name, set()).add(run.trial.seed)
    if single := [name for name, of_cell in seeds.items() if len(of_cell) == 1]:
        yield (
            f"One seed: {', '.join(single)}. Their intervals are over examples alone, and say nothing of what another "
            "seed would give."
        )
    if few := [name for name, of_cell in seeds.items() if 1 < len(of_cell) < FEW_SEEDS]:
        yield f"Two seeds: {', '.join(few)}. Their intervals are wide because two are few."


def _budgets(found: StudyResults) -> Iterator[str]:
    for tokens in sorted({trial.cell.tokens for trial in found.study.trials()}):
        share = tokens / PAPER_TOKENS
        if share < 1:
            yield (
                f"{short(tokens)} tokens are {share:.2g} of the paper's 3B: an order found here need not be the order "
                "there, and a score below the paper's is no failure to reproduce it."
            )
        elif share > 1:
            yield f"{short(tokens)} tokens are {share:.2g} times the paper's 3B: scores above its own are no surprise."


def _teacher(found: StudyResults) -> Iterator[str]:
    for teacher in dict.fromkeys(run.config.get("teacher", "") for run in found.trials):
        if teacher == "random":
            yield "The teacher is random: no number here means anything."
        elif teacher == "demo":
            yield (
                "The teacher is SmolLM2-135M-Instruct with weights of about 4.5 bits, not the paper's base model: the "
                "paper's scores stand beside ours for orientation alone."
            )
        elif teacher.endswith(".gguf"):
            yield f"The teacher {Path(teacher).name} is quantised, unlike the paper's."
    texts = dict.fromkeys(text for run in found.trials for text in run.config.get("text", []))
    if other := [Path(text).name for text in texts if "fineweb" not in text.lower()]:
        yield f"The text is {', '.join(other)}, not the paper's FineWeb."
    if any(run.config and not run.config.get("text") for run in found.trials):
        yield "The text is Python's own documentation, not the paper's FineWeb."


def _mixed(found: StudyResults) -> Iterator[str]:
    for key, what in (("devices", "devices"), ("git_commit", "commits")):
        kinds = dict.fromkeys(str(run.card[key])[:40] for run in found.trials if run.card.get(key))
        if len(kinds) > 1:
            yield f"The runs were not all made on the same {what}: {', '.join(kinds)}."


def _open(estimates: Estimates) -> Iterator[str]:
    if (asked := len(estimates.found.study.contrasts)) > 1:
        yield (
            f"{asked} questions are asked at 95 % each: where nothing differs, one in twenty is answered all the "
            "same. So are ranks, of all pairs."
        )
    cells = {cell.name: cell for cell in estimates.found.study.cells()}
    for contrast in estimates.found.study.contrasts:
        found = estimates.difference(cells[contrast.a], cells[contrast.b], contrast.metric)
        if found is None or not found.is_decided:
            answer = "not measured" if found is None else UNDECIDED
            yield f"{contrast.question} By {title_of(contrast.metric)}: {answer}."
