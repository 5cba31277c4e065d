"""The paper's five subsets of LongBench (Bai et al. 2024, arXiv 2308.14508), with LongBench's own prompts and metrics.

The question-answering subsets and TriviaQA are scored by F1 over normalized words, TREC by the class that the answer
names. Of TREC's and TriviaQA's answers the first line counts. A prompt that is too long loses its middle.
With --chat, the prompts without examples are put into the chat template, as LongBench does.

lm-eval's tasks differ in three things: they cut prompts on the left, put one line break less into TriviaQA's prompt,
and end TREC's and TriviaQA's answers at a line break that comes first.

Data: `longbench/SUBSET.jsonl` under `--data`, or Xnhyacinth/LongBench from the hub; rows with `input` (or `question`),
`context`, `answers` and, for TREC, `all_classes`. Where `--data` has only a `longbench_mini`, that is measured, and the
result says that it is a sample.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlin.config import UserError
from jaxlin.evaluation.prompts import encode
from jaxlin.evaluation.records import rows
from jaxlin.evaluation.scoring import continuations
from jaxlin.evaluation.task import Options, Result, Task, data_folder, files_sha256, sha256_of
from jaxlin.runs import Teacher

HUB = "Xnhyacinth/LongBench"
MINI = "longbench_mini"
VERSION = "LongBench 1"
FIELDS = {"context": str, "answers": list}


@dataclass(frozen=True)
class Question:
    """One row: the prompt's parts, and what counts as right."""

    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Subset:
    """How a subset is asked (a template of context and question), for how many tokens, and scored.

    Where the prompt holds examples (`few_shot`), the first line of the answer counts.
    """

    template: str
    answer_tokens: int
    metric: Callable[[str, str, Sequence[str]], float]
    few_shot: bool = False

    def prompt(self, row: Question) -> str:
        """The whole prompt; braces in the row's texts mean nothing."""
        return self.template.format(context=row.context, question=row.question)

    def score(self, answer: str, row: Question) -> float:
        """The best over the right answers."""
        if self.few_shot:
            answer = answer.lstrip("\n").split("\n")[0]
        return max(self.metric(answer, right, row.classes) for right in row.answers)


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Harmonic mean of precision and recall over words; 0 where none is shared."""
    found, wanted = words(answer), words(right)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def classification(answer: str, right: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that `answer` names, where the right one is among them.

    A named class that is part of the right one's name does not count, unless the class before it did not either:
    LongBench removes from the list that it walks along, so it steps over the next one.
    """
    named = [name for name in classes if name in answer]
    at = 0
    while at < len(named):
        if named[at] in right and named[at] != right:
            del named[at]
        at += 1
    return 1 / len(named) if right in named else 0.0


SUBSETS = {
    "2wikimqa": Subset(
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nThe following are given passages.\n{context}\n\n"
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nQuestion: {question}\nAnswer:",
        32,
        f1,
    ),
    "multifieldqa_en": Subset(
        "Read the following text and answer briefly.\n\n{context}\n\n"
        "Now, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {question}\nAnswer:",
        64,
        f1,
    ),
    "narrativeqa": Subset(  # "asconcisely" is LongBench's
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation."
        "\n\nStory: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. "
        "Do not provide any explanation.\n\nQuestion: {question}\n\nAnswer:",
        128,
        f1,
    ),
    "trec": Subset(
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\n{context}\n{question}",
        64,
        classification,
        few_shot=True,
    ),
    "triviaqa": Subset(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{question}",
        32,
        f1,
        few_shot=True,
    ),
}


def load(name: str, path: Path | None, limit: int | None = None) -> list[Question]:
    """The first `limit` rows of subset `name`, from a .jsonl file, or from the hub where `path` is None.

    Raises UserError where they cannot be read, or a row lacks a field.
    """
    fields = FIELDS | ({"all_classes": list} if SUBSETS[name].metric is classification else {})
    found = rows(path, (HUB, name, "test"), fields)[:limit]
    return [_question(row, f"{path or HUB} ({name}), row {number}") for number, row in enumerate(found, 1)]


def _question(row: dict[str, Any], where: str) -> Question:
    question = row.get("input", row.get("question"))
    if not isinstance(question, str):
        raise UserError(f"{where}: no field 'input' or 'question' with the question")
    if not row["answers"]:
        raise UserError(f"{where}: no answers")
    return Question(row["context"], question, tuple(row["answers"]), tuple(row.get("all_classes") or ()))


def shorten(tokens: list[int], most: int) -> list[int]:
    """Of more than `most` tokens, as many of the beginning as of the end."""
    half = most // 2
    return tokens if len(tokens) <= most else tokens[:half] + tokens[-half:]


def measure(name: str, model: Teacher, options: Options) -> Result:
    """The subset's mean score. Prompts are cut to the model's context."""
    subset, path = SUBSETS[name], _file(name, options)
    questions = load(name, path, options.limit)
    most = model.config.max_position_embeddings - subset.answer_tokens
    chat = options.chat and not subset.few_shot
    prompts = [shorten(encode(model.tokenizer, subset.prompt(q), chat=chat), most) for q in questions]
    task = f"longbench_{name}"
    answers = continuations(
        model,
        prompts,
        subset.answer_tokens,
        stop_ids=(model.tokenizer.eos_token_id,),
        batch_tokens=options.budget,
        mesh=options.mesh,
        progress=options.bar(task, len(questions)),
    )
    texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    found = [subset.score(text, question) for text, question in zip(texts, questions, strict=True)]
    sample = f"{MINI}: a sample of {len(questions)}, not LongBench; " if path and path.parent.name == MINI else ""
    return Result(
        task=task,
        metrics={} if options.predict_only else {"score": sum(found) / len(found)},
        per_example={} if options.predict_only else {"score": found},
        n=len(questions),
        note=f"{sample}prompts of {most} tokens at most, cut in the middle" + ", chat template" * chat,
        version=VERSION,
        data_sha256=files_sha256([path]) if path else "",
        prompts_sha256=sha256_of(prompts),
        predictions=[{"answer": text, "right": q.answers} for text, q in zip(texts, questions, strict=True)],
    )


def _file(name: str, options: Options) -> Path | None:
    if options.data is None:
        return None
    return data_folder(options, "longbench", MINI) / f"{name}.jsonl"


def fingerprint(name: str, options: Options) -> str:
    """Data and definition. Raises UserError where the data is missing."""
    path = _file(name, options)
    load(name, path, 1)
    return sha256_of([VERSION, name, str(path and path.parent.name), files_sha256([path]) if path else HUB])


TASKS = {
    f"longbench_{name}": Task(
        f"longbench_{name}", functools.partial(measure, name), functools.partial(fingerprint, name)
    )
    for name in SUBSETS
}
