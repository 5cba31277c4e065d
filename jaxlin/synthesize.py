"""A teacher's answers to prompts, as conversations to train on.

Command: `python -m jaxlin.synthesize --teacher T --prompts FILE ... --out chats.jsonl`.

Prompts are taken in windows, whose samples are sorted by length and cut into batches. The batches depend on prompts and
settings alone, and each sample draws from random numbers of its own: a run that was stopped and started again writes
the same file, byte for byte. With another batch size a sample meets other padding, so only rounding may change it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlin import generate, sources
from jaxlin.command_line import parse, run_main
from jaxlin.config import UserError
from jaxlin.conversations import Conversation, read_conversations
from jaxlin.evaluation.scoring import padded_length
from jaxlin.filters import NearDuplicates, ends_in_loop, normalized, repetition
from jaxlin.runs import Teacher, write_text
from jaxlin.turns import Message, answer_ends, encode, render, system_message

WINDOW = 16  # batches whose prompts are sorted by length together
FREE = ("prompts", "out", "batch_size")  # settings that may differ when a file is continued


@dataclass(frozen=True)
class Settings(generate.GenerationSettings):
    """Write a teacher's answers to prompts as conversations to train on; the same command continues."""

    prompts: tuple[str, ...] = ()
    """Text sources, as --text of training; or conversations, each up to its last user turn (a .jsonl with messages)."""
    out: str = ""
    """The conversations, .jsonl; beside it OUT.rejected.jsonl and OUT.report.json."""
    prompt_field: str = "prompt"
    """Field of a record that holds the prompt; "messages" reads conversations from any source that training does."""
    system: str = ""
    """System prompt of conversations that have none; empty leaves it to the chat template."""
    samples: int = 1
    """Answers to each prompt; more than one need --temperature."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out."""
    keep_unfinished: bool = False
    """Keep answers that max_new_tokens cut off."""
    max_repetition: float = 0.3
    """Largest share of an answer's word 4-grams that were there before."""
    max_identical: int = 3
    """Most answers of the same text."""
    near_duplicates: float = 0.8
    """Leave out prompts whose word triples are to this share another's (Jaccard index); 1 is exact duplicates only."""
    batch_size: int = 16
    """Answers that are written together."""

    def check(self) -> None:
        """Refuse values out of range, before the model is loaded."""
        super().check()
        if not self.prompts:
            raise UserError("--prompts: give at least one file, folder or dataset")
        if not self.out:
            raise UserError("--out: give the file to write, such as chats.jsonl")
        for flag in ("samples", "max_prompt_tokens", "max_identical", "batch_size"):
            if (value := getattr(self, flag)) < 1:
                raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples {self.samples}: all alike at temperature 0; set --temperature above it")
        for flag, value in (("max-repetition", self.max_repetition), ("near-duplicates", self.near_duplicates)):
            if not 0 <= value <= 1:
                raise UserError(f"--{flag} {value}: must be from 0 to 1")


@dataclass(frozen=True)
class Job:
    """One answer to write."""

    id: str
    messages: list[Message]
    source: str
    tokens: list[int]

    @property
    def stream(self) -> int:
        """The number of its random numbers' stream."""
        return int(hashlib.sha256(self.id.encode()).hexdigest()[:8], 16)


# ---- prompts


def conversations(name: str, field: str) -> Iterator[list[Message]]:
    """The conversations of one source, each up to its last user turn; a text is one user turn."""
    if field == "messages" or _holds_messages(name):
        yield from map(_up_to_last_user, read_conversations([name], "--prompts"))
        return
    read = sources.Field(field, flag="--prompts", remedy="; set --prompt-field")
    opened = sources.open_text([name], read, end_of_text=-1, vocab_size=1 << 32)
    parts = [shard.read(0) for shard in opened] if isinstance(opened, list) else [_documents(opened)]
    for text in itertools.chain.from_iterable(parts):
        if not isinstance(text, str):
            raise UserError(f"--prompts {name}: holds tokens; give the text itself")
        yield [{"role": "user", "content": text.strip()}]


def _documents(documents: sources.Documents) -> Iterator[sources.Document]:
    return (documents[i] for i in range(len(documents)))


def _holds_messages(name: str) -> bool:
    """Whether the first record of a .jsonl has a conversation."""
    path = Path(name)
    if not name.endswith(".jsonl") or not path.is_file():
        return False
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        record = json.loads(first)
    except ValueError:
        return b'"messages"' in first
    return isinstance(record, dict) and "messages" in record


def _up_to_last_user(conversation: Conversation) -> list[Message]:
    turns = [{"role": m["role"], "content": m["content"]} for m in conversation.messages]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns


def jobs(settings: Settings, tokenizer: Any, counts: Counter[str]) -> Iterator[Job]:
    """What is to be answered, in the order of the sources; `counts` learns of prompts read and left out."""
    seen: set[str] = set()
    near = NearDuplicates(settings.near_duplicates)
    for name in settings.prompts:
        for messages in conversations(name, settings.prompt_field):
            counts["prompts"] += 1
            text = "\n".join(normalized(m["content"]) for m in messages if m["role"] != "system")
            if messages and messages[0]["role"] != "system":
                messages = [*system_message(settings.system), *messages]
            key = _digest(text)
            if not messages or not messages[-1]["content"].strip():
                counts["empty_prompt"] += 1
            elif key in seen:
                counts["duplicate_prompt"] += 1
            elif settings.near_duplicates < 1 and near.add(text):
                counts["near_duplicate_prompt"] += 1
            else:
                seen.add(key)
                tokens = encode(tokenizer, render(tokenizer, messages))
                if len(tokens) > settings.max_prompt_tokens:
                    counts["long_prompt"] += 1
                    continue
                digest = _digest(json.dumps(messages))
                yield from (Job(f"{digest}-{n}", messages, name, tokens) for n in range(settings.samples))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batches(found: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Jobs of like length, `size` at a time."""
    remaining = iter(found)
    while window := list(itertools.islice(remaining, WINDOW * size)):
        window.sort(key=lambda job: len(job.tokens))  # a stable sort: the order is the sources' among equals
        yield from (window[i : i + size] for i in range(0, len(window), size))


# ---- answers


class Output:
    """The files of a run: what was kept, what was rejected and why, and the report."""

    def __init__(self, settings: Settings) -> None:
        """Opens or continues them. Raises UserError for files of another run."""
        self._settings = settings
        out = Path(settings.out)
        self._kept, self._rejected, self._report = (
            Path(f"{out}{end}") for end in ("", ".rejected.jsonl", ".report.json")
        )
        self._check()
        self.done: set[str] = set()
        self.texts: Counter[str] = Counter()  # digests of answers kept
        self.counts: Counter[str] = Counter()
        write_text(self._report, json.dumps({"settings": self._numbers(), "finished": False}, indent=1))
        for path in (self._kept, self._rejected):
            for record in _repaired(path):
                self._count(record)

    def _numbers(self) -> dict[str, Any]:
        """Settings as JSON reads them."""
        return json.loads(json.dumps(dataclasses.asdict(self._settings)))

    def _check(self) -> None:
        out, new = self._settings.out, self._numbers()
        if not self._report.exists():
            if self._kept.exists():
                raise UserError(f"--out {out}: exists, and {self._report.name} does not; choose another file")
            return
        try:
            old = json.loads(self._report.read_text())["settings"]
        except (ValueError, KeyError):
            raise UserError(f"--out {out}: {self._report.name} is damaged; choose another file") from None
        if different := [name for name in new if name not in FREE and old.get(name, new[name]) != new[name]]:
            name = different[0]
            raise UserError(
                f"--out {out}: was written with another --{name.replace('_', '-')} ({old.get(name)}, now {new[name]}); "
                "choose another file, or delete this one and its report"
            )

    def _count(self, record: dict[str, Any]) -> None:
        self.done.add(record["id"])
        self.counts[record.get("reason", "kept")] += 1
        if "reason" not in record:
            self.texts[_digest(normalized(record["messages"][-1]["content"]))] += 1

    def add(self, job: Job, text: str, reason: str | None, *, unfinished: bool) -> None:
        """Keep the answer `text`, or say for which `reason` it is not."""
        if reason is None and self.texts[_digest(normalized(text))] >= self._settings.max_identical:
            reason = "identical_response"
        messages = [*job.messages, {"role": "assistant", "content": text}]
        record = {"messages": messages, "source": job.source, "id": job.id}
        record |= {"unfinished": True} if unfinished else {}
        record |= {"reason": reason} if reason else {}
        with (self._rejected if reason else self._kept).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._count(record)

    def finish(self, counts: Counter[str]) -> dict[str, int]:
        """Write the report; what was counted."""
        total = dict(counts + self.counts)
        report = {"settings": self._numbers(), "finished": True, "counts": total}
        write_text(self._report, json.dumps(report, indent=1))
        return total


def _repaired(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of ours, which is made if it is not there; half a last line is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                os.truncate(path, end)
                return
            end += len(line)
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: is damaged ({error}); delete the line") from None
            yield record


def judge(tokens: list[int], text: str, settings: Settings, *, unfinished: bool) -> str | None:
    """Why an answer is not worth learning from, or None."""
    if not text:
        return "empty_response"
    if ends_in_loop(tokens):
        return "loop"
    if unfinished and not settings.keep_unfinished:
        return "unfinished"
    return "repetition" if repetition(text) > settings.max_repetition else None


def synthesize(model: Teacher, settings: Settings) -> dict[str, int]:
    """Answer all prompts into the output's files, going on where they end; the counts, by reason."""
    counts = Counter[str]()
    ends = answer_ends(model.tokenizer)
    every = batches(jobs(settings, model.tokenizer, counts), settings.batch_size)
    first = list(itertools.islice(every, 1))  # what is wrong with prompts is said before a file is made
    if not first:
        why = ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "no prompts"
        raise UserError(f"--prompts {' '.join(settings.prompts)}: nothing to answer ({why}); give others")
    output = Output(settings)
    params = generate.serving_params(model.params, model.config)
    for batch in itertools.chain(first, every):
        if all(job.id in output.done for job in batch):
            continue
        answers = _answers(model, params, batch, ends, settings)
        for job, tokens in zip(batch, answers, strict=True):
            if job.id not in output.done:
                text = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                unfinished = len(tokens) == settings.max_new_tokens
                reason = judge(tokens, text, settings, unfinished=unfinished)
                output.add(job, text, reason, unfinished=unfinished)
        print(", ".join(f"{n} {name}" for name, n in sorted(output.counts.items())), flush=True)
    return output.finish(counts)


def _answers(model: Teacher, params: Any, batch: list[Job], ends: tuple[int, ...], settings: Settings):
    """New tokens of each job. The batch is filled up with its first job, so that all have one of few shapes."""
    rows = batch + batch[:1] * (settings.batch_size - len(batch))
    count = len(batch)
    answers = generate.generate(
        model.config,
        params,
        [job.tokens for job in rows],
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        seed=settings.seed,
        stop_ids=ends,
        finished=ends_in_loop,
        pad_to=padded_length(max(len(job.tokens) for job in batch)),
        streams=[job.stream for job in rows],
    )
    return answers[:count]


def main() -> None:
    """Entry point of `python -m jaxlin.synthesize`."""
    settings = parse(Settings)
    settings.check()
    counts = synthesize(settings.load(), settings)
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:8,} {name.replace('_', ' ')}")


if __name__ == "__main__":
    run_main(main, resumes="the same command goes on")
