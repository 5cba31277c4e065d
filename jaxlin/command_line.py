"""Settings from presets, config files and the command line; and how an entry point ends.

A run's settings are built in three layers, later ones winning: preset < config file < command line.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from jaxlin.config import PRESETS, DataConfig, RunConfig, Stage1Config, Stage2Config, Stage3Config, UserError

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
    path = Path(name)
    if path.suffix != ".py":
        path = CONFIG_DIR / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.py")))
        raise UserError(f"--config {name}: no such file; give a path or one of {known}")
    function = runpy.run_path(str(path)).get("config")
    if function is None:
        raise UserError(f"--config {name}: {path} defines no function config(base)")
    return replace(function(base), config=name)


def parse_run(args: Sequence[str] | None = None) -> RunConfig:
    """The run that a command line asks for: preset < config file < flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="recommended")
    first.add_argument("--config", default="demo")
    known, _ = first.parse_known_args(args)
    return parse(RunConfig, args, default=load_config_file(known.config, preset(known.preset)))


def parse(cls: type[T], args: Sequence[str] | None = None, *, default: T | None = None) -> T:
    """Parse a command line into the dataclass `cls`; every entry point of jaxlin parses with this."""
    given: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(cls, args=args, config=(tyro.conf.FlagConversionOff,), **given)


def run_main(main: Callable[[], Any]) -> None:
    """Call `main`; a `UserError`, or too little memory, becomes one line on stderr and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (UserError, RuntimeError) as error:  # JAX's own error is one, and is not imported here
        message = str(error)
        if not isinstance(error, UserError):
            if "RESOURCE_EXHAUSTED" not in message:
                raise
            message = f"out of memory: {message.splitlines()[0]}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
