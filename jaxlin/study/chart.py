"""Charts as inline SVG: points with intervals, and lines. Every mark names its value and its files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, ROW, PLOT_HEIGHT = 1000, 24, 360
LEFT, RIGHT, TOP, BOTTOM = 80, 300, 34, 46
LABELS = 260  # width of the names beside rows
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f", "#bcbd22")
NO_MARGIN = 1e-12
JITTER = 1.5  # between the bars of neighbouring lines


@dataclass(frozen=True)
class Point:
    """A value at a place, its interval and its files."""

    x: float
    y: float
    interval: tuple[float, float] | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """Points of one name."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Row:
    """One name's value on the x axis, and another's to compare (the paper's)."""

    name: str
    point: Point
    other: float | None = None


def rows_chart(title: str, label: str, rows: Sequence[Row]) -> str:
    """A row for each name, its value a dot, its interval a bar, what it is compared with a circle."""
    values = [v for row in rows for v in (row.point.x, *(row.point.interval or ()), row.other) if v is not None]
    height = TOP + ROW * len(rows) + BOTTOM
    axis = _Axis(*_padded(values), LABELS, WIDTH - 30)
    parts = [*_frame(title, height), *_ticks_below(axis, label, TOP, height - BOTTOM)]
    for at, row in enumerate(rows):
        y = TOP + ROW * (at + 0.5)
        parts.append(_text(LABELS - 8, y + 4, row.name, "end"))
        if row.other is not None:
            parts.append(f'<circle cx="{axis(row.other):.1f}" cy="{y:.1f}" r="4" fill="none" stroke="#777"/>')
        if row.point.interval:
            low, high = (axis(value) for value in row.point.interval)
            parts.append(f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{COLORS[0]}" stroke-width="2"/>')
        parts.append(_dot(axis(row.point.x), y, COLORS[0], f"{row.name}: {row.point.x:.4g}", row.point.sources))
    return "".join([*parts, "</svg>"])


def lines_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], *, log: bool = False) -> str:
    """Lines over x; `log` makes both axes logarithmic, on which what is not above 0 is left out."""
    lines = [_above_zero(line) for line in lines] if log else list(lines)
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    height = TOP + PLOT_HEIGHT + BOTTOM
    x_axis = _Axis(*_padded([p.x for p in points], log), LEFT, WIDTH - RIGHT, log)
    limits = [v for p in points for v in (p.y, *(p.interval or ())) if not log or v > 0]
    y_axis = _Axis(*_padded(limits, log), TOP + PLOT_HEIGHT, TOP, log)
    parts = [*_frame(title, height), *_ticks_below(x_axis, x_label, TOP, TOP + PLOT_HEIGHT)]
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, _short(value), "end"))
    parts.append(_text(LEFT, TOP - 6, y_label))
    for at, line in enumerate(lines):
        color = COLORS[at % len(COLORS)]
        aside = JITTER * (at - (len(lines) - 1) / 2)  # or bars of one place would hide each other
        path = "L".join(f"{x_axis(p.x) + aside:.1f} {y_axis(p.y):.1f}" for p in line.points)
        dash = ' stroke-dasharray="5 4"' if at >= len(COLORS) else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>' if path else "")
        for point in line.points:
            x, y = x_axis(point.x) + aside, y_axis(point.y)
            if point.interval and (not log or point.interval[0] > 0):
                low, high = (y_axis(value) for value in point.interval)
                parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{color}"/>')
            parts.append(_dot(x, y, color, f"{line.name}: {point.y:.4g} at {point.x:,.0f}", point.sources))
        y = TOP + 12 + 17 * at
        sample = f"M{WIDTH - RIGHT + 8} {y - 4}h18"
        parts.append(f'<path d="{sample}" stroke="{color}" stroke-width="3"{dash}/>')
        parts.append(_text(WIDTH - RIGHT + 30, y, line.name))
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` to places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values between the ends; on a logarithmic axis that spans little, those of a linear one."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            if len(inside := [value for value in every if self.low <= value <= self.high]) > 2:
                return inside
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 5, 10, 20) if (self.high - self.low) / (m * step) <= 8)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _padded(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """The ends of an axis that shows `values`."""
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.06, 1.01)
        return low / margin, high * margin
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1 + NO_MARGIN
    return low - margin, high + margin


def _above_zero(line: Line) -> Line:
    return Line(line.name, tuple(p for p in line.points if p.x > 0 and p.y > 0))


def _frame(title: str, height: float) -> Iterator[str]:
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img" '
    yield f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'


def _ticks_below(axis: _Axis, label: str, top: float, bottom: float) -> Iterator[str]:
    for value in axis.ticks():
        x = axis(value)
        yield f'<path d="M{x:.1f} {top}V{bottom:.1f}" stroke="#ddd"/>'
        yield _text(x, bottom + 16, _short(value), "middle")
    yield _text((axis.start + axis.end) / 2, bottom + 36, label, "middle")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(x: float, y: float, color: str, text: str, sources: Sequence[str]) -> str:
    files = escape(" ".join(sources))
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}" data-source="{files}">'
        f"<title>{escape(text)} ({files})</title></circle>"
    )


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"
