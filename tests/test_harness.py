"""The harness's model class and tasks: on a tiny model, and against the harness's own model on the demo teacher."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import eval as eval_script
from jaxlin import convert
from jaxlin.command_line import run_main
from jaxlin.config import RunConfig, UserError
from jaxlin.evaluation import benchmarks, report, suite
from jaxlin.evaluation.harness import JaxLM
from jaxlin.evaluation.scoring import continuations, loglikelihoods
from jaxlin.evaluation.subject import Subject
from jaxlin.evaluation.task import Kept, Options, Result, Task, read_jsonl
from jaxlin.runs import Teacher
from tests.models import TEACHER
from tests.tiny_llama import random_params

BYTES = replace(TEACHER, vocab_size=272, max_position_embeddings=64)
DATA = os.environ.get("JAXLIN_DATA")


@pytest.fixture(scope="module")
def model():
    params = jax.tree.map(lambda a: 0.2 * a, random_params(BYTES))
    return Teacher(BYTES, params, convert.byte_tokenizer())


@pytest.fixture
def lm(model):
    return JaxLM(model=model, batch_tokens=128, bar=lambda title, total: lambda done: None)


def requests(kind, *args):
    return [Instance(kind, {}, a, i) for i, a in enumerate(args)]


def encode(text):
    return convert.byte_tokenizer()(text)["input_ids"]


# ---- the model class


def test_it_is_registered():
    assert get_model("jaxlin") is JaxLM


def test_loglikelihood(lm, model):
    """The tokens that the harness defines: spaces move to the continuation, an empty context is the prefix token."""
    texts = [("One two", " three"), ("One two ", "three"), ("", "One"), ("ab" * 40, "cd")]
    end = lm.eot_token_id
    pairs = [
        (encode("One two"), encode(" three")),
        (encode("One two"), encode(" three")),
        ([end], encode("One")),
        (encode("ab" * 40)[-63:], encode("cd")),  # 64 tokens to read, the last one of the context's two
    ]
    found = lm.loglikelihood(requests("loglikelihood", *texts))
    assert found == loglikelihoods(model, pairs, batch_tokens=128)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_rolling(lm, model):
    """Every token once: the first window from the prefix token, later ones from all that fits."""
    text = "".join(chr(97 + i % 26) for i in range(150))
    tokens, end = encode(text), lm.eot_token_id
    windows = [([end], tokens[:64]), (tokens[63:64], tokens[64:128]), (tokens[85:128], tokens[128:])]
    expected = sum(value for value, _ in loglikelihoods(model, windows, batch_tokens=128))
    short, long = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("",), (text,)))
    assert short == 0 and long == pytest.approx(expected, rel=1e-6)


def test_generate_until(lm, model):
    settings = {"until": [], "max_gen_toks": 33, "do_sample": False}
    contexts = ["One two", "b", "a much longer one, that is cut on its left " * 2]
    whole = lm.generate_until(requests("generate_until", *((c, settings) for c in contexts)))
    prompts = [encode(context)[-31:] for context in contexts]
    tokens = continuations(model, prompts, 33, stop_ids=(lm.eot_token_id,), batch_tokens=128)
    assert whole == [model.tokenizer.decode(t, skip_special_tokens=True) for t in tokens]

    stop = whole[2][4:6]
    both = ((contexts[2], settings | {"until": [stop]}), (contexts[2], settings))
    assert lm.generate_until(requests("generate_until", *both)) == [whole[2].partition(stop)[0], whole[2]]
    with pytest.raises(UserError, match="decodes greedily only"):
        lm.generate_until(requests("generate_until", ("a", {"do_sample": True, "temperature": 1.0})))
    with pytest.raises(UserError, match="wants 64 new tokens, but the model's max_length is 64"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 64})))


def test_chat_template(lm, model):
    with pytest.raises(UserError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    tokenizer = convert.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = JaxLM(model=replace(model, tokenizer=tokenizer), batch_tokens=128)
    history = [{"role": "user", "content": "Hi"}]
    assert chat.apply_chat_template(history) == "<user>Hi<assistant>"
    history.append({"role": "assistant", "content": "Hello"})
    assert chat.apply_chat_template(history, add_generation_prompt=False) == "<user>Hi<assistant>Hello"
    assert chat.chat_template(True) == tokenizer.chat_template


# ---- tasks


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of the tasks' fields."""
    folder = tmp_path_factory.mktemp("data")
    arc = [
        {
            "id": str(i),
            "question": f"Which is {i}?\u2028Say",  # a line end to Python, not to JSON
            "choices": {"text": ["a", str(i), "ccc", "no"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        }
        for i in range(5)
    ]
    write_jsonl(folder / "eval/arc_easy/test.jsonl", arc)
    texts = [{"text": f"He said {w} and then {w}"} for w in ("yes", "no", "maybe")]
    write_jsonl(folder / "eval/lambada_openai/test.jsonl", texts)
    sums = [{"question": f"{i} and {i}?", "answer": f"It is #### {2 * i}"} for i in range(7)]
    write_jsonl(folder / "eval/gsm8k/test.jsonl", sums[:2])
    write_jsonl(folder / "eval/gsm8k/train.jsonl", sums)
    return folder


def test_multiple_choice(model, data):
    """Scores and examples from the harness's definition; the same from the requests by hand."""
    result = benchmarks.measure("arc_easy", model, Options(data=data, limit=3))
    right = []
    for i in range(3):
        context = encode(f"Question: Which is {i}?\u2028Say\nAnswer:")
        choices = ["a", str(i), "ccc", "no"]
        # The model has room for 64 tokens; these fit.
        found = [v for v, _ in loglikelihoods(model, [(context, encode(f" {c}")) for c in choices], batch_tokens=128)]
        right.append(float(np.argmax(found) == 1))
    assert result.per_example["acc"] == right and result.metrics["acc"] == pytest.approx(np.mean(right))
    assert set(result.metrics) == {"acc", "acc_norm"} and result.n == 3 and len(result.predictions) == 3
    assert "0-shot" in result.note and "0.4.13" in result.version
    assert result.prompts_sha256 != benchmarks.measure("arc_easy", model, Options(data=data, limit=2)).prompts_sha256


def test_generation_task(model, data):
    model = replace(model, config=replace(BYTES, max_position_embeddings=1024))
    seen = []
    options = Options(
        data=data, predict_only=True, bar=lambda title, total: seen.append((title, total)) or (lambda n: 0)
    )
    result = benchmarks.measure("gsm8k", model, options)
    assert not result.metrics and not result.per_example and result.n == 2
    assert isinstance(result.predictions[0]["resps"][0][0], str)
    assert seen == [("gsm8k, answering", 2)] and "5-shot" in result.note


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "test.jsonl").unlink(), r"test\.jsonl: no such file, and arc_easy needs it"),
        (lambda f: (f / "test.jsonl").write_text('{"question": 1'), r"test\.jsonl, line 1: not JSON"),
        (lambda f: (f / "test.jsonl").write_text('{"question": "a"}\n'), r"test\.jsonl, line 1: no field 'choices'"),
        (lambda f: (f / "test.jsonl").write_text(""), r"test\.jsonl, line 1: not JSON"),
        (lambda f: (f / "test.jsonl").write_bytes(b'\xff\xfe{"'), r"test\.jsonl: not UTF-8"),
        (lambda f: None, "arc_easy: the records do not fit the definition of arc_easy"),
        (lambda f: (f / "test.jsonl").rename(f.parent / "x") and f.rmdir(), "no folder arc_easy in it, nor in its"),
    ],
)
def test_damaged_data(model, tmp_path, damage, words):
    folder = tmp_path / "arc_easy"
    write_jsonl(folder / "test.jsonl", [{"question": "a", "choices": {}, "answerKey": "A"}])
    damage(folder)
    with pytest.raises(UserError, match=words):
        benchmarks.fingerprint("arc_easy", Options(data=tmp_path))
        benchmarks.measure("arc_easy", model, Options(data=tmp_path))


def test_a_fingerprint_is_of_the_data(data, tmp_path):
    here = benchmarks.fingerprint("arc_easy", Options(data=data))
    assert here == benchmarks.fingerprint("arc_easy", Options(data=data, limit=3))
    other = tmp_path / "arc_easy/test.jsonl"
    write_jsonl(other, read_jsonl(data / "eval/arc_easy/test.jsonl")[1:])
    assert here != benchmarks.fingerprint("arc_easy", Options(data=tmp_path))
    assert "allenai/ai2_arc ARC-Easy" in benchmarks.fingerprint("arc_easy", Options())


def test_average():
    """The paper's table 5, SmolLM2-135M: seven columns, LAMBADA's being the mean of two tasks."""
    scores = dict(winogrande=51.93, arc_easy=58.67, arc_challenge=29.61, piqa=68.01, hellaswag=43.23, bear=21.84)
    metrics = {t: {"acc": v, "acc_norm": v} for t, v in scores.items()}
    metrics |= {"lambada_openai": {"acc": 41.0}, "lambada_standard": {"acc": 37.32}}
    assert benchmarks.average(metrics)["with_bear"] == pytest.approx(44.64, abs=0.005)
    del metrics["bear"]
    assert benchmarks.average(metrics) == {"without_bear": pytest.approx((44.635714 * 7 - 21.84) / 6, abs=1e-3)}
    metrics["piqa"] = {"acc_norm": None}
    assert benchmarks.average(metrics) == {}


# ---- what is kept


def counting_task(name, calls, fail=False):
    def measure(model, options):
        calls.append(name)
        if fail:
            raise UserError(f"{name} is broken")
        return Result(name, {"acc": 0.5, "odd": float("inf")}, {"acc": [0.0, 1.0]}, 2, predictions=[{"answer": "x"}])

    return Task(name, measure, lambda options: f"data of {name}")


def test_finished_tasks_are_kept(model, tmp_path):
    """A task that is done is not done again, whatever comes after it fails; other options or data are another task."""
    calls, subject, kept = [], Subject({"teacher": model}, RunConfig()), Kept(tmp_path / "evaluation")
    tasks = {"a": counting_task("a", calls), "b": counting_task("b", calls, fail=True), "c": counting_task("c", calls)}
    outcome = suite.run(subject, tasks, Options(), kept)
    assert calls == ["a", "b", "c"] and outcome.failed == {"b": "b is broken"}
    again = suite.run(subject, tasks | {"b": counting_task("b", calls)}, Options(), kept)
    assert calls == ["a", "b", "c", "b"] and not again.failed
    assert again.results["a"]["teacher"] == replace(outcome.results["a"]["teacher"], predictions=[])
    suite.run(subject, {"a": tasks["a"]}, Options(limit=1), kept)
    suite.run(subject, {"a": replace(tasks["a"], fingerprint=lambda options: "other")}, Options(), kept)
    suite.run(
        replace(subject, models={"teacher": replace(model, params=random_params(BYTES, seed=1))}),
        tasks,
        Options(),
        kept,
    )
    assert calls[4:] == ["a", "a", "a", "b", "c"]
    latest = kept.latest()
    assert latest["a"]["teacher"].metrics == {"acc": 0.5, "odd": float("inf")}
    predictions = sorted((tmp_path / "evaluation").glob("a-teacher-*.predictions.jsonl"))
    assert len(predictions) == 4 and json.loads(predictions[0].read_text()) == {"answer": "x"}


def test_tables_add_up(model, tmp_path, monkeypatch):
    """A suite's file keeps what other tasks gave of the same parameters; of others it begins anew."""
    subject = Subject({"teacher": model}, RunConfig())
    monkeypatch.setitem(report.SUITES, "two", {name: counting_task(name, []) for name in "ab"})

    def measured(subject, *tasks):
        found = report.benchmark(subject, "two", Options(), tasks=tasks, folder=tmp_path)
        assert list(found["results"]) == list(tasks)
        return json.loads((tmp_path / "two.json").read_text())

    assert set(measured(subject, "a")["details"]) == {"a"}
    both = measured(subject, "b")
    assert set(both["results"]) == set(both["details"]) == {"a", "b"}
    others = replace(subject, models={"teacher": replace(model, params=random_params(BYTES, seed=1))})
    assert set(measured(others, "b")["results"]) == {"b"}


def test_damaged_results_are_measured_again(model, tmp_path):
    calls, subject = [], Subject({"teacher": model}, RunConfig())
    tasks = {"a": counting_task("a", calls)}
    suite.run(subject, tasks, Options(), Kept(tmp_path))
    (path,) = tmp_path.glob("a-teacher-*.json")
    path.write_text(path.read_text()[:50])
    suite.run(subject, tasks, Options(), Kept(tmp_path))
    assert calls == ["a", "a"] and json.loads(path.read_text())["made_with"]["versions"]["jax"]


# ---- the command


@pytest.fixture(scope="module")
def teacher_folder(model, tmp_path_factory):
    """The tiny model as a teacher that the command line can name."""
    folder = tmp_path_factory.mktemp("teacher")
    convert.export_hf(model.params, replace(BYTES, max_position_embeddings=64), folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    eval_script.main()


def test_command(monkeypatch, capsys, teacher_folder, data, tmp_path):
    args = (
        "--teacher",
        teacher_folder,
        "--suite",
        "zero_shot",
        "--data",
        data,
        "--batch-tokens",
        128,
        "--out",
        tmp_path,
    )
    call(monkeypatch, *args, "--tasks", "arc_easy", "--limit", 3, "--json")
    *table, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert any("acc norm" in row for row in table)
    assert found["results"]["arc_easy"]["teacher"].keys() == {"acc", "acc_norm"} and not found["failed"]
    details = found["details"]["arc_easy"]["teacher"]
    assert details["n"] == 3 and len(details["prompts_sha256"]) == 64
    assert json.loads((tmp_path / "zero_shot.json").read_text()) == found

    # The rest of the suite has no data: what there is, is measured, and what is missing is said.
    monkeypatch.setattr(benchmarks, "measure", None)  # kept results need no measuring
    with pytest.raises(UserError, match=r"no folder piqa"):
        call(monkeypatch, *args, "--limit", 3, "--tasks", "arc_easy", "piqa")
    assert "acc norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        (("--suite", "glue"), "--suite glue: choose one of quick, zero_shot"),
        (("--suite", "zero_shot", "--tasks", "squad"), "--tasks squad: the tasks of --suite zero_shot are lambada"),
        (("--suite", "zero_shot", "--text", "x.txt"), "--text: --suite zero_shot has no use for it"),
        (("--suite", "quick", "--chat"), "--chat: --suite quick has no use for it"),
        (("--suite", "zero_shot", "--batch-tokens", "0"), "--batch-tokens 0: must be at least 1"),
        (("--suite", "gsm8k", "--data", "tests"), "--data tests: no folder gsm8k in it"),
    ],
)
def test_command_refuses(monkeypatch, args, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, "--teacher", "missing", *args)


def test_without_lm_eval(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs the package lm_eval: pip install 'jaxlin\[eval\]'"):
        benchmarks.fingerprint("arc_easy", Options(data=data))


def test_bars():
    """A bar replaces the one before it, finished or not."""
    bars = suite.Bars(Console(file=io.StringIO()))
    bars("one", 3)(1)
    advance = bars("two", 2)
    advance(1)
    advance(1)
    bars.close()


def test_failures_in_one_line():
    assert report.failure({"a": "no data"}) == "no data"
    assert report.failure({"a": "x", "b": "x", "c": "y"}) == "a, b: x; c: y"
    assert report.failure({"a": "no folder a in it", "b": "no folder b in it"}) == "no folder a, b in it"
    assert report.failure({"a": "d/a: bad", "b": "d/b: bad"}) == "a: d/a: bad; b: d/b: bad"


def test_out_of_memory_outside_batches(capsys):
    """A model that does not fit is one line, too; other errors of JAX are shown whole."""

    def load(why):
        raise jax.errors.JaxRuntimeError(why)

    with pytest.raises(SystemExit, match="2"):
        run_main(lambda: load("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nBuffers:"))
    assert capsys.readouterr().err == ("error: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\n")
    with pytest.raises(jax.errors.JaxRuntimeError):
        run_main(lambda: load("INTERNAL: other"))


def test_where_results_are_kept():
    kept_in = {
        Path("runs/x/evaluation"): dict(run="runs/x"),
        Path("runs/teacher-demo/evaluation"): dict(teacher="demo"),
        Path("runs/teacher-org--name/evaluation"): dict(teacher="org/name"),
        Path("there"): dict(teacher="demo", out="there"),
    }
    for folder, settings in kept_in.items():
        assert eval_script.kept_in(eval_script.Settings(**settings)) == folder
