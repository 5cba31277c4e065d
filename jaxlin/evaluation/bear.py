"""BEAR: which of a relation's possible answers does the model find likeliest? (Wiland et al. 2024, arXiv 2404.04113)

Every subject is put into every template with every answer of the relation's answer space, and each sentence scored by
the log-likelihood of all its tokens after a beginning-of-sequence token: lm-pub-quiz 0.3.3 with its defaults for causal
models (`reduction="sum"`). The score is the share of (subject, template) pairs whose right answer comes first.

Data: `bear/BEAR` under `--data`: metadata_relations.json and a .jsonl file a relation; else that folder of
github.com/lm-pub-quiz/BEAR, at the commit that lm-pub-quiz takes.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlin import convert
from jaxlin.config import UserError
from jaxlin.evaluation.records import rows
from jaxlin.evaluation.scoring import Pair, loglikelihoods
from jaxlin.evaluation.task import Options, Result, Task, data_folder, files_sha256, sha256_of
from jaxlin.runs import Teacher

SUBJECT, ANSWER = "[X]", "[Y]"
METADATA = "metadata_relations.json"
FIELDS = {"sub_label": (str, int, float), "answer_idx": int}
VERSION = "lm-pub-quiz 0.3.3"
COMMIT = "725b4e3139d0a5fdf914b0419ba744273dddc689"
ARCHIVE = f"https://github.com/lm-pub-quiz/BEAR/archive/{COMMIT}.zip"

Score = Callable[[list[Pair]], list[tuple[float, bool]]]  # as `loglikelihoods`


@dataclass(frozen=True)
class Relation:
    """One relation: its templates, the answers to choose from, and for each subject the number of the right one."""

    code: str
    templates: tuple[str, ...]
    answers: tuple[str, ...]
    subjects: tuple[str, ...]
    right: tuple[int, ...]


def load(folder: Path, limit: int | None = None) -> list[Relation]:
    """The relations in `folder`, each with its first `limit` subjects.

    Raises UserError naming the file where one is missing or is not what it should be.
    """
    try:
        metadata = json.loads((folder / METADATA).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {METADATA}; it should be the folder BEAR of that dataset") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / METADATA}: cannot be read ({error})") from error
    files = sorted(folder.glob("*.jsonl"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise UserError(f"{folder}: no .jsonl file of a relation")
    return [_relation(path, metadata, limit) for path in files]


def _relation(path: Path, metadata: dict[str, Any], limit: int | None) -> Relation:
    about = metadata.get(path.stem)
    if about is None:
        raise UserError(f"{path.parent / METADATA}: nothing about relation {path.stem}")
    if missing := [name for name in ("templates", "answer_space_labels") if not about.get(name)]:
        raise UserError(f"{path.parent / METADATA}: relation {path.stem} has no {missing[0]}")
    if bad := [template for template in about["templates"] if ANSWER not in template]:
        raise UserError(f"{path.parent / METADATA}: relation {path.stem} has a template without {ANSWER}: {bad[0]!r}")
    found = rows(path, ("", None, ""), FIELDS)[:limit]
    answers = tuple(about["answer_space_labels"])
    for number, row in enumerate(found, 1):
        if not 0 <= row["answer_idx"] < len(answers):
            raise UserError(f"{path}: row {number} has answer {row['answer_idx']} of {len(answers)}")
    subjects = tuple(str(row["sub_label"]) for row in found)
    return Relation(path.stem, tuple(about["templates"]), answers, subjects, tuple(row["answer_idx"] for row in found))


def statement(template: str, subject: str, answer: str) -> str:
    """The template with both labels filled in, and its first letter capitalized."""
    values = {SUBJECT: subject, ANSWER: answer}
    text = re.sub(r"\[[XY]\]", lambda match: values[match.group()], template)
    return text[:1].upper() + text[1:]


def beginning(tokenizer: Any) -> int:
    """The token that a sentence follows: the beginning of a sequence, or what else separates texts."""
    return convert.end_of_text_id(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def sentences(relation: Relation) -> list[str]:
    """Every subject in every template with every answer, in this order."""
    return [
        statement(template, subject, answer)
        for subject in relation.subjects
        for template in relation.templates
        for answer in relation.answers
    ]


def scores(relation: Relation, tokenizer: Any, score: Score) -> np.ndarray:
    """Log-likelihood of each sentence, [subjects, templates, answers]."""
    encoded = tokenizer(sentences(relation), add_special_tokens=False, verbose=False)["input_ids"]
    start = [beginning(tokenizer)]
    found = score([(start, tokens) for tokens in encoded])
    shape = len(relation.subjects), len(relation.templates), len(relation.answers)
    return np.array([log_likelihood for log_likelihood, _ in found]).reshape(shape)


def hits(relation: Relation, likelihoods: np.ndarray) -> np.ndarray:
    """Whether the right answer is the likeliest (the first one, of equals), [subjects, templates]."""
    return likelihoods.argmax(-1) == np.array(relation.right)[:, None]


def measure(model: Teacher, options: Options) -> Result:
    """BEAR's accuracy, over all (subject, template) pairs alike. An example is a subject."""
    folder = _folder(options)
    relations = load(folder, options.limit)
    progress = options.bar("bear", sum(len(r.subjects) * len(r.templates) * len(r.answers) for r in relations))
    right = []
    predictions = []
    for relation in relations:
        likelihoods = scores(
            relation,
            model.tokenizer,
            lambda pairs: loglikelihoods(
                model, pairs, batch_tokens=options.budget, mesh=options.mesh, progress=progress
            ),
        )
        right.append(hits(relation, likelihoods))
        for subject, chosen, answer in zip(relation.subjects, likelihoods.argmax(-1), relation.right, strict=True):
            answers = [relation.answers[i] for i in chosen]
            predictions.append(
                {"relation": relation.code, "subject": subject, "answers": answers, "right": relation.answers[answer]}
            )
    by_subject = [float(value) for found in right for value in found.mean(-1)]
    metrics: dict[str, float | None] = {"acc": float(np.concatenate([found.ravel() for found in right]).mean())}
    return Result(
        task="bear",
        metrics={} if options.predict_only else metrics,
        per_example={} if options.predict_only else {"acc": by_subject},
        n=len(by_subject),
        note="" if options.limit is None else f"first {options.limit} subjects of each relation",
        version=VERSION,
        data_sha256=files_sha256(_files(folder)),
        prompts_sha256=sha256_of([sha256_of("\0".join(sentences(relation))) for relation in relations]),
        predictions=predictions,
    )


def _folder(options: Options) -> Path:
    return fetched() if options.data is None else data_folder(options, "bear/BEAR")


def fetched() -> Path:
    """The dataset's folder in $JAXLIN_CACHE (default ~/.cache/jaxlin), from GitHub where it is not there yet.

    Raises UserError where it cannot be had.
    """
    cache = Path(os.environ.get("JAXLIN_CACHE") or "~/.cache/jaxlin").expanduser()
    target = cache / f"BEAR-{COMMIT[:7]}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".bear-", dir=cache) as temporary:
            part = Path(temporary) / target.name
            part.mkdir()
            with urllib.request.urlopen(ARCHIVE, timeout=60) as answer:
                archive = zipfile.ZipFile(io.BytesIO(answer.read()))
            for name in archive.namelist():
                *_, folder, file = name.split("/")
                if folder == "BEAR" and file.endswith((".jsonl", ".json")):
                    (part / file).write_bytes(archive.read(name))
            load(part, 1)
            part.rename(target)  # whole or not at all
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"bear: {ARCHIVE} cannot be fetched ({error}); give --data DIR with DIR/bear/BEAR") from error
    return target


def _files(folder: Path) -> list[Path]:
    return [folder / METADATA, *folder.glob("*.jsonl")]


def fingerprint(options: Options) -> str:
    """Data and definition. Raises UserError where the data is missing."""
    folder = _folder(options)
    load(folder, 1)
    return sha256_of([VERSION, files_sha256(_files(folder))])


TASKS = {"bear": Task("bear", measure, fingerprint)}
