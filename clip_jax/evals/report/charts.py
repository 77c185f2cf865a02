"""Line charts as inline SVG that follows the page's colours, for reports that load nothing.

Colours are CSS variables of the page (`--ink`, `--faint`, `--series-1` …), so one chart serves light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

Number = int | float  # under test annotations are executed, and an int is no float there
Points = Sequence[tuple[Number, Number]]

WIDTH, HEIGHT = 480, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26  # margins for the ticks' texts
SERIES = 6  # colours that the page has
MAX_POINTS = 600  # of a line: beyond what 480 px can show


def line_chart(series: Mapping[str, Points], title: str) -> str:
    """Return an SVG of lines by name over one x axis, gaps where a value is not finite; '' if nothing is left."""
    finite = [p for points in series.values() for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not finite:
        return ""
    x_ticks, y_ticks = ticks(*_span(p[0] for p in finite), 5), ticks(*_span(p[1] for p in finite), 4)
    x_low, x_high = _span(p[0] for p in finite)
    y_low, y_high = min(y_ticks), max(y_ticks)

    def place(x: Number, y: Number) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / ((y_high - y_low) or 1) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for value in y_ticks:
        _, y = place(x_low, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="var(--faint)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        if x_low <= value <= x_high:
            x, _ = place(value, y_low)
            parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{number(value)}</text>')
    for index, points in enumerate(series.values()):
        colour = f"var(--series-{index % SERIES + 1})"
        for run in _finite_runs(_thinned(points)):
            placed = [place(x, y) for x, y in run]
            if len(placed) == 1:
                parts.append(f'<circle cx="{placed[0][0]}" cy="{placed[0][1]}" r="3" fill="{colour}"/>')
            else:
                line = " ".join(f"{x},{y}" for x, y in placed)
                parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.75"/>')
    return "".join([*parts, "</svg>"])


def ticks(low: Number, high: Number, about: int) -> list[float]:
    """Return round numbers, some `about` of them, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: Number) -> str:
    """Write a tick's value: `0.25`, `1,500`, `20k`, `3e-05`."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e")
    if abs(value) >= 1e4:
        return next(
            f"{value / size:g}{unit}" for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= size
        )
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _span(values: Iterable[Number]) -> tuple[Number, Number]:
    values = list(values)
    return min(values), max(values)


def _thinned(points: Points) -> Points:
    return points[:: max(1, -(-len(points) // MAX_POINTS))]


def _finite_runs(points: Points) -> list[list[tuple[Number, Number]]]:
    runs: list[list[tuple[Number, Number]]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
