"""Conversations as training reads them: records checked, rendered with the chat template, their learned tokens marked.

Text and tokens are those of the tokenizer's own `apply_chat_template`. Which of them an assistant wrote is known from
{% generation %} where the template has it (transformers' own mask is taken then). Otherwise an answer is what follows
the generation prompt, up to the last special token of its turn, which ends it. What a template writes after that, such
as a line break, is not learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxlin.command_line import whole_text
from jaxlin.config import UserError
from jaxlin.sources import Field, read_records, record_files

Message = Mapping[str, Any]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Conversation(NamedTuple):
    """One conversation as it was read."""

    where: str
    """File and line, or row."""
    messages: list[dict[str, Any]]


class Rendered(NamedTuple):
    """One conversation as tokens."""

    tokens: np.ndarray
    """int32 [N]."""
    learned: np.ndarray
    """bool [N]: the tokens that are to be predicted."""


def read_conversations(names: Sequence[str], flag: str = "--conversations") -> Iterator[Conversation]:
    """The conversations of the sources `names`, whose records have a list `messages` of {role, content}.

    Raises UserError, with file and line or row, for a record of another kind; `flag` is the setting that names them.
    """
    return read_records(names, replace(_FIELD, flag=flag))


def describe_sources(names: Sequence[str]) -> list[Any]:
    """What changes when a file does: [name, size, time] of each; what hf: names is taken to stay."""
    files = (path for name in names if not name.startswith("hf:") for path in record_files(name, _FIELD))
    return [*names, *([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


def _conversation(value: Any, where: str) -> Conversation:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{where}: field 'messages' is {type(value).__name__}, not a list of messages")
    return Conversation(where, [_message(each, f"{where}, message {n}") for n, each in enumerate(value, 1)])


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected {{role, content}}, found {type(value).__name__}")
    for name in ("role", "content"):
        if value.get(name) is None:
            raise UserError(f"{where}: it has no {name!r}")
        if not isinstance(value[name], str):
            raise UserError(f"{where}: {name!r} is {type(value[name]).__name__}, not text")
        whole_text(value[name], f"{where}: {name!r}")
    # A Parquet file has every field in every row.
    return {name: part for name, part in value.items() if part is not None}


_FIELD = Field("messages", _conversation, "--conversations", "; each record needs a list of {role, content}")


@dataclass(frozen=True)
class Renderer:
    """Conversations to tokens, as one tokenizer and its chat template write them."""

    tokenizer: Any
    loss_on: str
    """"all" learns every token; "assistant" those that an assistant wrote."""
    template: str = field(init=False)
    """The chat template that the tokenizer takes."""

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError("--conversations: the teacher's tokenizer has no chat template; choose an instruct teacher")
        if self.loss_on == "assistant" and not self.tokenizer.is_fast:
            raise UserError("--stage3.loss-on assistant: needs a fast tokenizer, with offsets of tokens")
        try:
            object.__setattr__(self, "template", self.tokenizer.get_chat_template())
        except ValueError as error:  # it has several, none of which is called default
            raise UserError(f"--conversations: the tokenizer's chat templates: {str(error).splitlines()[0]}") from None

    def __call__(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Tokens of conversations that have messages. Raises UserError for what the template refuses."""
        if self.loss_on == "assistant" and GENERATION.search(self.template):
            return [self._with_generation(each) for each in conversations]
        texts = [self._text(each, each.messages) for each in conversations]
        masked = self.loss_on == "assistant"
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=masked, verbose=False)
        if not masked:
            return [_rendered(ids, np.ones(len(ids), bool)) for ids in found["input_ids"]]
        return [
            _rendered(ids, self._learned(each, text, ids, offsets))
            for each, text, ids, offsets in zip(
                conversations, texts, found["input_ids"], found["offset_mapping"], strict=True
            )
        ]

    def _text(self, conversation: Conversation, messages: Sequence[Message], **options: Any) -> str:
        return self._apply(conversation, messages, tokenize=False, **options)

    def _apply(self, conversation: Conversation, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates raise what they like
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise UserError(f"{conversation.where}: the chat template refuses the conversation ({reason})") from error

    def _with_generation(self, conversation: Conversation) -> Rendered:
        found = self._apply(conversation, conversation.messages, return_dict=True, return_assistant_tokens_mask=True)
        return _rendered(found["input_ids"], np.asarray(found["assistant_masks"], bool))

    def _learned(self, conversation: Conversation, text: str, ids: Sequence[int], offsets: Any) -> np.ndarray:
        """The tokens of every answer, of which some character is in it, and what ends it."""
        begins, ends = np.asarray(offsets, int).reshape(-1, 2).T
        special = np.isin(ids, list(self._special_ids))
        learned = np.zeros(len(ids), bool)
        contents = None
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            start = self._length(conversation, text, i, add_generation_prompt=True)
            end = self._length(conversation, text, i + 1)
            if start is None or end is None:
                contents = contents or self._contents(conversation, text)
                start, end = contents[i][0] if start is None else start, contents[i][1]
                end = max([end, *ends[special & (begins == end)]])
            turn = np.flatnonzero((ends > start) & (begins < end))
            closing = turn[special[turn]]
            learned[turn if not len(closing) else turn[turn <= closing[-1]]] = True
        return learned

    def _length(self, conversation: Conversation, text: str, count: int, **options: Any) -> int | None:
        """The length of the first `count` messages, rendered; None where the whole text does not begin as they do."""
        beginning = self._text(conversation, conversation.messages[:count], **options)
        return len(beginning) if text.startswith(beginning) else None

    def _contents(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """The characters of each message, by what the template writes around messages of any content.

        For templates that write a conversation otherwise once it goes on: Qwen3's has an empty block of reasoning
        before the last answer alone. Raises UserError where what is around the messages depends on what they are.
        """
        marks = [f"\ue000{i}\ue001" for i in range(len(conversation.messages))]
        messages = [{**message, "content": mark} for message, mark in zip(conversation.messages, marks, strict=True)]
        before, *behind = re.split("\ue000\\d+\ue001", self._text(conversation, messages))
        at, spans = len(before) if text.startswith(before) else -1, []
        for message, after in zip(conversation.messages, behind, strict=False):
            either = (message["content"], message["content"].strip())
            length = next((len(content) for content in either if text.startswith(content + after, at)), -1)
            if at < 0 or length < 0:
                break
            spans.append((at, at + length))
            at += length + len(after)
        if len(spans) != len(marks) or at != len(text):
            raise UserError(
                f"{conversation.where}: what the chat template writes around messages depends on what they are, so "
                "answers cannot be told apart; use --stage3.loss-on all, or a template with {% generation %}"
            )
        return spans

    @property
    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return set(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def _rendered(ids: Sequence[int], learned: np.ndarray) -> Rendered:
    return Rendered(np.asarray(ids, np.int32), learned)
