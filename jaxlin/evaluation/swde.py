"""SWDE: find a value in the text of a web page (Lockard et al. 2019; as Arora et al. 2024, arXiv 2402.18668, use it).

The definition is lm-eval 0.4.13's task `swde`, version 1: the prompt is the row's text, which ends with the attribute's
name, and the answer, of one line and 48 tokens at most, is right where it holds the row's value in either case.

Data: `swde/validation.jsonl` under `--data`, or hazyresearch/based-swde-v2 from the hub; rows with `text` and `value`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jaxlin.evaluation.prompts import encode
from jaxlin.evaluation.records import rows
from jaxlin.evaluation.scoring import continuations
from jaxlin.evaluation.task import Options, Result, Task, data_folder, files_sha256, sha256_of
from jaxlin.runs import Teacher

HUB = ("hazyresearch/based-swde-v2", "default", "validation")
VERSION = "lm-eval swde 1"
FIELDS = {"text": str, "value": str}
ANSWER_TOKENS = 48
STOP = "\n"


@dataclass(frozen=True)
class Question:
    """A page up to the attribute's name, and the attribute's value."""

    prompt: str
    value: str


def load(path: Path | None, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a .jsonl file, or of the hub's dataset where `path` is None.

    Raises UserError where they cannot be read, or a row lacks a field.
    """
    return [Question(row["text"].strip(), row["value"].strip()) for row in rows(path, HUB, FIELDS)[:limit]]


def contains(answer: str, value: str) -> float:
    """1 where the first line of `answer` holds `value`, in either case, else 0."""
    return float(re.search(re.escape(value), answer.split(STOP)[0], re.IGNORECASE) is not None)


def measure(model: Teacher, options: Options) -> Result:
    """The share of questions whose answer holds the value."""
    path = _file(options)
    questions = load(path, options.limit)
    most = model.config.max_position_embeddings - ANSWER_TOKENS
    prompts = [encode(model.tokenizer, question.prompt, chat=options.chat)[-most:] for question in questions]
    answers = continuations(
        model,
        prompts,
        ANSWER_TOKENS,
        stop_ids=(model.tokenizer.eos_token_id,),
        stop_strings=(STOP,),
        batch_tokens=options.budget,
        mesh=options.mesh,
        progress=options.bar("swde", len(questions)),
    )
    texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    found = [contains(text, question.value) for text, question in zip(texts, questions, strict=True)]
    return Result(
        task="swde",
        metrics={} if options.predict_only else {"contains": sum(found) / len(found)},
        per_example={} if options.predict_only else {"contains": found},
        n=len(questions),
        note=f"prompts of {most} tokens at most, cut on the left" + ", chat template" * options.chat,
        version=VERSION,
        data_sha256=files_sha256([path]) if path else "",
        prompts_sha256=sha256_of(prompts),
        predictions=[{"answer": text, "value": q.value} for text, q in zip(texts, questions, strict=True)],
    )


def _file(options: Options) -> Path | None:
    return None if options.data is None else data_folder(options, "swde") / "validation.jsonl"


def fingerprint(options: Options) -> str:
    """Data and definition. Raises UserError where the data is missing."""
    path = _file(options)
    load(path, 1)
    return sha256_of([VERSION, files_sha256([path]) if path else HUB])


TASKS = {"swde": Task("swde", measure, fingerprint)}
