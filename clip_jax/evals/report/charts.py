"""SVG charts of reports: line charts, effective robustness, overlap with the training data.

Line charts use the CSS variables of the page (`--faint`, `--series-1` …). The others are also separate files, which
define the same colors for light and dark mode.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from clip_jax.evals.analysis.overlap import Overlap
from clip_jax.evals.analysis.robustness import LinearFit, expit, logit
from clip_jax.typing import Number

Points = Sequence[tuple[Number, Number]]
Span = tuple[Number, Number]

SERIES = 6  # number of series colors of the page
MAX_POINTS = 600  # of a line; a chart is 480 pixels wide


def ticks(low: Number, high: Number, about: int) -> list[float]:
    """Return about `about` round numbers, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def format_tick(value: Number) -> str:
    """Return a tick label: `0.25`, `1,500`, `20k`, `3e-05`."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e")
    if abs(value) >= 1e4:
        return next(
            f"{value / size:g}{unit}" for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= size
        )
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclasses.dataclass(frozen=True)
class _Axes:
    """A plot area: the spans of the data, and the area's edges in pixels."""

    x: Span
    y: Span
    left: Number
    right: Number
    top: Number
    bottom: Number

    def pixel(self, x: Number, y: Number) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * (self.right - self.left)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * (self.bottom - self.top)
        return round(self.left + across, 1), round(self.bottom - up, 1)

    def y_tick(self, y: Number, value: Number, stroke: str = "var(--faint)") -> str:
        """Return a horizontal grid line at `y`, labeled with `value`."""
        _, py = self.pixel(self.x[0], y)
        grid = _tag("line", x1=self.left, x2=self.right, y1=py, y2=py, stroke=stroke)
        return grid + _tag("text", format_tick(value), class_="y", x=self.left - 8, y=py + 4, text_anchor="end")

    def x_tick(self, x: Number, value: Number) -> str:
        """Return the label `value` below `x`."""
        px, _ = self.pixel(x, self.y[0])
        return _tag("text", format_tick(value), class_="x", x=px, y=self.bottom + 16, text_anchor="middle")


def _tag(name: str, body: str = "", **attributes: object) -> str:
    """Return an SVG element; the attributes `class_` and `text_anchor` are written `class` and `text-anchor`."""
    listed = "".join(f' {key.rstrip("_").replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{name}{listed}>{body}</{name}>" if body else f"<{name}{listed}/>"


def line_chart(series: Mapping[str, Points], title: str) -> str:
    """Return an SVG of named lines, with gaps at values that are not finite; '' without finite values."""

    def is_finite(point: tuple[Number, Number]) -> bool:
        return all(map(math.isfinite, point))

    finite = [point for points in series.values() for point in points if is_finite(point)]
    if not finite:
        return ""
    width, height = 480, 200
    x, y = ((min(values), max(values)) for values in zip(*finite, strict=True))
    x_ticks, y_ticks = ticks(*x, 5), ticks(*y, 4)
    axes = _Axes(x, (min(y_ticks), max(y_ticks)), left=52, right=width - 12, top=12, bottom=height - 26)
    parts = [axes.y_tick(value, value) for value in y_ticks]
    parts += [axes.x_tick(value, value) for value in x_ticks if x[0] <= value <= x[1]]
    for index, points in enumerate(series.values()):
        color = f"var(--series-{index % SERIES + 1})"
        for connected, run in itertools.groupby(points[:: max(1, -(-len(points) // MAX_POINTS))], is_finite):
            pixels = [axes.pixel(*point) for point in run] if connected else []
            if len(pixels) == 1:
                parts.append(_tag("circle", cx=pixels[0][0], cy=pixels[0][1], r=3, fill=color))
            elif pixels:
                line = " ".join(f"{px},{py}" for px, py in pixels)
                parts.append(_tag("polyline", points=line, fill="none", stroke=color, stroke_width=1.75))
    return _tag("svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=html.escape(title))


_STYLE = (
    ".chart{--paper:#fdfdfc;--ink:#1d1d1f;--soft:#6e6e73;--faint:#e6e6e9;--series-1:#3451d1;--series-2:#d9822b}"
    "@media(prefers-color-scheme:dark){.chart{--paper:#131316;--ink:#ececf0;--soft:#9a9aa3;--faint:#313138;"
    "--series-1:#8ea2ff;--series-2:#f0a860}}"
    ".chart text{font:11px system-ui,sans-serif;fill:var(--soft)}.chart .name{fill:var(--ink)}"
)


def _standalone(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return an SVG with its own style. `title` is for screen readers."""
    background = _tag("rect", width=width, height=height, fill="var(--paper)")
    attributes = {"class": "chart", "viewBox": f"0 0 {width} {height}", "role": "img", "aria_label": title}
    body = _tag("style", _STYLE) + background + "".join(parts)
    return _tag("svg", body, xmlns="http://www.w3.org/2000/svg", **attributes)


def _named_dots(axes: _Axes, dots: Iterable[tuple[str, Number, Number, str]], kind: str) -> list[str]:
    """Return a dot and a name for every (name, x, y, tooltip). Names that would overlap are moved down."""
    parts, free = [], 0.0
    placed = sorted((axes.pixel(x, y)[::-1], name, title) for name, x, y, title in dots)
    for (cy, cx), name, title in placed:
        free = max(cy + 4, free)
        x, anchor = (cx + 7, "start") if cx + 7 + _LETTER * len(name) < axes.right + 12 else (cx - 7, "end")
        tooltip = _tag("title", html.escape(title))
        parts.append(_tag("circle", tooltip, class_=kind, cx=cx, cy=cy, r=4, fill="var(--series-1)"))
        parts.append(_tag("text", html.escape(name), class_="name", x=x, y=f"{free:.1f}", text_anchor=anchor))
        free += _LINE_HEIGHT
    return parts


_ACCURACY_TICKS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
# Pixels: minimum distance of ticks, height of a line of text, width of a letter.
_TICK_GAP, _LINE_HEIGHT, _LETTER = 28, 12, 7


def robustness_chart(fit: LinearFit, points: Points, models: Mapping[str, tuple[Number, Number]]) -> str:
    """Draw accuracy under distribution shift against ImageNet accuracy on logit axes (Radford et al. 2021, figure 13).

    Args:
      fit: drawn as a line, with the ideal y = x.
      points: (ImageNet accuracy, accuracy under shift) of standard models, drawn as gray dots.
      models: the same by name. Accuracies of 0 or 1, which have no logit, raise ValueError.
    """
    all_points = [*points, *models.values()]
    if not all_points:
        raise ValueError("nothing to plot: pass (ImageNet accuracy, accuracy under shift) of standard models or models")
    width, height = 480, 360
    x_n, y_n = [logit(x) for x, _ in all_points], [logit(y) for _, y in all_points]
    # The y axis includes the range of x: the ideal line is always visible, and with it the robustness gap.
    axes = _Axes(_with_margin(x_n), _with_margin([*y_n, *x_n]), left=52, right=width - 12, top=12, bottom=height - 44)
    ideal = {"class_": "ideal", "stroke": "var(--soft)", "stroke_dasharray": "4 4"}
    fitted = {"class_": "fit", "stroke": "var(--series-2)", "stroke_width": 1.75}
    parts = [
        *_logit_grid(axes, height),
        _clipped_line(axes, 1.0, 0.0, **ideal),
        _clipped_line(axes, fit.slope, fit.intercept, **fitted),
    ]
    for row, (text, line) in enumerate((("ideal", ideal), (f"fit of {fit.n} standard models", fitted))):
        x, y = axes.left + 12, axes.top + 12 + 16 * row
        key = _tag("line", **line | {"class_": "key"}, x1=x, x2=x + 18, y1=y, y2=y)
        parts += [key, _tag("text", text, x=x + 24, y=y + 4)]
    for point in points:
        cx, cy = axes.pixel(*map(logit, point))
        parts.append(_tag("circle", class_="standard", cx=cx, cy=cy, r=3, fill="var(--soft)", fill_opacity=".6"))
    dots = []
    for name, (x, y) in models.items():
        above = 100 * fit.effective_robustness(x, y)
        dots.append((name, logit(x), logit(y), f"{name}: {above:+.1f} points of effective robustness"))
    title = "Accuracy under distribution shift against accuracy on ImageNet"
    return _standalone(width, height, title, [*parts, *_named_dots(axes, dots, "model")])


def _clipped_line(axes: _Axes, slope: float, intercept: float, **attributes: object) -> str:
    """Return the part of a line inside the axes, '' if there is none."""
    ends = [axes.x[0], axes.x[1]]
    if slope:
        crossings = sorted((y - intercept) / slope for y in axes.y)
        ends = [max(ends[0], crossings[0]), min(ends[1], crossings[1])]
    if ends[0] >= ends[1] or (not slope and not axes.y[0] <= intercept <= axes.y[1]):
        return ""
    (x1, y1), (x2, y2) = (axes.pixel(x, slope * x + intercept) for x in ends)
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def _logit_grid(axes: _Axes, height: int) -> list[str]:
    """Return grid lines, tick labels in percent, and the names of the axes."""
    parts = []
    for value in _logit_ticks(axes.y, (axes.bottom - axes.top) / _TICK_GAP):
        parts.append(axes.y_tick(logit(value), 100 * value))
    for value in _logit_ticks(axes.x, (axes.right - axes.left) / _TICK_GAP):
        x, _ = axes.pixel(logit(value), axes.y[0])
        parts.append(_tag("line", x1=x, x2=x, y1=axes.top, y2=axes.bottom, stroke="var(--faint)"))
        parts.append(axes.x_tick(logit(value), 100 * value))
    rotated = f"translate(14 {(axes.top + axes.bottom) / 2}) rotate(-90)"
    parts.append(_tag("text", "ImageNet (%)", x=(axes.left + axes.right) / 2, y=height - 8, text_anchor="middle"))
    return [*parts, _tag("text", "under shift (%)", transform=rotated, text_anchor="middle")]


def _with_margin(logits: Sequence[float]) -> Span:
    low, high = min(logits), max(logits)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _logit_ticks(span: Span, most: float) -> list[float]:
    """Return at most `most` round accuracies in a span of logits, from _ACCURACY_TICKS if three of them are inside."""
    low, high = expit(span[0]), expit(span[1])
    inside = [value for value in _ACCURACY_TICKS if low <= value <= high]
    if len(inside) < 3:
        inside = [value for value in ticks(low, high, 5) if low <= value <= high and 0 < value < 1]
    kept: list[float] = []
    for value in inside:
        if not kept or logit(value) - logit(kept[-1]) >= (span[1] - span[0]) / most:
            kept.append(value)
    return kept


_PANEL_WIDTH, _PANEL_HEIGHT = 480, 320  # pixels


class _Point(NamedTuple):
    """A circle with its interval. Units: x in percent, the others in points of accuracy. Marked ones have a name."""

    name: str
    x: Number
    y: Number
    low: Number
    high: Number
    marked: bool
    title: str


def overlap_chart(overlaps: Mapping[str, Overlap]) -> str:
    """Draw the effect of overlap on accuracy against the fraction of overlap (Radford et al. 2021, figure 17).

    Left panel: accuracy on overlapping minus on clean examples with its interval, for datasets with any overlap; marked
    where the interval excludes 0. Right panel: accuracy on all minus on clean examples; marked where significant after
    Bonferroni correction. The numbers are the tooltip of a circle.
    """
    if not overlaps:
        raise ValueError("nothing to plot: pass overlaps by dataset name, {'cifar10': analyze_overlap(…), …}")
    left, right = [], []
    for name, overlap in overlaps.items():
        title = (
            f"{name}: {overlap.overlapping:,} of {overlap.n:,} overlap ({overlap.fraction:.1%}); "
            f"accuracy {overlap.accuracy:.1%}, clean {overlap.accuracy_clean:.1%}, "
            f"overlapping {overlap.accuracy_overlapping:.1%}; corrected p {overlap.p_corrected:.2g}"
        )
        x, gain = 100 * overlap.fraction, 100 * overlap.gain
        if overlap.overlapping:
            low, high = (100 * end for end in overlap.interval)
            left.append(_Point(name, x, 100 * overlap.difference, low, high, low > 0 or high < 0, title))
        right.append(_Point(name, x, gain, gain, gain, overlap.significant, title))
    x_ticks = ticks(0, max(point.x for point in right), 5)
    panels = [
        _overlap_panel(left, x_ticks, "Accuracy on overlapping − on clean examples, points", 0),
        _overlap_panel(right, x_ticks, "Accuracy on all − on clean examples, points", _PANEL_WIDTH),
    ]
    return _standalone(2 * _PANEL_WIDTH, _PANEL_HEIGHT, "Accuracy by overlap with the training source", panels)


def _overlap_panel(points: Sequence[_Point], x_ticks: Sequence[Number], title: str, shift: int) -> str:
    """Draw one panel, `shift` pixels to the right."""
    y_ticks = ticks(min([0, *(p.low for p in points)]), max([0, *(p.high for p in points)]), 5)
    spans = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
    axes = _Axes(*spans, left=shift + 56, right=shift + _PANEL_WIDTH - 16, top=34, bottom=_PANEL_HEIGHT - 44)
    middle = (axes.left + axes.right) / 2
    parts = [_tag("text", title, class_="name", x=axes.left, y=axes.top - 16)]
    parts += [axes.y_tick(value, value, "var(--faint)" if value else "var(--soft)") for value in y_ticks]
    parts += [axes.x_tick(value, value) for value in x_ticks]
    parts.append(_tag("text", "Overlapping examples, %", x=middle, y=_PANEL_HEIGHT - 8, text_anchor="middle"))
    for point in points:
        (x, y), (_, low), (_, high) = (axes.pixel(point.x, value) for value in (point.y, point.low, point.high))
        color = "var(--series-1)" if point.marked else "var(--soft)"
        if low != high:
            parts.append(_tag("line", x1=x, x2=x, y1=low, y2=high, stroke=color))
        if not point.marked:
            tooltip = _tag("title", html.escape(point.title))
            parts.append(_tag("circle", tooltip, class_="plain", cx=x, cy=y, r=4, fill=color))
    marked = [(point.name, point.x, point.y, point.title) for point in points if point.marked]
    return "".join([*parts, *_named_dots(axes, marked, "marked")])
