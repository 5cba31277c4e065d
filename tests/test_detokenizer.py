"""Text as it comes: characters whole; nothing of a stop string is ever shown."""

from __future__ import annotations

import itertools

import pytest

from jaxlin import convert
from jaxlin.config import UserError
from jaxlin.detokenizer import Detokenizer, TextUntil


class Words:
    """A tokenizer whose tokens are these texts."""

    def __init__(self, *texts):
        self.texts = texts

    def decode(self, tokens, **kw):
        return "".join(self.texts[token] for token in tokens)


def test_characters_come_whole():
    tokenizer = convert.byte_tokenizer()
    text = "naïve 🦙, \N{REPLACEMENT CHARACTER} 漢字!"
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text and detokenizer.flush() == ""
    assert [p for p in pieces if p][:6] == ["n", "a", "ï", "v", "e", " "]

    llama = tokenizer("🦙")["input_ids"]
    broken = [llama[0], llama[1], *tokenizer("a")["input_ids"], llama[0]]  # two that never become complete
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in broken]
    assert pieces == ["", "", "\N{REPLACEMENT CHARACTER}a", ""]
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_a_text_goes_on():
    """SentencePiece's first token of a text has no space before it; one that goes on has."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "▁is": 1, "▁Paris": 2}, unk_token="<s>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    for before, text in (((), "Paris Paris"), ((0,), "Paris Paris"), ((0, *[1] * 20), " Paris Paris")):
        detokenizer = Detokenizer(tokenizer, before)
        assert detokenizer.push(2) + detokenizer.push(2) + detokenizer.flush() == text


def pushed(tokenizer, tokens, stops):
    """(text shown, after each token and at the end; the filter)"""
    until = TextUntil(tokenizer, stops)
    shown = list(itertools.accumulate([until.push(token) for token in tokens] + [until.flush()]))
    assert shown[-1] == until.text
    return shown, until


@pytest.mark.parametrize(
    "stops, shown, kept, stopped",
    [
        ([], ["ab", "abEN", "abENDc", "abENDcd", "abENDcdEN", "abENDcdEN"], 5, False),
        (["END"], ["ab", "ab", "ab", "ab", "ab", "ab"], 1, True),
        (["b"], ["a"] * 6, 0, True),  # begins inside the first token
        (["bEND"], ["a"] * 6, 0, True),
        (["DcdENX", "Q"], ["ab", "abEN", "abEN", "abEN", "abEN", "abENDcdEN"], 5, False),  # held back to the end
        (["cd", "Dc"], ["ab", "abEN", "abEN", "abEN", "abEN", "abEN"], 2, True),
        (
            ["cdE", "dENX"],
            ["ab", "abEN", "abEND", "abEND", "abEND", "abEND"],
            2,
            True,
        ),  # begins inside "Dc"
    ],
)
def test_stop_strings(stops, shown, kept, stopped):
    found, until = pushed(Words("ab", "EN", "Dc", "d", "EN"), range(5), stops)
    assert (found, until.kept, until.stopped) == (shown, kept, stopped)


def test_no_stop_string_leaks():
    """All texts of five letters of two, against cutting the whole text; one token a letter."""
    for letters in itertools.product("ab", repeat=6):
        text = "".join(letters)
        for stops in (["ab"], ["aab"], ["abab", "bb"], ["ba", "aaa"]):
            shown, until = pushed(Words("a", "b"), [ord(c) - ord("a") for c in text], stops)
            ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
            expected = text[: min(ends)[1]] if ends else text
            assert shown[-1] == expected and until.kept == len(expected)
            assert all(expected.startswith(part) for part in shown)


def test_stop_strings_of_many_bytes():
    """A stop string of characters that take several tokens, and the beginning of one that never ends."""
    tokenizer = convert.byte_tokenizer()
    tokens = tokenizer("né漢字x")["input_ids"]
    shown, until = pushed(tokenizer, tokens, ["字"])
    assert shown[-1] == "né漢" and until.kept == 6
    shown, until = pushed(tokenizer, tokens[:8], ["\N{REPLACEMENT CHARACTER}"])
    assert shown[-1] == "né漢" and until.kept == 6 and until.stopped


def test_refuses_an_empty_stop_string():
    with pytest.raises(UserError, match='--stop ""'):
        TextUntil(convert.byte_tokenizer(), ["a", ""])
