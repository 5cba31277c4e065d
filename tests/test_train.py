"""train.py as a user runs it: the whole job on a tiny teacher, interruption, and mistakes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlin.checkpoint import Checkpoints, load_params
from jaxlin.command_line import parse_run
from jaxlin.trainer import Trainer
from tests.models import STUDENT_MIXERS
from tests.quick_xla import QUICK

ROOT = Path(__file__).resolve().parent.parent
TIMES = re.compile("^tokens_per_second$|^seconds_|_flops_per_token$")


def command(folder, *args):
    return [sys.executable, "train.py", "--config", "tiny", "--run-dir", str(folder), *args]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and compiled programs kept between the processes of this module."""
    cache = tmp_path_factory.mktemp("compiled")
    return {**os.environ, "XLA_FLAGS": QUICK, "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip


def train(folder, environment, *args):
    done = subprocess.run(command(folder, *args), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """(folder, output) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(folder, environment, "--milestone-tokens", "6144")


def test_whole_job(finished, environment):
    """Three stages, each with a falling loss; the student ends nearer to its teacher; a rerun trains nothing."""
    folder, output = finished
    for stage in (1, 2, 3):
        assert f"after stage {stage}: KL to the teacher" in output
    now = json.loads((folder / "evaluation.json").read_text())
    assert now["kl"]["now"] < 0.7 * now["kl"]["initialisation"]
    assert now["stage_losses"].keys() == {"stage1", "stage2", "stage3"}
    for name, loss in now["stage_losses"].items():
        assert loss["end"] < 0.95 * loss["start"], name
    layers = [line["layer_loss"] for line in lines(folder) if "layer_loss" in line]
    assert {len(losses) for losses in layers} == {4}
    card = json.loads((folder / "card.json").read_text())
    assert card["state_elements_per_layer"] == [4 * 16 * 16] * 4
    assert card["student_parameters"] > card["teacher_parameters"]
    assert list((folder / "tensorboard").iterdir())
    assert_timed(folder, output)
    kept = Checkpoints(folder / "checkpoints", keep=2).steps()
    assert {24, 48, 68, 80} <= set(kept) and 32 not in kept  # one for every 6,144 tokens, for good

    before = load_params(folder / "checkpoints")
    assert "finished already, at step 80" in train(folder, environment)
    assert_same(load_params(folder / "checkpoints"), before)


def assert_timed(folder, output):
    """Each stage's seconds by what took them, and its flops; the last line of a stage has what its end took."""
    for stage in (1, 2, 3):
        found = [line for line in lines(folder) if line["stage"] == stage and "seconds_step" in line]
        assert len(found) > 2
        assert found[0]["seconds_compiling"] > 0 == found[1]["seconds_compiling"]
        assert sum(line["seconds_step"] + line["seconds_data"] for line in found) > 0
        assert found[-1]["seconds_saving"] > 0 < found[-1]["seconds_evaluation"]
        assert found[-1]["student_flops_per_token"] > found[-1]["teacher_flops_per_token"] > 0
        assert re.search(
            rf"stage {stage}: data \d+%, compiling \d+%, step \d+%, saving \d+%, evaluation \d+%; ", output
        )
    assert not any("mfu" in line for line in lines(folder))  # of CPUs nobody publishes the rate


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_run_continues_bit_for_bit(finished, environment, tmp_path, stage):
    """kill -9 in any stage; the same command resumes and ends with the uninterrupted run's parameters."""
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(folder), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not (folder / "metrics.jsonl").exists() or not any(
        line["stage"] == stage and line["step"] % 32 >= 9 for line in whole_lines(folder)
    ):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = train(folder, environment)
    step = int(output.split("resumed at step ")[1].split()[0])
    assert step > 0
    whole, _ = finished
    assert_same(load_params(folder / "checkpoints"), load_params(whole / "checkpoints"))
    assert untimed(folder) == untimed(whole)


def untimed(folder):
    """The metrics of a run, without its times, and without lines that have nothing else."""
    found = ({k: v for k, v in line.items() if not TIMES.search(k)} for line in lines(folder))
    return [line for line in found if line.keys() != {"step", "stage"}]


def whole_lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["recommended", "paper", "paper_code"])
@pytest.mark.parametrize("mixer", [*STUDENT_MIXERS, "gated_deltanet+softmax"])
def test_every_mixer_trains(mixer, preset, tmp_path, monkeypatch):
    """Every mixer and preset goes through all stages, and ends nearer to the teacher than it began."""
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    Trainer(parse_run(["--config", "tiny", "--mixer", mixer, "--preset", preset, "--run-dir", str(tmp_path / "run"),
                       "--tokens", "12288", "--save-every", "100"])).train()  # fmt: skip
    found = [line for line in lines(tmp_path / "run") if "heldout_kl" in line]
    assert found[-1]["stage"] == 3
    initial = json.loads((tmp_path / "run" / "fidelity.json").read_text())
    assert found[-1]["heldout_kl"] < initial["kl"]


def test_stages_can_be_run_one_by_one(finished, environment, tmp_path):
    """--stage 1, then --stage 2 3 in the same folder is the whole job."""
    folder = tmp_path / "parts"
    output = train(folder, environment, "--stage", "1", "--profile", "3:2")
    assert f"profiler trace in {folder / 'profile' / 'stage1'}" in output
    assert list((folder / "profile" / "stage1").rglob("*.xplane.pb"))
    assert {line["stage"] for line in lines(folder)} == {1}
    assert "resumed at step 32 (stage 1, step 32)" in train(folder, environment, "--stage", "2", "3")
    assert_same(load_params(folder / "checkpoints"), load_params(finished[0] / "checkpoints"))


MISTAKES = {
    "mixer": (["--mixer", "attention"], "--mixer attention: choose one of softmax, linear_attention"),
    "hybrid": (["--mixer", "gla+softmax+gla"], "period of 3, which does not divide the 4 layers"),
    "preset": (["--preset", "best"], "--preset best: choose one of recommended, paper, paper_code"),
    "option": (["--model.feature-map", "elu"], "--model.feature-map elu: gated_deltanet has no such option"),
    "option's range": (["--model.conv-size", "-2"], "--model.conv-size -2: must be at least 0"),
    "heldout": (["--data.heldout", "nowhere.txt"], "--data.heldout nowhere.txt: no such file"),
    "study": (["--config", "study_tiny"], "defines no function config(base); studies are for python -m jaxlin.study"),
    "profile": (["--profile", "0:2"], "--profile 0:2: give START:COUNT, a step of a stage from 1"),
    "config": (["--config", "huge"], "--config huge: no such file; give a path or one of demo, instruct, llama3_2_1b"),
    "stage": (["--stage", "4"], "--stage 4: stages are 1, 2 and 3"),
    "field": (["--stage1.sped", "3"], "--stage1.sped: no such setting"),
    "value": (["--stage1.lr", "fast"], "--stage1.lr fast: must be a number"),
    "range": (["--stage1.lr", "-1"], "--stage1.lr -1.0: must be at least 0"),
    "share": (["--data.heldout-fraction", "2"], "--data.heldout-fraction 2.0: must be from 0 to 1"),
    "seed": (["--seed", "-1"], "--seed -1: must be from 0 to 4294967295"),
    "workers": (["--data.workers", "-1"], "--data.workers -1: must be at least 0"),
    "zero tokens": (["--tokens", "0"], "--tokens 0: give a positive number"),
    "no stage": (["--stage1.tokens", "0", "--stage", "1"], "no stage has tokens to train on"),
    "batch": (["--stage1.batch-size", "3", "--stage1.accumulation", "2"], "--stage1.batch-size 3: must be a multiple"),
    "zero batch": (["--stage2.batch-size", "0"], "--stage2.batch-size 0: must be at least 1"),
    "zero length": (["--data.seq-len", "0"], "--data.seq-len 0: must be at least 2"),
    "mesh": (["--mesh.tensor", "3"], "--mesh.tensor 3"),
    "layers": (["--stage1.layers", "7"], "--stage1.layers 7: the teacher's layers are 0 to 3"),
    "text": (["--text", "nowhere.txt"], "nowhere.txt"),
    "no name": (["--text", ""], "--text '': no such file"),
    "empty text": (["--text", "{tmp}/empty.txt"], "empty.txt"),
    "broken text": (["--text", "{tmp}/broken.jsonl"], "broken.jsonl"),
    "teacher": (["--teacher", "{tmp}/nothing"], "nothing"),
    "run as teacher": (["--teacher", "{tmp}/another_run"], "another_run is the folder of a run: give it as --run"),
    "forgotten return": (["--config", "{tmp}/bare.py"], "its config(base) returned None; return replace(base, ...)"),
    "damaged run": (["--run-dir", "{tmp}/damaged"], "its config.json is damaged"),
    "truncated teacher": (["--teacher", "{tmp}/truncated"], "model.safetensors"),
    "mislabelled teacher": (["--teacher", "{tmp}/mislabelled"], "model.safetensors"),
    "another teacher": (["--teacher", "{tmp}/other"], "but --config tiny is for"),
    "loss": (["--stage1.lr", "1e38", "--stage1.lr-new", "1e38", "--stage1.clip", "0"], "lower --stage1.lr"),
    "skipping": (["--stage1.lr", "1e38", "--stage1.lr-new", "1e38", "--stage1.clip", "0",
                  "--stage1.on-bad-step", "skip"], "steps were all skipped as bad; lower --stage1.lr"),
}  # fmt: skip


@pytest.fixture
def material(tmp_path):
    """Files to stumble over."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    for name, text in (("another_run", '{"mixer": "gla"}'), ("damaged", '{"mixer": ')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "bare.py").write_text("def config(base):\n    pass\n")
    llama = {"model_type": "llama", "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0}  # fmt: skip
    for name, config in (("truncated", llama), ("mislabelled", llama), ("other", {**llama, "hidden_size": 128})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({"model.embed_tokens.weight": np.zeros((272, 32), np.float32)}, tmp_path / name / "model.safetensors")
    whole = (tmp_path / "truncated" / "model.safetensors").read_bytes()
    (tmp_path / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    from jaxlin.convert import byte_tokenizer

    for name in ("truncated", "mislabelled", "other"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_clear_line(name, material, monkeypatch, capsys):
    """Exit code 2, the argument and the remedy on stderr, and no run folder left behind."""
    args, message = MISTAKES[name]
    run_dir = material / "run"
    args = [arg.format(tmp=material) for arg in args]
    argv = ["train.py", "--config", "tiny", "--mesh.data", "1", "--run-dir", str(run_dir), *args]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not run_dir.exists() or name in ("loss", "skipping")


def test_run_folder_of_another_run(finished, environment, tmp_path):
    folder, _ = finished
    done = subprocess.run(
        command(folder, "--stage3.lr", "1"), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "holds a run with another stage3.lr (0.0003, now 1.0)" in done.stderr
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run(command(tmp_path), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "not empty and not a run folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    inside = tmp_path / "notes.txt/run"
    done = subprocess.run(command(inside), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and f"--run-dir {inside}: cannot be made" in done.stderr


def test_two_trainings_in_one_folder(environment, tmp_path):
    """The second is refused while the first is at work, whatever it is; its folder stays as it is."""
    folder = tmp_path / "run"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    done = subprocess.run(command(folder), cwd=ROOT, env=environment, capture_output=True, text=True)
    os.close(descriptor)
    assert done.returncode == 2 and f"--run-dir {folder}: another train.py works there" in done.stderr
    assert not list(folder.iterdir())
