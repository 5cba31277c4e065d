"""LongBench's five subsets: prompts, metrics, and files of its schema."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from jaxlin import convert
from jaxlin.config import UserError
from jaxlin.evaluation import longbench, records
from jaxlin.evaluation.longbench import SUBSETS, classification, f1
from jaxlin.evaluation.task import Options, read_jsonl
from tests import demo_teacher

TOKENIZER = convert.byte_tokenizer()


def row(question, answers, classes=None, context="Some {text}."):
    return {
        "input": question, "context": context, "answers": answers, "length": 3, "dataset": "d", "language": "en",
        "all_classes": classes, "_id": "0",
    }  # fmt: skip


def write(folder, name, rows, where="longbench"):
    (folder / where).mkdir(exist_ok=True)
    (folder / where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Options(data=folder)


def model(monkeypatch, answers, context=100_000):
    """A model that gives `answers`, and what it was asked."""
    asked = []

    def answer(model, prompts, new, **options):
        asked.append((prompts, new))
        return [TOKENIZER(text)["input_ids"] for text in answers[: len(prompts)]]

    monkeypatch.setattr(longbench, "continuations", answer)
    return SimpleNamespace(tokenizer=TOKENIZER, config=SimpleNamespace(max_position_embeddings=context)), asked


def test_f1_by_hand():
    assert f1("The cat sat.", "a cat") == pytest.approx(2 * (1 / 2) * 1 / (1 / 2 + 1))
    assert f1("cat cat", "cat") == pytest.approx(2 / 3) and f1("dog", "cat") == 0 and f1("", "cat") == 0
    assert f1("U.S.A", "usa") == 1


def test_metrics_are_longbenchs():
    """Against the harness's copy of LongBench's metrics, answers of every kind."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    metrics = pytest.importorskip("lm_eval.tasks.longbench.metrics", exc_type=ImportError)
    texts = ["", "the", "A cat, the Cat", "cat", "cats and a dog.", "Paris\nFrance", "É té"]
    for answer, right in itertools.product(texts, texts):
        assert f1(answer, right) == pytest.approx(metrics.qa_f1_score(answer, right))
    classes = ["Date", "Dat", "D", "Other", "Other entity", "entity", "Oth", "Location"]
    answers = ["Date", " Other entity", "Location or Date", "none", "D", "Other entity Date", "Oth entity"]
    for answer, right in itertools.product(answers, classes):
        expected = metrics.classification_score(answer, right, all_classes=classes)
        assert classification(answer, right, classes) == pytest.approx(expected), (answer, right)


def test_first_lines_and_best_answers(tmp_path, monkeypatch):
    who, _ = model(monkeypatch, ["\n\nDate\nLocation", "Date or Location"])
    rows = [row("Q", ["Date"], ["Date", "Location"]), row("Q", ["Date"], ["Date", "Location"])]
    found = longbench.TASKS["longbench_trec"].measure(who, write(tmp_path, "trec", rows))
    assert found.per_example == {"score": [1, 0.5]} and found.metrics == {"score": 0.75}
    who, _ = model(monkeypatch, ["one two\nthree"])
    rows = [row("Q", ["three", "one two"])]
    found = longbench.TASKS["longbench_triviaqa"].measure(who, write(tmp_path, "triviaqa", rows))
    assert found.metrics == {"score": 1}
    found = longbench.TASKS["longbench_2wikimqa"].measure(who, write(tmp_path, "2wikimqa", rows))
    assert found.metrics == {"score": pytest.approx(0.8)}


def test_long_prompts_lose_their_middle(tmp_path, monkeypatch):
    who, asked = model(monkeypatch, ["x"], context=132)
    options = write(tmp_path, "2wikimqa", [row("Where?", ["x"], context="word " * 100)])
    found = longbench.TASKS["longbench_2wikimqa"].measure(who, options)
    (tokens,), new = asked[0]
    text = TOKENIZER.decode(tokens)
    assert new == 32 and len(tokens) == 100 and "100 tokens at most, cut in the middle" in found.note
    assert text.startswith("Answer the question based on") and text.endswith("Question: Where?\nAnswer:")


def test_sample_is_called_a_sample(tmp_path, monkeypatch):
    who, _ = model(monkeypatch, ["x"] * 2)
    task = longbench.TASKS["longbench_narrativeqa"]
    rows = [row("Q", ["x"])] * 2
    mini = task.measure(who, write(tmp_path, "narrativeqa", rows, "longbench_mini"))
    assert mini.note.startswith("longbench_mini: a sample of 2, not LongBench")
    before = task.fingerprint(Options(data=tmp_path))
    full = task.measure(who, write(tmp_path, "narrativeqa", rows))
    assert "sample" not in full.note and task.fingerprint(Options(data=tmp_path)) != before


def test_hub(monkeypatch):
    asked = []
    rows = [{"question": "Q", "context": "C", "answers": ["x"]}]
    monkeypatch.setattr(records, "from_hub", lambda *hub: asked.append(hub) or rows)
    who, _ = model(monkeypatch, ["x"])
    assert longbench.TASKS["longbench_multifieldqa_en"].measure(who, Options()).metrics == {"score": 1}
    assert asked == [("Xnhyacinth/LongBench", "multifieldqa_en", "test")]


@pytest.mark.parametrize(
    "name, rows, words",
    [
        ("trec", [row("Q", ["x"])], "row 1: 'all_classes' is NoneType"),
        ("2wikimqa", [row("Q", [])], "row 1: no answers"),
        ("2wikimqa", [row("Q", "x")], "row 1: 'answers' is str"),
        ("2wikimqa", [row(None, ["x"])], "row 1: no field 'input' or 'question'"),
    ],
)
def test_malformed_data(tmp_path, name, rows, words):
    with pytest.raises(UserError, match=words):
        longbench.TASKS[f"longbench_{name}"].fingerprint(write(tmp_path, name, rows))


def test_no_data(tmp_path):
    with pytest.raises(UserError, match="no folder longbench"):
        longbench.TASKS["longbench_trec"].fingerprint(Options(data=tmp_path))


def test_prompts_are_longbenchs():
    """Beside the prompts that MiniLongBench stored, which mended one typing error of LongBench's.

    The sample was cut out of those prompts, and TriviaQA's contexts lost the line break that they end with.
    """
    data = demo_teacher.require_data()
    for name, subset in SUBSETS.items():
        path = data / "eval" / "longbench_mini" / f"{name}.jsonl"
        stored = [row["prompt"].replace("\n\n\nPassage:", "\n\nPassage:") for row in read_jsonl(path)]
        prompts = [subset.prompt(question) for question in longbench.load(name, path)]
        assert [prompt.replace("asconcisely", "as concisely") for prompt in prompts] == stored
