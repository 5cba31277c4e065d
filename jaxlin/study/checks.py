"""What a study is refused for before anything runs: settings, suites and questions that cannot be met."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlin.command_line import parse_run
from jaxlin.config import RunConfig, UserError
from jaxlin.evaluation.columns import COLUMNS
from jaxlin.evaluation.report import BENCHMARKS, choose_tasks
from jaxlin.mixers import resolve_options
from jaxlin.sources import files_of
from jaxlin.student import student_config
from jaxlin.study.design import HELD_OUT, Study


def check_sources(study: Study) -> None:
    """Refuse files of text that a run would not find; what comes from elsewhere (hf:, tfds:) is not asked."""
    for flag, names in (("--text", study.text), ("--heldout", study.heldout)):
        for name in names:
            if not name.startswith(("hf:", "tfds:")):
                files_of(name, flag)


def check_suites(study: Study) -> None:
    """Refuse suites and tasks that eval.py does not know, and contrasts of a metric that none of them gives."""
    measured: set[str] = set()
    for suite in study.suites:
        if suite.name == "quick":
            raise UserError("suite quick: train.py measures it at the end of every run; leave it out")
        if suite.limit is not None and suite.limit < 1:
            raise UserError(f"suite {suite.name}: limit {suite.limit} must be at least 1")
        measured |= set(choose_tasks(suite.name, suite.tasks))
    columns = {column.name: [task for task, _, _ in column.parts] for column in COLUMNS}
    for contrast in study.contrasts:
        if contrast.metric not in (*HELD_OUT, *columns):
            raise UserError(
                f"contrast {contrast.name}: {contrast.metric} is none of {', '.join((*HELD_OUT, *columns))}"
            )
        if lacking := [task for task in columns.get(contrast.metric, ()) if task not in measured]:
            suites = dict.fromkeys(name for name, tasks in BENCHMARKS.items() if set(lacking) & set(tasks))
            raise UserError(
                f"contrast {contrast.name}: no suite of the study gives {contrast.metric} ({lacking[0]} is missing); "
                f"add {', '.join(suites) or 'niah_short or niah_long'} to its suites"
            )


def check_settings(name: str, flags: Sequence[str]) -> None:
    """Refuse flags that train.py would for the run `name`: in one line, which says so."""
    try:
        _check_run(parse_run(flags))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _check_run(run: RunConfig) -> None:
    """Budgets, and mixers with their options; of a teacher whose shape is not known before it is loaded, not heads."""
    run.stages()
    for mixer in run.period:
        resolve_options(mixer, run.preset, run.model)
    if run.teacher_config is not None:
        student_config(run, run.teacher_config)
