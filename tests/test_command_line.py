"""Command lines: what is wrong with one is said in one line, which names the flag, the value and the remedy."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path

import pytest

import eval as eval_py
from jaxlin import chat, data, export, generate, hybrid, mistakes, synthesize
from jaxlin.command_line import parse, parse_run, run_main
from jaxlin.config import RunConfig, UserError
from jaxlin.evaluation import compare
from jaxlin.inspect import __main__ as inspect
from jaxlin.kernels import bench
from jaxlin.study import __main__ as study
from jaxlin.study import collect, report

EVAL = eval_py.Settings
COMMANDS = [
    RunConfig, EVAL, generate.Settings, chat.Settings, synthesize.Settings, export.Settings, data.Prepare,
    inspect.Settings, study.Settings, report.Settings, collect.Settings, compare.Settings, bench.Bench, hybrid.Settings,
]  # fmt: skip


def refused(cls, *args):
    """The line that a command line is refused with."""
    with pytest.raises(UserError) as error:
        parse(cls, args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_flag_of_every_command(cls, capsys):
    """The flags are those of tyro's help; each is told that a value is missing, too many or of another type."""
    with pytest.raises(SystemExit) as stop:
        parse(cls, ["--help"])
    usage = capsys.readouterr()
    assert stop.value.code == 0 and not usage.err and "repeatable" not in usage.out
    flags = {flag: kind for flag, kind in mistakes._flags(cls) if flag}
    assert all(f"{flag} " in usage.out.replace("]", " ").replace("\n", " ") for flag in flags)
    assert usage.out.count("│ --") <= len(flags)
    told = refused if cls is not RunConfig else lambda cls, *args: mistakes.find_mistake(cls, args)  # tyro takes 0.1 s
    for flag, kind in flags.items():
        switch, many = kind == tuple[()], typing.get_args(kind)[-1:] == (...,)
        if not switch and not many:
            assert told(cls, flag).startswith(f"{flag}: needs ")
        if switch:
            assert told(cls, flag, "True") == f"{flag} True: takes no value"
        elif not any(word in str(kind) for word in ("str", "Path")):
            assert told(cls, flag, "1.x", "1.x").startswith(f"{flag} 1.x: must be ")
        assert told(cls, f"{flag}x", "1").startswith(f"{flag}x: no such setting; did you mean --")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--stage3.batchsize 4", "--stage3.batchsize: no such setting; did you mean --stage3.batch-size?"),
        ("--fsdp 4", "--fsdp: no such setting; did you mean --mesh.fsdp?"),
        ("--lr 1", "--lr: no such setting; did you mean --stage1.lr or --stage2.lr or --stage3.lr?"),
        ("--quiet", "--quiet: no such setting; --help lists them"),
        ("-mixer gla", "-mixer: no such setting; did you mean --mixer?"),
        ("gla", "gla: no flag stands before it; --help lists them"),
        ("--tokens 1e6", "--tokens 1e6: must be a whole number, such as 1_000"),
        ("--stage3.batch_size=abc", "--stage3.batch-size abc: must be a whole number, such as 1_000"),
        ("--seed 1 2", "--seed 1 2: takes 1 value"),
        ("--stage 1 two", "--stage two: must be a whole number, such as 1_000"),
        ("--stage1.betas 0.9", "--stage1.betas: needs 2 values"),
        ("--stage1.betas 0.9 0.9 0.9", "--stage1.betas 0.9 0.9 0.9: takes 2 values"),
        ("--remat all", "--remat all: must be one of none, block, states, dots"),
        ("--stage1.clip-per-layer", "--stage1.clip-per-layer: needs one of True, False"),
        ("--model.rope big", "--model.rope big: must be one of teacher, own, none"),
        ("--config", "--config: needs a value"),
        ("--init-from --seed 1", "--init-from: needs a value"),
        ("--seed -1 --speed 3 --remat x", "--speed: no such setting; did you mean --seed?"),
    ],
)
def test_mistakes_in_train(args, message):
    with pytest.raises(UserError) as error:
        parse_run(args.split())
    assert str(error.value) == message


def test_what_is_needed():
    assert refused(study.Settings, "--dry-run") == "--config: needed; --help says what for"
    assert refused(collect.Settings) == "--out, --to: needed; --help says what for"
    assert refused(collect.Settings, "--out", "x") == "--to: needed; --help says what for"


def test_what_stands_without_a_flag():
    """Folders to compare stand together, before flags or behind."""
    folders = (Path("a"), Path("b"))
    for args in (["a", "b", "--seed", "1"], ["--seed", "1", "a", "b"]):
        assert parse(compare.Settings, args).runs == folders
    assert refused(compare.Settings, "a", "--seed", "x").startswith("--seed x: must be a whole number")
    assert refused(compare.Settings, "--seed", "x", "a").startswith("--seed x: must be a whole number")
    assert refused(compare.Settings, "a", "--seed", "1", "b") == "--seed 1 b: takes 1 value"


def test_switches():
    """Stand alone; with a value they are refused."""
    assert parse(EVAL, ["--json", "--run", "x", "--student_only"]) == EVAL(run="x", json=1, student_only=1)
    assert not parse(EVAL, []).json


def test_what_is_not_understood_is_shown_as_tyro_does(capsys):
    """Where no mistake is found that it could have meant."""

    @dataclasses.dataclass
    class Odd:
        size: complex = 1j

    with pytest.raises(SystemExit) as stop:
        parse(Odd, ["--size", "x"])
    assert stop.value.code == 2 and "--size" in capsys.readouterr().err


def test_interrupted(monkeypatch, capsys):
    """Python is not shut down, which a compilation that still runs would crash; what can go on is said."""

    def main():
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    for told in ("", "the same command goes on"):
        with pytest.raises(SystemExit) as stop:
            run_main(main, resumes=told)
        assert stop.value.code == 130
        assert capsys.readouterr().err == f"interrupted{told and ': ' + told}\n"


def test_an_error_names_the_flag_as_the_command_has_it(capsys):
    def main():
        raise UserError("--data.heldout nowhere.txt: no such file or folder")

    with pytest.raises(SystemExit):
        run_main(main, called={"--data.heldout": "--text"})
    assert capsys.readouterr().err == "error: --text nowhere.txt: no such file or folder\n"
