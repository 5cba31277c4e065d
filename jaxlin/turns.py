"""A conversation as tokens, turn by turn, by the tokenizer's chat template.

A state that goes through a conversation reads each turn once. What it has read is what the template makes of the whole
conversation: an answer stays open until the next turn, whose tokens begin with the template's own end of it, whether
the model had ended it or was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlin import convert
from jaxlin.config import UserError

Message = dict[str, str]
_ANSWER = "answer"  # any word, to see what a template puts behind it


class Conversation:
    """Messages, and the tokens that each turn adds to those before it.

    The tokens are exact where answers are text that the tokenizer would cut into the tokens that the model wrote, and
    where the template does not strip their ends. A character that was cut off is left out of the answer's text.
    """

    def __init__(self, tokenizer: Any, system: str = "") -> None:
        """Raises UserError without a chat template, or for one whose turns change what came before them."""
        self.messages: list[Message] = system_message(system)
        self._tokenizer = tokenizer
        self._read = ""  # the text that is read, but for the last answer
        _check_turns(tokenizer, self.messages)

    def ask(self, text: str) -> list[int]:
        """Tokens up to where the answer to `text` begins: the end of the answer before it, and the user's turn."""
        messages = [*self.messages, {"role": "user", "content": text}]
        whole = render(self._tokenizer, messages)
        answer = self.messages[-1]["content"] if self._read else ""
        rest = _after(_after(whole, self._read), answer)
        self.messages, self._read = messages, whole
        return encode(self._tokenizer, rest)

    def answer(self, text: str) -> None:
        """The answer that was read from the model, whole or cut."""
        self.messages.append({"role": "assistant", "content": text})


def system_message(text: str) -> list[Message]:
    """The message that a conversation begins with, where there is one."""
    return [{"role": "system", "content": text}] if text else []


def render(tokenizer: Any, messages: Sequence[Message], *, answer: bool = True) -> str:
    """The conversation as text; with `answer`, up to where the next answer begins.

    Raises UserError without a chat template, and where the template refuses the conversation.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the model's tokenizer has no chat template: choose an instruction-tuned model, or put its template into "
            "chat_template of tokenizer_config.json (python -m jaxlin.generate continues plain text)"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses a conversation of {roles} ({error})") from None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of rendered text, whose special tokens are written out."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def answer_ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: what the template closes it with, and every special token, being no text."""
    messages = [{"role": "user", "content": _ANSWER}, {"role": "assistant", "content": _ANSWER}]
    closing = render(tokenizer, messages, answer=False).rpartition(_ANSWER)[2]
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = {tokenizer.eos_token_id, convert.end_of_text_id(tokenizer), *added}
    first = encode(tokenizer, closing)[:1]
    if first and first[0] in tokenizer.added_tokens_decoder:  # a word that ends a turn may be a word of the answer too
        known.add(first[0])
    return tuple(sorted(i for i in known if i is not None))


def _after(text: str, beginning: str) -> str:
    """`text` without its beginning, whose ends the template may have stripped, and set off by white space."""
    for whole, start in ((text, beginning), (text, beginning.strip()), (text.lstrip(), beginning.strip())):
        if whole.startswith(start):
            return whole[len(start) :]
    raise UserError(
        "the chat template writes earlier turns differently once a conversation goes on, so no state can be carried "
        "from turn to turn: choose another model or template; /reset begins anew for single turns"
    )


def _check_turns(tokenizer: Any, messages: list[Message]) -> None:
    """Refuse a template that would change earlier turns, at once rather than in the second turn."""
    probe = [*messages, {"role": "user", "content": _ANSWER}]
    more = [*probe, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _ANSWER}]
    before = render(tokenizer, probe)
    _after(_after(render(tokenizer, more), before), _ANSWER)
