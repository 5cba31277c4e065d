"""Chat: a state that went through turns is that of one pass over the conversation; commands, interruption, errors."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading

import numpy as np
import pytest

from jaxlin import chat
from jaxlin.chat import Chat, Settings, talk
from jaxlin.config import UserError
from jaxlin.session import Session
from jaxlin.turns import Conversation, answer_ends, encode, render
from tests import models
from tests.tiny_chat import CHATML, LETTERS, TEMPERATURE, chat_model, chat_tokenizer

NEW = 2


@pytest.fixture(scope="module")
def teacher():
    return chat_model()


@pytest.mark.parametrize(
    "mixer, options", [("softmax", {}), ("gated_deltanet", {"conv_size": 4}), ("mlstm", {"conv_size": 4})]
)
def test_turns_are_one_pass(mixer, options):
    """Answers that ended, that max_new_tokens cut, and that were stopped; softmax's cache has to grow on the way."""
    model = chat_model(mixer, **options)
    conversation = Chat(model, Settings(teacher="x", max_new_tokens=NEW, temperature=TEMPERATURE, seed=2))
    conversation.session = Session(model.config, model.params, seed=2, room=64)
    kinds = set()
    for turn in range(30):
        stop = threading.Event()
        pieces = conversation.answer(f"t{turn}", stop)
        text = ""
        while True:
            try:
                text += next(pieces)
            except StopIteration as end:
                cut = end.value
                break
            if turn % 2:
                stop.set()
        assert cut == (stop.is_set() or len(text) == NEW)
        kinds.add("stopped" if stop.is_set() else "cut" if cut else "ended")
        if len(kinds) == 3:
            break
    assert kinds == {"stopped", "cut", "ended"}
    conversation.session.read(conversation.conversation.ask("last"))

    whole = encode(model.tokenizer, render(model.tokenizer, conversation.conversation.messages))
    assert conversation.session.length == len(whole) > 64
    expected = models.logits(model.config, model.params, np.array([whole]))[:, -1]
    np.testing.assert_allclose(conversation.session.logits, expected, rtol=2e-4, atol=2e-4)


def test_reading_goes_wrong_before_it_begins(teacher):
    session = Session(teacher.config, teacher.params)
    with pytest.raises(ValueError, match="not in a vocabulary"):
        session.read([1, 9999])
    assert session.length == 0
    with pytest.raises(ValueError, match="nothing was read"):
        next(session.stream(Settings().sampling, 1))


# ---- the dialogue


def say(model, *lines, out=None, **settings):
    """(answers, notices) of a scripted conversation."""
    out, notices = out or io.StringIO(), io.StringIO()
    settings = Settings(teacher="x", **dict(max_new_tokens=NEW, temperature=TEMPERATURE, seed=2) | settings)
    talk(Chat(model, settings), io.StringIO("".join(f"{line}\n" for line in lines)), out, notices)
    return out.getvalue(), notices.getvalue()


def test_commands(teacher, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"half":')  # someone else's
    script = ("hi", "", "more", f"/save {file}", "/reset", "hi", "/nonsense", f"/save {file}", "/exit", "unheard")
    answers, notices = say(teacher, *script, system="Be brief.")
    first, second, again, end = answers.split("\n")
    assert first == again and end == "" and set(first + second) <= set(LETTERS)
    half, long, short = file.read_text().splitlines()
    assert half == '{"half":'
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", first), ("user", "more"), ("assistant", second)]
    assert json.loads(long) == {"messages": [dict(role=r, content=c) for r, c in turns]}
    assert json.loads(short)["messages"] == json.loads(long)["messages"][:3]
    assert notices.count("appended to") == 2 and "/nonsense: unknown" in notices and "> " not in notices


def test_what_cannot_be_saved(teacher, tmp_path):
    _, notices = say(teacher, "/save", f"/save {tmp_path}/a", "hi", f"/save {tmp_path}/no/a")
    errors = [line for line in notices.splitlines() if line.startswith("error")]
    assert ["give a file" in errors[0], "nothing was said" in errors[1], "No such file" in errors[2]] == [True] * 3
    assert not list(tmp_path.iterdir())


def test_interrupt_stops_the_answer_only(teacher):
    class Impatient(io.StringIO):
        def write(self, text):
            if self.tell() == 0:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    before = signal.getsignal(signal.SIGINT)
    answers, notices = say(teacher, "hi", "more", out=Impatient(), max_new_tokens=40, seed=4)
    first, second, _ = answers.split("\n")
    assert len(first) == 1 and set(second) <= set(LETTERS) and "[stopped]" in notices
    assert signal.getsignal(signal.SIGINT) is before


# ---- templates

CHANGING = CHATML.replace("m['content']", "(m['content'] if loop.last else 'x' + m['content'])")
STRIPPING = CHATML.replace("m['content']", "m['content'] | trim")


def test_an_answer_of_white_space_may_be_stripped():
    conversation = Conversation(chat_tokenizer(STRIPPING))
    conversation.ask("a")
    conversation.answer(" b ")
    tokens = conversation.ask("c")
    expected = "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert tokens == encode(chat_tokenizer(), expected)


def test_an_answer_may_be_set_off_by_a_space():
    """As Mistral's templates do it, after a mark that ends with none."""
    template = CHATML.replace("m['content']", "' ' + (m['content'] | trim)")
    conversation = Conversation(chat_tokenizer(template))
    conversation.ask("a")
    for answer in ("b", " b"):
        conversation.answer(answer)
        expected = "<|im_end|>\n<|im_start|>user\n c<|im_end|>\n<|im_start|>assistant\n"
        assert conversation.ask("c") == encode(chat_tokenizer(), expected)


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "has no chat template"),
        (CHANGING, "writes earlier turns differently"),
        ("{{ raise_exception('no system') }}", "refuses a conversation of system, user .no system"),
    ],
)
def test_templates_that_will_not_do(template, words):
    with pytest.raises(UserError, match=words):
        Conversation(chat_tokenizer(template), system="a")


def test_what_ends_an_answer():
    tokenizer = chat_tokenizer()
    marks = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert answer_ends(tokenizer) == tuple(sorted(marks))
    plain = chat_tokenizer("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    assert answer_ends(plain) == tuple(sorted(marks))  # a newline may be a part of the answer


@pytest.mark.parametrize(
    "args, words",
    [
        (["--run", "missing"], "--run missing: no run there"),
        ([], "give either --run DIR or --teacher T"),
        (["--run", "missing", "--top-p", "2"], "--top-p 2.0"),
        (["--run", "missing", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    ],
)
def test_command_refuses(monkeypatch, args, words):
    monkeypatch.setattr(sys, "argv", ["chat", *args])
    with pytest.raises(UserError, match=words):
        chat.main()
