"""Training on conversations: losses where tokens are learned, both regimes end to end, starts from other runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlin import distill, losses, packing, runs
from jaxlin.checkpoint import load_params
from jaxlin.command_line import parse_run
from jaxlin.config import DataConfig, RunConfig, Stage3Config, UserError
from jaxlin.evaluation.report import evaluate
from jaxlin.evaluation.subject import open_subject
from jaxlin.model_flops import model_flops
from jaxlin.plan import placed_models
from jaxlin.sharding import make_mesh
from jaxlin.trainer import Trainer
from tests.chat_teacher import ARCHITECTURE, chat_teacher, chat_tokenizer, chats, write_chats
from tests.models import random_params, student_of
from tests.test_train import assert_same, lines

SMALL = ["--config", "tiny", "--data.seq-len", "128", "--stage3.batch-size", "4", "--mesh.data", "1"]
SHAPE = replace(ARCHITECTURE, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A teacher with a chat template, conversations, and a short run of a student of that teacher on text."""
    folder = tmp_path_factory.mktemp("sft")
    chat_teacher(folder / "teacher")
    write_chats(folder / "chats.jsonl", chats())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
        Trainer(parse_run([*SMALL, "--teacher", str(folder / "teacher"), "--mixer", "retnet", "--stage", "3",
                           "--tokens", "1024", "--run-dir", str(folder / "start")])).train()  # fmt: skip
    return folder


def sft(material, folder, *args):
    """The settings of a fine-tuning of the student in `material`."""
    return parse_run(["--config", "sft", "--conversations", str(material / "chats.jsonl"), "--run-dir", str(folder),
                      "--data.seq-len", "128", "--stage3.batch-size", "4", "--mesh.data", "1",
                      "--save-every", "2", "--log-every", "1",
                      *(args or ("--init-from", str(material / "start")))])  # fmt: skip


def batch_of(tmp_path, loss_on="assistant"):
    """Rows of several conversations each."""
    path = write_chats(tmp_path / "chats.jsonl", chats(6))
    config = DataConfig(seq_len=256)
    found = packing.prepare(tmp_path / "run", [str(path)], chat_tokenizer(), 256, loss_on, resuming=False)
    rows = packing.training_rows(found, config)
    return {name: np.stack([rows[i][name] for i in range(2)]) for name in rows[0]}


def unpacked(batch):
    """Each conversation in a row of its own."""
    places = [(row, s) for row, ids in enumerate(batch["segment_ids"]) for s in range(1, ids.max() + 1)]
    alone = {name: np.zeros((len(places), a.shape[1]), a.dtype) for name, a in batch.items()}
    for new, (row, segment) in enumerate(places):
        here = batch["segment_ids"][row] == segment
        for name, a in batch.items():
            alone[name][new, : here.sum()] = 1 if name == "segment_ids" else a[row, here]
    return alone


@pytest.mark.parametrize("mixer", ["softmax", "gated_deltanet"])
def test_packed_equals_unpacked(mixer, tmp_path):
    """Loss and gradients do not depend on what shares a row."""
    batch = batch_of(tmp_path)
    assert batch["segment_ids"].max() > 1
    student, stage = student_of(mixer, teacher=SHAPE), Stage3Config(kl_weight=0.7, ce_weight=0.3)
    gradients = jax.jit(distill.gradient_function(stage, student, SHAPE, "none"))
    params, teacher = random_params(student, 1), random_params(SHAPE)
    found, expected = (gradients(params, params, teacher, b, distill.counts(b)) for b in (batch, unpacked(batch)))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_only_learned_tokens_count(tmp_path):
    """A position counts where the next token of its conversation is learned; without the key all do as ever."""
    batch = batch_of(tmp_path)
    at = distill.targets_of(batch)
    for row, ids in enumerate(batch["segment_ids"]):
        expected = [t + 1 < 256 and ids[t] == ids[t + 1] != 0 and batch["learned"][row, t + 1] for t in range(256)]
        np.testing.assert_array_equal(at.valid[row], expected)
    np.testing.assert_array_equal(at.valid, at.has_next)
    count = distill.counts(batch)
    assert count["tokens"] == count["next_tokens"] == at.valid.sum() > 0
    plain = losses.targets(batch["tokens"], batch["segment_ids"])
    np.testing.assert_array_equal(plain.valid, batch["segment_ids"] != 0)


def test_cross_entropy_alone_runs_no_teacher(tmp_path):
    """The same gradients as with a KL of weight 0 in the sum, of no teacher; and none is counted."""
    batch, student = batch_of(tmp_path), student_of("retnet", teacher=SHAPE)
    stage = Stage3Config(kl_weight=0.0, ce_weight=1.0)
    params, count = random_params(student, 1), distill.counts(batch)
    found, metrics = jax.jit(distill.gradient_function(stage, student, SHAPE, "none"))(
        params, params, None, batch, count
    )
    tiny = replace(stage, kl_weight=1e-30)
    expected, seen = jax.jit(distill.gradient_function(tiny, student, SHAPE, "none"))(
        params, params, random_params(SHAPE), batch, count
    )
    assert metrics.keys() == {"loss", "ce"} and np.isclose(metrics["loss"], metrics["ce"], rtol=1e-6)
    np.testing.assert_allclose(metrics["ce"], seen["ce"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    run = RunConfig(mixer="retnet", dtype="float32", teacher_config=SHAPE)
    mesh = make_mesh(run.mesh, jax.local_devices()[:1])
    flops = {}
    for kl_weight in (0.0, 1.0):
        chosen = replace(stage, batch_size=2, kl_weight=kl_weight)
        teacher, (student,), (params, _, _) = placed_models(run, chosen, mesh)
        flops[kl_weight] = model_flops(chosen, student, teacher, params[0], random_params(SHAPE), 64, mesh)
    assert flops[0.0].teacher == 0 < flops[1.0].teacher
    head = 2 * SHAPE.hidden_size * SHAPE.vocab_size  # the teacher's logits are no longer computed either
    assert flops[1.0].student - flops[0.0].student == head


@pytest.mark.slow
def test_fine_tuning_a_student(material, tmp_path, capsys):
    """It starts where the other run ended, learns, resumes bit for bit, and eval.py measures what it measured."""
    run = sft(material, tmp_path / "whole")
    assert (run.mixer, run.teacher, run.dtype) == ("retnet", str(material / "teacher"), "float32")
    trainer = Trainer(run)
    trainer.train()
    out = capsys.readouterr().out
    assert "conversations: 40 of 40 kept" in out and "agreement" in out and "on conversations" in out
    report = json.loads((tmp_path / "whole/conversations.json").read_text())
    assert trainer.progress.step == round(report["rows"] / 4)  # one epoch
    assert runs.open_run(tmp_path / "whole").stages()[3].tokens == report["rows"] * 128
    held = [line for line in lines(tmp_path / "whole") if "heldout_loss" in line]
    assert held[-1]["heldout_loss"] < held[0]["heldout_loss"]
    started = json.loads((tmp_path / "whole/fidelity.json").read_text())
    assert np.isclose(held[0]["heldout_loss"], np.log(started["perplexity"]), rtol=1e-5)

    broken = Trainer(sft(material, tmp_path / "broken"))
    step = broken._train_step

    def stop_at_four(*args):
        if broken.progress.step == 4:
            raise KeyboardInterrupt
        return step(*args)

    broken._train_step = stop_at_four
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    (material / "start").rename(material / "away")  # it is not read again
    try:
        Trainer(sft(material, tmp_path / "broken", "--init-from", str(material / "start"))).train()
    finally:
        (material / "away").rename(material / "start")
    assert "resumed at step 4" in capsys.readouterr().out
    assert_same(load_params(tmp_path / "broken/checkpoints"), load_params(tmp_path / "whole/checkpoints"))

    measured = evaluate(open_subject(run=str(tmp_path / "whole")), tasks=["held_out"])
    last = [line for line in lines(tmp_path / "whole") if "heldout_kl" in line][-1]
    assert np.isclose(measured["results"]["held_out"]["student"]["kl"], last["heldout_kl"], rtol=1e-4)
    assert measured["kl"]["initialisation"] == started["kl"]


def test_fine_tuning_the_teacher(material, tmp_path):
    """The paper's baseline: the student is the teacher, so it starts at the teacher's own loss."""
    args = ("--mixer", "softmax", "--teacher", str(material / "teacher"), "--dtype", "float32", "--tokens", "1024")
    Trainer(sft(material, tmp_path / "run", *args)).train()
    started = json.loads((tmp_path / "run/fidelity.json").read_text())
    assert started["perplexity"] == started["teacher_perplexity"] and started["agreement"] == 1
    assert abs(started["kl"]) < 1e-9
    held = [line["heldout_loss"] for line in lines(tmp_path / "run") if "heldout_loss" in line]
    assert np.isclose(held[0], np.log(started["teacher_perplexity"]), rtol=1e-6) and held[-1] < held[0]


@pytest.mark.slow
def test_an_instruct_teacher(material, tmp_path, capsys):
    """Two stages on text, the third on conversations; stage 3 alone continues them without text."""
    args = ["--config", "instruct", "--mixer", "retnet", "--teacher", str(material / "teacher"), "--dtype", "float32",
            "--conversations", str(material / "chats.jsonl"), "--run-dir", str(tmp_path / "run"),
            "--data.seq-len", "128", "--data.eval-tokens", "1024", "--mesh.data", "1", "--tokens", "5120",
            *(f"--stage{n}.batch-size=4" for n in (1, 2, 3)), "--stage3.loss-on", "assistant"]  # fmt: skip
    (tmp_path / "text.txt").write_text("Some text to begin with. " * 400)
    args += ["--text", str(tmp_path / "text.txt")]
    Trainer(parse_run([*args, "--stage", "1", "2"])).train()
    assert "conversations" not in capsys.readouterr().out
    (tmp_path / "text.txt").unlink()
    Trainer(parse_run([*args, "--stage", "3"])).train()
    assert "on conversations" in capsys.readouterr().out
    seen = {line["stage"] for line in lines(tmp_path / "run") if "heldout_kl" in line}
    assert seen == {1, 2, 3}
    assert (tmp_path / "run/conversations/learned.npy").exists()


def test_starts_that_cannot_be(material, tmp_path):
    """One clear line, and no run folder."""
    start = str(material / "start")
    for args, message in (
        (("--init-from", str(tmp_path / "none")), "--init-from .*none: no run there"),
        (
            ("--mixer", "gla", "--teacher", str(material / "teacher")),
            "--init-from: give the run folder .*gla is untrained",
        ),
        (("--init-from", start, "--mixer", "retnet,gla"), "holds one student; give --mixer one name"),
        (("--init-from", start, "--mixer", "gla"), r"its student has another mixer \(\['retnet'\], now \['gla'\]\)"),
        (("--init-from", start, "--model.conv-size", "3"), r"another conv_size \(.*, now 3\)"),
        (("--init-from", start, "--epochs", "0"), "--epochs 0.0: must be above 0"),
        (
            ("--init-from", start, "--conversations", "--stage3.tokens", "64", "--stage3.loss-on", "assistant"),
            "--stage3.loss-on assistant: tells turns of --conversations apart",
        ),
        (("--init-from", start, "--data.heldout-fraction", "0"), "keeps back no conversations"),
        (("--init-from", start, "--conversations", str(tmp_path / "x")), "--conversations .*x: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(sft(material, tmp_path / "run", *args))
        assert not (tmp_path / "run").exists(), args


def test_tokens_of_the_command_line_overrule_a_config_s_epochs():
    flags = ("--config", "sft", "--stage3.tokens", "1000")
    assert parse_run(flags).epochs is None and parse_run(flags[:2]).epochs == 1.0
    assert parse_run((*flags, "--epochs", "2")).epochs == 2.0


def test_epochs_and_tokens():
    run = RunConfig(conversations=("c",), epochs=2.0, stage=(3,))
    assert run.stages(1000)[3].tokens == 2000
    assert run.stages()[3].tokens == Stage3Config().tokens
    assert replace(run, tokens=500).stages(1000)[3].tokens == 500
    shares = {n: stage.tokens for n, stage in RunConfig(tokens=10).stages().items()}
    assert shares == {1: 1, 2: 1, 3: 9}  # a step for each stage, however few they are
    with pytest.raises(UserError, match=r"--epochs 2\.0: counts passes over --conversations"):
        replace(run, conversations=()).stages()


def test_folders_from_before_there_were_conversations(tmp_path):
    """A setting that the folder does not know counts as its default."""
    run = RunConfig(run_dir=str(tmp_path / "run"))
    old = json.loads(runs.to_json(run))
    for name in ("conversations", "epochs", "init_from"):
        del old[name]
    del old["stage3"]["loss_on"]
    runs.write_text(tmp_path / "run/config.json", json.dumps(old))
    runs.check_folder(run)
    with pytest.raises(UserError, match=r"another stage3.loss_on \(all, now assistant\)"):
        runs.check_folder(replace(run, stage3=replace(run.stage3, loss_on="assistant")))


@pytest.mark.slow
def test_several_students(material, tmp_path):
    """Each as it would have been alone."""
    args = ("--teacher", str(material / "teacher"), "--dtype", "float32", "--tokens", "1024")
    Trainer(sft(material, tmp_path / "two", "--mixer", "retnet,gla", *args)).train()
    Trainer(sft(material, tmp_path / "one", "--mixer", "gla", *args)).train()
    tokens = (tmp_path / "two" / mixer / "conversations" / "tokens.npy" for mixer in ("retnet", "gla"))
    assert os.path.samefile(*tokens)
    together, alone = (load_params(tmp_path / name / "checkpoints") for name in ("two/gla", "one"))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(evaluate(open_subject(run=str(tmp_path / "two/gla")), tasks=["held_out"])["kl"]["now"])
