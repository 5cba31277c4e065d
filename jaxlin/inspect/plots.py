"""Figures of an inspection. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlin.evaluation.plots import new_figure
from jaxlin.inspect.report import GATES

Draw = Callable[[Any, dict[str, Any]], None]
DPI = 200
INK, SECOND = "#1f4e79", "#c0504d"
LABELS = {
    "decay": r"forgotten at a token, $1 - \alpha$",
    "beta": r"write strength $\beta$",
    "input_gate": "input gate $i$",
}
LEGEND: dict[str, Any] = dict(fontsize="x-small", frameon=False)


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figures of what was measured into `folder`, as PNG; their paths.

    Raises UserError without matplotlib.
    """
    figures: dict[str, Draw] = {"memory": memory, "states": states}
    if any(layer["gates"] for layer in found["layers"]):
        figures = {"gates": gates, **figures}
    if "needle" in found:
        figures["needle"] = needle
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in figures.items():
        figure = new_figure()
        plot(figure, found)
        path = folder / f"inspection_{name}.png"
        figure.savefig(path, dpi=DPI)
        written.append(path)
    return written


def gates(figure: Any, found: dict[str, Any]) -> None:
    """Quantiles of each gate over the layers."""
    shown = [name for name in GATES if any(name in layer["gates"] for layer in found["layers"])]
    figure.set_size_inches(0.6 + 3.8 * len(shown), 3.1)
    figure.get_layout_engine().set(wspace=0.05)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        with_it = [layer for layer in found["layers"] if name in layer["gates"]]
        rows = np.array([layer["gates"][name]["quantiles"] for layer in with_it])
        if name == "decay":  # what matters of decays near 1 is how far they are from it
            rows = np.maximum(1 - rows, 1e-6)
        spread(axes, [layer["layer"] for layer in with_it], rows)
        if name != "beta":
            logarithmic(axes)
        axes.set_ylabel(LABELS[name])
        of_layers(axes, found)
    legend(figure, figure.axes[0])


def memory(figure: Any, found: dict[str, Any]) -> None:
    """Effective memory over the layers: the median, and that of each head."""
    figure.set_size_inches(6.2, 3.6)
    axes = figure.subplots()
    both = any(layer["memory"]["gates"] != layer["memory"]["writes"] for layer in found["layers"])
    kinds = {"gates": ("by gates", INK)} | ({"writes": ("of writes", SECOND)} if both else {})
    for offset, (kind, (label, color)) in zip((-0.15, 0.15), kinds.items(), strict=False):
        for layer in found["layers"]:
            heads = [value for value in layer["memory"][kind]["by_head"] if value is not None]
            axes.plot([layer["layer"] + offset] * len(heads), heads, ".", color=color, markersize=3.5, alpha=0.4)
        middle = {layer["layer"]: layer["memory"][kind]["quantiles"][2] for layer in found["layers"]}
        x = range(max(middle) + 1)  # lines have gaps where a layer has no memory to draw, or an endless one
        values = [np.nan if middle.get(n) is None else middle[n] for n in x]
        never = ": endless" if np.all(np.isnan(values)) else ", small dots: heads"
        axes.plot(x, values, "o-", color=color, markersize=3.5, linewidth=1.4, label=label + never)
    axes.axhline(
        found["window"], color="grey", linewidth=0.8, linestyle=":", label="half a sequence, extrapolated above"
    )
    axes.set_ylabel("effective memory, tokens")
    logarithmic(axes)
    of_layers(axes, found)
    legend(figure, axes)


def states(figure: Any, found: dict[str, Any]) -> None:
    """Rank and size of the states over time, a line a layer."""
    figure.set_size_inches(9.6, 3.0)
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports] -- of the extra eval
    from matplotlib.cm import ScalarMappable  # pyright: ignore[reportMissingImports]
    from matplotlib.colors import Normalize  # pyright: ignore[reportMissingImports]
    from matplotlib.ticker import MaxNLocator  # pyright: ignore[reportMissingImports]

    most = {min(layer["states"]["shape"]) for layer in found["layers"]}
    of = f", of at most {most.pop()}" if len(most) == 1 else ""
    titles = {"effective_rank": f"effective rank{of}", "stable_rank": "stable rank", "norm": "Frobenius norm"}
    panels = figure.subplots(1, len(titles))
    colors, numbers = colormaps["viridis"], [layer["layer"] for layer in found["layers"]]
    scale = Normalize(0, max(numbers) or 1)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        lines = np.array([[np.mean(heads) for heads in layer["states"][name]] for layer in found["layers"]])
        for number, line in zip(numbers, lines, strict=True):
            axes.plot(found["positions"], line, "-", color=colors(scale(number)), linewidth=0.9, alpha=0.8)
        axes.plot(found["positions"], np.median(lines, axis=0), "k--", linewidth=1.6, label="median layer")
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["positions"], [str(n) for n in found["positions"]])
        axes.minorticks_off()
        axes.set(xlabel="tokens read", ylabel=title)
        if name == "norm":
            logarithmic(axes)
        tidy(axes)
    panels[0].legend(**LEGEND)
    figure.colorbar(
        ScalarMappable(scale, colors), ax=list(panels), label="layer", pad=0.01, ticks=MaxNLocator(integer=True)
    )


def needle(figure: Any, found: dict[str, Any]) -> None:
    """Accuracy by distance: of the probe on all layers, with its interval, and of each layer, as a map."""
    about = found["needle"]
    figure.set_size_inches(9.2, 3.4)
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    places, names = range(len(about["distances"])), [str(n) for n in about["distances"]]
    by_layer = 100 * np.array([layer["needle"]["accuracy"] for layer in found["layers"]])
    together = 100 * np.array(about["together"]["accuracy"])
    low, high = 100 * np.array(about["together"]["interval"]).T
    left.plot(places, together, "o-", color=INK, markersize=4, label="all layers, 95 % interval")
    left.errorbar(places, together, [together - low, high - together], fmt="none", ecolor=INK, capsize=2)
    left.plot(places, np.median(by_layer, axis=0), "s-", color=SECOND, markersize=3, label="median layer")
    left.fill_between(
        places,
        *np.quantile(by_layer, (0.25, 0.75), axis=0),
        color=SECOND,
        alpha=0.15,
        linewidth=0,
        label="25 to 75 % of layers",
    )
    left.axhline(100 / about["classes"], color="grey", linestyle=":", linewidth=0.9, label="chance")
    left.set(ylim=(0, 103), ylabel="probe accuracy, %")
    left.legend(**LEGEND, loc="upper right")
    tidy(left)
    image = right.imshow(by_layer.T, vmin=0, vmax=100, cmap="viridis", aspect="auto", origin="lower")
    right.set_yticks(places, names)
    numbers = [layer["layer"] for layer in found["layers"]]
    every = 1 if len(numbers) <= 12 else 5
    right.set_xticks(range(0, len(numbers), every), [str(n) for n in numbers[::every]])
    right.set(xlabel="layer", ylabel="tokens since the needle")
    left.set_xticks(places, names)
    left.set_xlabel("tokens since the needle")
    figure.colorbar(image, ax=right, label="probe accuracy, %")


def legend(figure: Any, axes: Any) -> None:
    """What the marks of `axes` mean, above the figure: beside the data there is no room."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, **LEGEND)


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with numbers as people write them: 1, 2 and 5, or round ones where it spans little."""
    from matplotlib import ticker  # pyright: ignore[reportMissingImports] -- of the extra eval

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5) if high < 8 * low else ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def spread(axes: Any, x: Sequence[int], rows: np.ndarray) -> None:
    """Quantiles [n, 5] as a dot, a thick and a thin bar: nothing is drawn between layers, where nothing is."""
    axes.vlines(x, rows[:, 0], rows[:, 4], color=INK, alpha=0.4, linewidth=1, label="5 to 95 %")
    axes.vlines(x, rows[:, 1], rows[:, 3], color=INK, alpha=0.55, linewidth=3.2, label="25 to 75 %")
    axes.plot(x, rows[:, 2], "o", color=INK, markersize=3.5, label="median")


def of_layers(axes: Any, found: dict[str, Any]) -> None:
    """An axis of all layers, those with softmax attention too."""
    count = len(found["layers"]) + len(found["softmax_layers"])
    every = 1 if count <= 12 else 5
    axes.set(xlabel="layer", xlim=(-0.7, count - 0.3), xticks=range(0, count, every))
    tidy(axes)


def tidy(axes: Any) -> None:
    """A light grid, and no frame above and at the right."""
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
