"""How the mixers of a student's layers are written: `3xgated_deltanet+softmax` is a period of four, which repeats."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence


def mixers_of(pattern: str) -> tuple[str, ...]:
    """The mixer ids of the shortest period: names joined by +, with NxNAME for N of them in a row."""
    mixers: list[str] = []
    for part in pattern.split("+"):
        found = re.fullmatch(r"([1-9]\d*)x(.+)", part)
        mixers += [found[2]] * int(found[1]) if found else [part]
    return _period(mixers)


def pattern_of(mixers: Sequence[str]) -> str:
    """The shortest pattern of these mixers, one for each layer or for each of a period."""
    runs = [(name, len(list(same))) for name, same in itertools.groupby(_period(mixers))]
    return "+".join(name if count == 1 else f"{count}x{name}" for name, count in runs)


def layers_of(mixers: Sequence[str], layers: int) -> list[str]:
    """The mixer of each of so many layers, which repeat the pattern."""
    return [mixers[i % len(mixers)] for i in range(layers)]


def _period(mixers: Sequence[str]) -> tuple[str, ...]:
    count = len(mixers)
    shortest = next(n for n in range(1, count + 1) if count % n == 0 and list(mixers) == [*mixers[:n]] * (count // n))
    return tuple(mixers[:shortest])
