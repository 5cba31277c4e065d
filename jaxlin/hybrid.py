"""Which layers should keep their attention: `python -m jaxlin.hybrid --run DIR --keep 6`. See `--help`.

A layer is worth what a student's KL to its teacher loses when that layer is the teacher's. Li et al. (2025, arXiv
2512.20569, section 3) restore one layer at a time, distill each such hybrid for a while, and keep the best. Here
nothing is trained: a layer costs a forward pass over held-out text, and `--greedy` chooses each layer given those that
were chosen before it.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from jaxlin.command_line import MEASURED_TEXT, parse, run_main
from jaxlin.config import ModelConfig, Switch, UserError
from jaxlin.distill import Batch, targets_of
from jaxlin.evaluation.bootstrap import Series, resample
from jaxlin.evaluation.columns import FEWEST
from jaxlin.evaluation.subject import open_subject
from jaxlin.evaluation.suite import Bars
from jaxlin.inspect.gates import linear_layers
from jaxlin.losses import logit_sums
from jaxlin.mixers.common import RMSNorm, positions_in_segments
from jaxlin.model import Block, apply, blocks, forward, head_kernel
from jaxlin.pattern import layers_of, pattern_of
from jaxlin.runs import Teacher

Progress = Callable[[int], Any]  # called with the number of measurements done


@dataclass(frozen=True)
class Settings:
    """Find the layers of a linear-time student that are worth most as the teacher's attention."""

    run: str = ""
    """Run folder; its student may be trained in stages 1 and 2 alone."""
    keep: int = 0
    """Layers that are to keep their attention; 0 is one in four."""
    greedy: Switch = 0
    """Choose one layer after the other, each given those before: --keep times the work."""
    text: tuple[str, ...] = ()
    """Text to read; empty uses the run's held-out text."""
    tokens: int = 8_192
    """Tokens of it."""
    json: Switch = 0
    """End with one line of JSON."""


@dataclass(frozen=True)
class Layer:
    """What a layer is worth as the teacher's: the KL with it, how much less that is than before, nats a token, and the
    95 % interval of the gain over sequences; None of few."""

    layer: int
    kl: float
    gain: float
    interval: tuple[float, float] | None


class Hybrids:
    """The hybrids of a student and its teacher, on some text: layers of the first, layers of the second."""

    def __init__(self, teacher: Teacher, student: Teacher, batches: Iterable[Batch]) -> None:
        self._teacher, self._student = teacher, student
        run = jax.jit(functools.partial(forward, teacher.config, logits=False))
        self._text: list[tuple[Batch, jax.Array]] = [
            (batch, run(teacher.params, batch["tokens"], segment_ids=batch["segment_ids"]).hidden) for batch in batches
        ]
        every = np.concatenate([np.sum(targets_of(batch).valid, axis=1) for batch, _ in self._text])
        self._rows = every > 0  # those that only fill the last batch have none
        self.tokens: np.ndarray = every[self._rows]
        """Of each sequence, those that the KL is over."""
        self._known: dict[frozenset[int], np.ndarray] = {}

    def kl(self, restored: Iterable[int]) -> np.ndarray:
        """KL to the teacher of the student whose layers `restored` are the teacher's, summed over each sequence."""
        layers = frozenset(restored)
        if layers not in self._known:
            which = np.isin(np.arange(self._student.config.num_hidden_layers), list(layers))
            models = (self._teacher.config, self._student.config), (self._teacher.params, self._student.params)
            found = [_kl(*models, which, batch, target) for batch, target in self._text]
            self._known[layers] = np.concatenate(found)[self._rows]
        return self._known[layers]


@functools.partial(jax.jit, static_argnums=0)
def _kl(configs: tuple[ModelConfig, ModelConfig], params: Any, restored: Any, batch: Batch, target: Any) -> jax.Array:
    """[B]: of the student whose layers `restored` [L] are the teacher's, whose final hidden states are `target`."""
    (config_t, config_s), (teacher, student) = configs, params
    (teacher_block,), student_blocks = blocks(config_t, packed=True), blocks(config_s, packed=True)
    segment_ids = batch["segment_ids"]
    positions, _ = positions_in_segments(segment_ids.shape, segment_ids, None)

    def run(block: Block, params: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda x: apply(block, params, x, positions=positions, segment_ids=segment_ids)[0]

    def period(x, rows):
        teacher_rows, student_rows, is_restored = rows
        for i, block in enumerate(student_blocks):
            of_teacher = jax.tree.map(lambda a, i=i: a[i], teacher_rows)
            of_student = student_rows[block.name]
            x = lax.cond(is_restored[i], run(teacher_block, of_teacher), run(block, of_student), x)
        return x, None

    teacher_rows, is_restored = jax.tree.map(
        lambda a: a.reshape(-1, config_s.period, *a.shape[1:]), (teacher["layers"]["block_0"], restored)
    )
    x = jnp.take(student["embed_tokens"]["embedding"], batch["tokens"], axis=0).astype(config_s.dtype)
    x, _ = lax.scan(period, x, (teacher_rows, student["layers"], is_restored))
    hidden = apply(RMSNorm(config_s), student["norm"], x)
    kernels = head_kernel(student), head_kernel(teacher)

    def sequence(row):
        hidden, target, at = jax.tree.map(lambda a: a[None], row)
        return logit_sums(hidden, target, *kernels, at, config_s).kl

    return lax.map(sequence, (hidden, target, targets_of(batch)))


def rank(hybrids: Hybrids, layers: Sequence[int], kept: Sequence[int] = (), done: Progress = bool) -> list[Layer]:
    """`layers` by what each is worth as the teacher's beside the layers `kept`, the most first."""
    before, total, after = hybrids.kl(kept), float(hybrids.tokens.sum()), dict[int, np.ndarray]()
    for layer in layers:
        after[layer] = hybrids.kl([*kept, layer])
        done(1)
    intervals = _intervals({layer: before - kl for layer, kl in after.items()}, hybrids.tokens)
    ranked = [
        Layer(layer, float(kl.sum()) / total, float((before - kl).sum()) / total, intervals.get(layer))
        for layer, kl in after.items()
    ]
    return sorted(ranked, key=lambda one: one.kl)


def _intervals(gains: dict[int, np.ndarray], tokens: np.ndarray) -> dict[int, tuple[float, float]]:
    """95 % intervals of gains a token, paired; none of few sequences."""
    if len(tokens) < FEWEST:
        return {}

    def draws(sums: dict[int, np.ndarray]) -> dict[int, np.ndarray]:  # of one pairing: always the same resamples
        series = {key: Series(values.tolist(), "sequences", bounds=None) for key, values in sums.items()}
        return {key: mean.values for key, mean in resample(series).items()}

    of_tokens = draws({0: tokens})[0]
    ends = {layer: np.percentile(gain / of_tokens, (2.5, 97.5)) for layer, gain in draws(gains).items()}
    return {layer: (float(low), float(high)) for layer, (low, high) in ends.items()}


def choose(
    hybrids: Hybrids, layers: Sequence[int], keep: int, *, greedy: bool = False, done: Progress = bool
) -> list[Layer]:
    """`layers` by their worth, the most first: the first `keep` are to be kept. With `greedy` these alone."""
    if not greedy:
        return rank(hybrids, layers, done=done)
    chosen = list[Layer]()
    for _ in range(keep):
        kept = [one.layer for one in chosen]
        chosen.append(rank(hybrids, [layer for layer in layers if layer not in kept], kept, done)[0])
    return chosen


def evenly(layers: Sequence[int], keep: int) -> list[int]:
    """As many of `layers` at equal distances, the last among them: what --mixer 4xNAME+softmax keeps."""
    return [layers[(i + 1) * len(layers) // keep - 1] for i in range(keep)]


def pattern(config: ModelConfig, kept: Sequence[int]) -> str:
    """The student's mixers with attention in the layers `kept`, as --mixer takes them."""
    own = enumerate(layers_of(config.mixer, config.num_hidden_layers))
    return pattern_of(["softmax" if i in kept else mixer for i, mixer in own])


def main() -> None:
    """Measure, print, and keep what was found in the run folder."""
    settings = parse(Settings)
    if not settings.run:
        raise UserError("--run: give a run folder")
    if settings.tokens < 1:
        raise UserError(f"--tokens {settings.tokens}: must be at least 1")
    subject = open_subject(settings.run, text=settings.text)
    data = replace(subject.config.data, eval_tokens=settings.tokens)
    subject = replace(subject, config=replace(subject.config, data=data))
    config = subject.models["student"].config
    layers = linear_layers(config)
    if not layers:
        raise UserError(f"--run {settings.run}: all its layers are softmax attention; there is nothing to rank")
    keep = settings.keep or max(1, len(layers) // 4)
    if not 0 < keep < len(layers):
        raise UserError(
            f"--keep {keep}: the student has {len(layers)} linear-time layers; keep fewer of them, 1 or more"
        )
    hybrids = Hybrids(subject.models["teacher"], subject.models["student"], subject.batches)
    bars = Bars(Console(stderr=True))
    try:
        work = sum(range(len(layers) - keep + 1, len(layers) + 1)) if settings.greedy else len(layers)
        found = choose(hybrids, layers, keep, greedy=bool(settings.greedy), done=bars("layers", work))
    finally:
        bars.close()
    chosen = sorted(one.layer for one in found[:keep])
    sets = {"none": [], "chosen": chosen, "even": evenly(layers, keep)}
    total = float(hybrids.tokens.sum())
    report = {
        "tokens": int(total),
        "text": list(settings.text),  # empty is what the run held back
        "greedy": bool(settings.greedy),
        "layers": [asdict(one) for one in found],
        "kl": {name: {"layers": kept, "kl": float(hybrids.kl(kept).sum()) / total} for name, kept in sets.items()},
        "mixer": pattern(config, chosen),
    }
    assert subject.run is not None
    subject.run.write("hybrid.json", report)
    console = Console()
    show(report, keep, console)
    run = subject.run.config  # of a run that starts from another, not all settings are that one's
    flags = ["--init-from", settings.run, "--config", run.config, *(["--text", *run.text] if run.text else [])]
    flags += ["--mixer", report["mixer"], "--stage", "3", "--run-dir", "FOLDER"]
    command = f"python train.py {shlex.join(flags)}"
    console.print(
        f"to train it:  {command}\nwrote {subject.run.folder / 'hybrid.json'}", highlight=False, soft_wrap=True
    )
    if settings.json:
        print(json.dumps(report))


def show(report: dict[str, Any], keep: int, console: Console) -> None:
    """The layers in order of their worth, and what keeping those chosen makes of the KL."""
    given = "given those above it" if report["greedy"] else "alone"
    table = Table(title=f"KL to the teacher with one more layer of its attention, each {given}")
    for name in ("layer", "KL", "less by", "95 %"):
        table.add_column(name, justify="right")
    for place, one in enumerate(report["layers"], 1):
        interval = "" if one["interval"] is None else "{:.4f} to {:.4f}".format(*one["interval"])
        table.add_row(str(one["layer"]), f"{one['kl']:.4f}", f"{one['gain']:.4f}", interval, end_section=place == keep)
    console.print(table)
    for name, what in (("none", "as it is"), ("chosen", "with layers {}"), ("even", "at equal distances, {}")):
        kept = ", ".join(map(str, report["kl"][name]["layers"]))
        line = f"KL on {report['tokens']:,} tokens {what.format(kept)}: {report['kl'][name]['kl']:.4f}"
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_main(main, called=MEASURED_TEXT)
