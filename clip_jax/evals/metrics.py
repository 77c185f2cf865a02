"""Metrics of scores and targets, and their confidence intervals. All metrics are fractions.

The definitions are scikit-learn's (https://scikit-learn.org/stable/modules/model_evaluation.html), the 2007 devkit's
for Pascal VOC and WILDS' for iWildCam. Deviations, so that constant or NaN scores are never better than chance:

- classes whose scores differ by less than `Predictions.tie` are tied, and a tie counts against the correct class;
- tied examples are ordered negative before positive, except for the ROC AUC, where a tied pair counts half;
- a score that is not finite ranks last for a correct class and first for a wrong one;
- a metric that every model maximizes (top-5 of five classes, a class that every image has) is undefined.

For finite scores without ties the values are equal.
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
    """A metric is undefined for these examples, for any model, e.g. the ROC AUC without negatives."""


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of a model and the targets of n examples."""

    scores: Float[np.ndarray, "n Q"] | Float[np.ndarray, "n"]  # of every class; for binary targets: of the positive one
    targets: Integer[np.ndarray, "n"] | Bool[np.ndarray, "n Q"]  # class ids; bool for multi-label targets
    groups: Integer[np.ndarray, "n"] | None = None  # of worst-group metrics; negative: ignored (FMoW's `Other`)
    ignored: Bool[np.ndarray, "n Q"] | None = None  # multi-label: neither positive nor negative (VOC's difficult)
    # Smaller differences of scores are ties. The default suits cosines, whose last bits depend on the position in a
    # matmul; scale it with the scores (100 × for logits at CLIP's temperature).
    tie: float = TIE
    known_ranks: Int64[np.ndarray, "n"] | None = None  # exact ranks, if computed elsewhere (`ranking.ranks`)

    def __post_init__(self) -> None:
        n, shape = len(self.scores), self.scores.shape
        if n == 0:
            raise ValueError("scores: expected at least one example, got none")
        if self.targets.shape not in ((n,), shape):
            got = list(self.targets.shape)
            raise ValueError(f"targets: expected shape [n] or [n Q] of scores{list(shape)}, got {got}")
        if self.groups is not None and self.groups.shape != (n,):
            raise ValueError(f"groups: expected int[{n}], one per example, got shape {list(self.groups.shape)}")
        if self.ignored is not None and not self.ignored.shape == self.targets.shape == shape:
            raise ValueError(f"ignored: expected multi-label targets bool{list(shape)}, got {list(self.ignored.shape)}")
        if self.targets.dtype != bool:
            classes = shape[1] if len(shape) == 2 else 2
            low, high = self.targets.min(), self.targets.max()
            if low < 0 or high >= classes:
                raise ValueError(f"targets: expected class ids from 0 to {classes - 1}, got {low} to {high}")
        if not self.tie >= 0:
            raise ValueError(f"tie: expected a difference of scores ≥ 0, e.g. {TIE} for cosines, got {self.tie}")

    def take(self, rows: Integer[np.ndarray, "m"]) -> Predictions:
        """Return a selection of the examples; ranks that are already computed are kept."""
        taken = copy.copy(self)
        vars(taken).update({name: x[rows] for name, x in vars(self).items() if isinstance(x, np.ndarray)})
        return taken

    @functools.cached_property
    def ranks(self) -> Int64[np.ndarray, "n"]:
        """The number of wrong classes ranked before the correct one; Q - 1 if its score is not finite."""
        if self.known_ranks is not None:
            return self.known_ranks
        ranks_n = np.empty(len(self.scores), np.int64)
        for rows, scores_nQ in self._blocks():
            correct_n1 = np.take_along_axis(scores_nQ, self.targets[rows, None], 1)
            lower_nQ = scores_nQ < correct_n1 - self.tie  # False for NaN, and for the correct class
            ranks_n[rows] = (~lower_nQ).sum(1) - 1
        return ranks_n

    @functools.cached_property
    def predicted(self) -> Int64[np.ndarray, "n"]:
        """The predicted class ids: the correct class if it ranks first, else the wrong class of the highest score."""
        predicted_n = self.targets.astype(np.int64)
        for rows, scores_nQ in self._blocks():
            np.put_along_axis(scores_nQ, self.targets[rows, None], -np.inf, 1)
            first_wrong_n = scores_nQ.argmax(1)  # NaN is the maximum in NumPy
            predicted_n[rows] = np.where(self.ranks[rows] < 1, predicted_n[rows], first_wrong_n)
        return predicted_n

    def _blocks(self) -> Iterator[tuple[slice, Float64[np.ndarray, "m Q"]]]:
        """Yield slices and their scores, with NaN for values that are not finite, in blocks of limited size."""
        if self.scores.ndim != 2 or self.targets.ndim != 1:
            raise ValueError(
                f"expected scores float[n Q] and targets int[n], got scores{list(self.scores.shape)} and targets"
                f"{list(self.targets.shape)}. Multi-label metrics: map, map_11_points, jaccard"
            )
        n, classes = self.scores.shape
        step = max(1, BLOCK_SCORES // classes)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            scores_nQ = self.scores[rows].astype(np.float64)
            yield rows, np.where(np.isfinite(scores_nQ), scores_nQ, np.nan)


def hits(predictions: Predictions, k: int = 1) -> Bool[np.ndarray, "n"]:
    """Return for each example whether its class is among the top k. Raises Undefined for k classes or fewer."""
    ranks_n = predictions.ranks
    if k >= (classes := predictions.scores.shape[1]):
        raise Undefined(f"top-{k} accuracy of {classes} classes is always 1: expected k < {classes}")
    return ranks_n < k


def accuracy(predictions: Predictions, k: int = 1) -> float:
    return float(hits(predictions, k).mean())


def mean_top1_top5(predictions: Predictions) -> float:
    """Return the mean of top-1 and top-5 accuracy, the number of Kinetics-700 (Radford et al. 2021, table 9)."""
    return (accuracy(predictions) + accuracy(predictions, 5)) / 2


def mean_per_class(predictions: Predictions) -> float:
    """Return the mean recall over the classes with examples: scikit-learn's balanced_accuracy_score."""
    return float(_means(hits(predictions), predictions.targets).mean())


def macro_f1(predictions: Predictions) -> float:
    """Return the mean F1 score over the classes with examples: the F1-macro_all of iWildCam, as in WILDS.

    scikit-learn's default also averages over classes that are predicted but have no examples.
    """
    classes = predictions.scores.shape[-1]
    hits_Q = np.bincount(predictions.targets, weights=hits(predictions), minlength=classes)
    support_Q = np.bincount(predictions.targets, minlength=classes)
    predicted_Q = np.bincount(predictions.predicted, minlength=classes)
    present_Q = support_Q > 0
    return float(np.mean(2 * hits_Q[present_Q] / (support_Q + predicted_Q)[present_Q]))


def worst_group(predictions: Predictions, k: int = 1) -> float:
    """Return the lowest top-k accuracy of a group: FMoW and GeoDE by region, Dollar Street (top 5) by income."""
    if predictions.groups is None:
        raise ValueError("groups: expected Predictions(scores, targets, groups=int[n]), got none")
    counted_n = predictions.groups >= 0
    if not counted_n.any():
        raise Undefined("no example is in a group: all group ids are negative")
    return float(_means(hits(predictions, k)[counted_n], predictions.groups[counted_n]).min())


def _means(values_n: Bool[np.ndarray, "n"], strata_n: Integer[np.ndarray, "n"]) -> Float64[np.ndarray, "m"]:
    """Return the mean of each stratum with examples."""
    _, stratum_n, sizes = np.unique(strata_n, return_inverse=True, return_counts=True)
    return np.bincount(stratum_n, weights=values_n) / sizes


def roc_auc(predictions: Predictions) -> float:
    """Return the probability that a positive scores above a negative (Hateful Memes).

    The score of an example is float[n], or the difference of its scores of the two classes.
    """
    scores, targets = predictions.scores, predictions.targets
    if targets.ndim != 1 or scores.shape[1:] not in ((), (2,)):
        raise ValueError(
            f"ROC AUC: expected scores float[n] or float[n 2] and targets int[n] of 0 and 1, got "
            f"scores{list(scores.shape)}, targets{list(targets.shape)}"
        )
    with np.errstate(invalid="ignore"):  # inf - inf
        score_n = scores.astype(np.float64) if scores.ndim == 1 else np.diff(scores.astype(np.float64))[:, 0]
    positive_n, finite_n = targets == 1, np.isfinite(score_n)
    if positive_n.all() or not positive_n.any():
        raise Undefined(f"ROC AUC: all {len(targets)} targets are {targets[0]}; use a split with both, or accuracy")
    above_P = np.where(finite_n, score_n, -np.inf)[positive_n]
    negatives = np.sort(np.where(finite_n, score_n, np.inf)[~positive_n])
    below_P = np.searchsorted(negatives, above_P - predictions.tie, "left")
    not_above_P = np.searchsorted(negatives, above_P + predictions.tie, "right")
    return float(np.mean(below_P + not_above_P) / 2 / len(negatives))


def mean_average_precision(predictions: Predictions) -> float:
    """Return the mean over classes of scikit-learn's average_precision_score.

    Classes without positives or without negatives are ignored (CLIP_benchmark counts the former as 0).
    """

    def average_precision(found: np.ndarray, before: np.ndarray, positives: int) -> float:
        return np.sum(found / (found + before)) / positives

    return _mean_over_columns(average_precision, predictions)


def map_11_points(predictions: Predictions) -> float:
    """Return the mean average precision of Pascal VOC 2007 (Everingham et al. 2010, section 4.2).

    The average precision of a class is the mean, over recalls of 0, 0.1 … 1, of the highest precision at that or a
    higher recall. Unlike in the devkit, the order of equal scores does not matter. Pass difficult objects as `ignored`.
    """

    def average_precision(found: np.ndarray, before: np.ndarray, positives: int) -> float:
        precisions = found / (found + before)
        # In integers: in floating point a recall of 3/10 is below 3 × 0.1.
        return np.mean([precisions[10 * found >= tenths * positives].max(initial=0) for tenths in range(11)])

    return _mean_over_columns(average_precision, predictions)


def jaccard(predictions: Predictions) -> float:
    """Return the mean over examples of the Jaccard index of the k positives and the k candidates of the highest scores.

    The metric of WinoGAViL (Bitton et al. 2022). Pad rows with fewer candidates by `ignored` ones.
    """

    def jaccard_index(found: np.ndarray, before: np.ndarray, positives: int) -> float:
        selected = np.sum(found + before <= positives)
        return selected / (2 * positives - selected)

    return _mean_over_columns(jaccard_index, predictions, by_example=True)


def _mean_over_columns(
    metric: Callable[[np.ndarray, np.ndarray, int], float], predictions: Predictions, *, by_example: bool = False
) -> float:
    """Return the mean of `metric` over the classes (or examples) that have both a positive and a negative.

    Its arguments: for every positive with a finite score the number of positives with at least its score and the number
    of negatives that are not lower; the number of positives, including those whose score is not finite.
    """
    scores, targets, ignored = predictions.scores, predictions.targets, predictions.ignored
    if scores.ndim != 2 or targets.dtype != bool:
        raise ValueError(
            f"expected scores float[n Q] and targets bool[n Q], got scores{list(scores.shape)} and targets "
            f"{targets.dtype}{list(targets.shape)}. For class ids: targets[:, None] == np.arange(Q)"
        )
    counted = np.ones(targets.shape, bool) if ignored is None else ~ignored
    scores = scores.astype(np.float64)
    if by_example:
        scores, targets, counted = scores.T, targets.T, counted.T
    values = []
    for column in range(scores.shape[1]):
        rows = counted[:, column]
        score, positive = scores[rows, column], targets[rows, column]
        if positive.all() or not positive.any():
            continue
        finite = np.isfinite(score)
        positives = np.sort(score[positive & finite])
        negatives = np.sort(np.where(finite, score, np.inf)[~positive])
        found = len(positives) - np.searchsorted(positives, positives, "left")
        before = len(negatives) - np.searchsorted(negatives, positives - predictions.tie, "left")
        values.append(metric(found, before, int(positive.sum())))
    if not values:
        raise Undefined("no class (or example) has both a positive and a negative")
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


class Interval(NamedTuple):
    low: float
    high: float


def with_references(
    key: str, value: float, candidates: int | float, chance: float | None = None, interval: Interval | None = None
) -> dict[str, float]:
    """Return a metric with its reference values `/candidates`, `/chance`, `/ci_low` and `/ci_high`."""
    low, high = interval or (None, None)
    found = {"": value, "/candidates": float(candidates), "/chance": chance, "/ci_low": low, "/ci_high": high}
    return {key + name: number for name, number in found.items() if number is not None}


def bootstrap_interval(
    values_n: Float[np.ndarray, "n"] | Bool[np.ndarray, "n"],
    *,
    strata_n: Integer[np.ndarray, "n"] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of a mean, or with strata of the mean of the strata's means.

    The counts of each distinct value in a resample are multinomial, so hits need one binomial number per resample.
    Equal values, as for n = 1, give an interval of width 0: use `exact_interval`. With strata, e.g. the targets for the
    mean per class, examples are drawn within each stratum.
    """
    if len(values_n) == 0 or not np.isfinite(values_n).all():
        raise ValueError("expected at least one value, all finite; count other values as errors, do not drop them")
    rng = np.random.default_rng(seed)
    strata = _rows_by_stratum(strata_n, len(values_n))
    means = np.zeros(resamples)
    for rows in strata:
        values, counts = np.unique(values_n[rows].astype(np.float64), return_counts=True)
        size = len(rows)
        step = max(1, BLOCK_SCORES // len(values))  # resamples per block
        for start in range(0, resamples, step):
            block = slice(start, min(start + step, resamples))
            drawn = rng.multinomial(size, counts / size, block.stop - block.start)
            means[block] += drawn @ values / size
    return _percentiles(means / len(strata), level)


def _rows_by_stratum(strata_n: Integer[np.ndarray, "n"] | None, n: int) -> list[np.ndarray]:
    if strata_n is None:
        return [np.arange(n)]
    return [np.flatnonzero(strata_n == stratum) for stratum in np.unique(strata_n)]


def mean_interval(values_n: Float[np.ndarray, "n"] | Bool[np.ndarray, "n"]) -> Interval:
    """Return the bootstrap interval of a mean of fractions, or the exact one if all are 0 or all are 1."""
    if values_n.min() == values_n.max() and values_n[0] in (0, 1):
        return exact_interval(int(values_n.sum()), len(values_n))
    return bootstrap_interval(values_n)


def confidence_interval(name: str, predictions: Predictions) -> Interval:
    """Return the 95 % interval of a metric of METRICS by the fastest bootstrap for it."""
    if name in ("top1", "top5"):
        return mean_interval(hits(predictions, 1 if name == "top1" else 5))
    if name == "mean_per_class":
        hits_n = hits(predictions)
        return bootstrap_interval(hits_n, strata_n=predictions.targets) if hits_n.std() else mean_interval(hits_n)
    return bootstrap_metric(METRICS[name], predictions)


def bootstrap_metric(
    metric: Metric,
    predictions: Predictions,
    *,
    strata_n: Integer[np.ndarray, "n"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of any metric, which is computed for every resample.

    With strata, examples are drawn within each stratum. Resamples for which the metric is undefined (e.g. without
    negatives) are ignored. A minimum over groups is biased low in resamples.
    """
    metric(predictions)  # raises its errors, and caches the ranks
    rng = np.random.default_rng(seed)
    strata = _rows_by_stratum(strata_n, len(predictions.scores))
    values = []
    for _ in range(resamples):
        rows = np.concatenate([rng.choice(rows, len(rows)) for rows in strata])
        try:
            values.append(metric(predictions.take(rows)))
        except Undefined:
            continue
    if not values:
        raise Undefined(f"undefined in all {resamples} resamples of {len(predictions.scores)} examples")
    return _percentiles(np.array(values))


def exact_interval(correct: int, n: int, *, level: float = LEVEL) -> Interval:
    """Return the exact interval of an accuracy, `correct` of n (Clopper and Pearson 1934), by bisection.

    Conservative: it covers at least `level`, and is wider than the bootstrap's.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"correct: expected 0 ≤ correct ≤ n and n ≥ 1, got {correct} of {n}")

    def lower_bound(correct: int) -> float:
        """Return the p at which `correct` or more of n have the probability (1 - level) / 2."""
        low, high = 0.0, correct / n
        for _ in range(60 if correct else 0):
            p = (low + high) / 2
            low, high = (p, high) if binomial_tail(correct, n, p) < (1 - level) / 2 else (low, p)
        return high

    return Interval(lower_bound(correct), 1 - lower_bound(n - correct))


def binomial_tail(correct: int, n: int, probability: float) -> float:
    """Return P(X ≥ correct) for X ~ Binomial(n, probability), exactly, for 0 < probability < 1."""
    log_binomial_i = _log_binomials(n)[correct:]
    i = np.arange(correct, n + 1)
    return float(np.exp(log_binomial_i + i * np.log(probability) + (n - i) * np.log1p(-probability)).sum())


@functools.lru_cache(maxsize=4)
def _log_binomials(n: int) -> Float64[np.ndarray, "m"]:
    """Return the logarithms of the binomial coefficients of n."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return log_factorial[n] - log_factorial - log_factorial[::-1]


def _percentiles(values: Float64[np.ndarray, "m"], level: float = LEVEL) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a fraction between 0 and 1, e.g. {LEVEL}, got {level}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
