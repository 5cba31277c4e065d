"""RULER's needles: the prompts of lm-eval's generator, whatever makes them up; what counts as found."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from jaxlin import convert
from jaxlin.config import UserError
from jaxlin.evaluation import haystack, ruler
from jaxlin.evaluation.punkt import require_punkt
from jaxlin.evaluation.task import Options
from tests import demo_teacher
from tests.goldens import make_ruler_goldens as goldens

TOKENIZER = convert.byte_tokenizer()
MODEL = SimpleNamespace(tokenizer=TOKENIZER)


@pytest.mark.parametrize("length", goldens.LENGTHS)
@pytest.mark.parametrize("name", ruler.VARIANTS)
def test_prompts_are_the_generators(name, length, monkeypatch):
    monkeypatch.setattr(ruler, "split_sentences", goldens.sentences)
    expected = json.loads((goldens.HERE / "ruler_prompts.json").read_text())[f"{name} {length}"]
    found = samples(name, length, goldens.COUNT)
    assert goldens.digest([[sample.prompt, sample.value] for sample in found]) == expected
    assert [sample.value for sample in samples(name, length, 3)] == [sample.value for sample in found[:3]]
    assert all(sample.tokens == TOKENIZER(sample.prompt)["input_ids"] for sample in found)


def samples(name, length, count, seed=1):
    return ruler.samples(
        ruler.VARIANTS[name], TOKENIZER, length, count, seed=seed, keys=goldens.KEYS, essay=goldens.ESSAY
    )


@pytest.mark.slow
def test_prompts_with_real_words_and_text():
    """The generator itself beside ours: wonderwords' lists, Punkt's sentences, SmolLM2's tokenizer."""
    pytest.importorskip("wonderwords", reason="wonderwords is not installed")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("nltk", reason="nltk is not installed")
    data = demo_teacher.require_data()
    require_punkt(data)
    from transformers import PreTrainedTokenizerFast

    prepare = pytest.importorskip("lm_eval.tasks.ruler.prepare_niah", reason="RULER's requirements are not installed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{data}/teacher/tokenizer.json")
    essay = demo_teacher.essay(data)
    keys = haystack.word_pairs()
    assert len(keys) == len(prepare.WORDS)
    assert all(keys[i] == prepare.WORDS[i] for i in random.Random(0).sample(range(len(keys)), 2000))
    template = pytest.importorskip("lm_eval.tasks.ruler.niah_utils").TEMPLATE
    for variant in ruler.VARIANTS.values():
        for length in ruler.LENGTHS:
            random.seed(0)
            text = essay if variant.essay else prepare.get_haystack(type_haystack="repeat")
            expected = prepare.generate_samples(
                text,
                max_seq_length=length,
                template=template,
                type_haystack="essay" if variant.essay else "repeat",
                type_needle_k="words",
                type_needle_v=variant.kind + "s",
                num_samples=20,
                TOKENIZER=tokenizer,
            )
            found = ruler.samples(variant, tokenizer, length, 20, keys=keys, essay=essay)
            assert [s.prompt for s in found] == [f"{e['input']} {e['gen_prefix']}" for e in expected]
            assert [[s.value] for s in found] == [e["outputs"] for e in expected]


def test_pairs_are_the_sorted_set():
    first = ["teeny", "red", "teeny-tiny", "teen", "old", "old-fashioned", "red"]
    second = ["fox", "tiny-fox", "x", "fashioned-x", "fox"]
    expected = sorted({f"{a}-{b}" for a in first for b in second})
    assert list(haystack.Pairs(first, second)) == expected


def test_no_room_and_too_few_words(monkeypatch):
    monkeypatch.setattr(ruler, "split_sentences", goldens.sentences)
    with pytest.raises(UserError, match="prompt of 200 tokens: no room"):
        samples("niah_single_1", 200, 1)
    with pytest.raises(UserError, match="the haystack: 12000 words are too few for prompts of 200000 tokens"):
        samples("niah_single_2", 200_000, 1)


def test_chat_prompts():
    """The question is the user's, and the answer is begun; lengths count as without the template."""
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    tokenizer = convert.byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}</>{% endif %}{% endfor %}"
    )
    plain = samples("niah_single_1", 700, 2)
    chat = ruler.samples(ruler.VARIANTS["niah_single_1"], tokenizer, 700, 2, seed=1, keys=goldens.KEYS, chat=True)
    for one, other in zip(plain, chat, strict=True):
        text = tokenizer.decode(other.tokens)
        question, _, begun = text.partition("</>")
        assert question.startswith("<user>A special magic number") and begun.startswith("<assistant>The special magic")
        assert one.value == other.value and text.replace("</><assistant>", " ") == "<user>" + one.prompt


# ---- the task


@pytest.fixture
def data(tmp_path, monkeypatch):
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "haystack.txt").write_text(" ".join(goldens.ESSAY), "utf-8")
    monkeypatch.setattr(ruler, "word_pairs", lambda: goldens.KEYS)
    monkeypatch.setattr(ruler, "split_sentences", goldens.sentences)
    monkeypatch.setattr(ruler, "require_punkt", lambda data: None)
    return tmp_path


def test_score(data, monkeypatch):
    expected = samples("niah_single_3", 3000, 4, seed=0)

    def answer(model, prompts, new, **options):
        assert prompts == [sample.tokens for sample in expected] and new == 128
        texts = [expected[0].value.upper(), "nothing", expected[1].value, f" It is {expected[3].value}. And"]
        return [TOKENIZER(text)["input_ids"] for text in texts]

    monkeypatch.setattr(ruler, "continuations", answer)
    task = ruler.TASKS["niah_single_3_4096"]
    assert task.name == "niah_single_3_4096"
    found = ruler.measure("niah_single_3", 3000, MODEL, Options(data=data, limit=4))
    assert found.task == "niah_single_3_3000" and found.n == 4
    assert found.metrics == {"acc": 0.5} and found.per_example == {"acc": [1, 0, 0, 1]}
    assert "haystack haystack.txt" in found.note and found.predictions[1]["answer"] == "nothing"
    only = ruler.measure("niah_single_3", 3000, MODEL, Options(data=data, limit=4, predict_only=True))
    assert only.metrics == {} == only.per_example and only.predictions == found.predictions


def test_haystacks(data, tmp_path):
    pytest.importorskip("wonderwords", reason="wonderwords is not installed")
    fingerprint = ruler.TASKS["niah_single_2_512"].fingerprint
    before = fingerprint(Options(data=data))
    (data / "ruler" / "haystack.txt").write_text("Another text. " * 600)
    assert fingerprint(Options(data=data)) != before
    (data / "ruler" / "haystack.txt").unlink()
    with pytest.raises(UserError, match=r"want a haystack, ruler/haystack\.txt"):
        fingerprint(Options(data=data))


def test_reading_haystacks(tmp_path):
    path = tmp_path / "PaulGrahamEssays.json"
    path.write_text(json.dumps({"text": " Two\n\nwords \t here"}))
    assert haystack.read_haystack(path) == ["", "Two", "words", "here"]
    path.write_text("[]")
    with pytest.raises(UserError, match="not a JSON object with a text"):
        haystack.read_haystack(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        haystack.read_haystack(path)
    with pytest.raises(UserError, match="cannot be read"):
        haystack.read_haystack(tmp_path / "missing.txt")
