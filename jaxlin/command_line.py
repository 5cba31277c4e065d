"""Settings from presets, config files and the command line; and how an entry point ends.

A run's settings are built in three layers, later ones winning: preset < config file < command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import runpy
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from jaxlin.config import PRESETS, DataConfig, RunConfig, Stage1Config, Stage2Config, Stage3Config, UserError
from jaxlin.mistakes import find_mistake

INHERITED = ("preset", "mixer", "model", "teacher", "teacher_config", "dtype", "param_dtype")  # see `init_from`
RUN_CARD = "run_card.json"
"""Beside the weights of an exported student: what its run was."""
CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
T = TypeVar("T")


def preset(name: str) -> RunConfig:
    """The recipe called `name`, at the paper's budget of 3B tokens."""
    if name == "recommended":
        return RunConfig()
    shared: dict[str, Any] = dict(clip_per_layer=False, lr_min=1e-4, schedule="wsd", decayed="all")
    run = RunConfig(
        stage1=Stage1Config(**shared, lr=2e-4, lr_new=2e-4, warmup=0.1),
        stage2=Stage2Config(**shared, lr=2e-3, lr_new=2e-3, warmup=0.2, stable=0.8),
        stage3=Stage3Config(schedule="linear", warmup=0.1, lr_min=0.0, ce_weight=1.0, decayed="all_but_norms"),
        data=DataConfig(separate_documents=False, shuffle=False),
    )
    if name == "paper":
        return replace(
            run,
            preset="paper",
            stage1=replace(run.stage1, width_reduction="sum", layer_reduction="mean"),
            stage2=replace(run.stage2, layer_reduction="mean"),
        )
    if name == "paper_code":
        return replace(
            run,
            preset="paper_code",
            stage2=replace(run.stage2, post_norm_target=True),
            stage3=replace(run.stage3, kl_reduction="sequence_sum"),
            param_dtype="bfloat16",
        )
    raise UserError(f"--preset {name}: choose one of {', '.join(PRESETS)}")


def load_config_file(name: str, base: RunConfig) -> RunConfig:
    """Apply the config file `name` (in configs/, or a path) to `base`.

    A config file is Python and defines `config(base: RunConfig) -> RunConfig`.
    """
    function = config_function(name, "config", "config(base); studies are for python -m jaxlin.study")
    found = function(base)
    if not isinstance(found, RunConfig):
        raise UserError(f"--config {name}: its config(base) returned {found!r}; return replace(base, ...)")
    return replace(found, config=name)


def config_function(name: str, function: str, signature: str) -> Callable:
    """The function that the config file `name` (in configs/, or a path) defines.

    `signature` is for errors: how it is called. Raises UserError.
    """
    path = Path(name)
    if path.suffix != ".py":
        path = CONFIG_DIR / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.py") if f"def {function}(" in p.read_text()))
        raise UserError(f"--config {name}: no such file; give a path or one of {known}")
    found = runpy.run_path(str(path)).get(function)
    if found is None:
        raise UserError(f"--config {name}: {path} defines no function {signature}")
    return found


def parse_run(args: Sequence[str] | None = None) -> RunConfig:
    """The run that a command line asks for: preset < config file < the run that it starts from < flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    maybe: dict[str, Any] = dict(nargs="?")  # of a value that is missing, `parse` says so
    first.add_argument("--preset", **maybe)
    first.add_argument("--config", **maybe, default="demo", const="demo")
    first.add_argument("--init-from", "--init_from", **maybe, default="", const="")
    first.add_argument("--run-dir", "--run_dir", **maybe, default="", const="")
    first.add_argument("--epochs", **maybe)
    first.add_argument("--stage3.tokens", "--stage3-tokens", **maybe, dest="stage3_tokens")
    known, _ = first.parse_known_args(args)
    before = _inherited(known.init_from, known.run_dir) if known.init_from else {}
    base = load_config_file(known.config, preset(known.preset or before.get("preset", "recommended")))
    if known.stage3_tokens and not known.epochs:
        base = replace(base, epochs=None)  # a config's epochs do not overrule the command line
    return parse(RunConfig, args, default=replace(base, **{**before, "preset": base.preset}))


def _inherited(init_from: str, run_dir: str) -> dict[str, Any]:
    """The settings that a run takes over from the one that it starts from; from its own folder once it is under way."""
    if is_exported(init_from):
        raise UserError(f"--init-from {init_from}: an exported student, not a run; give the run that it came from")
    path = Path(run_dir or init_from) / "config.json"
    if run_dir and not path.exists():
        path = Path(init_from) / "config.json"
    try:
        found = from_dict(RunConfig, json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"--init-from {init_from}: no run there (config.json is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--init-from {init_from}: {path} cannot be read ({error})") from None
    return {name: getattr(found, name) for name in INHERITED}


def one_of(run: str, teacher: str) -> None:
    """Refuse --run and --teacher together, and neither. Raises UserError."""
    if run and teacher:
        raise UserError(f"--run {run} and --teacher {teacher}: give one of them")
    if not run and not teacher:
        raise UserError("give either --run DIR or --teacher T")


def whole_text(text: str, where: str) -> str:
    """`text`, unless it holds half a character, which no tokenizer takes. Raises UserError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a character (at {error.start}), not UTF-8 text; convert it") from None
    return text


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an exported student."""
    return (Path(folder) / RUN_CARD).is_file()


def parse(cls: type[T], args: Sequence[str] | None = None, *, default: T | None = None) -> T:
    """Parse a command line into the dataclass `cls`; every entry point of jaxlin parses with this. Raises UserError."""
    args = sys.argv[1:] if args is None else args
    given: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # tyro draws a box of many lines, and has no public way to learn why
            return tyro.cli(cls, prog=_program(), args=args, config=(tyro.conf.FlagConversionOff,), **given)
    except SystemExit as stop:
        if stop.code and (mistake := find_mistake(cls, args)):
            raise UserError(mistake) from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def require_folder(flag: str, path: str | Path, remedy: str = "give another folder") -> None:
    """Refuse a file where a folder is wanted, or one that is not to be written to, before hours go into what cannot be
    kept. Raises UserError.
    """
    if not path or not Path(path).exists():
        return
    if not Path(path).is_dir():
        raise UserError(f"{flag} {path}: is a file; give a folder")
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written to; {remedy}")


def _program() -> str:
    """How the command that runs was called, as its help shows it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {Path(sys.argv[0]).name}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


MEASURED_TEXT = {"--data.heldout": "--text", "set --data.text-field": "give records that have it"}
"""For `run_main`, of commands that measure on --text: no setting of theirs names the field."""


def run_main(main: Callable[[], Any], *, called: Mapping[str, str] | None = None, resumes: str = "") -> None:
    """Call `main`; a `UserError`, or too little memory, becomes one line on stderr and exit code 2.

    called: what train.py's messages say, and what that is here; `resumes`: what somebody who interrupts it is told.
    """
    try:
        main()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stdout.flush()
        print(f"interrupted{f': {resumes}' if resumes else ''}", file=sys.stderr, flush=True)
        os._exit(130)  # XLA may be compiling in a thread, which would crash while Python shuts down
    except (UserError, RuntimeError) as error:  # JAX's own error is one, and is not imported here
        message = str(error)
        if not isinstance(error, UserError):
            if "RESOURCE_EXHAUSTED" not in message:
                raise
            message = f"out of memory: {message.splitlines()[0]}"
        for theirs, ours in (called or {}).items():
            message = message.replace(theirs, ours)
        print("error:", message, file=sys.stderr)
        sys.exit(2)


def to_json(config: Any) -> str:
    """A config dataclass as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_dict(cls: Any, data: Any) -> Any:
    """The inverse of `dataclasses.asdict` for the types used here; unknown fields are refused."""
    if data is None or (not isinstance(cls, type) and typing.get_origin(cls) is None):
        return data
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        if unknown := set(data) - set(hints):
            raise UserError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}: another version wrote the file")
        return cls(**{k: from_dict(hints[k], v) for k, v in data.items()})
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        return from_dict(next(a for a in args if a is not type(None)), data)
    if origin is tuple:
        return tuple(from_dict(args[0] if args[-1] is Ellipsis or len(set(args)) == 1 else Any, v) for v in data)
    return data
