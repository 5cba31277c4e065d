"""Several students from one teacher pass: each as if it were trained alone, and the teacher run once."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin.checkpoint import Checkpoints, load_params, save_all
from jaxlin.command_line import parse_run
from jaxlin.config import Stage1Config, Stage2Config, Stage3Config, UserError
from jaxlin.distill import trained_part
from jaxlin.model import forward
from jaxlin.optimizer import make_optimizer
from jaxlin.runs import open_run
from jaxlin.train_step import make_step
from jaxlin.trainer import Trainer
from tests.models import TEACHER, random_params, student_of
from tests.test_train import ROOT, assert_same, command, environment, train, untimed, whole_lines

__all__ = ["environment"]  # a fixture
TINY = replace(
    TEACHER, num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
)
STUDENTS = (student_of("retnet+softmax", teacher=TINY), student_of("gated_deltanet", teacher=TINY))
STAGES = {
    "1": Stage1Config(batch_size=4, accumulation=2, layers=(1,)),
    "2": Stage2Config(batch_size=2, post_norm_target=True, on_bad_step="skip"),
    "3": Stage3Config(batch_size=2, ce_weight=0.5),
}


def batch_of(stage, time=12):
    rows = stage.batch_size // stage.accumulation
    tokens = jax.random.randint(jax.random.key(0), (stage.accumulation, rows, time), 0, TINY.vocab_size)
    return {"tokens": tokens, "segment_ids": jnp.broadcast_to(1 + (jnp.arange(time) > 6), tokens.shape)}


def prepared(stage, students):
    """The step of these students, and what it starts from."""
    optimizers = tuple(make_optimizer(stage, 10, TINY.num_hidden_layers, own.period) for own in students)
    params = tuple(jax.tree.map(jnp.copy, random_params(own, 7)) for own in students)
    moments = tuple(optimizer.init(trained_part(own, stage)) for optimizer, own in zip(optimizers, params, strict=True))
    return make_step(stage, optimizers, students, TINY, "block"), params, moments


def trained(stage, students, steps=3):
    """Parameters and metrics after some steps on one batch."""
    step, params, moments = prepared(stage, students)
    seen = []
    for _ in range(steps):
        params, moments, metrics = step(params, moments, random_params(TINY), batch_of(stage))
        seen.append(metrics)
    return params, seen


@pytest.mark.parametrize("stage", [STAGES["1"], *(pytest.param(STAGES[n], marks=pytest.mark.slow) for n in "23")])
def test_together_as_alone(stage):
    """A student of period 2 beside one of period 1: each has the numbers that it has alone."""
    together, metrics = trained(stage, STUDENTS)
    for i, student in enumerate(STUDENTS):
        (alone,), expected = trained(stage, (student,))
        for found, (wanted,) in zip(metrics, expected, strict=True):
            assert found[i].keys() == wanted.keys()
            for name, value in wanted.items():
                np.testing.assert_allclose(found[i][name], value, rtol=1e-5, atol=1e-7, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together[i], alone)


@pytest.mark.parametrize(
    "stage", [Stage1Config(batch_size=2), pytest.param(Stage3Config(batch_size=2), marks=pytest.mark.slow)]
)
def test_the_teacher_runs_once(stage):
    """The compiled step of two students has the work of two steps, but for one forward pass of the teacher."""
    # Both of one period: XLA counts the body of a loop once, here always one layer.
    students = tuple(student_of(mixer, teacher=TINY) for mixer in ("retnet", "linear_attention"))

    def flops(students):
        step, *state = prepared(stage, students)
        return step.lower(*state, random_params(TINY), batch_of(stage)).compile().cost_analysis()["flops"]

    def teach(params, tokens, segment_ids):
        return forward(TINY, params, tokens, segment_ids=segment_ids, logits=False).hidden

    micro = {name: a[0] for name, a in batch_of(stage).items()}
    teacher = jax.jit(teach).lower(random_params(TINY), **micro).compile().cost_analysis()["flops"]
    alone = sum(flops((student,)) for student in students)
    assert 0 < flops(students) < alone - 0.9 * teacher


def test_a_kill_between_two_saves_leaves_a_common_step(tmp_path, monkeypatch):
    """No old checkpoint is deleted before every run has the new one, also where each keeps one alone."""
    runs = [Checkpoints(tmp_path / name, keep=1) for name in "ab"]
    states = [{"params": {"w": jnp.full(3, value)}} for value in (1.0, 2.0)]
    save_all(runs, 1, states, {})
    monkeypatch.setattr(runs[1], "_save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_all(runs, 2, states, {})
    assert [run.steps() for run in runs] == [[1, 2], [1]]
    runs = [Checkpoints(tmp_path / name, keep=1) for name in "ab"]
    save_all(runs, 2, states, {})
    assert [run.steps() for run in runs] == [[2], [2]]


FIRST = ("--stage", "1", "--tokens", "2048")  # 16 steps, saved at 8 and 16
TWO = ("--mixer", "gated_deltanet+softmax,retnet")
SHORT = ("--tokens", "6144", "--data.seq-len", "32", "--data.eval-tokens", "256", "--save-every", "8")


def run(folder, *args):
    return parse_run(["--config", "tiny", "--run-dir", str(folder), *SHORT, *args])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of two students, trained together on one device."""
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
        Trainer(run(folder, *TWO, *FIRST)).train()
    return folder


def test_folders_are_those_of_single_runs(both, tmp_path, monkeypatch, capsys):
    """Each student's numbers, settings and checkpoints are a single run's, which finds it finished."""
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    assert sorted(path.name for path in both.iterdir()) == ["gated_deltanet+softmax", "retnet"]
    alone, found = tmp_path / "alone", both / "retnet"
    Trainer(run(alone, "--mixer", "retnet", *FIRST)).train()
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert open_run(found).config == replace(open_run(alone).config, run_dir=str(found))
    assert open_run(found).student == open_run(alone).student
    for one, other in zip(untimed(found), untimed(alone), strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    capsys.readouterr()
    Trainer(run(found, "--mixer", "retnet", *FIRST)).train()
    Trainer(run(both, *TWO, *FIRST)).train()
    assert capsys.readouterr().out.count("finished already, at step 16") == 2


def test_mistakes(both, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])

    def mistake(folder, *args):
        before = sorted(tmp_path.rglob("*")), sorted(both.iterdir())
        with pytest.raises(UserError) as error:
            Trainer(run(folder, *FIRST, *args))
        assert (sorted(tmp_path.rglob("*")), sorted(both.iterdir())) == before
        return str(error.value)

    new = tmp_path / "new"
    assert mistake(new, "--mixer", "gla,kda,gla") == "--mixer gla,kda,gla: gla is there twice; name every student once"
    assert mistake(new, "--mixer", "gla,") == "--mixer gla,: a name is missing beside a comma"
    assert "--mixer attention: choose one of softmax, " in mistake(new, "--mixer", "gla,attention")
    assert "gla+softmax+gla has a period of 3, which does not" in mistake(new, "--mixer", "kda,gla+softmax+gla")
    assert mistake(both / "retnet", *TWO) == (
        f"--run-dir {both / 'retnet'}: holds a run; for several students give the folder that their run folders go into"
    )
    found = mistake(both, "--mixer", "retnet,gla")
    assert "no checkpoint of one place in common (newest steps: retnet 16, gla none); leave out" in found
    assert "holds a run with another stage3.lr" in mistake(both, *TWO, "--stage3.lr", "1")


def test_a_kill_between_the_first_saves(both, tmp_path, monkeypatch):
    """One student has the first checkpoint, the other none: they may start anew; with a second one they may not."""
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    folder = Path(shutil.copytree(both, tmp_path / "copy"))
    shutil.rmtree(folder / "gated_deltanet+softmax" / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint of one place in common"):
        Trainer(run(folder, *TWO, *FIRST))
    shutil.rmtree(folder / "retnet" / "checkpoints" / "16")
    assert Trainer(run(folder, *TWO, *FIRST)).progress.step == 0
    with pytest.raises(
        UserError, match="no checkpoint of one place in common"
    ):  # where one student has a stage behind it
        Trainer(run(folder, *TWO, *FIRST, "--stage", "2"))


def test_resumes_from_the_common_step_bit_for_bit(both, tmp_path, monkeypatch, capsys):
    """What a kill between two saves left: one student has a checkpoint more than the other."""
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    folder = Path(shutil.copytree(both, tmp_path / "copy"))
    shutil.rmtree(folder / "gated_deltanet+softmax" / "checkpoints" / "16")
    Trainer(run(folder, *TWO, *FIRST)).train()
    assert "resumed at step 8 (stage 1, step 8)" in capsys.readouterr().out
    assert_same_students(folder, both)


def test_starts_nobody_anew_beside_a_damaged_one(both, tmp_path, monkeypatch):
    """The only step in common is damaged, and one student is further."""
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    folder = Path(shutil.copytree(both, tmp_path / "copy"))
    damaged = folder / "gated_deltanet+softmax" / "checkpoints"
    shutil.rmtree(damaged / "16")
    files = [file for file in (damaged / "8").rglob("*") if file.is_file()]
    max(files, key=lambda file: file.stat().st_size).write_bytes(b"")
    before = load_params(folder / "retnet" / "checkpoints")
    with pytest.raises(UserError, match="no step is whole in the checkpoints of all"):
        Trainer(run(folder, *TWO, *FIRST)).train()
    assert_same(load_params(folder / "retnet" / "checkpoints"), before)


def assert_same_students(found, expected):
    for name in ("gated_deltanet+softmax", "retnet"):
        assert_same(load_params(found / name / "checkpoints"), load_params(expected / name / "checkpoints"))
        assert untimed(found / name) == untimed(expected / name)


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(environment, tmp_path):
    """kill -9 of two students at once; the same command resumes and ends with the uninterrupted run's parameters."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    args = (*TWO, *SHORT, *FIRST)
    train(whole, environment, *args)
    process = subprocess.Popen(command(folder, *args), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    student = folder / "retnet"
    while not (student / "metrics.jsonl").exists() or not any(line["step"] > 8 for line in whole_lines(student)):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resumed at step " in train(folder, environment, *args)
    assert_same_students(folder, whole)
    for name in ("gated_deltanet+softmax", "retnet"):
        assert json.loads((folder / name / "evaluation.json").read_text())["kl"]["now"] > 0
