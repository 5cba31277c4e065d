"""Conversations: rendered as the template does, answers marked exactly, packed whole, mistakes named by line."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlin import packing
from jaxlin.config import DataConfig, UserError
from jaxlin.conversations import Conversation, Renderer, read_conversations
from tests.chat_teacher import CHATML, COUNTING, GENERATION, STRICT, chat_tokenizer, chats, write_chats
from tests.demo_teacher import require_demo

CONFIG = DataConfig(seq_len=128, heldout_fraction=0.1, eval_tokens=256)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello <|im_end|> né"},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": " Bye. \n"},
]


def render(messages, tokenizer, loss_on="assistant"):
    (found,) = Renderer(tokenizer, loss_on)([Conversation("here", list(messages))])
    return found


def answers(found, tokenizer):
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.learned, [0]])))
    return [tokenizer.decode(found.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
@pytest.mark.parametrize("template", [CHATML, GENERATION, STRICT])
def test_tokens_are_those_of_the_template(template, loss_on):
    tokenizer = chat_tokenizer(template)
    for record in [{"messages": TALK}] + (chats(4) if template != STRICT else []):
        found = render(record["messages"], tokenizer, loss_on)
        expected = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
        assert found.tokens.tolist() == expected
        assert found.learned.all() == (loss_on == "all")


def test_answers_and_what_ends_them_are_learned():
    """Up to the end of the turn, not the line break after it; the same as transformers' own mask."""
    for template in (CHATML, GENERATION):
        tokenizer = chat_tokenizer(template)
        found = answers(render(TALK, tokenizer), tokenizer)
        assert found == ["Hello <|im_end|> né<|im_end|>", " Bye. \n<|im_end|>"]
    for record in chats():
        ours, theirs = (render(record["messages"], chat_tokenizer(t)) for t in (CHATML, GENERATION))
        np.testing.assert_array_equal(ours.learned, theirs.learned)
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_without_an_end_of_turn_the_whole_turn_is_learned():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    assert answers(render(TALK[2:], tokenizer), tokenizer) == [" Bye. \n\n\n"]


def test_templates_that_rewrite_the_beginning():
    """Answers are found by what is written around them; reasoning, that of Qwen3's last answer alone, is learned."""
    tokenizer = chat_tokenizer(COUNTING)
    assert answers(render(TALK, tokenizer), tokenizer) == ["Hello <|im_end|> né<|im_end|>", " Bye. \n<|im_end|>"]
    last = "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content | trim }}"
    assert CHATML.count("{{ m.content }}") == 1
    tokenizer = chat_tokenizer(CHATML.replace("{{ m.content }}", last))
    talk = [*TALK, *TALK[2:]]
    expected = ["Hello <|im_end|> né<|im_end|>", "Bye.<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"]
    assert answers(render(talk, tokenizer), tokenizer) == expected
    assert answers(render(talk[:1], tokenizer), tokenizer) == []


def test_templates_that_will_not_do():
    tokenizer = chat_tokenizer(COUNTING.replace("m.content", "m.content | upper"))
    with pytest.raises(UserError, match=r"^here: what the chat template writes around messages depends .*loss-on all"):
        render(TALK, tokenizer)
    render(TALK, tokenizer, "all")
    with pytest.raises(UserError, match=r"^here: the chat template refuses the conversation \(.*roles must alternate"):
        render(TALK[1:], chat_tokenizer(STRICT))
    with pytest.raises(UserError, match="no chat template"):
        Renderer(chat_tokenizer(None), "all")


def test_the_demo_teachers_template():
    """A real vocabulary, where tokens are several characters, and its default system prompt."""
    from jaxlin.convert import load_tokenizer

    tokenizer = load_tokenizer(require_demo())
    found = render(TALK, tokenizer)
    assert found.tokens.tolist() == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert answers(found, tokenizer) == ["Hello <|im_end|> né<|im_end|>", " Bye. \n<|im_end|>"]
    # By characters: what follows each generation prompt is learned from its first token on.
    for i in (1, 3):
        prompt = tokenizer.apply_chat_template(TALK[:i], add_generation_prompt=True, return_dict=False)
        assert found.tokens[: len(prompt)].tolist() == prompt
        assert not found.learned[len(prompt) - 1] and found.learned[len(prompt)]


def test_every_kind_of_file_reads_the_same(tmp_path):
    records = chats(5)
    write_chats(tmp_path / "a.jsonl", records)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pa_zst = pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd")
    pa_zst.write((tmp_path / "a.jsonl").read_bytes())
    pa_zst.close()
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    for name in names:
        found = list(read_conversations([str(tmp_path / name)]))
        assert [each.messages for each in found] == [record["messages"] for record in records]
        assert found[1].where == f"{tmp_path / name}, {'row 1' if name.endswith('parquet') else 'line 2'}"
    assert len(list(read_conversations([str(tmp_path)]))) == 20


GOOD = json.dumps({"messages": TALK[:2]})
MISTAKES = {
    "no messages": ('{"text": "a"}', "line 2: no field 'messages' among text; each record needs a list of"),
    "no role": ('{"messages": [{"content": "a"}]}', "line 2, message 1: it has no 'role'"),
    "no content": ('{"messages": [{"role": "user", "content": null}]}', "line 2, message 1: it has no 'content'"),
    "type": ('{"messages": [{"role": "user", "content": ["a"]}]}', "line 2, message 1: 'content' is list, not text"),
    "text": ('{"messages": "hello"}', "line 2: field 'messages' is str, not a list of messages"),
    "list": ('{"messages": ["hello"]}', "line 2, message 1: expected {role, content}, found str"),
    "json": ('{"messages": ', "line 2: not a line of JSON"),
    "utf-8": (b'{"messages": [{"role": "user", "content": "\xff"}]}', "line 2: not a line of JSON"),
    "surrogate": (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "line 2, message 1: 'content': holds half"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_malformed_conversations_name_their_line(name, tmp_path):
    """And leave nothing behind in the run folder."""
    bad, message = MISTAKES[name]
    bad = bad if isinstance(bad, bytes) else bad.encode()
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join([GOOD.encode(), bad, GOOD.encode()]))
    with pytest.raises(UserError) as error:
        prepared(tmp_path / "run", tmp_path / "chats.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'chats.jsonl'}, {message}"), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_other_sources(tmp_path):
    (tmp_path / "chats.txt").write_text("hello")
    for name, message in {
        "chats.txt": "chats.txt: unknown kind of file, use one of .jsonl",
        "absent": "--conversations .*absent: no such file or folder",
        "few.jsonl": "1 of 1 conversations have something to learn, at least 2",
    }.items():
        write_chats(tmp_path / "few.jsonl", chats(1))
        with pytest.raises(UserError, match=message):
            prepared(tmp_path / "run", tmp_path / name)
    with pytest.raises(UserError, match="--conversations ftp:chats: unknown scheme ftp:, use hf:NAME"):
        list(read_conversations(["ftp:chats"]))


def prepared(folder, path, *, seq_len=128, loss_on="all", resuming=False):
    return packing.prepare(folder, [str(path)], chat_tokenizer(), seq_len, loss_on, resuming=resuming)


def test_nothing_is_dropped_silently(tmp_path):
    """Empty conversations are left out, long ones cut; both are counted."""
    records = [*chats(10), {"messages": []}, {"messages": TALK[:1]}, {"messages": [TALK[0], {
        "role": "assistant", "content": "long " * 100}]}]  # fmt: skip
    path = write_chats(tmp_path / "chats.jsonl", records)
    found = prepared(tmp_path / "run", path, loss_on="assistant")
    report = found.report
    assert (report["read"], report["kept"], report["without_messages"], report["nothing_to_learn"]) == (13, 11, 1, 1)
    lengths = [len(render(r["messages"], chat_tokenizer()).tokens) for r in records if len(r["messages"]) > 1]
    assert report["cut"] == sum(length > 128 for length in lengths) > 0
    assert found.lengths().tolist() == [min(length, 128) for length in lengths]
    assert report["tokens"] == sum(found.lengths()) and report["learned"] == found.learned.sum()
    line = packing.summary(report, packing.training_rows(found, CONFIG), 128)
    assert "11 of 13 kept" in line and "left out 1 without messages and 1 with nothing to predict" in line
    assert prepared(tmp_path / "all", path).report["nothing_to_learn"] == 0


def test_prepared_once(tmp_path):
    """Kept while files and settings are the same, else made anew; a resumed run keeps what it began with."""
    path = write_chats(tmp_path / "chats.jsonl", chats(10))
    first = prepared(tmp_path / "run", path)
    written = (tmp_path / "run/conversations/tokens.npy").stat().st_ino
    prepared(tmp_path / "run", path)
    assert (tmp_path / "run/conversations/tokens.npy").stat().st_ino == written
    write_chats(path, chats(12))
    assert len(prepared(tmp_path / "run", path, resuming=True)) == 10
    assert len(prepared(tmp_path / "run", path)) == 12
    assert prepared(tmp_path / "run", path, loss_on="assistant").report["learned"] < first.report["learned"]
    (tmp_path / "run/conversations.json").write_text(json.dumps(first.report))
    with pytest.raises(UserError, match=r"no longer what the run in .* began with"):
        prepared(tmp_path / "run", path, resuming=True)


def test_best_fit():
    """Every conversation once, no row too long, and no two rows that would fit in one."""
    lengths = np.random.default_rng(0).integers(1, 101, 500).tolist()
    rows = packing.pack(lengths, 100)
    assert sorted(index for row in rows for index in row) == list(range(500))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert filled[-1] <= 100 and filled[0] + filled[1] > 100
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 1  # the bound of best-fit decreasing


def test_rows_hold_whole_conversations(tmp_path):
    """Tokens, segments and learned tokens are those of the conversations; padding is at the end."""
    found = prepared(tmp_path / "run", write_chats(tmp_path / "c.jsonl", chats()), loss_on="assistant")
    rows = packing.training_rows(found, CONFIG)
    firsts = [min(row) for row in rows.places]
    assert firsts == sorted(firsts)  # as in the files, where nothing shuffles them
    training, heldout = found.split(CONFIG.heldout_fraction)
    assert len(heldout) == 4 and not set(training) & set(heldout)
    seen = []
    for row in map(rows.__getitem__, range(len(rows))):
        ids, used = row["segment_ids"], int((row["segment_ids"] > 0).sum())
        assert (ids[used:] == 0).all() and not row["tokens"][used:].any() and not row["learned"][used:].any()
        for segment in range(1, ids.max() + 1):
            seen.append((row["tokens"][ids == segment].tobytes(), row["learned"][ids == segment].tobytes()))
    spans = (found.span(i) for i in training)
    expected = [(found.tokens[s].astype(np.int32).tobytes(), found.learned[s].tobytes()) for s in spans]
    assert sorted(seen) == sorted(expected)
    batches = packing.heldout_rows(found, CONFIG, batch_size=2)
    assert {batch["tokens"].shape for batch in batches} == {(2, 128)}
    assert max(int(batch["segment_ids"].max()) for batch in batches) >= 1


def test_epochs_differ_and_states_continue(tmp_path):
    """Every row once an epoch, in another order; the state is JSON, and goes on bit for bit."""
    found = prepared(tmp_path / "run", write_chats(tmp_path / "c.jsonl", chats()))
    rows = packing.training_rows(found, CONFIG)
    batches = packing.row_batches(rows, CONFIG, batch_size=1, seed=3)
    epochs = [[next(batches)["tokens"].tobytes() for _ in rows.places] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    state = json.loads(json.dumps(batches.get_state()))
    after = [next(batches) for _ in range(3)]
    batches.close()
    again = packing.row_batches(rows, CONFIG, batch_size=1, seed=3)
    again.set_state(state)
    for expected in after:
        for name, value in next(again).items():
            np.testing.assert_array_equal(value, expected[name])
    again.close()
