"""What is wrong with a command line that tyro refused, in one line.

tyro draws a box of many lines, and has no public way to learn why. It decides; here the command line is only read once
more, against the types of the settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

FLAG = re.compile("--?[a-zA-Z]")
NUMBERS = {int: "a whole number, such as 1_000", float: "a number"}


def find_mistake(cls: Any, args: Sequence[str]) -> str | None:
    """The first mistake in a command line that tyro refused, and its remedy."""
    kinds = dict(_flags(cls))
    given = list(_given(args))
    for flag, values in given:
        if flag and flag not in kinds:
            near = _near(flag, list(kinds))
            return f"{flag}: no such setting; {f'did you mean {near}?' if near else '--help lists them'}"
        loose = "" in kinds and not given[0][1]  # what needs no flag stands together: before all flags or behind
        if found := _wrong_values(flag, kinds.get(flag, tuple[()]), values, loose=loose):
            return found
    fields = (f for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING)
    needed = (f"--{field.name.replace('_', '-')}" for field in fields)
    missing = [flag for flag in needed if flag in kinds and flag not in dict(given)]
    return f"{', '.join(missing)}: needed; --help says what for" if missing else None


def _flags(cls: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """The flags that tyro makes of a dataclass, and the types of their values; "" are arguments without a flag."""
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        flag = prefix + name.strip("_").replace("_", "-")
        markers = getattr(kind, "__metadata__", ())
        if markers:
            kind = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from _flags(kind, f"{flag}.")
        elif tyro.conf.Suppress not in markers:
            switch = tyro.conf.UseCounterAction in markers
            yield "" if tyro.conf.Positional in markers else flag, tuple[()] if switch else kind


def _given(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The flags on a command line, each with the values behind it; "" is what comes before any."""
    flag, values = "", []
    for arg in args:
        if not FLAG.match(arg):
            values.append(arg)
            continue
        yield flag, values
        flag, equals, value = arg.partition("=")
        flag, values = flag.replace("_", "-"), [value] if equals else []
    yield flag, values


def _near(flag: str, known: Sequence[str]) -> str:
    """The flags that `flag` may have been meant for: by the whole, or by what follows the last dot."""
    if near := difflib.get_close_matches(flag, known, 1, 0.8):
        return near[0]
    names = [one.lstrip("-").rpartition(".")[2] for one in known]
    near = difflib.get_close_matches(flag.lstrip("-").rpartition(".")[2], names, 1, 0.8)
    return " or ".join(one for one, name in zip(known, names, strict=True) if name in near)


def _wrong_values(flag: str, kind: Any, values: list[str], *, loose: bool) -> str | None:
    """What is wrong with the values of a flag, if anything; with `loose`, others may stand behind them."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if values == ["None"]:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    parts = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    if parts[-1:] == (...,):
        parts = parts[:1] * len(values)
    for part, value in zip(parts, values, strict=False):
        if wanted := _wanted(part, value):
            return f"{flag} {value}: must be {wanted}"
    if len(values) > len(parts) and not loose:
        if not flag:
            return f"{values[0]}: no flag stands before it; --help lists them"
        return f"{flag} {' '.join(values)}: takes {len(parts) or 'no'} value{'s' * (len(parts) > 1)}"
    if len(values) < len(parts):
        return f"{flag}: needs {f'{len(parts)} values' if len(parts) > 1 else _wanted(kind, '') or 'a value'}"
    return None


def _wanted(kind: Any, value: str) -> str | None:
    """What a value should have been, or None where it will do."""
    if kind in NUMBERS:
        try:
            kind(value)
        except ValueError:
            return NUMBERS[kind]
        return None
    choices = [str(choice) for choice in ((True, False) if kind is bool else typing.get_args(kind))]
    return f"one of {', '.join(choices)}" if choices and value not in choices else None
