"""Decoding after prompts of 1k to 16k tokens, as Markdown: `python -m benchmarks.decoding --run DIR`.

A token's time is what 256 more cost after the same prompt, over 256; the state is what a sequence keeps between two
tokens; the peak is of all that the device held until then, parameters included (CPUs do not tell it). Times are the
shortest of three equal calls after the first, so without compilation.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import jax
import numpy as np

from jaxlin import generate
from jaxlin.command_line import parse, run_main
from jaxlin.config import UserError
from jaxlin.model import init_state
from jaxlin.runs import Teacher

NEW = 256  # tokens
LENGTHS = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Settings:
    """Time and memory of decoding, by the length of the prompt."""

    run: str = ""
    """Run folder of the student."""
    teacher: str = ""
    """Instead of a run: "demo", a Hugging Face name or folder, or a .gguf file."""
    batch: int = 8
    """Sequences decoded together."""
    lengths: tuple[int, ...] = LENGTHS
    """Tokens of the prompts."""


def state_bytes(model: Teacher, length: int) -> int:
    """What one sequence keeps, whose prompt and continuation have `length` tokens."""
    state = jax.eval_shape(lambda: init_state(model.config, 1, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def seconds(model: Teacher, prompts: list[list[int]], new: int) -> float:
    """The shortest time of three equal calls, after one that compiles."""
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        generate.generate(model.config, model.params, prompts, max_new_tokens=new)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def measure(model: Teacher, length: int, batch: int) -> dict[str, float]:
    """One row of the table."""
    tokens = np.random.default_rng(length).integers(0, model.config.vocab_size, (batch, length))
    short, long = (seconds(model, tokens.tolist(), new) for new in (1 + generate.BLOCK, 1 + generate.BLOCK + NEW))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "length": length,
        "milliseconds_a_token": 1e3 * (long - short) / NEW,
        "state_bytes": state_bytes(model, length + NEW),
        "peak_bytes": peak,
    }


def main() -> None:
    """Print the table, and a line of JSON."""
    settings = parse(Settings)
    if settings.batch < 1:
        raise UserError(f"--batch {settings.batch}: must be at least 1")
    model = generate.load_model(settings.run, settings.teacher)
    device = jax.devices()[0].device_kind
    print(f"{'+'.join(model.config.mixer)}, {model.config.dtype}, {settings.batch} sequences, {device}\n")
    print("| prompt | ms a token | state a sequence, MB | peak memory, GB |")
    print("|---|---|---|---|", flush=True)
    found = []
    for length in sorted(settings.lengths):
        row = measure(model, length, settings.batch)
        cells = f"{row['milliseconds_a_token']:.3f} | {row['state_bytes'] / 1e6:.2f} | {row['peak_bytes'] / 1e9:.2f}"
        print(f"| {length} | {cells} |", flush=True)
        found.append(row)
    print("\n" + json.dumps({"mixer": model.config.mixer, "device": device, "batch": settings.batch, "rows": found}))


if __name__ == "__main__":
    run_main(main)
