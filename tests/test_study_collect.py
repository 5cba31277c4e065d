"""A study's results on another machine than its checkpoints: collected, reported from, not run again."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest

from jaxlin import runs
from jaxlin.command_line import parse_run
from jaxlin.config import UserError
from jaxlin.runs import milestone_folder, write_text
from jaxlin.study.collect import LINES, collect, thinned
from jaxlin.study.design import Arm, Study, Suite
from jaxlin.study.estimates import Estimates
from jaxlin.study.report import write_report
from jaxlin.study.results import read_study, write_design
from jaxlin.study.runner import Runner

SETTINGS = ("--config", "tiny", "--teacher", "random")
STUDY = Study("Two runs", (Arm(("retnet", "kda"), tokens=(1000,)),), SETTINGS, milestone_tokens=400)
FOUND = {"kl": 0.25, "perplexity": 30.0, "agreement": 0.5}
SUMS = [{"tokens": 100, "next_tokens": 99, "kl": 25.0, "agree": 50.0, "ce": 300.0}]


@pytest.fixture
def out(tmp_path):
    """A finished run with two milestones, whose checkpoints are there, and one that was not begun."""
    folder, trial = tmp_path / "here", STUDY.trials()[0]
    write_design(STUDY, folder)
    run = parse_run([*SETTINGS, "--mixer", "retnet", "--preset", "recommended", "--tokens", "1000", "--seed", "0",
                     "--milestone-tokens", "400", "--run-dir", str(folder / trial.name)])  # fmt: skip
    opened = runs.new_run(run, run.teacher_config)
    opened.write("card.json", {"command": "/home/me/train.py --text /data/fineweb", "student_parameters": 5})
    opened.write("evaluation.json", evaluation())
    lines: list[dict] = []
    for stage, steps in ((2, range(1, 358)), (3, range(358, 1001))):
        lines += [{"step": n, "stage": stage, "loss": 1.0, "tokens": n} for n in steps]
        measured = {f"heldout_{name}": value for name, value in FOUND.items()}
        lines.append({"step": steps[-1], "stage": stage, **measured})
    write_text(run.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(run.folder / "evaluation/niah-student-x.predictions.jsonl", "{}\n")
    for step, tokens in ((4, 400), (8, 800), (10, 1000)):
        progress = json.dumps({"progress": {"tokens": tokens}})
        manifest = {"step": step, "milestone": True, "extra": [progress], "files": {}}
        write_text(run.folder / f"checkpoints/{step}/manifest.json", json.dumps(manifest))
    return folder


def evaluation(**more):
    return {"results": {"held_out": {"student": FOUND}}, "held_out_sums": SUMS, **more}


def measure_milestones(out):
    folder = out / STUDY.trials()[0].name
    for step, tokens in runs.open_run(folder).milestones().items():
        found = evaluation(step=step, tokens=tokens)
        write_text(milestone_folder(folder, step) / "evaluation.json", json.dumps(found))


def commands(out):
    return list(Runner(STUDY, out).commands(STUDY.trials()))


def test_milestones_are_measured_once(out):
    """By one command for all of a run, the newest checkpoint aside; suites follow where the study asks for them."""
    assert runs.open_run(out / "recommended-1k-s0/retnet").milestones() == {4: 400, 8: 800}
    retnet, train, kda = sorted(commands(out), key=lambda line: "kda" in line)
    assert retnet.endswith(
        "--run " + str(out / "recommended-1k-s0/retnet") + " --suite quick --tasks held_out --milestones"
    )
    assert "--milestone-tokens 400" in train and kda.endswith("--milestones")
    measure_milestones(out)
    assert "# recommended-1k-s0/retnet: done" in commands(out)
    study = Study(**{**vars(STUDY), "suites": (Suite("bear", milestones=True),)})
    found = list(Runner(study, out).commands(study.trials()[:1]))
    assert [line.partition("--suite ")[2] for line in found] == ["bear", "bear --milestones --student-only"]
    along = Estimates(read_study(out)).along(STUDY.cells()[0], "kl")
    assert {tokens: e.value for tokens, e in along.items()} == {400: 0.25, 800: 0.25, 1000: 0.25}
    assert along[400].sources == ("recommended-1k-s0/retnet/milestones/4/evaluation.json",)


@pytest.mark.parametrize("to", ["home", "home.tar.gz"])
def test_collected(out, to):
    """Without checkpoints, answers and most of the log, the report is the same and nothing is to be done again."""
    measure_milestones(out)
    size = collect(out, out.parent / to)
    assert 0 < size < 20_000
    home = out.parent / "home"
    if to.endswith("gz"):
        with tarfile.open(out.parent / to) as archive:
            assert all(m.name.startswith("home/") and m.mode == 0o644 for m in archive.getmembers())
            assert {(m.uid, m.gid, m.uname, m.gname) for m in archive.getmembers()} == {(0, 0, "", "")}
            archive.extractall(out.parent, filter="data")
    here, there = (write_report(folder)[0].read_text() for folder in (out, home))
    assert here == there and "KL to the teacher against tokens" in there
    learned = [
        [(line["stage"], line["tokens"]) for line in read_study(folder).trials[0].lines] for folder in (out, home)
    ]
    assert learned == [[(2, 357), (3, 1000)]] * 2
    assert not list(home.rglob("checkpoints")) and not list(home.rglob("*.predictions.jsonl"))
    assert json.loads((home / "recommended-1k-s0/retnet/card.json").read_text())["command"] == "train.py --text fineweb"
    runner = Runner(STUDY, home)
    runner.check(STUDY.trials())
    assert list(runner.commands(STUDY.trials()[:1])) == ["# recommended-1k-s0/retnet: done"]


def test_collected_from_several(out, tmp_path):
    """Runs that were collected before stay."""
    collect(out, home := tmp_path / "home")
    shutil.move(home / "recommended-1k-s0/retnet", home / "recommended-1k-s0/kda")
    collect(out, home)
    assert len(read_study(home).trials) == 2


def test_a_log_is_thinned():
    """Lines of other things than steps stay, as do the first step and that before a measurement; one that a kill cut
    goes."""
    lines = [json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(950)]
    found = thinned([*lines, '{"step": 949, "heldout_kl": 1.0}\n', '{"st'])
    assert len(found) == 950 // 10 + 2 <= LINES + 2
    assert found[0] == lines[0] and found[-2] == lines[-1] and found[-1].startswith('{"step": 949, "held')
    assert thinned(lines[:100]) == lines[:100]


def test_refused(out, tmp_path):
    with pytest.raises(UserError, match=r"--to .*: inside --out"):
        collect(out, out / "small")
    with pytest.raises(UserError, match="no study there"):
        collect(tmp_path / "nothing", tmp_path / "small")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        collect(out, tmp_path / "file" / "home.tar.gz")
    assert not (tmp_path / "small").exists()
