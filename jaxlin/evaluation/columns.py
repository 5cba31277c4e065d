"""What runs are compared by: the paper's columns, each a mean of tasks' metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxlin.evaluation import benchmarks, longbench, ruler
from jaxlin.evaluation.bootstrap import Draws, Mean, Series
from jaxlin.evaluation.task import Result

FEWEST = 20  # examples for an interval: of fewer, what is measured decides nothing

Results = Mapping[str, Result]  # of one model, by task


@dataclass(frozen=True)
class Column:
    """A weighted mean of metrics: parts are (task, metric, weight)."""

    name: str
    parts: tuple[tuple[str, str, float], ...]

    def value(self, results: Results) -> float | None:
        """The score, a share; None where a part of it was not measured."""
        total = 0.0
        for task, metric, weight in self.parts:
            found = results[task].metrics.get(metric) if task in results else None
            if found is None:
                return None
            total += weight * found
        return total

    def draws(self, means: Mapping[tuple[str, str], Mean]) -> Draws | None:
        """The score over resamples, from those of the means of its parts; None where one has no scores of examples."""
        if any((task, metric) not in means for task, metric, _ in self.parts):
            return None
        return Draws.of_column([(weight, means[task, metric]) for task, metric, weight in self.parts])


def _mean(name: str, parts: list[tuple[str, str, float]]) -> Column:
    total = sum(weight for _, _, weight in parts)
    return Column(name, tuple((task, metric, weight / total) for task, metric, weight in parts))


def _columns() -> list[Column]:
    zero_shot = [
        _mean(name, [(task, metric, 1.0) for task in tasks]) for name, (tasks, metric) in benchmarks.COLUMNS.items()
    ]
    needles = [_mean(task, [(task, "acc", 1.0)]) for task in ruler.EVERY_TASK]
    long = [_mean(task, [(task, "score", 1.0)]) for task in longbench.TASKS]
    return [
        *zero_shot,
        _mean("average", [part for column in zero_shot for part in column.parts]),
        _mean("average without bear", [part for column in zero_shot if column.name != "bear" for part in column.parts]),
        *needles,
        _mean("niah", [part for column in needles if column.name in ruler.TASKS for part in column.parts]),
        _mean("ifeval", [("ifeval", "prompt_level_strict_acc", 1.0)]),
        _mean("gsm8k", [("gsm8k", "exact_match_strict_match", 1.0)]),
        _mean("swde", [("swde", "contains", 1.0)]),
        *long,
        _mean("longbench", [part for column in long for part in column.parts]),
    ]


COLUMNS = _columns()


def series(results: Results) -> dict[tuple[str, str], Series]:
    """The scores of examples, where there are enough, of every metric that a column needs; paired by their prompts.

    So models are paired whose variants of the same passages were measured on as many.
    """
    wanted = {(task, metric) for column in COLUMNS for task, metric, _ in column.parts}
    scores = {
        (task, metric): values
        for task, metric in sorted(wanted)
        if task in results and len(values := results[task].per_example.get(metric) or []) >= FEWEST
    }
    found = {}
    for (task, metric), values in scores.items():
        alike = [one for one in _same_passages(task) if len(scores.get((one, metric), [])) == len(values)]
        pairing = (metric, len(values), *((one, results[one].prompts_sha256) for one in alike))
        found[task, metric] = Series(values, pairing)
    return found


def _same_passages(task: str) -> tuple[str, ...]:
    """The task and those that ask the same of the same passages, row by row, the first N: LAMBADA's two variants."""
    variants, _ = benchmarks.COLUMNS["lambada"]
    return variants if task in variants else (task,)
