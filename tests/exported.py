"""Students to export, shared by the tests of folders and of the model in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlin import runs
from jaxlin.checkpoint import Checkpoints
from jaxlin.command_line import parse_run
from jaxlin.config import ModelConfig
from jaxlin.export import Student, export
from jaxlin.runs import Run
from tests.models import random_params
from tests.tiny_llama import word_tokenizer

CARD = {
    "card": {"student_parameters": 1_000_000},
    "settings": {
        "teacher": "some-org/Some-Model", "preset": "recommended", "text": ["hf:text"], "conversations": [],
        "dtype": "float32", "seed": 0,
    },
    "step": 7,
    "stages": {"3": {"tokens": 4096, "lr": 3e-4, "lr_new": 3e-4}},
    "losses": {"stage3": {"start": 2.0, "end": 1.0}},
    "evaluation": {"arc_easy": {"student": {"acc": 0.5}, "teacher": {"acc": 0.75}}},
}  # fmt: skip


def student(config: ModelConfig, params: Any = None) -> Student:
    """A student with random parameters, or those given, and a tokenizer of words."""
    params = random_params(config) if params is None else params
    return Student(config, params, word_tokenizer(config.vocab_size), CARD)


def folder_of(config: ModelConfig, folder: Path, **options: Any) -> Path:
    """A student with random parameters, exported."""
    export(student(config), folder, **options)
    return folder


def run_folder(folder: Path, *flags: str, params: Any = None) -> Run:
    """A run of the config `tiny` that trained nothing: its student has random parameters, or those given."""
    run = parse_run(["--config", "tiny", "--run-dir", str(folder), *flags])
    opened = runs.new_run(run, runs.teacher_config(run))
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(6, {"params": random_params(opened.student) if params is None else params}, {})
    checkpoints.close()
    opened.write("card.json", {"command": f"train.py --run-dir {folder}", "devices": "1 x cpu", "versions": {}})
    return opened


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
