"""A study's grid, commands, locks; what is skipped, resumed and measured; failures; a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlin.command_line import run_main
from jaxlin.config import UserError
from jaxlin.study.__main__ import main
from jaxlin.study.design import Arm, Contrast, Study, Suite, check, chosen, load_study
from jaxlin.study.locks import Owner, take
from jaxlin.study.report import write_report
from jaxlin.study.results import write_design
from jaxlin.study.runner import Call, Runner, _stop, read_shard
from jaxlin.study.tables import UNDECIDED
from tests import tiny_study
from tests.test_train import ROOT

GROUP, BAD = "recommended-384-s0", "recommended-nowhere-384-s0"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of the study's processes."""
    return tiny_study.environment(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, environment):
    """(runner, what it said) of a study that ran to its end, good runs and bad ones."""
    folder = tmp_path_factory.mktemp("study")
    study, said = tiny_study.study(tiny_study.write_bear(folder / "data")), []
    runner = Runner(study, folder / "out", say=said.append)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        runner.check(study.trials())
        write_design(study, runner.out)
        for group in runner.groups(study.trials(), together=2):
            runner.work(group)
    return runner, said


# ---- the design


def test_grid():
    """Every combination once, the first seeds of all arms before the second ones."""
    arms = (
        Arm(("gla", "kda"), tokens=(1000, 2_000_000), seeds=(3, 4)),
        Arm(("kda",), preset="paper_code", variant="gated", options=("--model.out-gate", "random"), tokens=(1500,)),
    )
    assert [trial.name for trial in Study("", arms).trials()] == [
        "recommended-1k-s3/gla", "recommended-1k-s3/kda", "recommended-2M-s3/gla", "recommended-2M-s3/kda",
        "paper_code-gated-1500-s0/kda",
        "recommended-1k-s4/gla", "recommended-1k-s4/kda", "recommended-2M-s4/gla", "recommended-2M-s4/kda",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "study, message",
    [
        (Study("", ()), "no arm has"),
        (Study("", (Arm(("gla",), preset="best"),)), "preset best"),
        (Study("", (Arm(("gla", "gla+gda")),)), "mixer gda is none of softmax, linear_attention"),
        (Study("", (Arm(("gla",), options=("--a", "b")),)), "options or a variant"),
        (Study("", (Arm(("gla",), variant="a/b", options=("--a", "b")),)), "'a/b' cannot be part"),
        (Study("", (Arm(("gla",)), Arm(("gla",)))), "recommended-60M-s0/gla is there twice"),
        (Study("", (Arm(("gla",)),), settings=("--seed", "1")), "--seed is set by the grid"),
        (Study("", (Arm(("gla",)),), suites=(Suite("bear", milestones=True),)), "milestone_tokens is 0; set it"),
        (Study("", (Arm(("gla",)),), contrasts=(Contrast("c", "?", "x/gla", "x/gla", "kl"),)), "x/gla is none of"),
    ],
)
def test_designs_that_cannot_be(study, message):
    with pytest.raises(UserError, match=message):
        check(study, "x.py")


@pytest.mark.parametrize("name", ["study_135m", "study_tiny"])
def test_configs(name, tmp_path):
    """Their flags are ones that train.py takes, their suites and metrics exist; nothing is written."""
    study = load_study(name)
    Runner(study, tmp_path / "out").check(study.trials())
    assert not (tmp_path / "out").exists()


def test_unknown_names(tmp_path):
    study = tiny_study.study(tmp_path)
    assert [trial.cell.mixer for trial in chosen(study, ["retnet", f"{BAD}/gla"])] == ["gla", "retnet"]
    seeds = chosen(load_study("study_135m"), ["recommended-60M"])
    assert len(seeds) == 10 and {trial.group for trial in seeds} == {"recommended-60M-s0", "recommended-60M-s1"}
    with pytest.raises(UserError, match="--only mlstm: no run of that name"):
        chosen(study, ["mlstm"])
    with pytest.raises(UserError, match=r"--config tiny: .* defines no function study"):
        load_study("tiny")
    for text in ("1", "2/2", "a/b"):
        with pytest.raises(UserError, match=f"--shard {text}"):
            read_shard(text)
    for name, message in (
        (str(tmp_path / "none.txt"), r"--text .*none\.txt: no such file"),
        ("", "--text '': no such"),
    ):
        with pytest.raises(UserError, match=message):
            Runner(replace(study, text=(name,)), tmp_path / "out").check(study.trials())
    assert not (tmp_path / "out").exists()


def contrast(metric):
    return (Contrast("c", "?", tiny_study.RETNET, tiny_study.LINEAR, metric),)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(arms=(Arm(("kdx",), tokens=(384,)),), contrasts=()), "s0/kdx: --mixer kdx: choose one of softmax"),
        (dict(settings=("--config", "tinx")), "--config tinx: no such file"),
        (dict(settings=("--config", "tiny", "--sead", "1")), r"--sead: no such setting; did you mean --seed\?"),
        (dict(settings=("--config", "tiny", "--remat", "x")), "--remat x: must be one of none, block"),
        (dict(suites=(Suite("bears"),)), "--suite bears: choose one of quick"),
        (dict(suites=(Suite("quick"),)), "suite quick: train.py measures it"),
        (dict(suites=(Suite("bear", limit=0),)), "suite bear: limit 0 must be at least 1"),
        (dict(suites=(Suite("zero_shot", tasks=("piqua",)),)), "--tasks piqua: the tasks of --suite zero_shot"),
        (dict(contrasts=contrast("speed")), "contrast c: speed is none of kl, perplexity"),
        (dict(contrasts=contrast("niah")), r"no suite of the study gives niah \(niah_.* is missing\); add niah"),
    ],
)
def test_what_cannot_be_run(tmp_path, changes, message):
    """Is refused in one line before anything is, also where another run is asked for; nothing is written."""
    study = replace(tiny_study.good(tiny_study.study(tmp_path / "data")), **changes)
    with pytest.raises(UserError, match=message) as refused:
        Runner(study, tmp_path / "out").check([])
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_commands(tmp_path):
    """Two students in one process; the teacher measured once; groups shared out between jobs."""
    study = tiny_study.good(tiny_study.study(tmp_path))
    runner = Runner(study, tmp_path / "out")
    (group,) = runner.groups(study.trials(), together=2)
    train, first, second, along, _ = runner.commands(group)
    flags = f"--mixer retnet,linear_attention --tokens 384 --seed 0 --run-dir {tmp_path}/out/{GROUP}"
    assert train.endswith(f"{flags} --milestone-tokens 256")
    assert first.endswith(f"--run {tmp_path}/out/{GROUP}/retnet --suite bear --data {tmp_path}")
    assert second.endswith("--student-only") and along.endswith("--suite quick --tasks held_out --milestones")
    alone = runner.groups(study.trials(), together=1)
    assert [trial.name for (trial,) in alone[1::2]] == [f"{GROUP}/linear_attention"]


def sleepers(folder, trials):
    """A command for each trial that says when it began and ended, in a file and in its order of ending."""
    code = (
        "import sys, time; began = time.time(); time.sleep(0.5); print(began, time.time(), file=open(sys.argv[1], 'a'))"
    )
    return [Call([sys.executable, "-c", code, str(folder / "times")], [trial], "sleep") for trial in trials]


@pytest.mark.parametrize("at_once", (1, 2))
def test_side_by_side(at_once, tmp_path):
    """As many commands as allowed, each with a share of the device's memory; locks name them while they run."""
    runner = Runner(tiny_study.study(tmp_path), tmp_path / "out", say=lambda line: None, at_once=at_once)
    trials = runner.study.trials()[:2]
    locks = {trial: take(tmp_path / f"{trial.cell.mixer}.lock") for trial in trials}
    ended = runner._call(sleepers(tmp_path, trials), locks)
    assert [code for _, code, _ in ended] == [0, 0]
    lines = (tmp_path / "times").read_text().splitlines()
    (_, end), (begin, _) = sorted([float(time) for time in line.split()] for line in lines)
    assert (begin < end) == (at_once == 2)


def test_what_is_stopped_has_ended(tmp_path, monkeypatch):
    """Commands that take their time to end are waited for, or killed; a second signal leaves none behind."""
    monkeypatch.setattr("jaxlin.study.runner.PATIENCE", 0.5)
    slow = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    processes = [subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        process.stdout.readline()
    handler = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    _stop(processes)
    assert all(process.returncode == -signal.SIGKILL for process in processes)
    assert signal.getsignal(signal.SIGTERM) == handler
    for process in processes:
        process.stdout.close()


# ---- the runs


@pytest.mark.slow
def test_failures_are_reported_and_the_others_go_on(done):
    """Bad students fail together, then each alone; good ones are trained at once and measured."""
    runner, said = done
    assert [line.partition(":")[0] for line in runner.failures] == [f"{BAD}/kda", f"{BAD}/gla"]
    assert "exit code" in runner.failures[0] and "--stage1.layers 99" in runner.failures[0].partition("code")[2]
    assert sum(line.endswith("one by one") for line in said) == 1
    for mixer in ("retnet", "linear_attention"):
        folder = runner.out / GROUP / mixer
        assert json.loads((folder / "evaluation.json").read_text())["mixer"] == mixer
        assert (folder / "evaluation/bear.json").exists()
        along = json.loads((folder / "milestones/2/evaluation.json").read_text())
        assert (along["step"], along["tokens"]) == (2, 256) and along["results"]["held_out"]["student"]["kl"] > 0
    assert not list(runner.out.rglob("*.lock*"))


@pytest.mark.slow
def test_what_is_there_is_not_done_again(done, tmp_path):
    """Skipped when whole; measured where only that is missing; resumed where half done; refused with other settings."""
    shutil.copytree(done[0].out, out := tmp_path / "out")
    study = tiny_study.good(done[0].study)
    runner, (retnet, linear) = Runner(study, out), study.trials()
    assert list(runner.commands([retnet, linear])) == [f"# {GROUP}/retnet: done", f"# {GROUP}/linear_attention: done"]

    limited = replace(study, suites=(replace(study.suites[0], limit=3),))
    assert all("--suite bear --limit 3" in line for line in Runner(limited, out).commands([retnet]))
    shutil.rmtree(out / retnet.name / "evaluation")
    (command,) = runner.commands([retnet])
    assert "eval.py" in command

    (out / linear.name / "evaluation.json").unlink()
    command, along = runner.commands([linear])
    assert along.endswith("--milestones") and "train.py" in command and f"--run-dir {out}/{linear.name}" in command

    with pytest.raises(UserError, match=r"another data\.eval_tokens"):
        Runner(replace(study, settings=(*study.settings[:5], "256", *study.settings[6:])), out).check([retnet])


@pytest.mark.slow
def test_a_rerun_measures_nothing_twice(done):
    """Where everything is there no process is started, and no lock is left."""
    said = []
    runner = Runner(tiny_study.good(done[0].study), done[0].out, say=said.append)
    runner.work(runner.study.trials())
    assert said == [] and runner.failures == [] and not list(runner.out.rglob("*.lock*"))


@pytest.mark.slow
def test_report_of_real_runs(done):
    """Numbers of the folders' files, the benchmark with its interval, and what was not run."""
    out = done[0].out
    markdown, _ = (path.read_text() for path in write_report(out))
    found = json.loads((out / GROUP / "retnet/evaluation.json").read_text())
    assert f"| {found['results']['held_out']['student']['kl']:.4f} |" in markdown
    assert sum(batch["kl"] for batch in found["held_out_sums"]) > 0
    assert re.search(rf"\| {tiny_study.RETNET} \| \d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\] \|", markdown)
    assert f"Not run: {BAD}/kda, {BAD}/gla." in markdown and UNDECIDED in markdown
    assert f"`{GROUP}/retnet/metrics.jsonl`" in markdown


# ---- locks


def test_two_jobs_never_take_the_same_run(tmp_path):
    """The second one is told who has it; it is free again when given back."""
    path = tmp_path / "group" / "run.lock"
    lock = take(path)
    refused = take(path)
    assert isinstance(refused, str) and f"process {os.getpid()} of" in refused and "delete the file only if" in refused
    lock.release()
    assert not isinstance(take(path), str)


def test_stale_locks(tmp_path):
    """What a process of this host left is taken over, unless a command of it still runs; of another host, never."""
    path = tmp_path / "run.lock"
    command = subprocess.Popen(["sleep", "60"])
    try:
        take(path).share(command.pid)
        owners = json.loads(path.read_text())
        path.write_text(json.dumps([{**owners[0], "started": "another boot"}, owners[1]]))
        refused = take(path)
        assert isinstance(refused, str) and f"process {command.pid} of" in refused
    finally:
        command.kill()
        command.wait()
    lock = take(path)
    assert not isinstance(lock, str)
    lock.release()
    path.write_text(json.dumps([{**owners[0], "host": "elsewhere"}]))
    assert "of elsewhere works on this run" in take(path)
    path.write_text("")
    assert "a process that left no name works on this run" in take(path)
    assert Owner.of(os.getpid()) == Owner.of(os.getpid()) and not Owner.of(os.getpid()).is_gone()


def test_a_process_that_nobody_waited_for_is_gone(tmp_path):
    """A zombie holds no run."""
    path = tmp_path / "run.lock"
    ended = subprocess.Popen(["sleep", "60"])
    take(path).share(ended.pid)
    path.write_text(json.dumps([json.loads(path.read_text())[1]]))
    assert isinstance(take(path), str)
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays
    lock = take(path)
    assert not isinstance(lock, str)
    ended.wait()


# ---- the command


def config_file(folder: Path, data: str, kind: str) -> Path:
    """A study config with `kind` (good, study) of tiny_study."""
    config = folder / "study.py"
    whole = f"tiny_study.study(Path({data!r}))"
    config.write_text(
        "from pathlib import Path\nfrom tests import tiny_study\n\n\n"
        f"def study():\n    return {f'tiny_study.good({whole})' if kind == 'good' else whole}\n"
    )
    return config


@pytest.mark.slow
def test_the_command(done, environment, tmp_path, monkeypatch, capsys):
    """A finished run starts nothing and ends with a report; a failing one ends with its line and exit code 1."""
    shutil.copytree(done[0].out, out := tmp_path / "out")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [
        "study",
        "--config",
        str(config_file(tmp_path, done[0].study.data, "study")),
        "--out",
        str(out),
        "--only",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "retnet"])
    run_main(main)
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"wrote {out}/report.md", f"wrote {out}/report.html"] and said.err == ""
    monkeypatch.setattr(sys, "argv", [*command, "gla", "linear_attention"])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    said = capsys.readouterr()
    assert ended.value.code == 1 and "wrote" in said.out
    assert said.err.startswith(f"failed:\n  {BAD}/gla: train.py ended with exit code ")


@pytest.mark.slow
def test_killed_and_run_again(done, environment, tmp_path):
    """The study and its commands are killed in the middle of training; the same command ends as without the kill."""
    runner, _ = done
    config = config_file(tmp_path, runner.study.data, "good")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jaxlin.study", "--config", str(config), "--out", str(out)]
    environment = {**os.environ, **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    while not list(out.glob("*/linear_attention/checkpoints/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(out.rglob("*.lock"))
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for trial in runner.study.trials()[2:]:
        assert_same_results(out / trial.name, runner.out / trial.name)
    assert not list(out.rglob("*.lock"))


def assert_same_results(folder: Path, other: Path):
    def measured(path):
        found = json.loads((path / "evaluation.json").read_text())
        return found["params_sha256"], found["results"]["held_out"], found["stage_losses"]

    assert measured(folder) == measured(other)
    bear = [json.loads((path / "evaluation/bear.json").read_text())["results"] for path in (folder, other)]
    assert bear[0]["bear"]["student"] == bear[1]["bear"]["student"]
