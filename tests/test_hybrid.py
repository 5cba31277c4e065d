"""Hybrids of a student and its teacher: patterns, what a layer is worth, the command, and training from there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlin import hybrid
from jaxlin.command_line import parse_run
from jaxlin.config import RunConfig, UserError
from jaxlin.evaluation.language_modeling import compare
from jaxlin.evaluation.subject import open_subject
from jaxlin.pattern import mixers_of, pattern_of
from jaxlin.runs import Teacher, open_run
from jaxlin.student import init_student, restore_attention, restored_layers
from jaxlin.trainer import Trainer
from tests.models import TEACHER, random_params, student_of

FOUR = replace(TEACHER, num_hidden_layers=4)
SMALL = ["--config", "tiny", "--mesh.data", "1", "--tokens", "3072"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A short run of a student with four linear-time layers."""
    folder = tmp_path_factory.mktemp("hybrid") / "start"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: jax.local_devices()[:1])
        Trainer(parse_run([*SMALL, "--mixer", "gated_deltanet", "--stage", "1", "2", "--run-dir", str(folder)])).train()
    return folder


@pytest.mark.parametrize(
    ("pattern", "mixers", "shortest"),
    [
        ("gla", ("gla",), "gla"),
        ("gla+softmax", ("gla", "softmax"), "gla+softmax"),
        ("3xgla+softmax", ("gla", "gla", "gla", "softmax"), "3xgla+softmax"),
        ("2xgla+1xkda+12xsoftmax", ("gla", "gla", "kda", *["softmax"] * 12), "2xgla+kda+12xsoftmax"),
        ("gla+gla", ("gla",), "gla"),
        ("gla+softmax+gla+softmax", ("gla", "softmax"), "gla+softmax"),
        ("0xgla+", ("0xgla", ""), "0xgla+"),  # names that no mixer has, for the error to name
    ],
)
def test_patterns(pattern, mixers, shortest):
    assert mixers_of(pattern) == mixers and pattern_of(mixers) == shortest
    assert RunConfig(mixer=pattern).period == mixers


@pytest.mark.parametrize(("mixer", "restored"), [("gated_deltanet", [1, 3]), ("gla+mlstm", [0])])
def test_kl_of_hybrids(mixer, restored):
    """That of a model that is built so, layer for layer; with all layers of a teacher that lent the rest, none."""
    student = student_of(mixer, teacher=FOUR)
    teacher_params = random_params(FOUR)
    params = init_student(teacher_params, student, jax.random.key(3))
    tokens = np.random.default_rng(0).integers(0, 97, (4, 24)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 10:], segments[2, 20:], segments[3] = 2, 0, 0
    batches = [{"tokens": tokens[i : i + 2], "segment_ids": segments[i : i + 2]} for i in (0, 2)]
    hybrids = hybrid.Hybrids(Teacher(FOUR, teacher_params, None), Teacher(student, params, None), batches)
    assert hybrids.tokens.tolist() == [24, 24, 20]
    built = student_of("+".join(mixers_of(hybrid.pattern(student, restored))), teacher=FOUR)
    assert restored_layers(student, built) == restored
    wanted = compare(FOUR, teacher_params, built, restore_attention(params, student, teacher_params, built), batches)
    np.testing.assert_allclose(hybrids.kl(restored).sum() / 68, wanted["kl"], rtol=1e-4)
    np.testing.assert_allclose(hybrids.kl(range(4)), 0, atol=1e-4)


class Known:
    """Hybrids whose KL is known: what each layer is worth, and layers 0 and 1 as much together as one of them."""

    tokens = np.full(20, 10)
    worth = np.array([3.0, 2.9, 0.5, 1.0])

    def kl(self, restored):
        gain = self.worth[list(restored)].sum() - (2.9 if {0, 1} <= set(restored) else 0)
        return np.full(20, 10 - gain) + np.linspace(-1, 1, 20)


def test_choices():
    """One by one, the two that are worth most alone; with `greedy` the second is the one that still adds most."""
    hybrids, seen = Known(), []
    alone = hybrid.choose(hybrids, range(4), 2, done=seen.append)
    assert [one.layer for one in alone] == [0, 1, 3, 2] and len(seen) == 4
    assert alone[0].kl == pytest.approx(0.7) and alone[0].gain == pytest.approx(0.3)
    assert alone[0].interval == pytest.approx((0.3, 0.3))
    greedy = hybrid.choose(hybrids, range(4), 2, greedy=True, done=seen.append)
    assert [one.layer for one in greedy] == [0, 3] and len(seen) == 4 + 4 + 3
    assert greedy[1].gain == pytest.approx(0.1)
    hybrids.tokens = np.full(19, 10)
    assert hybrid.rank(hybrids, [2])[0].interval is None


def test_equal_distances():
    assert hybrid.evenly(range(30), 6) == [4, 9, 14, 19, 24, 29]
    assert hybrid.evenly(range(32), 3) == [9, 20, 31]
    assert hybrid.pattern(student_of("gla", teacher=FOUR), [1, 3]) == "gla+softmax"
    assert hybrid.pattern(student_of("gla+kda", teacher=FOUR), [3]) == "gla+kda+gla+softmax"


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["hybrid", *map(str, args)])
    hybrid.main()


def test_command_and_training_from_it(start, tmp_path, monkeypatch, capsys):
    """The pattern that the command prints trains from the run, and begins at the KL that the command found."""
    run(monkeypatch, "--run", start, "--keep", 1, "--tokens", 1024, "--json")
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads((start / "hybrid.json").read_text())
    assert found["tokens"] == 1024 and len(found["layers"]) == 4 and found["kl"]["even"]["layers"] == [3]
    assert found["kl"]["chosen"]["layers"] == [found["layers"][0]["layer"]]
    assert f"--init-from {start} --config" in out and f"--mixer {found['mixer']} --stage 3 --run-dir" in out
    of_start = open_subject(str(start))
    teacher, student = of_start.models["teacher"], of_start.models["student"]
    whole = compare(teacher.config, teacher.params, student.config, student.params, of_start.batches)
    assert found["kl"]["none"]["kl"] == pytest.approx(whole["kl"], rel=1e-4)

    args = [
        *SMALL,
        "--init-from",
        str(start),
        "--mixer",
        found["mixer"],
        "--stage",
        "3",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    Trainer(parse_run(args)).train()
    fidelity = json.loads((tmp_path / "run/fidelity.json").read_text())
    assert fidelity["kl"] == pytest.approx(found["kl"]["chosen"]["kl"], rel=1e-4)
    kept = found["kl"]["chosen"]["layers"]
    assert [i for i, mixer in enumerate(fidelity["mixer"]) if mixer == "softmax"] == kept
    assert open_run(tmp_path / "run").student.num_hidden_layers == 4
    before = (tmp_path / "run/metrics.jsonl").read_text()
    Trainer(parse_run(args)).train()  # finished: nothing is begun again
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    run(monkeypatch, "--run", tmp_path / "run", "--keep", 2, "--greedy")  # a hybrid's own attention is no candidate
    assert kept[0] not in [one["layer"] for one in json.loads((tmp_path / "run/hybrid.json").read_text())["layers"]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--run: give a run folder"),
        (("--run", "{start}", "--keep", 4), "--keep 4: the student has 4 linear-time layers; keep fewer of them"),
        (("--run", "{start}", "--tokens", 0), "--tokens 0: must be at least 1"),
    ],
)
def test_mistakes(start, monkeypatch, args, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *(str(arg).format(start=start) for arg in args))


def test_starts_that_are_no_hybrids(start, tmp_path):
    """Other mixers are refused, and so is a student of which nothing would be left."""
    for mixer in ("gla+softmax", "softmax", "3xgated_deltanet+retnet"):
        with pytest.raises(
            UserError, match=r"another mixer .*; leave out the setting that changes it, or give some of"
        ):
            Trainer(
                parse_run([*SMALL, "--init-from", str(start), "--mixer", mixer, "--run-dir", str(tmp_path / "run")])
            )
        assert not (tmp_path / "run").exists()
