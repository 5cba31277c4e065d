"""A conversation in the terminal, or through a pipe, a line a turn.

Command: `python -m jaxlin.chat --run DIR`. Answers come on standard output, everything else on standard error. The
model reads each turn once, into its state: a turn costs what is new in it, however long the conversation.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from jaxlin.command_line import parse, run_main, whole_text
from jaxlin.config import UserError
from jaxlin.detokenizer import Detokenizer
from jaxlin.generate import GenerationSettings
from jaxlin.runs import Teacher
from jaxlin.session import Session, serving_params
from jaxlin.turns import Conversation, answer_ends

HELP = "/reset begins anew, /save FILE appends the conversation to FILE, /exit ends; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Settings(GenerationSettings):
    """Talk to a student, or to its teacher. Commands: /reset, /save FILE, /exit."""

    system: str = ""
    """The system prompt; empty leaves it to the chat template."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""


class Chat:
    """A model, and one conversation with it."""

    def __init__(self, model: Teacher, settings: Settings) -> None:
        """Raises UserError for a tokenizer without a usable chat template."""
        self._model, self._settings = model, settings
        self._params = serving_params(model.params, model.config, unroll=bool(settings.unroll))
        self.reset()
        self._ends = answer_ends(model.tokenizer)

    def reset(self) -> None:
        """A new conversation, under the same system prompt."""
        self.conversation = Conversation(self._model.tokenizer, self._settings.system)
        self.session = Session(self._model.config, self._params, seed=self._settings.seed)

    @property
    def outgrown(self) -> bool:
        """Whether the conversation is longer than what the model was made for."""
        return self.session.length > self._model.config.max_position_embeddings

    def answer(self, text: str, stop: threading.Event) -> Generator[str, None, bool]:
        """The answer to the user's `text`, in pieces; `stop` ends it after the next token.

        Returns, as the generator's value, whether it was cut: by `stop` or by max_new_tokens.
        """
        asked = self.conversation.ask(whole_text(text, "this line"))
        self.session.read(asked)
        pieces, detokenizer, count = [], Detokenizer(self._model.tokenizer, asked), 0
        if not stop.is_set():
            for token in self.session.stream(self._settings.sampling, self._settings.max_new_tokens, self._ends):
                count += 1
                if piece := detokenizer.push(token):
                    pieces.append(piece)
                    yield piece
                if stop.is_set():
                    break
        self.conversation.answer("".join(pieces))
        return stop.is_set() or count == self._settings.max_new_tokens

    def save(self, file: str) -> None:
        """Append the conversation to `file`, as a line of JSON that training reads."""
        if not file:
            raise UserError("/save: give a file, /save FILE")
        if not any(message["role"] == "assistant" for message in self.conversation.messages):
            raise UserError(f"/save {file}: nothing was said yet")
        line = json.dumps({"messages": self.conversation.messages}, ensure_ascii=False) + "\n"
        try:
            append(Path(file), line)
        except OSError as error:
            raise UserError(f"/save {file}: cannot be written ({error.strerror})") from None


def append(path: Path, line: str) -> None:
    """Append a line, on a line of its own even where the last one was left without an end."""
    with path.open("a+b") as out:
        if out.tell():
            out.seek(-1, 2)
            line = line if out.read() == b"\n" else "\n" + line
        out.write(line.encode())


def talk(chat: Chat, lines: TextIO, out: TextIO, notices: TextIO) -> None:
    """Answer each line of `lines` on `out`; /commands, and what is no answer, go to `notices`. Ends with the input.

    Where `lines` is a terminal, a mark asks for the next one.
    """
    human = lines.isatty()
    told = False  # of the conversation's length
    if human:
        print(HELP, file=notices)
    while line := _next_line(lines, notices, human):
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/exit":
                return
            if command == "/reset":
                chat.reset()
                told = False
            elif command == "/save":
                chat.save(rest.strip())
                print(f"appended to {rest.strip()}", file=notices)
            elif command.startswith("/"):
                print(f"{command}: unknown; {HELP}", file=notices)
            elif command:
                _answer(chat, line.strip(), out, notices)
                if chat.outgrown and not told:
                    told = True
                    print("[the conversation is longer than what the model was made for: /reset]", file=notices)
        except UserError as error:
            print(f"error: {error}", file=notices)
        notices.flush()


def _next_line(lines: TextIO, notices: TextIO, human: bool) -> str:
    """The next line, empty at the end; at a terminal Ctrl-C drops the line that was being written."""
    while True:
        if human:
            print("> ", end="", file=notices, flush=True)
        try:
            return lines.readline()
        except KeyboardInterrupt:
            if not human:
                raise
            print(file=notices)


def _answer(chat: Chat, text: str, out: TextIO, notices: TextIO) -> None:
    with _interruptible() as stop:
        pieces = chat.answer(text, stop)
        cut = False
        while True:
            try:
                out.write(next(pieces))
                out.flush()
            except StopIteration as end:
                cut = end.value
                break
    out.write("\n")
    out.flush()
    if cut:
        print("[stopped]" if stop.is_set() else "[cut at --max-new-tokens]", file=notices)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event that comes out, so that no state is left half-read; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes no signals
        yield stop
        return

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Entry point of `python -m jaxlin.chat`."""
    settings = parse(Settings)
    settings.check()
    chat = Chat(settings.load(), settings)
    with contextlib.suppress(KeyboardInterrupt):  # there is nothing to resume
        talk(chat, sys.stdin, sys.stdout, sys.stderr)


if __name__ == "__main__":
    run_main(main)
