"""Where metrics go: the file, TensorBoard, and Weights & Biases, of which a stand-in records what it is told."""

from __future__ import annotations

import json
import sys
import types

import pytest

from jaxlin.command_line import parse_run
from jaxlin.config import UserError
from jaxlin.metrics import MetricsLog, require_wandb


class WandbError(Exception):
    """Its own."""


@pytest.fixture
def wandb(monkeypatch):
    """A module like W&B's; what runs were started with, and what they were told, in the order of the calls."""
    told = []

    class Run:
        def __init__(self, **settings):
            told.append(("init", settings))

        def __getattr__(self, name):
            return lambda *args, **kwargs: told.append((name, *args, kwargs))

    module = types.ModuleType("wandb")
    module.init, module.Settings = Run, dict
    module.errors = types.SimpleNamespace(Error=WandbError)
    module.told = told
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run_in(folder, *flags):
    folder.mkdir(exist_ok=True)
    return parse_run(["--config", "tiny", "--run-dir", str(folder), *flags])


def test_lines(tmp_path):
    """A killed run's steps after its checkpoint, and its half a line, are dropped."""
    log = MetricsLog(run_in(tmp_path / "run"), 0)
    for step in (1, 2, 3):
        log.write(step, 1, {"loss": step / 2, "layer_loss": [0.5, 1.5]})
    log.close()
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "st')
    log = MetricsLog(run_in(tmp_path / "run"), 2)
    log.write(3, 2, {"loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["stage"], line["loss"]) for line in lines] == [(1, 1, 0.5), (2, 1, 1.0), (3, 2, 7.0)]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_wandb(wandb, tmp_path):
    """The same scalars as TensorBoard's, and a run that goes on after a kill."""
    run = run_in(tmp_path / "run", "--wandb", "team/linear")
    for step in (1, 1):
        log = MetricsLog(run, 0)
        log.write(step, 3, {"kl": 0.25, "layer_loss": [0.5, 1.5]})
        log.close()
    first, again = (settings for name, settings, *_ in wandb.told if name == "init")
    assert (first["entity"], first["project"], first["name"]) == ("team", "linear", "run")
    assert first["config"]["mixer"] == "gated_deltanet" and first["id"] == again["id"]
    scalars = {"step": 1, "stage3/kl": 0.25, "stage3/layer_loss/00": 0.5, "stage3/layer_loss/01": 1.5}
    assert [call[1] for call in wandb.told if call[0] == "log"] == [scalars, scalars]
    assert [name for name, *_ in wandb.told].count("finish") == 2


def test_wandb_cannot_be_reached(wandb, tmp_path):
    def refuse(**settings):
        raise WandbError("No API key configured.\nMore of it.")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"--wandb linear: No API key configured\.; set WANDB_MODE=offline"):
        MetricsLog(run_in(tmp_path / "run", "--wandb", "linear"), 0)


def test_wandb_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_wandb("")
    with pytest.raises(UserError, match="--wandb linear: the package is not installed; pip install wandb"):
        require_wandb("linear")
