"""How much of an evaluation set's accuracy comes from pictures that the model was trained on.

    distances, rows = nearest_hash(hash_pictures(eval_pictures), blocks)        # clip_jax.evals.analysis.duplicates
    overlap = analyse(hits(scored), distances <= MAX_DISTANCE, tests=len(names))

Source: Radford et al. 2021, section 5 and figure 17. It splits the examples in those with a near-duplicate in the
training source and the others, the clean ones, and asks two questions: how much lower is the accuracy of the clean ones
than of all (`gain`), and would as many overlapping ones be right if they were as easy as the clean ones (`p_value`)?

What it can't say: near-duplicates may be harder or easier by themselves (the paper finds Kinetics' to be black frames),
the accuracy of the clean ones counts as known without error, and a detector that misses some leaves them among them.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from clip_jax.evals.metrics import Interval, Undefined, exact_interval
from clip_jax.evals.report.charts import Number, number, ticks

LEVEL = 0.995  # of the interval, as the paper's
ALPHA = 0.05  # significant: a corrected p-value below this


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The accuracy of an evaluation set, and of its parts; NaN for the overlapping part where it has no example.

    n, overlapping: numbers of examples.
    interval: of accuracy_overlapping - accuracy_clean, at 99.5 % (Clopper and Pearson's, of the first).
    p_value: of a one-sided exact binomial test.
    p_corrected: after Bonferroni, over all evaluation sets that were looked at.
    """

    n: int
    overlapping: int
    accuracy: float
    accuracy_clean: float
    accuracy_overlapping: float
    interval: Interval
    p_value: float
    p_corrected: float

    @property
    def share(self) -> float:
        """The share of examples that overlap."""
        return self.overlapping / self.n

    @property
    def gain(self) -> float:
        """What the overlap adds to the accuracy of the whole set: all - clean."""
        return self.accuracy - self.accuracy_clean

    @property
    def difference(self) -> float:
        """How much more often overlapping ones are right: overlapping - clean."""
        return self.accuracy_overlapping - self.accuracy_clean

    @property
    def significant(self) -> bool:
        """Whether the overlap inflates the accuracy: p_corrected < 0.05."""
        return self.p_corrected < ALPHA


def analyse(hits_n: Bool[np.ndarray, "n"], overlapping_n: Bool[np.ndarray, "n"], tests: int = 1) -> Overlap:
    """Compare the examples that have a near-duplicate in the training source with those that have none.

    hits_n: which examples are right. overlapping_n: which have one. tests: how many evaluation sets are looked at; the
    p-value is multiplied by it. Without any overlap p is 1 and the gain 0.

    Raises: ValueError for no examples or arrays of unlike lengths; Undefined where all examples overlap.
    """
    n, overlapping = len(hits_n), int(np.sum(overlapping_n))
    if hits_n.dtype != bool or overlapping_n.dtype != bool or hits_n.shape != overlapping_n.shape or not n:
        raise ValueError(
            f"got hits {hits_n.dtype}{list(hits_n.shape)} and overlapping {overlapping_n.dtype}"
            f"{list(overlapping_n.shape)}; expected bool[n] twice, n ≥ 1, such as hits(scored) and distances <= 8"
        )
    if tests < 1:
        raise ValueError(f"tests={tests}: the number of evaluation sets that are looked at, 1 or more")
    if overlapping == n:
        raise Undefined(
            f"all {n} examples overlap: there is no clean one to compare with. If that is a surprise, the detector's "
            "threshold is too loose"
        )
    right, clean = int(hits_n[overlapping_n].sum()), float(hits_n[~overlapping_n].mean())
    if overlapping:
        low, high = exact_interval(right, overlapping, level=LEVEL)
        p_value = binomial_p_value(right, overlapping, clean)
    else:
        low, high, p_value = math.nan, math.nan, 1.0
    return Overlap(
        n=n,
        overlapping=overlapping,
        accuracy=float(hits_n.mean()),
        accuracy_clean=clean,
        accuracy_overlapping=right / overlapping if overlapping else math.nan,
        interval=Interval(low - clean, high - clean),
        p_value=p_value,
        p_corrected=min(1.0, p_value * tests),
    )


def binomial_p_value(right: int, n: int, chance: float) -> float:
    """Return the probability that `right` or more of n are right if each is with `chance`: exact, one-sided.

    One-sided as in the paper: the question is whether the overlap inflates the accuracy, not whether it differs.
    """
    if not 0 <= right <= n or not 0 <= chance <= 1:
        raise ValueError(f"{right} right of {n} at a chance of {chance}: needs 0 ≤ right ≤ n and 0 ≤ chance ≤ 1")
    if right == 0 or chance == 1:
        return 1.0
    if chance == 0:
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    i = np.arange(right, n + 1)
    log_ways = log_factorial[n] - log_factorial[i] - log_factorial[n - i]
    return min(1.0, float(np.exp(log_ways + i * np.log(chance) + (n - i) * np.log1p(-chance)).sum()))


# ------------------------------------------------------------------------------------------------ the paper's plot

_WIDTH, _HEIGHT = 480, 320  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 34, 44
# The report's colours, as classes: SVG viewers that know no CSS variables show the light ones.
_STYLE = """
.overlap text { font: 12px system-ui, sans-serif; fill: #6e6e73 } .overlap .name { fill: #1d1d1f }
.overlap .grid { stroke: #e6e6e9 } .overlap .zero { stroke: #6e6e73 } .overlap .plain { fill: #5b6472; stroke: #5b6472 }
.overlap .marked { fill: #3451d1; stroke: #3451d1 }
@media (prefers-color-scheme: dark) {
.overlap text { fill: #9a9aa3 } .overlap .name { fill: #ececf0 }
.overlap .grid { stroke: #313138 } .overlap .zero { stroke: #9a9aa3 } .overlap .plain { fill: #a3acb9; stroke: #a3acb9 }
.overlap .marked { fill: #8ea2ff; stroke: #8ea2ff } }
"""


class _Point(NamedTuple):
    """A circle with its interval, in percent and in points of accuracy; `marked` ones carry their name."""

    name: str
    x: Number
    y: Number
    low: Number
    high: Number
    marked: bool
    words: str


def plot(overlaps: Mapping[str, Overlap]) -> str:
    """Return the paper's figure 17 as an SVG of its own: by the share of overlap, what it changes, in points.

    Left: overlapping - clean with its interval, of sets that have any overlap; marked where it excludes 0. Right: all -
    clean; marked where significant after Bonferroni. A circle says its numbers when pointed at.

    Raises: ValueError for no overlaps.
    """
    if not overlaps:
        raise ValueError("nothing to plot: give overlaps by the name of the evaluation set, {'cifar10': analyse(…), …}")
    left, right = [], []
    for name, overlap in overlaps.items():
        x, gain, words = 100 * overlap.share, 100 * overlap.gain, _words(name, overlap)
        if overlap.overlapping:
            low, high = (100 * end for end in overlap.interval)
            left.append(_Point(name, x, 100 * overlap.difference, low, high, low > 0 or high < 0, words))
        right.append(_Point(name, x, gain, gain, gain, overlap.significant, words))
    x_ticks = ticks(0, max(point.x for point in right), 5)
    panels = [
        _panel(left, x_ticks, "Accuracy on overlapping − on clean examples, points", 0),
        _panel(right, x_ticks, "Accuracy on all − on clean examples, points", _WIDTH),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDTH} {_HEIGHT}" class="overlap" role="img" '
        f'aria-label="Accuracy by overlap with the training source"><style>{_STYLE}</style>{"".join(panels)}</svg>'
    )


def _panel(points: Sequence[_Point], x_ticks: Sequence[Number], title: str, shift: int) -> str:
    """Draw one panel, `shift` px to the right: the grid, then the intervals, the circles, and names of marked ones."""
    y_ticks = ticks(min([0, *(p.low for p in points)]), max([0, *(p.high for p in points)]), 5)

    def place(x: Number, y: Number) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return round(shift + _LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    left, right, middle = shift + _LEFT, shift + _WIDTH - _RIGHT, shift + (_LEFT + _WIDTH - _RIGHT) / 2
    parts = [f'<text class="name" x="{left}" y="{_TOP - 16}">{title}</text>']
    for value in y_ticks:
        _, y = place(0, value)
        grid = "grid" if value else "zero"
        parts.append(f'<line class="{grid}" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        x, _ = place(value, 0)
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">Overlapping examples, %</text>')
    for point in sorted(points, key=lambda point: point.marked):  # marked ones on top
        (x, y), (_, low), (_, high) = place(point.x, point.y), place(point.x, point.low), place(point.x, point.high)
        kind = "marked" if point.marked else "plain"
        if low != high:
            parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>')
        title = f"<title>{html.escape(point.words)}</title>"
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="4">{title}</circle>')
        if point.marked:
            side, anchor = (8, "start") if x < middle else (-8, "end")
            name = html.escape(point.name)
            parts.append(f'<text class="name" x="{x + side}" y="{y - 6}" text-anchor="{anchor}">{name}</text>')
    return "".join(parts)


def _words(name: str, overlap: Overlap) -> str:
    return (
        f"{name}: {overlap.overlapping:,} of {overlap.n:,} overlap ({overlap.share:.1%}); "
        f"accuracy {overlap.accuracy:.1%}, clean {overlap.accuracy_clean:.1%}, "
        f"overlapping {overlap.accuracy_overlapping:.1%}; corrected p {overlap.p_corrected:.2g}"
    )
