"""What a study is: arms that vary mixer, preset, options, budget and seed; what is measured; what is asked.

A study config is Python and defines `study() -> Study`. A trial is one run; a cell is a trial whatever its seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jaxlin.command_line import config_function
from jaxlin.config import PRESETS, UserError
from jaxlin.pattern import mixers_of

HELD_OUT = ("kl", "perplexity", "agreement")  # what every run is measured by; columns of benchmarks besides
RESERVED = ("--mixer", "--preset", "--tokens", "--seed", "--run-dir", "--milestone-tokens")  # what the grid itself sets


@dataclass(frozen=True)
class Arm:
    """Students that share everything but mixer, budget and seed, and so may share a teacher's forward passes."""

    mixers: tuple[str, ...]
    preset: str = "recommended"
    variant: str = ""
    """A name for `options`, part of the runs' folders."""
    options: tuple[str, ...] = ()
    """Flags of train.py beyond the study's: ("--model.out-gate", "none")."""
    tokens: tuple[int, ...] = (60_000_000,)
    """Budgets, in token positions over all stages."""
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Suite:
    """A suite of eval.py."""

    name: str
    limit: int | None = None
    """Examples of each task; None is what the suite chooses."""
    tasks: tuple[str, ...] = ()
    """Tasks of the suite; empty means all."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    milestones: bool = False
    """Measure the runs' milestones as well, for scores against tokens."""


@dataclass(frozen=True)
class Contrast:
    """A question put to two cells, answered by the difference a - b of one metric."""

    name: str
    question: str
    a: str
    """Name of a cell: PRESET[-VARIANT]-BUDGET/MIXER."""
    b: str
    metric: str
    """kl, perplexity or agreement on held-out text, or a column of `jaxlin.evaluation.columns`."""


@dataclass(frozen=True)
class Study:
    """A grid of runs and what to make of it."""

    name: str
    arms: tuple[Arm, ...]
    settings: tuple[str, ...] = ()
    """Flags of train.py that all runs share: ("--config", "tiny")."""
    suites: tuple[Suite, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    milestone_tokens: int = 0
    """Tokens between checkpoints that are kept and measured on held-out text, for figure 2; 0 for none."""
    text: tuple[str, ...] = ()
    """Training text, as train.py's --text; empty is the config file's."""
    heldout: tuple[str, ...] = ()
    """Held-out text, as --data.heldout."""
    data: str = ""
    """Folder with the benchmarks' data, as eval.py's --data; empty takes them from the hub."""
    notes: tuple[str, ...] = ()
    """What a reader of the report must know besides."""

    def trials(self) -> list[Trial]:
        """Every run, each once, in the order of the arms; seeds outermost, so that a study cut short has all cells."""
        return [
            Trial(Cell(arm.preset, arm.variant, tokens, mixer), seed, arm.options)
            for arm, seed in self._seeded()
            for tokens in arm.tokens
            for mixer in arm.mixers
        ]

    def _seeded(self) -> Iterator[tuple[Arm, int]]:
        for nth in range(max((len(arm.seeds) for arm in self.arms), default=0)):
            yield from ((arm, arm.seeds[nth]) for arm in self.arms if nth < len(arm.seeds))

    def cells(self) -> list[Cell]:
        """The cells of the trials, each once."""
        return list(dict.fromkeys(trial.cell for trial in self.trials()))


@dataclass(frozen=True)
class Cell:
    """A student by all that varies but its seed."""

    preset: str
    variant: str
    tokens: int
    mixer: str

    @property
    def name(self) -> str:
        """PRESET[-VARIANT]-BUDGET/MIXER."""
        return f"{self.settings}/{self.mixer}"

    @property
    def settings(self) -> str:
        """PRESET[-VARIANT]-BUDGET."""
        return "-".join(part for part in (self.preset, self.variant, short(self.tokens)) if part)


@dataclass(frozen=True)
class Trial:
    """One run of the study."""

    cell: Cell
    seed: int
    options: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The folder of the trials that differ from this one in the mixer alone."""
        return f"{self.cell.settings}-s{self.seed}"

    @property
    def name(self) -> str:
        """The run folder, relative to the study's."""
        return f"{self.group}/{self.cell.mixer}"


def short(tokens: int) -> str:
    """60_000_000 as 60M, for names."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)


def load_study(name: str) -> Study:
    """The study of the config `name` (a path, or a name in configs/). Raises UserError for what cannot be run."""
    function = config_function(name, "study", "study(); run configs are for train.py")
    return check(function(), name)


def check(study: Study, name: str) -> Study:
    """`study`, whose names must be unique and refer to something; `name` is what errors call its config."""
    from jaxlin.mixers import MIXERS  # which brings JAX: --help does without

    trials = study.trials()
    if not trials:
        raise UserError(f"--config {name}: no arm has a mixer, a budget and a seed")
    for arm in study.arms:
        if arm.preset not in PRESETS:
            raise UserError(f"--config {name}: preset {arm.preset} is none of {', '.join(PRESETS)}")
        if bool(arm.options) != bool(arm.variant):
            raise UserError(f"--config {name}: an arm of {arm.mixers[0]} has options or a variant; give both or none")
        if odd := [part for part in (arm.variant, *arm.mixers) if set(part) & set("/,- ")]:
            raise UserError(f"--config {name}: {odd[0]!r} cannot be part of a folder's name; use letters, digits, _")
        if unknown := [part for mixer in arm.mixers for part in mixers_of(mixer) if part not in MIXERS]:
            raise UserError(f"--config {name}: mixer {unknown[0]} is none of {', '.join(MIXERS)}")
    if study.milestone_tokens < 0:
        raise UserError(f"--config {name}: milestone_tokens {study.milestone_tokens} must be 0 (none) or more")
    if any(suite.milestones for suite in study.suites) and not study.milestone_tokens:
        raise UserError(f"--config {name}: a suite is for milestones, but the study's milestone_tokens is 0; set it")
    options: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for arm in study.arms:
        options.setdefault((arm.preset, arm.variant), set()).add(arm.options)
    if unclear := [variant for (_, variant), found in options.items() if len(found) > 1]:
        raise UserError(f"--config {name}: variant {unclear[0]} has several sets of options; name each its own")
    flags = [*study.settings, *(flag for arm in study.arms for flag in arm.options)]
    if reserved := [flag for flag in flags if flag in RESERVED]:
        raise UserError(f"--config {name}: {reserved[0]} is set by the grid; use the arm's own field")
    if twice := [run for run, count in Counter(trial.name for trial in trials).items() if count > 1]:
        raise UserError(f"--config {name}: {twice[0]} is there twice; name the variants")
    known = {cell.name for cell in study.cells()}
    for contrast in study.contrasts:
        for cell in (contrast.a, contrast.b):
            if cell not in known:
                raise UserError(
                    f"--config {name}: contrast {contrast.name}: {cell} is none of {', '.join(sorted(known))}"
                )
    return study


def chosen(study: Study, only: Sequence[str]) -> list[Trial]:
    """The trials whose run, group, cell, settings or mixer `only` names; all where it is empty."""
    trials = study.trials()
    names = {t: (t.name, t.group, t.cell.name, t.cell.settings, t.cell.mixer) for t in trials}
    named = {name: [t for t in trials if name in names[t]] for name in only}
    if unknown := [name for name, found in named.items() if not found]:
        raise UserError(f"--only {unknown[0]}: no run of that name; there are {', '.join(t.name for t in trials)}")
    return [trial for trial in trials if not only or any(trial in found for found in named.values())]


def with_sources(study: Study, text: Sequence[str], heldout: Sequence[str], data: str) -> Study:
    """The study on other text or benchmark data, where they are given."""
    return replace(
        study,
        text=tuple(text) or study.text,
        heldout=tuple(heldout) or study.heldout,
        data=data or study.data,
    )
