"""Measuring: against direct computations, on a mesh, and from the command line."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_script
from jaxlin import convert, generate, runs
from jaxlin.checkpoint import Checkpoints
from jaxlin.command_line import load_config_file, preset, to_json
from jaxlin.config import MeshConfig, UserError
from jaxlin.evaluation import niah, quick
from jaxlin.evaluation.fidelity import fidelity, fidelity_table
from jaxlin.evaluation.language_modeling import compare, perplexity
from jaxlin.evaluation.report import as_line
from jaxlin.evaluation.subject import open_subject, params_sha256
from jaxlin.mixers.common import positions_in_segments
from jaxlin.model import LanguageModel, blocks
from jaxlin.sharding import make_mesh
from jaxlin.student import init_student
from tests.models import TEACHER as SMALL
from tests.models import random_params, student_of

TEACHER = replace(SMALL, num_hidden_layers=4)  # two periods of the student's mixers
STUDENT = student_of("gated_deltanet+softmax", teacher=TEACHER)


@pytest.fixture(scope="module")
def teacher_params():
    return random_params(TEACHER)


@pytest.fixture(scope="module")
def student_params():
    return random_params(STUDENT, seed=1)


@pytest.fixture(scope="module")
def batches():
    """Packed segments, padding at the end, and a row that is nothing else."""
    rng = np.random.default_rng(0)
    segment_ids = np.array([[1] * 10 + [2] * 6, [1] * 11 + [0] * 5, [1] * 16, [0] * 16] * 2, np.int32)
    return [
        {"tokens": rng.integers(0, TEACHER.vocab_size, segment_ids.shape).astype(np.int32), "segment_ids": ids}
        for ids in (segment_ids, segment_ids[::-1])
    ]


def direct(batches, teacher_params, student_params):
    """What `compare` gives, from whole logits, token by token."""
    logs = []
    for config, params in ((TEACHER, teacher_params), (STUDENT, student_params)):
        run = jax.jit(lambda b, c=config, p=params: LanguageModel(c).apply(
            {"params": p}, b["tokens"], segment_ids=b["segment_ids"]).logits)  # fmt: skip
        logs.append([np.asarray(jax.nn.log_softmax(run(b)), np.float64) for b in batches])
    kl, agree, ce = [], [], ([], [])
    for b, t, s in zip(batches, *logs, strict=True):
        tokens, ids = b["tokens"], b["segment_ids"]
        for row, at in np.argwhere(ids != 0):
            kl.append((np.exp(t[row, at]) * (t[row, at] - s[row, at])).sum())
            agree.append(t[row, at].argmax() == s[row, at].argmax())
            if at + 1 < ids.shape[1] and ids[row, at + 1] == ids[row, at]:
                for losses, log in zip(ce, (t, s), strict=True):
                    losses.append(-log[row, at, tokens[row, at + 1]])
    return {
        "teacher_perplexity": math.exp(np.mean(ce[0])),
        "perplexity": math.exp(np.mean(ce[1])),
        "kl": np.mean(kl),
        "agreement": np.mean(agree),
        "tokens": len(kl),
        "next_tokens": len(ce[0]),
    }


def test_compare_is_the_direct_computation(batches, teacher_params, student_params):
    found = compare(TEACHER, teacher_params, STUDENT, student_params, batches)
    expected = direct(batches, teacher_params, student_params)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert 0 < found["agreement"] < 1 and found["tokens"] == 4 * 43

    alone = perplexity(TEACHER, teacher_params, batches)
    assert alone["perplexity"] == pytest.approx(expected["teacher_perplexity"], rel=1e-5)
    assert alone["next_tokens"] == expected["next_tokens"]

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = fidelity(TEACHER, teacher_params, STUDENT, student_params, batches, mesh=mesh)
    assert {name: sharded[name] for name in found} == pytest.approx(found, rel=1e-5)


def test_the_teacher_is_its_own_perfect_student(batches, teacher_params):
    report = fidelity(TEACHER, teacher_params, TEACHER, teacher_params, batches)
    assert report["kl"] == 0 and report["agreement"] == 1
    assert report["perplexity"] == report["teacher_perplexity"]
    assert report["nmse"] == [0] * 4
    np.testing.assert_allclose(report["cosine"], 1, rtol=1e-6)
    assert report["mixer"] == ["softmax"] * 4


def test_fidelity_of_each_layer(batches, teacher_params, student_params):
    """Against each block applied by hand to the teacher's residual stream; hybrids' layers in their order."""
    report = fidelity(TEACHER, teacher_params, STUDENT, student_params, batches)
    assert report["mixer"] == ["gated_deltanet", "softmax"] * 2
    error, power, cosine, count = np.zeros(4), np.zeros(4), np.zeros(4), 0
    run = jax.jit(lambda b: LanguageModel(TEACHER).apply(
        {"params": teacher_params}, b["tokens"], segment_ids=b["segment_ids"],
        collect=("hidden_states", "mixer_outputs"), logits=False).collected)  # fmt: skip
    for batch in batches:
        seen, valid = run(batch), batch["segment_ids"] != 0
        positions, _ = positions_in_segments(valid.shape, jnp.asarray(batch["segment_ids"]), None)
        count += valid.sum()
        for layer in range(4):
            block = blocks(STUDENT)[layer % 2]
            params = jax.tree.map(lambda a, i=layer // 2: a[i], student_params["layers"][block.name])
            call = dict(positions=positions, segment_ids=jnp.asarray(batch["segment_ids"]))
            _, mixed, _ = jax.jit(block.apply)({"params": params}, seen["hidden_states"][layer], **call)
            a, b = (np.asarray(x, np.float64)[valid] for x in (mixed, seen["mixer_outputs"][layer]))
            error[layer] += ((a - b) ** 2).sum()
            power[layer] += (b**2).sum()
            cosine[layer] += ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).sum()
    np.testing.assert_allclose(report["nmse"], error / power, rtol=1e-4)
    np.testing.assert_allclose(report["cosine"], cosine / count, rtol=1e-4, atol=1e-5)
    assert fidelity_table(report).row_count == 4
    json.dumps(report)


def test_nothing_to_measure(teacher_params):
    padding = {"tokens": np.zeros((8, 16), np.int32), "segment_ids": np.zeros((8, 16), np.int32)}
    with pytest.raises(ValueError, match="nothing to predict"):
        perplexity(TEACHER, teacher_params, [padding])
    with pytest.raises(ValueError, match="nothing to predict"):
        perplexity(TEACHER, teacher_params, [])


# ---- needle in a haystack


@pytest.mark.parametrize("length", [450, 600, 1000])
def test_niah_prompt(length):
    tokenizer = convert.byte_tokenizer()
    questions = niah.samples(tokenizer, length, 8)
    assert questions == niah.samples(tokenizer, length, 8) != niah.samples(tokenizer, length, 8, seed=1)
    assert questions[:3] == niah.samples(tokenizer, length, 3)
    for question in questions:
        assert question.prompt.count("One of the special magic numbers for") == 1
        assert question.prompt.count(question.value) == 1 and len(question.value) == 7
        assert question.prompt.endswith("mentioned in the provided text is")
        assert tokenizer(question.prompt)["input_ids"] == question.tokens
        assert length - len(max(niah.NOISE, key=len)) - 1 <= len(question.tokens) <= length
    depths = {round(q.prompt.index(q.value) / len(q.prompt), 1) for q in niah.samples(tokenizer, length, 30)}
    assert len(depths) > 2


def test_niah_length_without_room():
    tokenizer = convert.byte_tokenizer()
    with pytest.raises(UserError, match="of 100 tokens: the question alone is"):
        niah.samples(tokenizer, 100, 1)
    room = niah.shortest(tokenizer)
    assert niah.samples(tokenizer, room, 50)
    answers = niah.scores(lambda prompts: [[] for _ in prompts], tokenizer, (room - 1, room), 1)
    assert answers == {str(room - 1): None, str(room): 0.0}


def test_niah_score():
    tokenizer = convert.byte_tokenizer()

    def encode(text):
        return tokenizer(text)["input_ids"]

    def right(prompts):
        return [encode(" " + "".join(c for c in tokenizer.decode(p) if c.isdigit()) + ". Next") for p in prompts]

    def half(prompts):
        return [a if i % 2 else encode("1234567") for i, a in enumerate(right(prompts))]

    assert niah.score(right, tokenizer, 500, 2 * niah.BATCH + 2) == 1
    assert niah.score(half, tokenizer, 500, 2 * niah.BATCH + 2) == 0.5


# ---- the command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that was initialised and saved, with the metrics of two stages."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    rng = random.Random(0)
    text = folder.parent / "text.txt"
    text.write_text("\n\n".join(" ".join(rng.choice(niah.WORDS) for _ in range(60)) for _ in range(200)))
    config = load_config_file("tiny", preset("recommended"))
    data = replace(config.data, heldout=(str(text),), eval_tokens=256)
    config = replace(config, run_dir=str(folder), text=(str(text),), data=data)
    runs.write_text(folder / "config.json", to_json(config))
    teacher = runs.load_teacher(config)
    run = runs.new_run(config, teacher.config)
    params = jax.jit(lambda t, key: init_student(t, run.student, key))(teacher.params, jax.random.key(0))
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    checkpoints.save(4, {"params": params}, {})
    checkpoints.close()
    run.write("fidelity.json", {"kl": 0.5})
    lines = [{"stage": s, "step": i, "heldout_loss": 10.0 * s - i} for s in (1, 2) for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, params


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    eval_script.main()


def test_eval_of_a_run(run_folder, monkeypatch, capsys):
    folder, params = run_folder
    call(monkeypatch, "--run", folder, "--tasks", "held_out", "--json")
    *table, line = capsys.readouterr().out.splitlines()
    assert any("perplexity" in row for row in table)
    found = json.loads(line)
    assert found["params_sha256"] == params_sha256(params)
    assert found["stage_losses"] == {"stage1": {"start": 10.0, "end": 8.0}, "stage2": {"start": 20.0, "end": 18.0}}
    assert found["kl"]["initialisation"] == 0.5 and 0 < found["kl"]["now"] < 1
    assert found["results"]["held_out"]["student"]["kl"] == found["kl"]["now"]
    assert str(folder) not in line
    assert as_line(json.loads((folder / "evaluation.json").read_text())) == line


def test_another_text_is_not_kept_as_the_runs(run_folder, monkeypatch, capsys, tmp_path):
    folder, _ = run_folder
    call(monkeypatch, "--run", folder, "--tasks", "held_out")
    before = (folder / "evaluation.json").read_bytes()
    (tmp_path / "other.txt").write_text("another text " * 50)
    call(monkeypatch, "--run", folder, "--tasks", "held_out", "--text", tmp_path / "other.txt", "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["kl"]["initialisation"] is None and found["kl"]["now"] > 0
    assert (folder / "evaluation.json").read_bytes() == before


@pytest.mark.slow
def test_every_quick_task(run_folder, monkeypatch, capsys):
    folder, _ = run_folder
    monkeypatch.setattr(quick, "NIAH_LENGTHS", (128, 400))
    call(monkeypatch, "--run", folder, "--limit", 2, "--json")
    line = capsys.readouterr().out.splitlines()[-1]
    results = json.loads(line)["results"]
    assert results["niah_single_1"] == {name: {"128": None, "400": 0.0} for name in ("teacher", "student")}
    assert "speed" not in results and "second" not in line
    kept = json.loads((folder / "evaluation.json").read_text())
    assert kept["results"]["speed"]["student"]["decode_tokens_per_second"] > 0

    call(monkeypatch, "--run", folder, "--tasks", "niah_single_1", "--limit", 1, "--json")
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < again["kl"]["now"] < 1 and list(again["results"]) == ["niah_single_1"]

    call(monkeypatch, "--run", folder, "--tasks", "held_out", "--limit", 1, "--json")  # the same limit: beside those
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["results"]) == ["held_out"]
    assert set(json.loads((folder / "evaluation.json").read_text())["results"]) == {"niah_single_1", "held_out"}


def test_milestones(run_folder, monkeypatch, tmp_path, capsys):
    """Each is measured into its own folder, beside the run's, and once; without any it is an error."""
    (folder, params), words = run_folder, "has none; train with --milestone-tokens N"
    with pytest.raises(UserError, match=words):
        call(monkeypatch, "--run", folder, "--milestones", "--tasks", "held_out")
    shutil.copytree(folder, folder := tmp_path / "run")
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    before = jax.tree.map(lambda a: 0.9 * a, params)
    checkpoints.save(2, {"params": before}, {"progress": {"tokens": 128}}, milestone=True)
    checkpoints.close()
    call(monkeypatch, "--run", folder, "--milestones", "--tasks", "held_out", "--json")
    found = json.loads((folder / "milestones/2/evaluation.json").read_text())
    assert (found["step"], found["tokens"]) == (2, 128) and found["params_sha256"] == params_sha256(before)
    assert "stage_losses" not in found and found["held_out_sums"] and not (folder / "milestones/4").exists()
    shown, (task, asked) = capsys.readouterr().out, (quick.TASKS["held_out"], [])
    monkeypatch.setattr(quick, "TASKS", {"held_out": lambda *args: asked.append(args[1]) or task(*args)})
    call(monkeypatch, "--run", folder, "--milestones", "--tasks", "held_out", "--json")
    assert capsys.readouterr().out.splitlines()[-1] == shown.splitlines()[-1] and not asked
    call(monkeypatch, "--run", folder, "--milestones", "--tasks", "held_out", "--limit", 3)
    assert asked == [3]
    (folder / "milestones/2/evaluation.json").write_text('{"suite": "qu')
    call(monkeypatch, "--run", folder, "--milestones", "--tasks", "held_out", "--limit", 3)
    assert asked == [3, 3]


def test_a_student_alone(run_folder):
    subject = open_subject(str(run_folder[0]))
    alone = subject.student_only()
    assert list(alone.models) == ["student"] and alone.measured is subject.measured


def test_generate_from_a_run(run_folder, monkeypatch, capsys):
    texts = []
    for flags in ([], ["--teacher-model"], []):
        args = ["generate", "--run", str(run_folder[0]), "--prompt", "maple", "--max-new-tokens", "12", *flags]
        monkeypatch.setattr(sys, "argv", args)
        generate.main()
        texts.append(capsys.readouterr().out)
    student, teacher, again = texts
    assert student.startswith("maple") and teacher.startswith("maple")
    assert student == again != teacher


@pytest.mark.parametrize(
    "args, words",
    [
        ((), "give either --run DIR or --teacher T"),
        (("--run", "a", "--teacher", "demo"), "--run a and --teacher demo: give one of them"),
        (("--run", "missing"), "--run missing: no run there"),
        (("--run", "x", "--suite", "slow"), "--suite slow: choose one of quick"),
        (("--run", "x", "--tasks", "arc"), "--tasks arc: the tasks of --suite quick are held_out"),
        (("--run", "x", "--suite", "niah", "--data", "missing"), "--data missing: no such folder"),
        (("--run", "x", "--student-only"), "--student-only: give --run DIR and a --suite of benchmarks"),
        (("--teacher", "demo", "--milestones"), "--milestones: give --run DIR"),
        (("--run", "x", "--milestones", "--out", "y"), "--milestones: give --run DIR, into which .* and no --out"),
        (("--run", "x", "--limit", "0"), "--limit 0: must be at least 1"),
    ],
)
def test_eval_refuses(monkeypatch, args, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, *args)


def test_eval_refuses_a_run_that_cannot_keep_the_results(tmp_path, monkeypatch):
    """Before anything is loaded. (Who runs the tests may be root, who may write everywhere.)"""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=f"--run {tmp_path}: cannot be written to; the results go there"):
        call(monkeypatch, "--run", str(tmp_path))


def test_eval_refuses_text_that_is_not_there(run_folder, monkeypatch):
    with pytest.raises(UserError, match=r"no_such_text\.txt"):
        call(monkeypatch, "--run", run_folder[0], "--text", "no_such_text.txt")


def test_params_sha256():
    """Paths, order and bytes all count, and nothing else."""
    a = {"x": {"b": jnp.arange(3.0), "a": jnp.ones(2, jnp.bfloat16)}, "c": jnp.zeros(())}
    same = {"c": np.zeros((), np.float32), "x": {"a": np.asarray(a["x"]["a"]), "b": np.arange(3, dtype=np.float32)}}
    assert params_sha256(a) == params_sha256(same)
    for other in (
        {**a, "c": jnp.ones(())},
        {**a, "d": a["c"]},
        {"x": {"a": a["x"]["b"], "b": a["x"]["a"]}, "c": a["c"]},
    ):
        assert params_sha256(other) != params_sha256(a)
