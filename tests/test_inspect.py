"""Looking into students: every definition against a plain computation; all mixers; the command and its mistakes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlin.command_line import parse_run
from jaxlin.config import ModelConfig, RunConfig, UserError
from jaxlin.convert import byte_tokenizer
from jaxlin.export import Student, export
from jaxlin.inspect import __main__ as command
from jaxlin.inspect import gates, memory, needle, probe, report, states
from jaxlin.inspect.subject import Subject
from jaxlin.mixers.common import TokenMixer
from jaxlin.mixers.retnet import retention_decay
from jaxlin.model import forward, init_state
from jaxlin.student import abstract_params, student_config
from tests.exported import CARD, run_folder
from tests.models import STUDENT_MIXERS, TEACHER, student_of
from tests.tiny_llama import word_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 48)).astype(np.int32)


def params_of(config: ModelConfig):
    """Random parameters that nothing has to be compiled for."""
    rng = np.random.default_rng(0)

    def draw(path, a):
        return (0.1 * rng.normal(size=a.shape) + (path[-1].key == "weight")).astype(np.float32)

    return jax.tree.map_with_path(draw, nn.unbox(abstract_params(config)))


# ---- memory


def test_constant_gates_are_remembered_exactly():
    """1 / |g| tokens, within the window, beyond it, and within the first token."""
    g = retention_decay(8)
    k = jax.random.normal(jax.random.key(0), (1, 1, 300, 8, 4))
    constant = jnp.broadcast_to(g, (1, 1, 300, 8))
    found = memory.lengths(k, constant, None, jnp.array([0, 99]), 200)
    for lengths in found.values():
        np.testing.assert_allclose(lengths[:, 0, 0], np.broadcast_to(-1 / g, (2, 8)), rtol=1e-4)
    np.testing.assert_allclose(memory.first_passage(4 * jnp.arange(1.0, 9)[:, None]), [0.25])
    channels = jnp.broadcast_to(-jnp.array([0.5, 0.1, 0.02, 0.0]), (1, 1, 300, 8, 4))
    found = memory.lengths(k, channels, None, jnp.array([7]), 100)["gates"]
    np.testing.assert_allclose(found[0, 0, 0], np.broadcast_to([2, 10, 50, np.inf], (8, 4)), rtol=1e-4)


def test_first_passage_is_a_search():
    spent = np.cumsum(np.random.default_rng(0).exponential(0.05, (60, 50)), axis=0)
    for found, curve in zip(memory.first_passage(jnp.asarray(spent)), spent.T, strict=True):
        curve = np.concatenate([[0], curve])
        expected = np.interp(1, curve, np.arange(61)) if curve[-1] >= 1 else 60 / curve[-1]
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("channels", [False, True])
def test_what_is_left_of_a_write(channels):
    """Against the product of the transitions, written out; it is never more than gates alone leave of any channel."""
    rng = np.random.default_rng(0)
    steps, size = 12, 4
    k = rng.normal(size=(steps + 1, size))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, g = rng.uniform(0, 1, steps + 1), -rng.exponential(0.1, (steps + 1, size if channels else 1))
    left, trace = [], k[0]
    for t in range(1, steps + 1):
        trace = (np.eye(size) - beta[t] * np.outer(k[t], k[t])) @ (np.exp(g[t]) * trace)
        left.append(np.linalg.norm(trace))
    axes = (None, None, slice(None), None)
    given = g[axes] if channels else g[axes][..., 0]
    call = (jnp.moveaxis(jnp.asarray(a[axes][:, :, 1:]), 2, 0) for a in (k, given[0, 0, :, 0], beta))
    found = memory.remaining(jnp.asarray(k[0][None, None, None]), *call)
    np.testing.assert_allclose(found[:, 0, 0, 0], left, rtol=1e-5)
    both = memory.lengths(*(jnp.asarray(a) for a in (k[axes], given, beta[axes])), jnp.array([0]), steps)
    assert np.all(np.asarray(both["writes"]) < np.max(both["gates"]))


def test_without_gates_and_erasing_nothing_is_forgotten():
    k = jnp.ones((1, 1, 20, 2, 4))
    assert all(np.isinf(a).all() for a in memory.lengths(k, None, None, jnp.array([0, 5]), 10).values())
    erased = memory.lengths(k / 2, None, jnp.full((1, 1, 20, 2), 0.5), jnp.array([0]), 10)
    assert np.isinf(erased["gates"]).all()
    np.testing.assert_allclose(erased["writes"], 1 / np.log(2), rtol=1e-5)


# ---- states


def test_ranks():
    values = np.array([[1, 1, 1, 1], [2, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]], float)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(states.effective_rank(values), [4, 1, np.exp(entropy), 0])
    np.testing.assert_allclose(states.stable_rank(values), [4, 1, 10 / 9, 0])


def test_states_in_pieces_are_those_of_one_pass():
    config = student_of("mlstm")
    params = params_of(config)
    read = jax.jit(lambda tokens: forward(config, params, tokens, state=init_state(config, 2, 48), logits=False).state)
    whole = read(TOKENS)["layers"]["block_0"]["memory"]
    *_, (found,) = (list(found.values()) for found in states.walk(config, params, TOKENS, (24, 48)))
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_norm_is_that_of_the_unscaled_state():
    """The mLSTM keeps e^-m C."""
    c, m = np.random.default_rng(0).normal(size=(1, 1, 2, 4, 3)), np.array([[[1.0, -2.0]]])
    found = states.spectrum((c, np.ones((1, 1, 2, 4)), m))["norm"]
    np.testing.assert_allclose(found, np.exp(m) * np.linalg.norm(c, axis=(-2, -1)))


# ---- gates


def test_every_mixer():
    """All of them in one hybrid, with a layer of softmax attention between."""
    mixers = [*STUDENT_MIXERS[:3], "softmax", *STUDENT_MIXERS[3:]]
    config = student_of("+".join(mixers), teacher=replace(TEACHER, num_hidden_layers=len(mixers)))
    params = params_of(config)
    layers = dict(zip(gates.linear_layers(config), gates.measure(config, params, TOKENS), strict=True))
    over_time = dict(zip(layers, states.measure(config, params, TOKENS, (48,)), strict=True))
    assert list(layers) == [number for number in range(len(mixers)) if number != 3]
    for number, layer in layers.items():
        mixer = mixers[number]
        delta, gated = "delta" in mixer or mixer == "kda", mixer not in ("linear_attention", "deltanet")
        expected = {"decay": gated, "beta": delta, "input_gate": mixer == "mlstm"}
        assert set(layer["gates"]) == {name for name, there in expected.items() if there}, mixer
        for found in layer["gates"].values():
            assert found["quantiles"] == sorted(found["quantiles"]) and np.shape(found["by_head"]) == (4, 5)
            assert found["quantiles"][0] > 0
        by_gates, writes = (layer["memory"][name]["by_head"] for name in ("gates", "writes"))
        assert np.isfinite(by_gates).all() == gated and np.isfinite(writes).all() == (gated or delta)
        if mixer not in ("gla", "kda"):  # whose keys may prefer channels that last
            assert np.all(np.array(writes) <= by_gates)
        state = over_time[number]
        assert np.shape(state["norm"]) == (1, 4) and state["shape"] == (16, 16)
        assert np.all((np.array(state["effective_rank"]) >= 1) & (np.array(state["effective_rank"]) <= 16))
    medians = [head[2] for head in layers[1]["gates"]["decay"]["by_head"]]
    np.testing.assert_allclose(medians, np.exp(retention_decay(4)), rtol=1e-6)


def test_programs_are_the_same_where_nobody_looks(monkeypatch):
    config = student_of("kda+mlstm")
    params, tokens = params_of(config), jnp.asarray(TOKENS)

    def program():
        return str(jax.make_jaxpr(lambda p: forward(config, p, tokens, packed=True, remat="block").logits)(params))

    with_it = program()
    monkeypatch.setattr(TokenMixer, "record", lambda self, **arrays: None)
    assert program() == with_it


# ---- needles


def test_a_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels, folds = np.arange(200) // 5 % 10, np.arange(200) % 5
    noise = rng.normal(size=(200, 300))
    hidden = noise + 8 * rng.normal(size=(10, 300))[labels] + 50
    assert np.mean(probe.predict(hidden, labels, folds) == labels) > 0.98
    low, high = probe.wilson(int(np.sum(probe.predict(noise, labels, folds) == labels)), 200)
    assert low < 0.1 < high
    assert np.mean(probe.predict(np.zeros((200, 3)), labels, folds) == labels) <= 0.1  # no error without information


def test_wilson():
    np.testing.assert_allclose(probe.wilson(5, 10), (0.2366, 0.7634), atol=1e-4)
    np.testing.assert_allclose(probe.wilson(0, 10), (0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(probe.wilson(10, 10), (0.7225, 1), atol=1e-4)


def test_sketch_keeps_inner_products():
    x = jax.random.normal(jax.random.key(0), (20, 5000))
    assert probe.sketch(x, 5000, 0) is x
    small = probe.sketch(x, 1024, 0)
    assert small.shape == (20, 1024)
    np.testing.assert_allclose(small @ small.T, x @ x.T, atol=5 * 5000 / 32)
    assert np.array_equal(small, probe.sketch(x, 1024, 0)) and not np.array_equal(small, probe.sketch(x, 1024, 1))


def test_examples_differ_in_the_digit_alone():
    stream = np.arange(1000) % 50 + 300  # no token of a needle
    made = needle.examples(stream, byte_tokenizer(), (0, 20, 40), 100, seed=3)
    assert made.tokens.shape == (100, made.end + 40)
    assert [np.sum(made.labels == digit) for digit in range(10)] == [10] * 10
    texts = [byte_tokenizer().decode(row[needle.BEFORE : made.end]) for row in made.tokens]
    assert texts == [f" One of the special magic numbers for harbor is: {digit}." for digit in made.labels]
    first = made.tokens[:, 0] - 300
    around = np.delete(made.tokens, np.s_[needle.BEFORE : made.end], axis=1)
    assert np.array_equal(around, (first[:, None] + np.arange(72)) % 50 + 300)
    assert np.array_equal(made.tokens, needle.examples(stream, byte_tokenizer(), (40,), 100, seed=3).tokens)


def test_folds_share_no_token():
    made = needle.examples(np.arange(1000), byte_tokenizer(), (100,), 100, seed=0)
    text = np.delete(made.tokens, np.s_[needle.BEFORE : made.end], axis=1)
    spans = [(text[made.folds == fold].min(), text[made.folds == fold].max()) for fold in range(5)]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("stream", "tokenizer", "words"),
    [
        (
            np.arange(300),
            byte_tokenizer(),
            "--distances 40: a needle's text of 72 tokens does not fit",
        ),
        (np.arange(900), word_tokenizer(48), "--examples: the tokenizer"),
    ],
)
def test_refused_needles(stream, tokenizer, words):
    with pytest.raises(UserError, match=words):
        needle.examples(stream, tokenizer, (40,), 50, seed=0)


# ---- the command


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, args)])
    command.main()


def run_of(mixer, folder):
    """A run of the config `tiny` that trained nothing."""
    run = parse_run(["--config", "tiny", "--mixer", mixer])
    run_folder(folder, "--mixer", mixer, params=params_of(student_config(run, run.teacher_config)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 60)
    return path


def test_the_command(tmp_path, monkeypatch, capsys, text):
    """A hybrid's run: tables, JSON, figures where matplotlib is; the same numbers once more."""
    folder = tmp_path / "run"
    run_of("gated_deltanet+softmax", folder)
    args = ["--run", folder, "--text", text, "--sequences", 2, "--length", 32, "--examples", 50, "--distances", 0, 8]
    call(monkeypatch, *args, "--json")
    *shown, line = capsys.readouterr().out.splitlines()
    shown, found = "\n".join(shown), json.loads(line)
    assert "softmax attention: layers 1, 3" in shown and "The teacher has no state" in " ".join(shown.split())
    assert (folder / "inspection.json").read_text() == line
    assert [layer["layer"] for layer in found["layers"]] == [0, 2] and found["softmax_layers"] == [1, 3]
    assert found["positions"] == [32] and found["needle"]["distances"] == [0, 8]
    for layer in found["layers"]:
        assert len(layer["needle"]["accuracy"]) == 2 and len(layer["states"]["effective_rank"]) == 1
    figures = sorted(path.name for path in folder.glob("*.png"))
    assert figures == [f"inspection_{name}.png" for name in ("gates", "memory", "needle", "states")] or (
        not figures and "no figures: drawing needs matplotlib" in shown
    )
    call(monkeypatch, *args, "--out", tmp_path / "again")
    assert (tmp_path / "again" / "inspection.json").read_text() == line


def test_an_exported_student(tmp_path, monkeypatch, capsys, text):
    """Words and not digits: without needles. Linear attention never forgets."""
    config, folder = student_of("linear_attention"), tmp_path / "out"
    export(Student(config, params_of(config), word_tokenizer(97), CARD), folder)
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{i % 97}" for i in range(400)))
    with pytest.raises(UserError, match="an exported student, which has no text with it; give --text"):
        call(monkeypatch, "--run", folder)
    call(monkeypatch, "--run", folder, "--text", words, "--length", 40, "--examples", 0)
    assert "∞" in capsys.readouterr().out
    found = json.loads((folder / "inspection.json").read_text())
    assert found["layers"][0]["memory"]["writes"]["quantiles"] == [None] * 5 and "needle" not in found


def test_text_that_is_too_short(tmp_path):
    """A run that holds back too little is shown on what it trained on; a given text is refused."""
    config = replace(student_of("retnet"), vocab_size=272)
    (tmp_path / "a.txt").write_text("One document.")
    (tmp_path / "b.txt").write_text("Two documents. " * 40)
    run = RunConfig(text=(str(tmp_path),), data=replace(RunConfig().data, seq_len=32))
    subject = Subject(config, {}, byte_tokenizer(), run, tmp_path, {}, "")
    assert subject.stream(100, 10)[1] == "held out"
    assert subject.stream(100, 50)[1] == "trained on"
    given = replace(subject, run=replace(run, data=replace(run.data, heldout=(str(tmp_path / "a.txt"),))))
    options = dict(sequences=1, positions=(32,), examples=0, distances=(), seed=0, bar=lambda *_: lambda n: None)
    with pytest.raises(UserError, match="--length 500: the text has only 14 tokens; give more --text, or less"):
        report.inspect(given, length=500, **options)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--run: give a run folder"),
        (("--run", "missing"), "no run there"),
        (("--run", __file__), "no run there"),
        (("--run", "x", "--positions", "32", "1024"), "--positions 1024: beyond the sequences' 512 tokens"),
        (("--run", "x", "--positions", "64", "32"), "--positions 64 32: must be in ascending order"),
        (("--run", "x", "--distances", "-1"), "--distances -1: must be in ascending order, from 0"),
        (("--run", "x", "--examples", "20"), "--examples 20: must be at least 50, or 0 for none"),
        (("--run", "x", "--sequences", "0"), "--sequences 0: must be at least 1"),
        (("--run", "x", "--seed", "-1"), "--seed -1: must be at least 0"),
        (("--run", "x", "--out", __file__), "--out .*: is a file; give a folder"),
    ],
)
def test_refused(monkeypatch, args, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, *args)


def test_a_file_run_by_its_path_is_told_so():
    """The folder's name is that of a module which everything imports, where jaxlin/ itself is searched for modules."""
    done = subprocess.run([sys.executable, "jaxlin/chat.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "run python -m jaxlin.NAME, not python jaxlin/NAME.py\n"


def test_softmax_alone_is_refused(tmp_path, monkeypatch):
    run_of("softmax", tmp_path / "run")
    with pytest.raises(UserError, match="all its layers are softmax attention, which has no state"):
        call(monkeypatch, "--run", tmp_path / "run")
    assert not list(Path(tmp_path / "run").glob("inspection*"))
