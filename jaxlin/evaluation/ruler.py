"""RULER's single-needle tasks S-NIAH-1, 2 and 3 (Hsieh et al. 2024, arXiv 2404.06654, table 2).

Prompts are those of lm-eval 0.4.13's `niah_single_1` to `niah_single_3` for the same seed, tokenizer, word lists and
haystack, one length a run. The numbers that choose a prompt's contents come from one generator in a fixed order, so
that order is part of the definition. Two things to know about it:

- The haystack grows by 500 words (S-NIAH-2, 3). Where not even 500 fit, as at 512 tokens, it is a single word, and the
  task hardly more than copying the needle.
- `length` counts the prompt without the first words of the answer, which it ends with, and 128 tokens for the answer.

The haystack is `ruler/haystack.txt` under `--data` (any long text), or RULER's own essays, as `PaulGrahamEssays.json`
there, or baber/paul_graham_essays from the hub. A task is one variant at one length: `niah_single_2_4096`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlin.config import UserError
from jaxlin.evaluation.haystack import ESSAYS, read_haystack, split_sentences, word_pairs
from jaxlin.evaluation.niah import NOISE, Needle, Sample, magic_number
from jaxlin.evaluation.prompts import encode
from jaxlin.evaluation.punkt import require_punkt
from jaxlin.evaluation.scoring import continuations
from jaxlin.evaluation.task import Options, Result, Task, files_sha256, sha256_of
from jaxlin.runs import Teacher

ANSWER_TOKENS = 128
COUNT = 500  # questions of each length
LENGTHS = (512, 1024, 2048, 4096)
SHORT_LENGTHS = (256,)
LONG_LENGTHS = (8192, 16384, 32768)
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of the essay's sentences
HAYSTACKS = ("haystack.txt", "PaulGrahamEssays.json")  # under `--data`, in its folder `ruler`
VERSION = "lm-eval 0.4.13"


@dataclass(frozen=True)
class Variant:
    """One of the tasks: what repeats, and what is hidden in it."""

    essay: bool
    kind: str


VARIANTS = {
    "niah_single_1": Variant(essay=False, kind="number"),
    "niah_single_2": Variant(essay=True, kind="number"),
    "niah_single_3": Variant(essay=True, kind="uuid"),
}


def samples(
    variant: Variant,
    tokenizer: Any,
    length: int,
    count: int = COUNT,
    *,
    seed: int = 0,
    keys: Sequence[str],
    essay: Sequence[str] = (),
    chat: bool = False,
) -> list[Sample]:
    """`count` questions of at most `length` tokens; the first ones are the same for every `count`.

    Args:
        variant: one of VARIANTS.
        tokenizer: counts and encodes tokens, with the special tokens that it adds by itself.
        length: tokens of prompt and answer.
        keys: words to choose the needle's from, `word_pairs()` for RULER's.
        essay: the haystack's words, for variants that need them.
        chat: put the questions into the tokenizer's chat template, which does not count as a part of their length.

    Raises:
        UserError: `length` has no room for a question, or `essay` too few words for it.
    """
    rng = random.Random(seed)
    draw = functools.partial(_draw, variant, rng, keys, essay)
    repeats = 5 if length < 4096 else 25
    step = 500 if variant.essay else repeats
    size = _haystack_size(draw, tokenizer, length, step, len(essay) if variant.essay else length)
    return [_fitting(draw, tokenizer, length, size, step, chat) for _ in range(count)]


def _haystack_size(draw: Callable, tokenizer: Any, length: int, step: int, most: int) -> int:
    """How many units of haystack, of `most` that there are, a prompt of `length` tokens holds: n x `step`, else 1."""
    size, tokens = step, 0
    while tokens + ANSWER_TOKENS < length:
        needle, text = draw(size)
        tokens = _count(tokenizer, text + needle.value)
        if tokens + ANSWER_TOKENS > length:
            size -= step
            break
        if size > most:
            raise UserError(f"the haystack: {most} words are too few for prompts of {length} tokens")
        size += step
    return max(size, 1)


def _fitting(draw: Callable, tokenizer: Any, length: int, size: int, step: int, chat: bool) -> Sample:
    """A question with `size` units of haystack, or fewer where its needle is longer than that leaves room for."""
    while size > 0:
        needle, text = draw(size)
        if _count(tokenizer, text) + ANSWER_TOKENS <= length:
            tokens = encode(tokenizer, text, chat=chat, prefix=needle.prefix)
            return Sample(f"{text} {needle.prefix}", tokens, needle.value)
        size -= step
    raise UserError(f"a needle-in-a-haystack prompt of {length} tokens: no room for the question and its answer")


def _draw(
    variant: Variant, rng: random.Random, keys: Sequence[str], essay: Sequence[str], size: int
) -> tuple[Needle, str]:
    """A needle and its question, in a haystack of `size` words or repetitions."""
    key = rng.choice(keys)
    value = magic_number(rng) if variant.kind == "number" else str(uuid.UUID(int=rng.getrandbits(128), version=4))
    needle = Needle(variant.kind, key, value)
    if variant.essay:
        sentences = split_sentences(" ".join(essay[:size]).strip())
        at = int(len(sentences) * (rng.sample(DEPTHS, 1)[0] / 100))
        context = " ".join([" ".join(sentences[:at]), needle.sentence, " ".join(sentences[at:])])
    else:
        units = [" ".join(NOISE)] * size
        units.insert(rng.sample(range(size), 1)[0], needle.sentence)
        context = "\n".join(units)
    rng.sample(range(1), 1)  # RULER chooses which of its needles to ask for, even of one
    return needle, needle.question(context)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def measure(name: str, length: int, model: Teacher, options: Options) -> Result:
    """The share of questions whose magic value is in the answer."""
    variant, haystack = VARIANTS[name], _haystack(VARIANTS[name], options)
    count = COUNT if options.limit is None else options.limit
    essay = read_haystack(haystack) if variant.essay else []
    questions = samples(
        variant,
        model.tokenizer,
        length,
        count,
        seed=options.seed,
        keys=word_pairs(),
        essay=essay,
        chat=options.chat,
    )
    task = f"{name}_{length}"
    answers = continuations(
        model,
        [question.tokens for question in questions],
        ANSWER_TOKENS,
        stop_ids=(model.tokenizer.eos_token_id,),
        batch_tokens=options.budget,
        mesh=options.mesh,
        progress=options.bar(task, count),
    )
    texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    found = [float(question.answered(text)) for question, text in zip(questions, texts, strict=True)]
    mean_length = sum(len(question.tokens) for question in questions) / count
    where = f", haystack {haystack.name if haystack else ESSAYS}" if variant.essay else ""
    return Result(
        task=task,
        metrics={} if options.predict_only else {"acc": sum(found) / count},
        per_example={} if options.predict_only else {"acc": found},
        n=count,
        note=f"prompts of {mean_length:.0f} tokens on average{where}" + ", chat template" * options.chat,
        version=VERSION,
        data_sha256=files_sha256([haystack]) if haystack else "",
        prompts_sha256=sha256_of([question.tokens for question in questions]),
        seed=options.seed,
        predictions=[{"answer": text, "right": q.value} for text, q in zip(texts, questions, strict=True)],
    )


def _haystack(variant: Variant, options: Options) -> Path | None:
    """The file that the haystack is in; None where it is the hub's, or not needed."""
    if options.data is None or not variant.essay:
        return None
    for folder in (options.data / "ruler", options.data / "eval" / "ruler"):
        for name in HAYSTACKS:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"--data {options.data}: the needle tasks want a haystack, ruler/{HAYSTACKS[0]}: any long text will do"
    )


def fingerprint(name: str, length: int, options: Options) -> str:
    """Data and definition. Raises UserError where something is missing."""
    variant, haystack = VARIANTS[name], _haystack(VARIANTS[name], options)
    word_pairs()
    if variant.essay:
        require_punkt(options.data)
        read_haystack(haystack)
    words = importlib.metadata.version("wonderwords")
    return sha256_of([VERSION, name, length, words, files_sha256([haystack]) if haystack else ESSAYS])


def _tasks(lengths: Sequence[int]) -> dict[str, Task]:
    return {
        f"{name}_{n}": Task(f"{name}_{n}", functools.partial(measure, name, n), functools.partial(fingerprint, name, n))
        for name in VARIANTS
        for n in lengths
    }


TASKS = _tasks(LENGTHS)
SHORT_TASKS = _tasks(SHORT_LENGTHS)
LONG_TASKS = _tasks(LONG_LENGTHS)
EVERY_TASK = {**SHORT_TASKS, **TASKS, **LONG_TASKS}
