"""One run on any topology: every mesh of eight devices, two processes and one device give the same numbers.

Runs go through the trainer, or through train.py where there are two processes, which gloo connects.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlin.command_line import parse_run
from jaxlin.config import UserError
from jaxlin.evaluation.report import report_run
from jaxlin.trainer import Trainer
from tests.models import STUDENT_MIXERS
from tests.quick_xla import QUICK

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ("--config", str(ROOT / "tests" / "eight_heads.py"), "--keep", "99")
CHEAP = ("--config", str(ROOT / "tests" / "eight_heads_tied.py"), "--mixer", "retnet")  # compiles fastest
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(shape) == 8]


def flags(mesh):
    """Of (data, fsdp, tensor) or (data, fsdp, tensor, sequence)."""
    return [part for axis, size in zip(("data", "fsdp", "tensor", "sequence"), mesh, strict=False)
            for part in (f"--mesh.{axis}", str(size))]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Compiled programs are kept between runs and processes."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    settings = {"jax_compilation_cache_dir": cache, "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for name, value in before.items():
        jax.config.update(name, value)


def train(folder, *args, devices=8, evaluate=False):
    """A run in this process, on the first `devices`."""
    run = parse_run([*CONFIG, "--run-dir", str(folder), *args])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: jax.local_devices()[:devices])
        Trainer(run).train()
        if evaluate:
            report_run(run.folder, run.mesh)
    return folder


def train_apart(folder, compiled, *args, devices=8):
    """The same by train.py, in two processes with half of the devices each; what each of them printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    share = f"--xla_force_host_platform_device_count={devices // 2} {QUICK}"
    environment = {**os.environ, **compiled, "XLA_FLAGS": share, "PYTHONPATH": str(ROOT),
                   "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "train.py", *CONFIG, "--run-dir", str(folder), *args,
             *("--distributed.coordinator", address, "--distributed.processes", "2"),
             *("--distributed.process", str(number))],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=1200) for process in started]
    assert not any(process.returncode for process in started), outputs
    # Gloo's threads print "[Gloo] Rank 0 is connected to 1 peer ranks. ...", now and then into each other's lines.
    return [
        "".join(line for line in out.splitlines(True) if line.strip() and "peer ranks" not in line)
        for out, _ in outputs
    ]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(folder, expected):
    """Every loss and every evaluation of two runs."""
    found, wanted = lines(folder), lines(expected)
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        assert one.keys() == two.keys()
        timed = {name for name in one if name.startswith("seconds_")} | {"tokens_per_second"}
        for name in one.keys() - timed:
            tolerance = 1e-3 if name == "gradient_norm" else 1e-5  # where gradients cancel, their rounding does not
            np.testing.assert_allclose(one[name], two[name], rtol=tolerance, err_msg=f"{name} of {one}")
    assert_same_tree(*(json.loads((f / "fidelity.json").read_text()) for f in (folder, expected)))


def assert_same_evaluation(folder, expected):
    reports = [json.loads((f / "evaluation.json").read_text()) for f in (folder, expected)]
    for report in reports:
        assert report.pop("params_sha256") and report["results"].pop("speed")
    assert_same_tree(*reports)


def assert_same_tree(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one == two if isinstance(two, str) else np.isclose(one, two, rtol=1e-5, atol=0), (one, two)


def cut(folder, step, new):
    """A copy of a run that was stopped after the checkpoint of `step`."""
    shutil.copytree(folder, new)
    for checkpoint in (new / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return new


def test_two_processes_and_then_one(compiled, tmp_path, capsys):
    """A stage in two processes has the numbers of one device alone; so has the rest of it, continued on one device."""
    stage = (*CHEAP, "--stage", "2")
    alone = train(tmp_path / "alone", *stage, devices=1)
    first, second = train_apart(tmp_path / "two", compiled, *stage, *flags((1, 2, 1)), devices=2)
    assert_same_numbers(tmp_path / "two", alone)
    assert "after stage 2: KL to the teacher" in first and "held_out" in first and second == ""
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["results"]["held_out"]["student"]["kl"] > 0
    folder = cut(tmp_path / "two", 2, tmp_path / "cut")
    capsys.readouterr()
    train(folder, *stage, devices=1)
    before = "2 devices (data 1 x fsdp 2 x sequence 1 x tensor 1) of 2 processes"
    line = f"resumed at step 2 (stage 2, step 2) of {folder}, saved on {before}, now on 1 device\n"
    assert line in capsys.readouterr().out
    assert_same_numbers(folder, alone)


def mistake(tmp_path, *args):
    """What a run is refused with; nothing is loaded before, and nothing written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlin.trainer.load_teacher", lambda *a: pytest.fail("a model was loaded"))
        with pytest.raises(UserError) as error:
            Trainer(parse_run([*CONFIG, "--run-dir", str(tmp_path / "run"), *args]))
    assert not (tmp_path / "run").exists()
    return str(error.value)


MISTAKES = {
    "--mesh.tensor 3": "--mesh.tensor 3: must divide the 8 heads and vocabulary 272: use 1, 2, 4 or 8",
    "--mesh.fsdp 3": "--mesh.fsdp 3: must divide the width 32: use 1, 2, 4 or 8",
    "--mesh.fsdp 4 --mesh.tensor 4": "--mesh.fsdp 4 --mesh.tensor 4 (together 16): must divide the 8 devices: "
    "use 1, 2, 4 or 8",
    "--mesh.data 3": "--mesh.data 3: 8 devices with fsdp 1 x sequence 1 x tensor 1 need 8, or -1",
    "--mesh.sequence 3": "--mesh.sequence 3: must divide the sequence length 32 (--data.seq-len): use 1, 2, 4 or 8",
    "--mesh.sequence 16": "--mesh.sequence 16: must divide the 8 devices: use 1, 2, 4 or 8",
    "--mesh.fsdp 0": "--mesh.fsdp 0: must be at least 1",
    "--stage3.batch-size 12": "--stage3.batch-size 12: must be a multiple of accumulation x data x fsdp "
    "= 8: use 8 or 16",
    "--mesh.tensor 4 --stage1.batch-size 6 --stage1.accumulation 4": "--stage1.batch-size 6: must be a multiple of "
    "accumulation x data x fsdp = 8: use 8",
}  # fmt: skip


@pytest.mark.parametrize("args", MISTAKES)
def test_a_mesh_that_does_not_fit(args, tmp_path):
    assert mistake(tmp_path, *args.split()) == MISTAKES[args]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """All stages on one device, uninterrupted."""
    return train(tmp_path_factory.mktemp("runs") / "alone", *CHEAP, devices=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The default mixer on one device, with its evaluation."""
    return train(tmp_path_factory.mktemp("runs") / "whole", devices=1, evaluate=True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh(mesh, whole, tmp_path):
    """All stages and the evaluation, of the default mixer."""
    folder = train(tmp_path / "run", *flags(mesh), evaluate=True)
    assert_same_numbers(folder, whole)
    assert_same_evaluation(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [name for name in STUDENT_MIXERS if name != "gated_deltanet"])
def test_sequences_of_every_mixer_in_pieces(mixer, tmp_path):
    """All stages and the evaluation, on two devices along `sequence`, and on those with parameters and heads split."""
    alone = train(tmp_path / "alone", "--mixer", mixer, devices=1, evaluate=True)
    for mesh, devices in (((1, 1, 1, 2), 2), ((1, 2, 2, 2), 8)):
        folder = train(tmp_path / str(devices), "--mixer", mixer, *flags(mesh), devices=devices, evaluate=True)
        assert_same_numbers(folder, alone)
        assert_same_evaluation(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 2, 4), (1, 1, 8), (1, 1, 2, 4)], ids=str)
def test_two_processes(mesh, whole, compiled, tmp_path):
    """Batches, parameters, heads or sequences are split between them, or all of it."""
    _, second = train_apart(tmp_path / "run", compiled, *flags(mesh))
    assert second == ""
    assert_same_numbers(tmp_path / "run", whole)
    assert_same_evaluation(tmp_path / "run", whole)


@pytest.mark.slow
def test_several_students_in_two_processes(compiled, tmp_path):
    """Each as if it were trained alone, on one device."""
    first, second = train_apart(tmp_path / "both", compiled, "--mixer", "retnet,gla", *flags((1, 2, 1)), devices=2)
    assert "after stage 3" in first and second == ""
    for mixer in ("retnet", "gla"):
        assert_same_numbers(tmp_path / "both" / mixer, train(tmp_path / mixer, "--mixer", mixer, devices=1))


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_on_a_mesh(pieces, tmp_path, alone):
    accumulation = [part for n in (1, 2, 3) for part in (f"--stage{n}.accumulation", str(pieces))]
    assert_same_numbers(train(tmp_path / "run", *CHEAP, *accumulation, *flags((2, 1, 4))), alone)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, compiled):
    """Whole runs on three topologies, to be stopped and continued."""
    folder = tmp_path_factory.mktemp("elsewhere")
    train(folder / "fsdp", *CHEAP, *flags((1, 8, 1)))
    train(folder / "tensor", *CHEAP, *flags((2, 1, 4)))
    train_apart(folder / "processes", compiled, *CHEAP, *flags((2, 2, 2)))
    return folder


MOVES = {"fsdp": ((1, 1, 1), 1), "tensor": ((1, 4, 1), 4), "processes": ((1, 1, 1), 1)}


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6, 10])
@pytest.mark.parametrize("name", MOVES)
def test_a_stopped_run_goes_on_elsewhere(name, step, elsewhere, tmp_path, alone):
    """In the middle of each stage: fsdp 8 to one device; data 2 x tensor 4 to fsdp 4; two processes to one."""
    mesh, devices = MOVES[name]
    folder = cut(elsewhere / name, step, tmp_path / name)
    assert_same_numbers(train(folder, *CHEAP, *flags(mesh), devices=devices), alone)
