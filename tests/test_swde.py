"""SWDE: rows of the hub's schema, prompts and the score of lm-eval's task."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from jaxlin import convert
from jaxlin.config import UserError
from jaxlin.evaluation import records, swde
from jaxlin.evaluation.task import Options

TOKENIZER = convert.byte_tokenizer()
MODEL = SimpleNamespace(tokenizer=TOKENIZER, config=SimpleNamespace(max_position_embeddings=4096))
ROWS = [
    {"doc_id": "0", "key": "Director", "value": " Ann (A.) Lee ", "text": "\nA film\u2028 Director:  "},
    {"doc_id": "1", "key": "Year", "value": "1999", "text": "Another film. Year:"},
    {"doc_id": "2", "key": "Year", "value": "2001", "text": "A third film. Year:"},
]
ANSWERS = [" by ANN (A.) LEE and others", " 2001\n1999", " in 2001, they say"]


def write(folder, rows):
    (folder / "swde").mkdir(exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "swde" / "validation.jsonl").write_text("".join(lines), "utf-8")
    return Options(data=folder)


@pytest.fixture
def answering(monkeypatch):
    """A model that gives ANSWERS, and what it was asked."""
    asked = []

    def answer(model, prompts, new, *, stop_strings, **options):
        asked.extend(TOKENIZER.decode(prompt) for prompt in prompts)
        assert new == 48 and stop_strings == ("\n",)
        return [TOKENIZER(text)["input_ids"] for text in ANSWERS[: len(prompts)]]

    monkeypatch.setattr(swde, "continuations", answer)
    return asked


def test_score(tmp_path, answering):
    task = swde.TASKS["swde"]
    found = task.measure(MODEL, write(tmp_path, ROWS))
    assert answering == ["A film\u2028 Director:", "Another film. Year:", "A third film. Year:"]
    assert found.per_example == {"contains": [1, 0, 1]} and found.metrics == {"contains": pytest.approx(2 / 3)}
    assert found.n == 3 and found.predictions[1] == {"answer": ANSWERS[1], "value": "1999"}
    few = task.measure(MODEL, Options(data=tmp_path, limit=1, predict_only=True))
    assert few.n == 1 and few.metrics == {} == few.per_example and len(few.predictions) == 1


def test_score_is_the_harnesss(tmp_path):
    task = pytest.importorskip("lm_eval.tasks.swde.task", reason="lm-eval is not installed")
    questions = swde.load(write(tmp_path, ROWS).data / "swde" / "validation.jsonl")
    for answer in ("ann (a.) lee", "Ann (B.) Lee", "1999", "in 2001.", "", "Ⅻ 1999"):
        for question in questions:
            assert swde.contains(answer, question.value) == task.contains_score(answer, [question.value])


def test_hub(monkeypatch, answering):
    asked = []
    monkeypatch.setattr(records, "from_hub", lambda *hub: asked.append(hub) or [dict(row) for row in ROWS])
    assert swde.TASKS["swde"].measure(MODEL, Options()).n == 3
    assert asked == [("hazyresearch/based-swde-v2", "default", "validation")]


def test_fingerprint_follows_the_data(tmp_path):
    fingerprint = swde.TASKS["swde"].fingerprint
    before = fingerprint(write(tmp_path, ROWS))
    assert fingerprint(write(tmp_path, ROWS)) == before != fingerprint(write(tmp_path, ROWS[:2]))


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "line 1: not JSON"),
        ([{"text": "a"}], r"validation\.jsonl, line 1: no field 'value'"),
        ([ROWS[0], ROWS[1] | {"value": 3}], r"validation\.jsonl, row 2: 'value' is int"),
        (["a"], "line 1: no field 'text'"),
    ],
)
def test_malformed_data(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        swde.TASKS["swde"].fingerprint(write(tmp_path, rows))


def test_no_data(tmp_path):
    with pytest.raises(UserError, match="no folder swde"):
        swde.TASKS["swde"].fingerprint(Options(data=tmp_path))
