"""BEAR: sentences, likelihoods and accuracy; equal to lm-pub-quiz's where it can be run."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import linen as nn

from jaxlin import convert
from jaxlin.config import UserError
from jaxlin.evaluation import bear
from jaxlin.evaluation.bear import Relation, hits, scores, statement
from jaxlin.evaluation.scoring import loglikelihoods
from jaxlin.evaluation.task import Options
from jaxlin.runs import Teacher
from jaxlin.student import abstract_params
from tests import demo_teacher
from tests.models import TEACHER, logits

TOKENIZER = convert.byte_tokenizer()
METADATA = {
    "P1": {
        "templates": ["[X] is in [Y].", "in [Y] lies [X]."],
        "answer_space_labels": ["Oz", "[X]"],
        "answer_space_ids": ["Q1", "Q2"],
    },
    "P20": {"templates": ["[Y]: [X]"], "answer_space_labels": ["a", "b", "c"], "answer_space_ids": ["Q3", "Q4", "Q5"]},
}
ROWS = {
    "P1": [
        {"sub_id": "Q7", "sub_label": "émile", "sub_aliases": [], "obj_id": "Q2", "obj_label": "[X]", "answer_idx": 1},
        {"sub_id": "Q8", "sub_label": "A [Y]", "sub_aliases": [], "obj_id": "Q1", "obj_label": "Oz", "answer_idx": 0},
    ],
    "P20": [{"sub_id": "Q9", "sub_label": 1984, "sub_aliases": [], "obj_id": "Q5", "obj_label": "c", "answer_idx": 2}],
}


def write(folder, metadata=METADATA, rows=ROWS):
    path = folder / "bear" / "BEAR"
    path.mkdir(parents=True, exist_ok=True)
    (path / bear.METADATA).write_text(json.dumps(metadata))
    for code, lines in rows.items():
        (path / f"{code}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Options(data=folder)


@pytest.fixture
def model():
    config, rng = replace(TEACHER, vocab_size=257), np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(config))
    return Teacher(config, jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(a.dtype), shapes), TOKENIZER)


def test_statement():
    assert statement("[X] was born in [Y].", "émile", "Oz") == "Émile was born in Oz."
    assert statement("[Y], [X], [Y]", "[Y]", "[X]") == "[X], [Y], [X]"  # labels are not templates


def test_load(tmp_path):
    folder = write(tmp_path).data / "bear" / "BEAR"
    first, second = bear.load(folder)
    assert first == Relation("P1", ("[X] is in [Y].", "in [Y] lies [X]."), ("Oz", "[X]"), ("émile", "A [Y]"), (1, 0))
    assert second.code == "P20" and second.subjects == ("1984",) and second.right == (2,)
    assert [relation.subjects for relation in bear.load(folder, 1)] == [("émile",), ("1984",)]


def test_likelihoods_are_of_whole_sentences(tmp_path, model):
    """Each sentence after the token that begins a text, against the logits of that sentence alone."""
    relation = bear.load(write(tmp_path).data / "bear" / "BEAR")[0]
    found = scores(relation, TOKENIZER, lambda pairs: loglikelihoods(model, pairs))
    assert found.shape == (2, 2, 2)
    for i, subject in enumerate(relation.subjects):
        for j, template in enumerate(relation.templates):
            for k, answer in enumerate(relation.answers):
                sequence = [256, *TOKENIZER(statement(template, subject, answer))["input_ids"]]
                tokens = np.zeros((1, 32), np.int32)
                tokens[0, : len(sequence)] = sequence
                log = np.asarray(logits(model.config, model.params, tokens)[0], np.float64)
                log = log - np.log(np.exp(log).sum(-1, keepdims=True))
                expected = sum(log[at, token] for at, token in enumerate(sequence[1:]))
                assert found[i, j, k] == pytest.approx(expected, abs=1e-4)


def test_first_of_equals_is_chosen():
    relation = Relation("P1", ("[Y]",), ("a", "b"), ("x", "y", "z"), (0, 1, 1))
    assert hits(relation, np.array([[[1.0, 1.0]], [[1.0, 1.0]], [[0.0, 1.0]]])).tolist() == [[True], [False], [True]]


def test_accuracy(tmp_path, monkeypatch, model):
    """A model that prefers "Oz" and "c": P1's subjects are wrong and right in both templates, P20's is right."""
    asked = []

    def prefer(model, pairs, *, progress, **options):
        asked.extend(pairs)
        progress(len(pairs))
        texts = [TOKENIZER.decode(tokens) for _, tokens in pairs]
        return [(float("Oz" in text or text.startswith("C:")), False) for text in texts]

    monkeypatch.setattr(bear, "loglikelihoods", prefer)
    done = []
    options = replace(write(tmp_path), bar=lambda title, total: done.append((title, total)) or done.append)
    found = bear.TASKS["bear"].measure(model, options)
    assert done == [("bear", 11), 8, 3] and {tuple(start) for start, _ in asked} == {(256,)}
    assert found.metrics == {"acc": 3 / 5}
    assert found.per_example == {"acc": [0.0, 1.0, 1.0]} and found.n == 3
    assert found.predictions[0] == {"relation": "P1", "subject": "émile", "answers": ["Oz", "Oz"], "right": "[X]"}
    few = bear.TASKS["bear"].measure(model, replace(options, limit=1, predict_only=True))
    assert few.note == "first 1 subjects of each relation" and few.n == 2 and few.metrics == {}


@pytest.mark.parametrize(
    "metadata, rows, words",
    [
        ({}, ROWS, "nothing about relation P1"),
        (METADATA | {"P1": {"templates": ["[X]"], "answer_space_labels": ["a"]}}, ROWS, r"a template without \[Y\]"),
        (METADATA | {"P1": {"templates": ["[Y]"]}}, ROWS, "P1 has no answer_space_labels"),
        (METADATA, {"P1": [{"sub_label": "a", "answer_idx": 2}]}, r"P1\.jsonl: row 1 has answer 2 of 2"),
        (METADATA, {"P1": [{"sub_label": "a", "answer_idx": "2"}]}, "'answer_idx' is str"),
        (METADATA, {"P1": [{"sub_label": "a"}]}, "no field 'answer_idx'"),
        (METADATA, {}, r"no \.jsonl file of a relation"),
    ],
)
def test_malformed_data(tmp_path, metadata, rows, words):
    with pytest.raises(UserError, match=words):
        bear.TASKS["bear"].fingerprint(write(tmp_path, metadata, rows))


def test_no_data(tmp_path):
    with pytest.raises(UserError, match="no folder bear/BEAR"):
        bear.TASKS["bear"].fingerprint(Options(data=tmp_path))
    (tmp_path / "bear" / "BEAR").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no metadata_relations\.json"):
        bear.TASKS["bear"].fingerprint(Options(data=tmp_path))


def test_fetched_once(tmp_path, monkeypatch):
    """From an archive as GitHub makes them; kept whole, and nothing where it is damaged."""
    folder = write(tmp_path).data / "bear" / "BEAR"
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"BEAR-{bear.COMMIT}/README.md", "")
        file.writestr(f"BEAR-{bear.COMMIT}/BEAR-big/P3.jsonl", "")
        for path in folder.iterdir():
            file.write(path, f"BEAR-{bear.COMMIT}/BEAR/{path.name}")
    monkeypatch.setenv("JAXLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bear, "ARCHIVE", (tmp_path / "absent.zip").as_uri())
    with pytest.raises(UserError, match=r"absent\.zip cannot be fetched .* give --data DIR"):
        bear.TASKS["bear"].fingerprint(Options())
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(bear, "ARCHIVE", archive.as_uri())
    assert bear.load(bear.fetched()) == bear.load(folder)
    archive.unlink()
    assert bear.load(bear.fetched()) == bear.load(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_equal_to_lm_pub_quiz(tmp_path):
    """Every score of the demo teacher on three relations' first subjects, within 1e-3 relative; the same accuracy."""
    quiz = pytest.importorskip("lm_pub_quiz", reason="lm-pub-quiz is not installed")
    folder = demo_teacher.require_data() / "eval" / "bear" / "BEAR"
    theirs, model = demo_teacher.both(tmp_path)
    evaluator = quiz.Evaluator.from_model(theirs, model_type="CLM", tokenizer=model.tokenizer)
    codes = ("P105", "P412", "P403")
    dataset = quiz.Dataset.from_path(folder)
    for relation in bear.load(folder, 4):
        if relation.code not in codes:
            continue
        subset = dataset[relation.code].filter_subset(range(4), keep_answer_space=True)
        expected = evaluator.evaluate_relation(subset, batch_size=8, metric="accuracy")
        table = expected.instance_table
        found = scores(relation, model.tokenizer, lambda pairs: loglikelihoods(model, pairs))
        np.testing.assert_allclose(found, np.array(table["pll_scores"].tolist()).reshape(found.shape), rtol=1e-3)
        assert hits(relation, found).mean() == pytest.approx(expected.metric_values["accuracy"])
