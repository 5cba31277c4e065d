"""Everything that is measured of a student, as JSON and in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlin.config import UserError
from jaxlin.inspect import gates, needle, probe, states
from jaxlin.inspect.subject import Subject
from jaxlin.pattern import layers_of

GATES = {"decay": "decay", "beta": "beta", "input_gate": "input gate"}
Bar = Callable[[str, int], Callable[[int], Any]]


def inspect(
    subject: Subject, *, sequences: int, length: int, positions: Sequence[int], examples: int,
    distances: Sequence[int], seed: int, bar: Bar,
) -> dict[str, Any]:  # fmt: skip
    """Measure `subject`, whose settings `python -m jaxlin.inspect` explains.

    Returns what was measured, and on what; layers, for each linear-time one its number, mixer, gates, memory
    (`gates.measure`), states (`states.measure`) and needle (`probe.measure`); and together, the needle's probe on all
    layers. None stands for infinity. Raises UserError where the text is too short.
    """
    config, params = subject.config, subject.params
    # Needles lie in as much text as the examples would fill without a shared token, where there is so much.
    window = needle.BEFORE + max(distances, default=0) if examples else 0
    stream, which = subject.stream(max(sequences * length, examples * window), max(length, needle.FOLDS * window))
    sequences = min(sequences, len(stream) // length)
    if not sequences:
        raise UserError(f"--length {length}: the text has only {len(stream)} tokens; give more --text, or less")
    rows = stream[: sequences * length].reshape(sequences, length)
    # Before anything is computed: a tokenizer or a text that will not do is refused.
    made = needle.examples(stream, subject.tokenizer, distances, examples, seed) if examples else None

    of_gates = gates.measure(config, params, rows, bar("gates and memory", sequences))
    of_states = states.measure(config, params, rows, positions, bar("states", sequences))
    found = probe.measure(config, params, made, distances, seed, bar("needles", examples)) if made else None
    numbers, mixers = gates.linear_layers(config), layers_of(config.mixer, config.num_hidden_layers)
    layers = [
        {"layer": number, "mixer": mixers[number], **one, "states": of_state}
        for number, one, of_state in zip(numbers, of_gates, of_states, strict=True)
    ]
    if found:
        layers = [{**layer, "needle": scores} for layer, scores in zip(layers, found["layers"], strict=True)]
    report = {
        **{name: subject.settings.get(name) for name in ("teacher", "preset", "mixer")},
        "params_sha256": subject.params_sha256,
        "softmax_layers": [i for i in range(config.num_hidden_layers) if i not in numbers],
        "text": which,
        "text_tokens": len(stream),
        "sequences": sequences,
        "length": length,
        "window": length // 2,
        "quantiles": gates.QUANTILES,
        "positions": positions,
        "layers": layers,
    }
    if found:
        about = {"examples": examples, "classes": len(needle.DIGITS), "seed": seed}
        report["needle"] = {"distances": distances, **about, "together": found["together"]}
    return json.loads(json.dumps(_finite(report)))


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_results(found: dict[str, Any], console: Console) -> None:
    """The report as tables: by layer, by position, by distance."""
    what = f"{found['mixer']} ({found['preset']}), a student of {found['teacher']}"
    console.print(f"{what}, on {found['sequences']} sequences of {found['length']} tokens", highlight=False)
    tables = [gate_table(found), memory_table(found), state_table(found)]
    for table in [*tables, needle_table(found) if "needle" in found else None]:
        if table is not None:
            console.print(table)
    for note in notes(found):
        console.print(note, highlight=False)


def gate_table(found: dict[str, Any]) -> Table | None:
    """Gates, a row a layer; None where no mixer has any."""
    shown = [name for name in GATES if any(name in layer["gates"] for layer in found["layers"])]
    table = Table(title="Gates, 5 / 50 / 95 %")
    for heading in ("layer", "mixer", *(GATES[name] for name in shown)):
        table.add_column(heading, justify="left" if heading == "mixer" else "right")
    for layer in found["layers"]:
        spreads = (_spread(layer["gates"].get(name, {}).get("quantiles"), _gate) for name in shown)
        table.add_row(str(layer["layer"]), layer["mixer"], *spreads)
    return table if shown else None


def memory_table(found: dict[str, Any]) -> Table:
    """Memory, and the rank of the state at the last position, a row a layer."""
    table = Table(title="Effective memory in tokens, 5 / 50 / 95 %, and rank of the states")
    for heading in ("layer", "mixer", "by gates", "of writes", "effective rank"):
        table.add_column(heading, justify="left" if heading == "mixer" else "right")
    for layer in found["layers"]:
        spreads = (_spread(layer["memory"][name]["quantiles"], _tokens) for name in ("gates", "writes"))
        rank = f"{np.mean(layer['states']['effective_rank'][-1]):.1f} of {min(layer['states']['shape'])}"
        table.add_row(str(layer["layer"]), layer["mixer"], *spreads, rank)
    return table


def state_table(found: dict[str, Any]) -> Table:
    """Rank and size of the states over time, means over heads and layers."""
    table = Table(title="States over time, means over layers, heads and sequences")
    for heading in ("tokens", "effective rank", "stable rank", "Frobenius norm"):
        table.add_column(heading, justify="right")
    for at, position in enumerate(found["positions"]):
        values = [
            np.mean([np.mean(layer["states"][name][at]) for layer in found["layers"]])
            for name in ("effective_rank", "stable_rank", "norm")
        ]
        table.add_row(str(position), *(f"{value:.4g}" for value in values))
    return table


def needle_table(found: dict[str, Any]) -> Table:
    """Accuracy of the probes by distance."""
    about = found["needle"]
    table = Table(title=f"Which of {about['classes']} needles: accuracy of linear probes on the state")
    for heading in ("tokens since", "all layers", "95 %", "median layer", "best layer", "chance"):
        table.add_column(heading, justify="right")
    for at, distance in enumerate(about["distances"]):
        by_layer = [layer["needle"]["accuracy"][at] for layer in found["layers"]]
        low, high = about["together"]["interval"][at]
        table.add_row(
            str(distance),
            f"{about['together']['accuracy'][at]:.1%}",
            f"{100 * low:.0f} to {100 * high:.0f}",
            f"{np.median(by_layer):.1%}",
            f"{max(by_layer):.1%} ({found['layers'][int(np.argmax(by_layer))]['layer']})",
            f"{1 / about['classes']:.0%}",
        )
    return table


def notes(found: dict[str, Any]) -> list[str]:
    """What a reader must know of the numbers."""
    lines = [
        "Memory: tokens until the product of the gates, or what is left of a write, falls below 1/e (∞: never); times "
        f"above {found['window']} continue the rate that was measured. Rank: after {found['positions'][-1]} tokens."
    ]
    if found["softmax_layers"]:
        numbers = ", ".join(map(str, found["softmax_layers"]))
        lines.append(f"Not shown, softmax attention: layers {numbers}. They keep the whole context and have no state.")
    if found["text"] == "trained on":
        lines.append("The run holds back too little text: this is text that it was trained on. --text gives other.")
    if "needle" in found:
        about = found["needle"]
        lines.append(
            f"Needles: {about['examples']} examples in {found['text_tokens']:,} tokens of text, each tested by a probe "
            "fitted on other text; intervals are Wilson's. The best layer is chosen after the fact. The teacher has no "
            "state to compare with."
        )
    return lines


def _spread(quantiles: list[float | None] | None, number: Callable[[float | None], str]) -> str:
    """The lowest, middle and highest quantile; one number where they are the same."""
    if quantiles is None:
        return ""
    texts = [number(quantiles[i]) for i in (0, 2, 4)]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _gate(value: float | None) -> str:
    assert value is not None
    return f"{value:.4f}" if 0.99 < value < 1 else f"{value:.3f}" if value < 10 else f"{value:.3g}"


def _tokens(value: float | None) -> str:
    return "∞" if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
