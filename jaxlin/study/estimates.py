"""Numbers of cells and differences between them, with intervals over examples and seeds.

A cell's value is the mean over its seeds. Its draws are bootstrap resamples of a benchmark's examples, or of the
batches of held-out text, the same ones for all runs that read the same. With n >= 2 seeds they also move by
t(n - 1) s / sqrt(n), s the deviation over seeds: what Student's interval allows so few. With one seed an interval says
nothing about others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from jaxlin.evaluation.bootstrap import DRAWS, SHARES, Draws, Mean, Series, resample
from jaxlin.evaluation.columns import COLUMNS, FEWEST
from jaxlin.evaluation.columns import series as series_of
from jaxlin.study.design import HELD_OUT, Cell
from jaxlin.study.results import StudyResults, TrialResults, number

COLUMN = {column.name: column for column in COLUMNS}
LOWER_IS_BETTER = ("kl", "perplexity")
LIMITS = {"kl": (0.0, math.inf), "perplexity": (1.0, math.inf)}  # what they can be; all others are shares
TEACHER = Cell("", "", 0, "teacher")  # whose results are kept beside those of a student


@dataclass(frozen=True)
class Estimate:
    """A number, its interval, and what both are over."""

    value: float
    interval: tuple[float, float] | None
    """None without scores of examples where there is one seed, with too few examples, and where seeds are all alike."""
    seeds: tuple[int, ...]
    examples: int
    """Of held-out text, batches; 0 for what is one number a run."""
    sources: tuple[str, ...]
    """Files, relative to the study's folder."""

    @property
    def is_decided(self) -> bool:
        """Of a difference: whether it has an interval, which does not hold 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass
class Estimates:
    """Estimates of a study."""

    found: StudyResults
    draws: int = DRAWS
    confidence: float = 0.95

    def of(
        self, cell: Cell, metric: str, seeds: Sequence[int] | None = None, tokens: int | None = None
    ) -> Estimate | None:
        """The metric of a cell, or of TEACHER, over `seeds` or all; None where it was not measured.

        With `tokens`, at the milestones of so many.
        """
        runs = self._runs(cell, metric, tokens)
        runs = {seed: run for seed, run in runs.items() if seeds is None or seed in seeds}
        values = {seed: self._value(run, cell, metric) for seed, run in runs.items()}
        drawn = {seed: self._drawn(run, cell, metric) for seed, run in runs.items()}
        found = self._estimate(values, drawn, metric, [(cell, run) for run in runs.values()])
        return found and replace(found, interval=found.interval and within(LIMITS.get(metric, SHARES), found.interval))

    def along(self, cell: Cell, metric: str) -> dict[int, Estimate]:
        """The metric of a cell by tokens: at the milestones that all its finished runs have, and at the end."""
        runs = [run for run in self.found.trials if run.trial.cell == cell and run.held_out]
        shared = set.intersection(*(set(run.milestones) for run in runs)) if runs else set()
        seeds = [run.trial.seed for run in runs]
        points = {tokens: self.of(cell, metric, seeds, tokens) for tokens in sorted(shared)}
        points[cell.tokens] = self.of(cell, metric, seeds)
        return {tokens: found for tokens, found in points.items() if found is not None}

    def difference(self, a: Cell, b: Cell, metric: str) -> Estimate | None:
        """a - b, over the seeds that both have; None where one was not measured, or they share no seed."""
        of_a, of_b = self._runs(a, metric), self._runs(b, metric)
        values, drawn = {}, {}
        for seed in (seed for seed in of_a if seed in of_b):
            values[seed] = self._value(of_a[seed], a, metric) - self._value(of_b[seed], b, metric)
            one, other = self._drawn(of_a[seed], a, metric), self._drawn(of_b[seed], b, metric)
            drawn[seed] = None if one is None or other is None else one - other
        used = [(cell, runs[seed]) for cell, runs in ((a, of_a), (b, of_b)) for seed in values]
        return self._estimate(values, drawn, metric, used)

    def recovery(self, cell: Cell, metric: str) -> Estimate | None:
        """The metric of a cell over the teacher's; None where one was not measured, or the teacher's is 0."""
        runs, (teacher,) = self._runs(cell, metric), list(self._runs(TEACHER, metric).values()) or [None]
        if teacher is None or not (base := self._value(teacher, TEACHER, metric)):
            return None
        under, values, drawn = self._drawn(teacher, TEACHER, metric), {}, {}
        for seed, run in runs.items():
            over = self._drawn(run, cell, metric)
            values[seed] = self._value(run, cell, metric) / base
            drawn[seed] = None if over is None or under is None or not under.low.all() else over / under
        return self._estimate(values, drawn, metric, [*((cell, run) for run in runs.values()), (TEACHER, teacher)])

    def ranks(self, cells: Sequence[Cell], metric: str) -> dict[Cell, tuple[int, int]]:
        """Best and worst rank that each of the cells may have, 1 for the best; one is above another only where the
        interval of their difference does not hold 0."""
        sign = -1 if metric in LOWER_IS_BETTER else 1

        def is_above(a: Cell, b: Cell) -> bool:
            found = self.difference(a, b, metric)
            return found is not None and found.is_decided and sign * found.value > 0

        above = {(a, b): is_above(a, b) for a in cells for b in cells if a != b}
        return {
            cell: (
                1 + sum(above[other, cell] for other in cells if other != cell),
                len(cells) - sum(above[cell, other] for other in cells if other != cell),
            )
            for cell in cells
        }

    def _runs(self, cell: Cell, metric: str, tokens: int | None = None) -> dict[int, TrialResults]:
        """The runs of a cell that have the metric, by seed; for the teacher the first one that does."""
        if cell == TEACHER:
            found = [run for run in self.found.trials if not math.isnan(self._value(run, cell, metric))]
            return {0: found[0]} if found else {}
        trials = [run for run in self.found.trials if run.trial.cell == cell]
        if tokens is not None:
            trials = [run.milestones[tokens] for run in trials if tokens in run.milestones]
        of_cell = {run.trial.seed: run for run in trials}
        return {seed: run for seed, run in of_cell.items() if not math.isnan(self._value(run, cell, metric))}

    def _value(self, run: TrialResults, cell: Cell, metric: str) -> float:
        """The metric of one run; NaN where it was not measured."""
        if metric in HELD_OUT:
            return number(run.held_out.get(metric)) if cell != TEACHER else math.nan
        return number(COLUMN[metric].value(run.results(_model(cell))))

    def _drawn(self, run: TrialResults, cell: Cell, metric: str) -> Draws | None:
        """The metric of one run over resamples of the examples."""
        if metric in HELD_OUT:
            return self._held_out(run, metric)
        return COLUMN[metric].draws(self._resampled.get((run.folder, _model(cell)), {}))

    @cached_property
    def _resampled(self) -> dict[tuple[Path, str], dict[tuple[str, str], Mean]]:
        """The scores of examples of every run and model: of the same prompts, the same resamples, drawn once."""
        every = {
            (run.folder, model, *key): one
            for trial in self.found.trials
            for run in (trial, *trial.milestones.values())
            for model in ("student", "teacher")
            for key, one in series_of(run.results(model)).items()
        }
        found: dict[tuple[Path, str], dict[tuple[str, str], Mean]] = {}
        for (folder, model, task, metric), drawn in resample(every, draws=self.draws).items():
            found.setdefault((folder, model), {})[task, metric] = drawn
        return found

    def _held_out(self, run: TrialResults, metric: str) -> Draws | None:
        """A held-out metric over resamples of the batches of text; None of too few."""
        sums = run.held_out_sums
        if len(sums) < FEWEST:
            return None
        pairing = ("held-out text", *(batch["tokens"] for batch in sums))
        series = {key: Series([batch[key] for batch in sums], pairing, bounds=None) for key in sums[0]}
        means = {key: drawn.values for key, drawn in resample(series, draws=self.draws).items()}
        if metric == "perplexity":
            return Draws.of(np.exp(means["ce"] / means["next_tokens"]))
        return Draws.of(means["kl" if metric == "kl" else "agree"] / means["tokens"])

    def _estimate(
        self,
        values: Mapping[int, float],
        drawn: Mapping[int, Draws | None],
        metric: str,
        used: Sequence[tuple[Cell, TrialResults]],
    ) -> Estimate | None:
        if not values:
            return None
        value = float(np.mean(list(values.values())))
        known = [one for one in drawn.values() if one is not None]
        draws = Draws.of(np.full(self.draws, value))
        if len(known) == len(drawn):
            draws = Draws.weighted((1 / len(known), one) for one in known)
        if len(values) > 1:
            deviation = float(np.std(list(values.values()), ddof=1))
            name = repr((metric, sorted(values), sorted({cell.name for cell, _ in used})))
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
            # Student's quantiles themselves, in a random order: as many draws would have ragged tails.
            moves = stdtrit(len(values) - 1, (np.arange(self.draws) + 0.5) / self.draws)
            draws = draws + rng.permutation(moves) * deviation / math.sqrt(len(values))
        sources = dict.fromkeys(file for cell, run in used for file in self.sources(run, cell, metric))
        return Estimate(
            value,
            draws.interval(self.confidence),
            tuple(sorted(values)),
            self._examples(used, metric),
            tuple(sources),
        )

    def _examples(self, used: Sequence[tuple[Cell, TrialResults]], metric: str) -> int:
        """Of the tasks of a run together, or batches of held-out text; where runs differ, the fewest."""
        if metric in HELD_OUT:
            return min(len(run.held_out_sums) for _, run in used)
        tasks = [task for task, _, _ in COLUMN[metric].parts]
        return min(sum(run.results(_model(cell))[task].n for task in tasks) for cell, run in used)

    def sources(self, run: TrialResults, cell: Cell, metric: str) -> list[str]:
        """The files that a metric of a run comes from."""
        if metric in HELD_OUT:
            return [self.found.source(run.folder / "evaluation.json")]
        tasks = dict.fromkeys(task for task, _, _ in COLUMN[metric].parts)
        return [self.found.source(run.kept[_model(cell)][task].path) for task in tasks]


def within(limits: tuple[float, float], found: tuple[float, float]) -> tuple[float, float]:
    """The part of an interval that a number can be in: seeds' own knows no bounds."""
    low, high = (min(max(value, limits[0]), limits[1]) for value in found)
    return low, high


def _model(cell: Cell) -> str:
    return "teacher" if cell == TEACHER else "student"
