"""What the number of an evaluation set is: from scores and targets to one fraction, and how sure that fraction is.

The definitions are scikit-learn's (https://scikit-learn.org/stable/modules/model_evaluation.html), the 2007 devkit's
for Pascal VOC and WILDS' for iWildCam, with the deviations that keep a broken model from looking good:

- of two classes whose scores lie within `Predictions.tie` neither stands before the other, and the right one loses;
- of two examples within it the negative stands before the positive, but for the ROC AUC, which as everywhere counts
  half of such a pair: constant scores reach what chance reaches and no more;
- a score that is not finite is the worst that it can be: last for what is right, first for what is wrong;
- what no model can get wrong (the best five of five classes, a class that every picture has) is no measurement.

Where scores are finite and further apart than that, the numbers are theirs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Integer

from clip_jax.evals.ranking import BLOCK_SCORES, TIE

LEVEL, RESAMPLES = 0.95, 1000


class Undefined(ValueError):
    """A metric that these examples can't have, whatever the model: AUC without negatives, say."""


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """A test set as a model scored it: all that a metric may look at.

    scores: higher is likelier; of every class, or for a yes or no question of yes alone.
    targets: the one class that is right, or for several at once (multi-label) whether each is.
    groups: for the worst group: which one an example is of; negative for none (FMoW's region `Other`).
    known_ranks: what `ranks` returns, where something surer than these scores has told it (`ranking.ranks`).
    ignored: with multi-label targets: neither right nor wrong (VOC's difficult objects, a padded candidate).
    tie: scores closer than this are equal. The default is that of cosines, whose last bits depend on the place in a
        matrix product; scale it with them (100 × for logits at CLIP's temperature).
    """

    scores: Float[np.ndarray, "n Q"] | Float[np.ndarray, "n"]
    targets: Integer[np.ndarray, "n"] | Bool[np.ndarray, "n Q"]
    groups: Integer[np.ndarray, "n"] | None = None
    ignored: Bool[np.ndarray, "n Q"] | None = None
    tie: float = TIE
    known_ranks: Int64[np.ndarray, "n"] | None = None

    def __post_init__(self) -> None:
        n, shape = len(self.scores), self.scores.shape
        if n == 0:
            raise ValueError("no examples: a metric needs at least one")
        if self.targets.shape not in ((n,), shape):
            raise ValueError(f"targets{list(self.targets.shape)} don't belong to scores{list(shape)}: [n] or [n Q]")
        if self.groups is not None and self.groups.shape != (n,):
            raise ValueError(f"groups{list(self.groups.shape)} for {n} examples: one group each, int[{n}]")
        if self.ignored is not None and not self.ignored.shape == self.targets.shape == shape:
            raise ValueError(f"ignored{list(self.ignored.shape)} goes with multi-label targets bool{list(shape)}")
        if self.targets.dtype != bool:
            classes = shape[1] if len(shape) == 2 else 2
            low, high = self.targets.min(), self.targets.max()
            if low < 0 or high >= classes:
                raise ValueError(f"targets from {low} to {high}, but there are {classes} classes: 0 to {classes - 1}")
        if not self.tie >= 0:
            raise ValueError(f"tie={self.tie}: a distance of scores, at least 0; {TIE} suits cosines")

    def take(self, rows: Integer[np.ndarray, "m"]) -> Predictions:
        """Return these examples only, repeated where rows are; ranks that are known already stay known."""
        taken = copy.copy(self)
        vars(taken).update({name: x[rows] for name, x in vars(self).items() if isinstance(x, np.ndarray)})
        return taken

    @functools.cached_property
    def ranks(self) -> Int64[np.ndarray, "n"]:
        """How many wrong classes stand before the right one: all of them where that has no finite score."""
        if self.known_ranks is not None:
            return self.known_ranks
        ranks_n = np.empty(len(self.scores), np.int64)
        for rows, scores_nQ in self._blocks():
            right_n1 = np.take_along_axis(scores_nQ, self.targets[rows, None], 1)
            surely_worse_nQ = scores_nQ < right_n1 - self.tie  # False for NaN, and for the right one itself
            ranks_n[rows] = (~surely_worse_nQ).sum(1) - 1
        return ranks_n

    @functools.cached_property
    def named(self) -> Int64[np.ndarray, "n"]:
        """The class that the model names: the right one if it stands alone at the top, else the first wrong one."""
        named_n = self.targets.astype(np.int64)
        for rows, scores_nQ in self._blocks():
            np.put_along_axis(scores_nQ, self.targets[rows, None], -np.inf, 1)
            first_wrong_n = scores_nQ.argmax(1)  # NaN is NumPy's highest
            named_n[rows] = np.where(self.ranks[rows] < 1, named_n[rows], first_wrong_n)
        return named_n

    def _blocks(self) -> Iterator[tuple[slice, Float64[np.ndarray, "m Q"]]]:
        """Yield rows and their scores, NaN for those that are not finite: memory doesn't grow with the examples."""
        if self.scores.ndim != 2 or self.targets.ndim != 1:
            raise ValueError(
                f"needs scores float[n Q] and one right class each, int[n]; got scores{list(self.scores.shape)} and "
                f"targets{list(self.targets.shape)}. For several classes at once take map, map_11_points or jaccard"
            )
        n, classes = self.scores.shape
        step = max(1, BLOCK_SCORES // classes)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            scores_nQ = self.scores[rows].astype(np.float64)
            yield rows, np.where(np.isfinite(scores_nQ), scores_nQ, np.nan)


# ------------------------------------------------------------------------------------------ one class is right


def hits(scored: Predictions, k: int = 1) -> Bool[np.ndarray, "n"]:
    """Return for each example whether its class is among the first k.

    Raises: Undefined where there are k classes or fewer, since then it always is.
    """
    ranks_n = scored.ranks
    if k >= (classes := scored.scores.shape[1]):
        raise Undefined(f"the right one of {classes} classes is always among the first {k}; take k below {classes}")
    return ranks_n < k


def accuracy(scored: Predictions, k: int = 1) -> float:
    """Return the share of examples whose class is among the first k."""
    return float(hits(scored, k).mean())


def mean_top1_top5(scored: Predictions) -> float:
    """Return the mean of top-1 and top-5 accuracy, the number of Kinetics-700 (Radford et al. 2021, table 9)."""
    return (accuracy(scored) + accuracy(scored, 5)) / 2


def mean_per_class(scored: Predictions) -> float:
    """Return the recall's mean over the classes that have examples: scikit-learn's balanced_accuracy_score."""
    return float(_means(hits(scored), scored.targets).mean())


def macro_f1(scored: Predictions) -> float:
    """Return the F1's mean over the classes that have examples: the F1-macro_all of iWildCam.

    As in WILDS, f1_score(average='macro', labels=unique(y_true)). scikit-learn's default takes in the classes that
    are only ever named, at 0 each, and so makes the number depend on how many those are.
    """
    classes = scored.scores.shape[-1]
    hits_Q = np.bincount(scored.targets, weights=hits(scored), minlength=classes)
    there_Q = np.bincount(scored.targets, minlength=classes)
    named_Q = np.bincount(scored.named, minlength=classes)
    present_Q = there_Q > 0
    return float(np.mean(2 * hits_Q[present_Q] / (there_Q + named_Q)[present_Q]))


def worst_group(scored: Predictions, k: int = 1) -> float:
    """Return the lowest of the groups' top-k accuracies: FMoW and GeoDE by region, Dollar Street's top 5 by income.

    Raises: ValueError without groups.
    """
    if scored.groups is None:
        raise ValueError("the worst group needs groups: Predictions(scores, targets, groups=int[n])")
    counted_n = scored.groups >= 0
    if not counted_n.any():
        raise Undefined("no example is in a group: all of `groups` is negative")
    return float(_means(hits(scored, k)[counted_n], scored.groups[counted_n]).min())


def _means(values_n: Bool[np.ndarray, "n"], parts_n: Integer[np.ndarray, "n"]) -> Float64[np.ndarray, "m"]:
    """Return the mean of each part that has examples."""
    _, part_n, sizes = np.unique(parts_n, return_inverse=True, return_counts=True)
    return np.bincount(part_n, weights=values_n) / sizes


# ------------------------------------------------------------------------------------------------ yes or no


def roc_auc(scored: Predictions) -> float:
    """Return how often a positive scores above a negative: Hateful Memes. Scores of two classes are subtracted.

    Raises: Undefined where all examples are of one class.
    """
    scores, targets = scored.scores, scored.targets
    if targets.ndim != 1 or scores.shape[1:] not in ((), (2,)):
        raise ValueError(
            f"ROC AUC is of two classes: scores float[n] or float[n 2] and targets int[n], 0 or 1; got "
            f"scores{list(scores.shape)}, targets{list(targets.shape)}"
        )
    with np.errstate(invalid="ignore"):  # inf - inf
        yes_n = scores.astype(np.float64) if scores.ndim == 1 else np.diff(scores.astype(np.float64))[:, 0]
    positive_n, finite_n = targets == 1, np.isfinite(yes_n)
    if positive_n.all() or not positive_n.any():
        raise Undefined(
            f"ROC AUC compares positives with negatives, but all {len(targets)} targets are {targets[0]}: "
            "take a part of the test set that has both, or accuracy"
        )
    above_P = np.where(finite_n, yes_n, -np.inf)[positive_n]
    negatives = np.sort(np.where(finite_n, yes_n, np.inf)[~positive_n])
    below_P = np.searchsorted(negatives, above_P - scored.tie, "left")
    not_above_P = np.searchsorted(negatives, above_P + scored.tie, "right")
    return float(np.mean(below_P + not_above_P) / 2 / len(negatives))


# ----------------------------------------------------------------------------------- several classes are right


def mean_average_precision(scored: Predictions) -> float:
    """Return the mean over classes of scikit-learn's average_precision_score: each picture that has the class counts
    with the precision among those scored no lower.

    Classes without positives or without negatives are left out (CLIP_benchmark counts the first as 0).
    """
    return _mean_over_columns(_average_precision, *_multi(scored))


def map_11_points(scored: Predictions) -> float:
    """Return the mean average precision of Pascal VOC 2007 (Everingham et al. 2010, section 4.2).

    A class's is the mean, over recalls of 0, 0.1 … 1, of the highest precision at that recall or a higher one.
    Differs from the devkit in that the order of equal scores doesn't matter. Mark difficult objects as `ignored`.
    """
    return _mean_over_columns(_average_precision_11_points, *_multi(scored))


def jaccard(scored: Predictions) -> float:
    """Return the mean over examples of the Jaccard index between what is right and as many candidates of the highest
    scores: WinoGAViL's (Bitton et al. 2022). Rows of fewer candidates than others end with `ignored` ones.
    """
    scores_nQ, targets_nQ, counted_nQ, tie = _multi(scored)
    return _mean_over_columns(_jaccard, scores_nQ.T, targets_nQ.T, counted_nQ.T, tie)


def _average_precision(found: Int64[np.ndarray, "m"], before: Int64[np.ndarray, "m"], positives: int) -> float:
    return float(np.sum(found / (found + before)) / positives)


def _average_precision_11_points(
    found: Int64[np.ndarray, "m"], before: Int64[np.ndarray, "m"], positives: int
) -> float:
    precisions = found / (found + before)
    # In integers: a recall of 3/10 is below 3 × 0.1 in floating point, and its precision would be lost.
    return float(np.mean([precisions[10 * found >= tenths * positives].max(initial=0) for tenths in range(11)]))


def _jaccard(found: Int64[np.ndarray, "m"], before: Int64[np.ndarray, "m"], positives: int) -> float:
    chosen = int(np.sum(found + before <= positives))
    return chosen / (2 * positives - chosen)


def _multi(
    scored: Predictions,
) -> tuple[Float64[np.ndarray, "n Q"], Bool[np.ndarray, "n Q"], Bool[np.ndarray, "n Q"], float]:
    """Return the scores, what is right, what counts, and the tie."""
    if scored.scores.ndim != 2 or scored.targets.dtype != bool:
        raise ValueError(
            f"needs scores float[n Q] and targets bool[n Q], several right at once; got "
            f"scores{list(scored.scores.shape)}, targets {scored.targets.dtype}{list(scored.targets.shape)}. "
            "For one class each: targets[:, None] == np.arange(Q)"
        )
    counted_nQ = np.ones(scored.targets.shape, bool) if scored.ignored is None else ~scored.ignored
    return scored.scores.astype(np.float64), scored.targets, counted_nQ, scored.tie


def _mean_over_columns(
    metric: Callable[[np.ndarray, np.ndarray, int], float],
    scores: Float64[np.ndarray, "N M"],
    targets: Bool[np.ndarray, "N M"],
    counted: Bool[np.ndarray, "N M"],
    tie: float,
) -> float:
    """Return the mean of `metric` over the columns that have both a positive and a negative.

    It gets two arrays with an entry for every positive with a finite score (how many positives score as high, and how
    many negatives are not surely lower) and the number of positives, those included that have no finite score.
    """
    values = []
    for column in range(scores.shape[1]):
        rows = counted[:, column]
        score, positive = scores[rows, column], targets[rows, column]
        if positive.all() or not positive.any():
            continue
        finite = np.isfinite(score)
        right = np.sort(score[positive & finite])
        wrong = np.sort(np.where(finite, score, np.inf)[~positive])
        found = len(right) - np.searchsorted(right, right, "left")
        before = len(wrong) - np.searchsorted(wrong, right - tie, "left")
        values.append(metric(found, before, int(positive.sum())))
    if not values:
        raise Undefined("nothing to tell apart: no class (or example) has both a positive and a negative")
    return float(np.mean(values))


Metric = Callable[[Predictions], float]
METRICS: dict[str, Metric] = {
    "top1": accuracy,
    "top5": functools.partial(accuracy, k=5),
    "mean_top1_top5": mean_top1_top5,
    "mean_per_class": mean_per_class,
    "macro_f1": macro_f1,
    "worst_group_top1": worst_group,
    "worst_group_top5": functools.partial(worst_group, k=5),
    "roc_auc": roc_auc,
    "map": mean_average_precision,
    "map_11_points": map_11_points,
    "jaccard": jaccard,
}


# --------------------------------------------------------------------------------------------- how sure it is


class Interval(NamedTuple):
    """Where a metric of other examples from the same source would lie, at a level such as 95 %."""

    low: float
    high: float


def bootstrap_interval(
    values_n: Float[np.ndarray, "n"] | Bool[np.ndarray, "n"],
    *,
    strata_n: Integer[np.ndarray, "n"] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of a mean, e.g. of `hits(scored)`; with strata of the mean of their means.

    With `strata_n=targets`, mean per class: examples are drawn within each class. Exact and cheap: how often each
    distinct value is drawn is multinomial, so that hits take one binomial number per resample, not n. All values
    equal, as for n = 1, give an interval of no width, which says nothing: see `exact_interval`.
    """
    if len(values_n) == 0 or not np.isfinite(values_n).all():
        raise ValueError("needs at least one value, all finite: count what is not as a miss before, don't drop it")
    rng = np.random.default_rng(seed)
    strata_n = np.zeros(len(values_n), np.int64) if strata_n is None else strata_n
    strata = np.unique(strata_n)
    means = np.zeros(resamples)
    for stratum in strata:
        values, counts = np.unique(values_n[strata_n == stratum].astype(np.float64), return_counts=True)
        size = int(counts.sum())
        step = max(1, BLOCK_SCORES // len(values))  # resamples held at a time
        for start in range(0, resamples, step):
            block = slice(start, min(start + step, resamples))
            drawn = rng.multinomial(size, counts / size, block.stop - block.start)
            means[block] += drawn @ values / size
    return _percentiles(means / len(strata), level)


def interval_of_mean(values_n: Float[np.ndarray, "n"] | Bool[np.ndarray, "n"]) -> Interval:
    """Return the bootstrap's interval of a mean of fractions, and the exact one where all are 0 or all are 1."""
    if values_n.min() == values_n.max() and values_n[0] in (0, 1):
        return exact_interval(int(values_n.sum()), len(values_n))
    return bootstrap_interval(values_n)


def interval_of(name: str, scored: Predictions) -> Interval:
    """Return the interval of a metric of METRICS by the bootstrap, by the cheapest way that gives it."""
    if name in ("top1", "top5"):
        return interval_of_mean(hits(scored, 1 if name == "top1" else 5))
    if name == "mean_per_class":
        right_n = hits(scored)
        return bootstrap_interval(right_n, strata_n=scored.targets) if right_n.std() else interval_of_mean(right_n)
    return bootstrap_metric(METRICS[name], scored)


def bootstrap_metric(
    metric: Metric,
    scored: Predictions,
    *,
    strata_n: Integer[np.ndarray, "n"] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of any metric, computed anew for examples drawn with replacement.

    With strata, drawn within each: the number of each class stays. Resamples in which the metric is undefined (no
    negative was drawn) are left out. A minimum over groups lies lower in resamples than in the set itself.

    Raises: what the metric raises for the set itself.
    """
    metric(scored)  # an error here is the set's, not a resample's; and ranks are known from now on
    rng = np.random.default_rng(seed)
    strata_n = np.zeros(len(scored.scores), np.int64) if strata_n is None else strata_n
    parts = [np.flatnonzero(strata_n == stratum) for stratum in np.unique(strata_n)]
    values = []
    for _ in range(resamples):
        rows = np.concatenate([rng.choice(part, len(part)) for part in parts])
        try:
            values.append(metric(scored.take(rows)))
        except Undefined:
            continue
    if not values:
        raise Undefined(f"undefined in all of {resamples} resamples of {len(scored.scores)} examples: too few")
    return _percentiles(np.array(values), level)


def exact_interval(right: int, n: int, *, level: float = LEVEL) -> Interval:
    """Return the exact interval of an accuracy, `right` of n (Clopper and Pearson 1934), by bisection.

    Never too narrow, so that 1 of 1 says 0.025 to 1; elsewhere wider than the bootstrap's.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} right of {n}: needs 0 ≤ right ≤ n and n ≥ 1")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])

    def lowest(right: int) -> float:
        """The probability of a hit at which `right` or more are only just as rare as the level allows."""
        i = np.arange(right, n + 1)
        log_ways = log_factorial[n] - log_factorial[i] - log_factorial[n - i]
        low, high = 0.0, right / n
        for _ in range(60 if right else 0):
            p = (low + high) / 2
            tail = np.exp(log_ways + i * np.log(p) + (n - i) * np.log1p(-p)).sum()
            low, high = (p, high) if tail < (1 - level) / 2 else (low, p)
        return high

    return Interval(lowest(right), 1 - lowest(n - right))


def _percentiles(values: Float64[np.ndarray, "m"], level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is a fraction between 0 and 1, such as {LEVEL}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
