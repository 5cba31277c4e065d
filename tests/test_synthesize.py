"""Synthesis: where prompts come from, what is left out and why, and that a stopped run ends as an unbroken one."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxlin import synthesize
from jaxlin.config import UserError
from jaxlin.filters import NearDuplicates, ends_in_loop, repetition
from jaxlin.synthesize import Settings, conversations, jobs, judge
from tests.tiny_chat import LETTERS, TEMPERATURE, chat_model, chat_tokenizer

NEW = 4


@pytest.fixture(scope="module")
def teacher():
    return chat_model()


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---- prompts


def test_sources_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("A text.\n")
    fields = write_lines(tmp_path / "b.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    system, user, answer = ({"role": r, "content": r} for r in ("system", "user", "assistant"))
    chats = write_lines(tmp_path / "c.jsonl", [{"messages": [system, user, answer, user, answer]}])
    assert list(conversations(str(tmp_path / "a.txt"), "prompt")) == [[{"role": "user", "content": "A text."}]]
    assert [c[-1]["content"] for c in conversations(fields, "prompt")] == ["one", "two"]
    assert list(conversations(chats, "prompt")) == [[system, user, answer, user]]
    nobody = write_lines(tmp_path / "d.jsonl", [{"messages": [system]}, {"messages": []}])
    assert list(conversations(nobody, "messages")) == [[], []]


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"text": "a"}\n', "no field 'prompt' among text; set --prompt-field"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}\n', "line 1, message 1: 'content' is list, not text"),
        ('{"messages": 3}\n', "line 1: field 'messages' is int"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"mess', "line 2: not a line of JSON"),
    ],
)
def test_sources_that_will_not_do(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        list(conversations(str(tmp_path / "a.jsonl"), "prompt"))
    with pytest.raises(UserError, match=r"--prompts .*: no such file"):
        list(conversations(str(tmp_path / "missing"), "prompt"))
    np.save(tmp_path / "a.npy", np.arange(3, dtype=np.uint16))
    with pytest.raises(UserError, match=r"--prompts .*: holds tokens"):
        list(conversations(str(tmp_path / "a.npy"), "prompt"))


def test_prompts_left_out(tmp_path):
    long = "Please write me a short poem about the sea and the sky and the wind in the old trees"
    texts = ["One two", " one  TWO ", "", long, long + "!", "One three", "x" * 99]
    source = write_lines(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    settings = Settings(prompts=(source,), system="Be brief.", samples=2, max_prompt_tokens=150)
    counts = Counter()
    found = list(jobs(settings, chat_tokenizer(), counts))
    assert [job.messages[-1]["content"] for job in found] == ["One two"] * 2 + [long] * 2 + ["One three"] * 2 + [
        "x" * 99
    ] * 2
    assert all(job.messages[0] == {"role": "system", "content": "Be brief."} for job in found)
    assert counts == dict(prompts=7, duplicate_prompt=1, empty_prompt=1, near_duplicate_prompt=1)
    assert len({job.stream for job in found}) == len(found)
    short = list(
        jobs(replace(settings, max_prompt_tokens=80, near_duplicates=1.0), chat_tokenizer(), counts := Counter())
    )
    assert len(short) == 4 and counts["long_prompt"] == 3 and counts["near_duplicate_prompt"] == 0


# ---- filters


def test_loops():
    assert ends_in_loop([5] * 48) and ends_in_loop([9, *range(20)] + [1, 2, 3] * 16)
    assert ends_in_loop(list(range(64)) * 3)
    assert not ends_in_loop([5] * 47) and not ends_in_loop([*[5] * 100, 6])
    assert not ends_in_loop(list(range(64)) * 2) and not ends_in_loop([])


def test_repetition():
    assert repetition("a b c") == repetition("a b c d e f g") == 0
    assert repetition("a b c d " * 10) == pytest.approx(1 - 4 / 37)


def test_near_duplicates():
    words = [f"w{i}" for i in range(50)]
    near = NearDuplicates(0.8)
    assert [near.add(" ".join(w)) for w in (words, words[:-2], words[::-1], words[25:], ["a"], ["A"])] == [
        False, True, False, False, False, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tokens, text, unfinished, reason",
    [
        ([1, 2], "a good answer", False, None),
        ([], "", False, "empty_response"),
        ([1] * 60, "aaa", True, "loop"),
        ([1, 2], "a good answer", True, "unfinished"),
        ([1, 2], "a b c d " * 5, False, "repetition"),
    ],
)
def test_why_an_answer_is_rejected(tokens, text, unfinished, reason):
    assert judge(tokens, text, Settings(), unfinished=unfinished) == reason
    kept = judge(tokens, text, Settings(keep_unfinished=True), unfinished=unfinished)
    assert kept == (None if reason == "unfinished" else reason)


# ---- whole runs


@pytest.fixture
def settings(tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"{i} " * (1 + i % 3)} for i in range(7)])
    return Settings(
        prompts=(prompts,), out=str(tmp_path / "out/chats.jsonl"), max_new_tokens=NEW, temperature=TEMPERATURE,
        batch_size=4, samples=2, near_duplicates=1.0, max_identical=2,
    )  # fmt: skip


def files(settings):
    return [Path(settings.out + end).read_bytes() for end in ("", ".rejected.jsonl", ".report.json")]


def records(settings):
    """The messages of every answer, by its id."""
    lines = [json.loads(line) for data in files(settings)[:2] for line in data.splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["messages"] for line in lines}


def test_a_stopped_run_ends_as_an_unbroken_one(teacher, settings):
    counts = synthesize.synthesize(teacher, settings)
    whole = files(settings)
    kept, rejected, report = whole
    assert counts["prompts"] == 7 and counts["kept"] == len(kept.splitlines()) > 1
    assert sum(counts.values()) - 7 == len(records(settings)) == 14
    assert counts["unfinished"] and json.loads(report)["counts"] == counts
    first = json.loads(kept.splitlines()[0])
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"]
    assert set(first["messages"][1]["content"]) <= set(LETTERS) and first["source"] == settings.prompts[0]

    assert synthesize.synthesize(teacher, settings) == counts and files(settings) == whole  # nothing is left to do
    for cut_kept, cut_rejected in ((len(kept) // 2, len(rejected) // 3), (0, 0)):
        for end, data, cut in (("", kept, cut_kept), (".rejected.jsonl", rejected, cut_rejected)):
            Path(settings.out + end).write_bytes(data[:cut])
        assert synthesize.synthesize(teacher, settings) == counts
        assert files(settings) == whole


def test_the_batch_does_not_matter(teacher, settings, tmp_path):
    synthesize.synthesize(teacher, settings)
    other = replace(settings, out=str(tmp_path / "other.jsonl"), batch_size=3)
    synthesize.synthesize(teacher, other)
    assert records(settings) == records(other)


def test_prompts_that_leave_nothing_to_answer(teacher, settings, tmp_path):
    """One line that says why, and no files."""
    prompts, out = tmp_path / "empty.jsonl", tmp_path / "none.jsonl"
    prompts.write_text('{"prompt": " "}\n')
    with pytest.raises(UserError, match=r"nothing to answer \(1 empty_prompt, 1 prompts\)"):
        synthesize.synthesize(teacher, replace(settings, prompts=(str(prompts),), out=str(out)))
    assert not out.exists()


def test_files_of_another_run_are_refused(settings, tmp_path):
    synthesize.Output(settings)
    synthesize.Output(replace(settings, batch_size=2))
    with pytest.raises(UserError, match=r"another --temperature \(0.001, now 2.0\); choose another file"):
        synthesize.Output(replace(settings, temperature=2.0))
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"mine.jsonl: exists, and mine.jsonl.report.json does not"):
        synthesize.Output(replace(settings, out=str(tmp_path / "mine.jsonl")))
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_a_refusal_leaves_no_file(teacher, settings, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        synthesize.synthesize(teacher, replace(settings, prompts=(str(tmp_path / "missing"),)))
    plain = replace(teacher, tokenizer=chat_tokenizer(None))
    with pytest.raises(UserError, match="no chat template"):
        synthesize.synthesize(plain, settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "--prompts: give at least one"),
        (["--prompts", "a"], "--out: give the file"),
        (["--prompts", "a", "--out", "b", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--prompts", "a", "--out", "b", "--samples", "2"], "--samples 2: all alike at temperature 0"),
        (["--prompts", "a", "--out", "b", "--max-repetition", "2"], "--max-repetition 2.0: must be from 0 to 1"),
        (["--prompts", "a", "--out", "b", "--run", "missing"], "--run missing: no run there"),
    ],
)
def test_command_refuses(monkeypatch, args, words):
    monkeypatch.setattr(sys, "argv", ["synthesize", *args])
    with pytest.raises(UserError, match=words):
        synthesize.main()
