"""Effective robustness: accuracy under distribution shift beyond what accuracy on ImageNet foretells.

Taori et al. 2020 (https://arxiv.org/abs/2007.00644) and Radford et al. 2021, section 3.3 and figures 13 and 14: over
standard models the logit of accuracy under shift is linear in the logit of accuracy on ImageNet. A model's effective
robustness is what it has above that line, as a difference of accuracies.

Accuracies are fractions. ImageNet-A, ImageNet-R and ObjectNet have a part of ImageNet's classes: to draw figure 13,
give as accuracy on ImageNet that over the same classes ("class subsampled"), averaged as the shifts are. Deviation:
without the bootstrapped band around the line.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax.evals.report.charts import LEFT, RIGHT, TOP, WIDTH, Number, Points, number, ticks

SHIFTS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet")
PAPER_SHIFTS = (*SHIFTS, "imagenet_vid", "youtube_bb")  # the two of videos are seldom measured
IMAGENET = "imagenet"

HEIGHT, BOTTOM = 360, 44  # room for the ticks' texts and the axis' name
TICKS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
TICK_GAP, TEXT_GAP, LETTER = 28, 12, 7  # px that a tick's text takes across, a line of text down, a letter across

Span = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """logit(accuracy under shift) = slope × logit(accuracy on ImageNet) + intercept, fitted to n standard models."""

    slope: float
    intercept: float
    n: int

    def predict(self, x: Number) -> float:
        """Return the accuracy under shift of a standard model whose accuracy on ImageNet is x."""
        return _expit(self.slope * _logit(x) + self.intercept)

    def effective_robustness(self, x: Number, y: Number) -> float:
        """Return y, the accuracy under shift, minus what x, that on ImageNet, foretells: 0.1 is ten points above.

        Raises: ValueError if y is no fraction, or x is 0, 1 or no fraction.
        """
        return _fraction(y) - self.predict(x)


def fit(points: Points) -> Baseline:
    """Fit the line to standard models' (accuracy on ImageNet, accuracy under shift), by least squares on logits.

    Raises: ValueError for accuracies of 0 or 1, which have no logit, and with fewer than two different x.
    """
    logits_n2 = np.array([(_logit(x), _logit(y)) for x, y in points]).reshape(-1, 2)
    if len(np.unique(logits_n2[:, 0])) < 2:
        raise ValueError(
            f"a line needs two models of different accuracy on ImageNet; got {len(points)} points: {list(points)[:3]}. "
            "Add standard models, such as ResNets of several sizes trained on ImageNet"
        )
    x_n, y_n = logits_n2.T
    from_mean_n = x_n - x_n.mean()
    slope = float(from_mean_n @ (y_n - y_n.mean()) / (from_mean_n @ from_mean_n))
    return Baseline(slope, float(y_n.mean() - slope * x_n.mean()), len(points))


def average_shift(accuracies: Mapping[str, Number], shifts: Sequence[str] = SHIFTS) -> float:
    """Return the mean accuracy over the shifts; what else `accuracies` holds isn't looked at.

    The paper's average is over PAPER_SHIFTS. Averages compare only over the same shifts, so that one that is missing is
    an error and not left out.

    Raises: ValueError with the names that are missing.
    """
    if missing := [shift for shift in shifts if shift not in accuracies]:
        raise ValueError(
            f"no accuracy for {', '.join(missing)}; got {', '.join(accuracies) or 'none'}. "
            f"Measure them, or average over fewer, for the model and its baselines alike: shifts={_having(accuracies)}"
        )
    if not shifts:
        raise ValueError(f"no shifts to average over; the default is {SHIFTS}")
    return sum(_fraction(accuracies[shift], shift) for shift in shifts) / len(shifts)


def robustness_gap(accuracies: Mapping[str, Number], shifts: Sequence[str] = SHIFTS) -> float:
    """Return accuracy on ImageNet, `accuracies['imagenet']`, minus the average under shift: 0 is ideal."""
    if IMAGENET not in accuracies:
        raise ValueError(f"no accuracy for {IMAGENET}; got {', '.join(accuracies) or 'none'}")
    return _fraction(accuracies[IMAGENET], IMAGENET) - average_shift(accuracies, shifts)


def summary(metrics: Mapping[str, float], baselines: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the average over SHIFTS, the gap to ImageNet and, beside standard models, the effective robustness.

    Keys: `robustness/shifts/{average,gap,effective}`. Empty unless zero-shot top-1 of all of them is there and finite.
    Accuracies of 0 or 1 have no logit, so there is no effective robustness then.
    """
    found = {name: metrics.get(f"zeroshot/{name}/top1", math.nan) for name in (IMAGENET, *SHIFTS)}
    if not all(map(math.isfinite, found.values())):
        return {}
    average = average_shift(found)
    result = {"average": average, "gap": robustness_gap(found)}
    if baselines and 0 < found[IMAGENET] < 1 and 0 < average < 1:
        result["effective"] = fit(list(baselines.values())).effective_robustness(found[IMAGENET], average)
    return {f"robustness/shifts/{name}": value for name, value in result.items()}


def read_points(path: str | os.PathLike[str], shifts: Sequence[str] = SHIFTS) -> dict[str, tuple[float, float]]:
    """Read standard models from a CSV file: by name (accuracy on ImageNet, average accuracy under the shifts).

    The columns are `model`, `imagenet` and one for each shift, in fractions; other columns are not looked at.

    Raises: ValueError with line and column for what is missing, a percentage, or a model named twice.
    """
    points = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        needed = ("model", IMAGENET, *shifts)
        if missing := [column for column in needed if column not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{path}: no column {', '.join(missing)}; its columns are {', '.join(reader.fieldnames or ())}. "
                f"The first line should be: {','.join(needed)}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{where}: more cells than columns, {row[None]}; fractions have a point, no comma")
            if row["model"] in points:
                raise ValueError(f"{where}: {row['model']!r} is there already; a standard model counts once")
            accuracies = {column: _parsed(row[column], f"{where}, {column}") for column in needed[1:]}
            points[row["model"]] = accuracies[IMAGENET], average_shift(accuracies, shifts)
    return points


def _having(accuracies: Mapping[str, Number]) -> tuple[str, ...]:
    return tuple(shift for shift in PAPER_SHIFTS if shift in accuracies)


def _parsed(cell: str | None, where: str) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        raise ValueError(f"{where}: {cell!r} is no fraction like 0.762") from None
    return _fraction(value, where)


def _fraction(value: Number, where: str = "accuracy") -> float:
    if not 0 <= value <= 1:
        hint = f"; as a fraction {value} % is {value / 100:.6g}" if 1 < value <= 100 else ""
        raise ValueError(f"{where}: {value} is no fraction from 0 to 1{hint}")
    return float(value)


def _logit(value: Number) -> float:
    if _fraction(value) in (0, 1):
        raise ValueError(
            f"accuracy {value} has no logit: give fractions strictly between 0 and 1, leave the model out, or for "
            "`right` of n examples take (right + 0.5) / (n + 1)"
        )
    return math.log(value) - math.log1p(-value)


def _expit(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


# ----------------------------------------------------------------------------------------------------- the plot

# The report's colours (report.html.jinja), for an SVG that has no page around it.
STYLE = (
    ".robustness{--paper:#fdfdfc;--ink:#1d1d1f;--soft:#6e6e73;--faint:#e6e6e9;--series-1:#3451d1;--series-2:#d9822b}"
    "@media(prefers-color-scheme:dark){.robustness{--paper:#131316;--ink:#ececf0;--soft:#9a9aa3;--faint:#313138;"
    "--series-1:#8ea2ff;--series-2:#f0a860}}"
    ".robustness text{font:11px system-ui,sans-serif;fill:var(--soft)}.robustness .name{fill:var(--ink)}"
)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Logit-scaled axes: what they span, in logits, and where that is in the picture."""

    x: Span
    y: Span

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of two logits."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    def line(self, slope: float, intercept: float, name: str, stroke: str) -> str:
        """Return the part of a line that lies inside the axes, '' if none does."""
        ends = [self.x[0], self.x[1]]
        if slope:
            crossings = sorted((y - intercept) / slope for y in self.y)
            ends = [max(ends[0], crossings[0]), min(ends[1], crossings[1])]
        if ends[0] >= ends[1] or (not slope and not self.y[0] <= intercept <= self.y[1]):
            return ""
        (x1, y1), (x2, y2) = (self.place(x, slope * x + intercept) for x in ends)
        return f'<line class="{name}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {stroke}/>'


def plot(baseline: Baseline, points: Points, models: Mapping[str, tuple[Number, Number]]) -> str:
    """Draw accuracy under shift against accuracy on ImageNet as in figure 13: the models by name, the standard ones,
    their line, and the ideal y = x, on logit-scaled axes.

    Returns: a stand-alone SVG that follows the reader's light or dark mode.

    Raises: ValueError for accuracies of 0 or 1, which have no logit, and without any point or model.
    """
    everything = [*points, *models.values()]
    if not everything:
        raise ValueError(
            "nothing to plot: give standard models, (accuracy on ImageNet, under shift), or models by name"
        )
    x_n, y_n = [_logit(x) for x, _ in everything], [_logit(y) for _, y in everything]
    axes = _Axes(_span(x_n), _span([*y_n, *x_n]))  # the ideal is always in sight: the gap is what figure 13 shows
    ideal = 'stroke="var(--soft)" stroke-dasharray="4 4"'
    fitted = 'stroke="var(--series-2)" stroke-width="1.75"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="robustness" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Accuracy under distribution shift against accuracy on ImageNet"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>',
        *_grid(axes),
        axes.line(1.0, 0.0, "ideal", ideal),
        axes.line(baseline.slope, baseline.intercept, "fit", fitted),
    ]
    for row, (text, stroke) in enumerate((("ideal", ideal), (f"fit of {baseline.n} standard models", fitted))):
        x, y = LEFT + 12, TOP + 12 + 16 * row
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" {stroke}/>')
        parts.append(f'<text x="{x + 24}" y="{y + 4}">{text}</text>')
    for x, y in points:
        cx, cy = axes.place(_logit(x), _logit(y))
        parts.append(f'<circle class="standard" cx="{cx}" cy="{cy}" r="3" fill="var(--soft)" fill-opacity=".6"/>')
    return "".join([*parts, *_marks(axes, baseline, models), "</svg>"])


def _grid(axes: _Axes) -> list[str]:
    parts = []
    for value in _ticks(axes.y, (HEIGHT - TOP - BOTTOM) / TICK_GAP):
        _, y = axes.place(axes.x[0], _logit(value))
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="var(--faint)"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{number(100 * value)}</text>')
    for value in _ticks(axes.x, (WIDTH - LEFT - RIGHT) / TICK_GAP):
        x, _ = axes.place(_logit(value), axes.y[0])
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--faint)"/>')
        parts.append(
            f'<text class="x" x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(100 * value)}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">ImageNet (%)</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">under shift (%)</text>')
    return parts


def _marks(axes: _Axes, baseline: Baseline, models: Mapping[str, tuple[Number, Number]]) -> list[str]:
    """Return a dot and a name for every model, names moved down where they would lie on one another."""
    parts, free = [], 0.0
    placed = sorted((*axes.place(_logit(x), _logit(y)), name) for name, (x, y) in models.items())
    for cx, cy, name in sorted(placed, key=lambda mark: mark[1]):
        x, y = models[name]
        above = f"{100 * baseline.effective_robustness(x, y):+.1f} points of effective robustness"
        text, free = html.escape(name), max(cy + 4, free)
        beside, anchor = (cx + 7, "start") if cx + 7 + LETTER * len(name) < WIDTH else (cx - 7, "end")
        parts.append(
            f'<circle class="model" cx="{cx}" cy="{cy}" r="4" fill="var(--series-1)">'
            f"<title>{text}: {above}</title></circle>"
            f'<text class="name" x="{beside:.1f}" y="{free:.1f}" text-anchor="{anchor}">{text}</text>'
        )
        free += TEXT_GAP
    return parts


def _span(logits: Sequence[float]) -> Span:
    low, high = min(logits), max(logits)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(span: Span, most: float) -> list[float]:
    """Return round accuracies in the span, far enough apart for their texts, the usual ones where three fit."""
    low, high = _expit(span[0]), _expit(span[1])
    inside = [value for value in TICKS if low <= value <= high]
    if len(inside) < 3:
        inside = [value for value in ticks(low, high, 5) if low <= value <= high and 0 < value < 1]
    kept: list[float] = []
    for value in inside:
        if not kept or _logit(value) - _logit(kept[-1]) >= (span[1] - span[0]) / most:
            kept.append(value)
    return kept
