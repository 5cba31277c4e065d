"""The quick suite: minutes, no downloads. Enough to see whether a student works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxlin.evaluation import niah
from jaxlin.evaluation.language_modeling import perplexity, summary
from jaxlin.evaluation.speed import speed
from jaxlin.evaluation.subject import Subject, answerer

NIAH_LENGTHS = (128, 256)
SAMPLES = 8


def held_out(subject: Subject, limit: int) -> dict[str, dict[str, Any]]:
    """Perplexity of each model on held-out text; KL and agreement of a student with its teacher."""
    teacher = subject.models["teacher"]
    if subject.run is None:
        found = perplexity(teacher.config, teacher.params, subject.batches, mesh=subject.mesh)
        return {"teacher": {"perplexity": found["perplexity"]}}
    found = summary(subject.held_out_sums)
    return {
        "teacher": {"perplexity": found["teacher_perplexity"]},
        "student": {name: found[name] for name in ("perplexity", "kl", "agreement")},
    }


def needle(subject: Subject, limit: int) -> dict[str, dict[str, Any]]:
    """S-NIAH-1 by prompt length."""
    return {
        name: niah.scores(answerer(model, niah.ANSWER_TOKENS, subject.mesh), model.tokenizer, NIAH_LENGTHS, limit)
        for name, model in subject.models.items()
    }


def timing(subject: Subject, limit: int) -> dict[str, dict[str, Any]]:
    """Tokens per second, forward and decoding."""
    return {name: speed(model, subject.batches[0], subject.mesh) for name, model in subject.models.items()}


# Each takes the subject and a number of samples, and gives {"teacher": {metric: value}, "student": {...}}.
TASKS: dict[str, Callable[[Subject, int], dict[str, dict[str, Any]]]] = {
    "held_out": held_out,
    "niah_single_1": needle,
    "speed": timing,
}
