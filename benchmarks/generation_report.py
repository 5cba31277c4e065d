"""What `benchmarks.generation_speed` shows: a line a cell, a table, the three ratios that must hold, and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jaxlin.config import UserError

TEACHER = "softmax"
Found = Mapping[Any, Mapping[str, Any]]


class Marks(NamedTuple):
    """The cells that the ratios are of, in tokens of a prompt and sequences."""

    flat: tuple[int, int] = (1024, 65536)
    long: int = 32768
    served: tuple[int, int] = (4096, 32)


MARKS = Marks()


def ratios(found: Found) -> dict[str, dict[str, Any]]:
    """By mixer, those whose cells were measured.

    flat: milliseconds a token after 64k tokens over those after 1k, batch 1. prefill_32k: seconds of reading 32k
    tokens over the teacher's, batch 1. throughput_4k: tokens/s over the teacher's after 4k tokens, batch 32;
    throughput_32k: after 32k, in the largest batch that the teacher fits (throughput_32k_batch).
    """
    measured = {tuple(cell): figures for cell, figures in found.items() if figures["status"] == "measured"}

    def quotient(name: str, over: tuple, under: tuple) -> float | None:
        if over not in measured or under not in measured:
            return None
        return measured[over][name] / measured[under][name]

    short, long = MARKS.flat
    largest = max((batch for mixer, length, batch in measured if mixer == TEACHER and length == MARKS.long), default=0)
    results = {}
    for mixer in dict.fromkeys(cell[0] for cell in measured):
        own = {"flat": quotient("decode_ms_per_token", (mixer, long, 1), (mixer, short, 1))}
        if mixer != TEACHER:
            speed, at = "decode_tokens_per_second", (MARKS.long, largest)
            own["prefill_32k"] = quotient("prefill_seconds", (mixer, MARKS.long, 1), (TEACHER, MARKS.long, 1))
            own["throughput_4k"] = quotient(speed, (mixer, *MARKS.served), (TEACHER, *MARKS.served))
            own["throughput_32k"] = quotient(speed, (mixer, *at), (TEACHER, *at))
            own["throughput_32k_batch"] = largest or None
        results[mixer] = own
    return results


def line(cell: Any, figures: Mapping[str, Any]) -> str:
    """One cell in words."""
    where = f"{cell.mixer:17} {cell.length:6} tokens x {cell.batch:3}"
    if figures["status"] != "measured":
        return f"{where}: {figures['status']}"
    read, written = figures["prefill_tokens_per_second"], figures["decode_tokens_per_second"]
    step = figures["decode_ms_per_token"]
    return f"{where}: reads {read:10,.0f} tokens/s, writes {written:9,.0f} tokens/s at {step:8.3f} ms a token"


def show(found: Found, results: Mapping[str, Any]) -> None:
    """Print all cells as a table, and the ratios."""
    console = Console()
    table = Table(title=f"{results['config']}, {results['dtype']}, {results['device']}, jax {results['jax']}")
    for name in ("mixer", "batch", "length"):
        table.add_column(name, justify="left" if name == "mixer" else "right")
    for name in ("prefill tokens/s", "ms a token", "tokens/s", "state a sequence, MB", "peak, GB"):
        table.add_column(name, justify="right")
    for cell, figures in sorted(found.items(), key=lambda item: (item[0].mixer, item[0].batch, item[0].length)):
        shown = [figures["status"], "", "", "", ""]
        if figures["status"] == "measured":
            shown = [
                f"{figures['prefill_tokens_per_second']:,.0f}",
                f"{figures['decode_ms_per_token']:.3f}",
                f"{figures['decode_tokens_per_second']:,.0f}",
                f"{figures['state_bytes_per_sequence'] / 1e6:.2f}",
                f"{figures['peak_bytes'] / 1e9:.1f}",
            ]
        table.add_row(cell.mixer, str(cell.batch), str(cell.length), *shown)
    console.print(table)
    names = ("flat", "prefill_32k", "throughput_4k", "throughput_32k", "throughput_32k_batch")
    table = Table(title="ratios: flat at most 1.05, prefill below 1, throughput at 4k at least 3")
    for name in ("mixer", *names):
        table.add_column(name)
    for mixer, own in results["ratios"].items():
        values = [own.get(name) for name in names]
        table.add_row(mixer, *("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


def draw(found: Found, results: Mapping[str, Any], path: Path) -> None:
    """Milliseconds a token and tokens/s against the length, a column a batch. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] -- of the extra eval
    except ImportError:
        raise UserError(f"--plot {path}: needs matplotlib: pip install matplotlib") from None
    measured = {cell: figures for cell, figures in found.items() if figures["status"] == "measured"}
    batches = sorted({cell.batch for cell in measured})
    if not batches:
        raise UserError(f"--plot {path}: nothing was measured")
    rows = (("decode_ms_per_token", "ms a token"), ("decode_tokens_per_second", "tokens/s written"),
            ("prefill_tokens_per_second", "tokens/s read"))  # fmt: skip
    mixers = {mixer: f"C{i}" for i, mixer in enumerate(dict.fromkeys(cell.mixer for cell in found))}
    lengths = sorted({cell.length for cell in measured})
    figure = Figure(figsize=(4 * len(batches), 9), layout="constrained")
    axes = figure.subplots(len(rows), len(batches), squeeze=False, sharex=True, sharey="row")
    for column, batch in enumerate(batches):
        axes[0][column].set_title(f"batch {batch}")
        axes[-1][column].set_xlabel("tokens before")
        for row, (name, label) in enumerate(rows):
            ax = axes[row][column]
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
            ax.yaxis.set_minor_formatter(lambda y, _: f"{y:,.0f}" if str(y)[0] in "25" else "")
            ax.set_ylabel(label if column == 0 else "")
            for mixer, color in mixers.items():
                own = {c: f for c, f in measured.items() if (c.mixer, c.batch) == (mixer, batch)}
                points = sorted((c.length, f[name]) for c, f in own.items())
                width = 2.5 if mixer == TEACHER else 1
                ax.plot(
                    *(zip(*points, strict=True) if points else ([], [])), label=mixer, color=color, marker=".", lw=width
                )
                for cell, figures in found.items():
                    if (cell.mixer, cell.batch, figures["status"]) == (mixer, batch, "OOM"):
                        at = ax.get_xaxis_transform()
                        ax.text(cell.length, 0.03, "OOM", color=color, rotation=90, ha="center", transform=at)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{results['config']}, {results['dtype']}, {results['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
