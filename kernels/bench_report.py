"""What `bench` measured, for people: a line a row, Markdown tables, a plot. Needs no device, and matplotlib to plot.

A time is set beside what the least of bytes would take at the speed of a copy, or the least of products at that of a
matrix product, whichever is longer: that roof binds, and its share of the time is the percentage. Peers are compared by
time over our time: above 1 ours is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlin.config import UserError

PASSES = dict(forward="forward", both="forward and backward")
PEERS = ("fla", "mlstm_kernels")
TITLES = dict(
    linear_attention="linear attention", retention="RetNet", mlstm="mLSTM", deltanet="DeltaNet",
    gated_deltanet="Gated DeltaNet", gla="GLA", kda="KDA", softmax="softmax attention", fla="FLA",
    mlstm_kernels="mlstm_kernels", cudnn="cuDNN",
)  # fmt: skip
OURS = ("pallas", "chunked", "scan")
Row = dict[str, Any]


# ---- numbers ----


def roof(part: Row, about: Row) -> tuple[float, str] | None:
    """(share of the roof that binds, "copy" or "matmul"); None where no roof was measured."""
    bounds = {}
    if about.get("copy_tbs"):
        bounds["copy"] = part["bytes"] / about["copy_tbs"] / 1e9
    if about.get("matmul_tflops"):
        bounds["matmul"] = part["flops"] / about["matmul_tflops"] / 1e9
    if not bounds:
        return None
    binding = max(bounds, key=lambda name: bounds[name])
    return bounds[binding] / part["ms"], binding


def find(rows: Sequence[Row], op: str, shape: str, *implementations: str) -> Row | None:
    """The row of the first of some implementations that was timed."""
    found = {row["implementation"]: row for row in rows if (row["op"], row["shape"]) == (op, shape)}
    return next((found[name] for name in implementations if "forward" in found.get(name, {})), None)


def ratio(theirs: Row | None, ours: Row | None, name: str) -> float | None:
    """Their time of a pass over ours."""
    if theirs is None or ours is None or name not in theirs or name not in ours:
        return None
    return theirs[name]["ms"] / ours[name]["ms"]


def ratios(rows: Sequence[Row], row: Row) -> dict[str, dict[str, float | None]]:
    """By peer (`fla`: whichever library has the op; `softmax`), by pass."""
    if row["implementation"] not in OURS:
        return {}
    peers = dict(
        fla=find(rows, row["op"], row["shape"], *PEERS), softmax=find(rows, "softmax", row["shape"], "cudnn", "xla")
    )
    return {peer: {name: ratio(theirs, row, name) for name in PASSES} for peer, theirs in peers.items()}


# ---- text ----


def heading(about: Row) -> str:
    """The device and its roofs."""
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    copy, matmul = about.get("copy_tbs", 0), about.get("matmul_tflops", 0)
    cards = f" ({about['gpus']} of them, a shape's rows on one)" if about.get("gpus", 1) > 1 else ""
    clock = "" if about.get("clock") == "device" else ", by wall time"  # as all runs once were
    return f"{about['device']}{cards}: copy {copy:.2f} TB/s, bfloat16 product {matmul:.0f} TFLOP/s{clock}; {versions}"


def origin(about: Row) -> str:
    """The heading, or those of all runs that rows come from."""
    if "runs" not in about:
        return f"{heading(about)}.\n"
    lines = [
        f"{number}. {head}: " + ", ".join(f"{count} of {_title(name)}" for name, count in counts.items())
        for number, (head, counts) in enumerate((run for run in about["runs"] if run[1]), 1)
    ]
    return (
        "Rows of several runs, one after the other on cards of one kind; ratios may be of two:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def line(row: Row, about: Row) -> str:
    """A row in a terminal."""
    text = f"{row['op']:<17}{row['shape']:<17}{row['implementation']:<14}"
    for name in PASSES:
        if name in row:
            part = row[name]
            share = roof(part, about)
            text += (
                f"{part['ms']:9.3f} ms{'*' if 'host_ms' in part else ' '}{part['bytes'] / part['ms'] / 1e9:5.2f} TB/s"
            )
            text += f" {share[0]:4.0%} {share[1]}  " if share else "  "
    text += " ".join(f"{name} {error:.1e}" for name, error in row.get("errors", {}).items())
    return text + "".join(f"  {name} failed: {reason[:110]}" for name, reason in row["failed"].items())


def markdown(results: Row) -> str:
    """Everything: how it was measured, a summary of ratios, a table a shape, the decode step, what failed."""
    about, rows = results["about"], results["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    whole = [shape for shape in shapes if not shape.startswith("step:")]
    parts = [
        "# The kernels, timed\n",
        "Written by `python -m jaxlin.kernels.bench --markdown FILE`.\n",
        origin(about),
        METHOD,
        summary(rows, whole),
    ]
    parts += [shape_table(rows, shape, about) for shape in whole]
    parts += [step_table(rows, shape, about) for shape in shapes if shape not in whole]
    failed = [
        f"- {_title(row['op'])}, {row['shape']}, {_title(row['implementation'])}, {name}: `{_cell(reason)}`"
        for row in rows
        for name, reason in row["failed"].items()
    ]
    parts += ["## What failed\n\n" + "\n".join(failed) + "\n"] if failed else []
    return "\n".join(parts)


METHOD = """Shapes are B x T x H x D, bfloat16; ms are medians. TB/s counts inputs and o (with the backward pass their
gradients too) once each. The roof is the share of the time that moving those at the speed of the copy would take, or,
where that is longer, the matrix products at that of the product above ("mm"). Errors are relative RMS errors of the
passes timed, against the scan in float32 (softmax attention: against XLA's). Ratios are their time over ours: above 1
ours is faster; in the mLSTM's rows "FLA" is mlstm_kernels. Peers have the layout they want and gates of the same dtype;
RetNet's gates are constants to all. Times are those of the device, which is kept busy while calls are issued. (In runs
"by wall time" only rows with "\\*", whose calls the host issues slower than the device runs them, were timed so; in the
others starting and waiting for 20 calls is some 10 us of each.)
"""


def summary(rows: Sequence[Row], shapes: Sequence[str]) -> str:
    """Ratios of the Pallas kernels."""
    ops = list(dict.fromkeys(row["op"] for row in rows if row["op"] != "softmax"))
    head = ["", *shapes]
    body = []
    for op in ops:
        for peer, title in (("fla", "FLA"), ("softmax", "softmax")):
            cells = []
            for shape in shapes:
                row = find(rows, op, shape, "pallas")
                found = ratios(rows, row)[peer] if row else {}
                cells.append(" \\| ".join(_ratio(found.get(name)) for name in PASSES) if row else "")
            name = "mlstm_kernels" if (op, peer) == ("mlstm", "fla") else title
            body.append([f"{_title(op)}, x {name}", *cells])
    return "## Pallas against peers, forward \\| forward and backward\n\n" + _table(head, body)


def shape_table(rows: Sequence[Row], shape: str, about: Row) -> str:
    """All rows of a shape."""
    head = ["", "by"]
    for title in ("forward", "both"):
        head += [f"{title}, ms", "TB/s", "roof", "x FLA", "x softmax"]
    head += ["error of o", "largest of gradients"]
    body = []
    for row in sorted((row for row in rows if row["shape"] == shape), key=_order):
        compared = ratios(rows, row)
        cells = [_title(row["op"]), _title(row["implementation"])]
        for name in PASSES:
            cells += [*_times(row, name, about), *(_ratio(compared.get(p, {}).get(name)) for p in ("fla", "softmax"))]
        body.append([*cells, *_errors(row)])
    return f"## {shape.replace('x', ' x ')}\n\n" + _table(head, body)


def step_table(rows: Sequence[Row], shape: str, about: Row) -> str:
    """The decode step."""
    batch, layers, heads, d = shape.removeprefix("step:").split("x")
    body = []
    for row in sorted((row for row in rows if row["shape"] == shape), key=_order):
        scan = find(rows, row["op"], shape, "scan", "default")
        compared = _ratio(ratio(scan, row, "forward"))
        cells = [_title(row["op"]), row["implementation"], *_times(row, "forward", about), compared]
        errors = row.get("errors", {})
        body.append([*cells, *(f"{errors[n]:.1e}" if n in errors else "" for n in ("o", "state"))])
    text = f"One program: a token of {batch} sequences through {layers} layers of {heads} heads, K = V = {d}.\n"
    text += "The roof is reading and writing their float32 states once, as a copy does. `default` is `ops.*_step`.\n\n"
    head = ["", "by", "ms a step", "TB/s", "roof", "x scan", "error of o", "of the state"]
    return "## The decode step\n\n" + text + _table(head, body)


def _times(row: Row, name: str, about: Row) -> list[str]:
    """ms, TB/s and share of the roof of a pass, for cells."""
    if name not in row:
        return ["failed" if {name, "row"} & set(row["failed"]) else "", "", ""]
    part, share = row[name], roof(row[name], about)
    percent = f"{share[0]:.0%}{' mm' if share[1] == 'matmul' else ''}" if share else ""
    star = "\\*" if "host_ms" in part else ""
    return [f"{part['ms']:.3f}{star}", f"{_speed(part):.2f}", percent]


def _speed(part: Row) -> float:
    """TB/s."""
    return part["bytes"] / part["ms"] / 1e9


def _errors(row: Row) -> list[str]:
    errors = dict(row.get("errors", {}))
    o = errors.pop("o", None)
    worst = max(errors, key=lambda name: errors[name], default=None)
    return ["" if o is None else f"{o:.1e}", "" if worst is None else f"{worst} {errors[worst]:.1e}"]


def _order(row: Row) -> tuple[int, int]:
    """Ops in the order of the papers, ours before theirs."""
    names = ("pallas", "default", "chunked", "scan", *PEERS)
    place = names.index(row["implementation"]) if row["implementation"] in names else len(names)
    return list(TITLES).index(row["op"]) if row["op"] in TITLES else len(TITLES), place


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


# ---- plot ----


def draw(results: Row, path: Path) -> None:
    """Forward and backward by shape: bars of ours and the peers, a line at softmax attention. Raises UserError."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] -- of the extra eval
    except ImportError:
        raise UserError("--plot: needs matplotlib: pip install matplotlib; --from makes it of bench.json") from None
    rows = [row for row in results["rows"] if not row["shape"].startswith("step:") and "both" in row | row["failed"]]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        raise UserError("--plot: nothing was timed forward and backward")
    figure = Figure(layout="constrained", figsize=(11, 3.2 * ((len(shapes) + 1) // 2)))
    grid = figure.subplots((len(shapes) + 1) // 2, 2 if len(shapes) > 1 else 1, squeeze=False)
    every = list(grid.flat)
    for axes, shape in zip(every, shapes, strict=False):
        _bars(axes, rows, shape)
    for axes in every[len(shapes) :]:
        axes.set_axis_off()
    figure.suptitle(f"Forward and backward, ms, {results['about']['device']} (lower is better)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, rows: Sequence[Row], shape: str) -> None:
    ops = [op for op in TITLES if op != "softmax" and any((row["op"], row["shape"]) == (op, shape) for row in rows)]
    kinds = (("pallas", "C0", ("pallas",)), ("XLA, chunked", "C7", ("chunked",)), ("FLA, mlstm_kernels", "C1", PEERS))
    for number, (label, color, names) in enumerate(kinds):
        found = {at: find(rows, op, shape, *names) for at, op in enumerate(ops)}
        timed = {at: row["both"]["ms"] for at, row in found.items() if row and "both" in row}
        if not timed:
            continue
        bars = axes.bar([at + 0.27 * (number - 1) for at in timed], timed.values(), 0.26, color=color, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize="xx-small")
    softmax = find(rows, "softmax", shape, "cudnn", "xla")
    if softmax and "both" in softmax:
        axes.axhline(softmax["both"]["ms"], color="black", linestyle="--", label="softmax attention, cuDNN")
    axes.set_xticks(range(len(ops)), [_title(op) for op in ops], rotation=30, ha="right", fontsize="small")
    axes.set(yscale="log", title=f"{shape.replace('x', ' x ')} (B x T x H x D)")
    axes.legend(fontsize="xx-small")
