"""Metrics of scores and targets. All metrics are fractions.

The definitions are scikit-learn's (https://scikit-learn.org/stable/modules/model_evaluation.html), the 2007 devkit's
for Pascal VOC and WILDS' for iWildCam. For finite scores without ties the values are equal. With ties, i.e. exactly
equal scores, a metric is its expected value over the orders of the tied classes or examples, all equally likely:
constant scores are at chance. The expectation is exact, except for macro F1, worst groups and 11 points, which are not
linear in the hits: the mean of DRAWS random orders. `by_index` orders ties by index instead, as `argmax` does.

Scores that are not finite rank last for a correct class and first for a wrong one. If none of the scores that are
compared is finite, they are tied.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Integer

from clip_jax.evals.ranking import BLOCK_SCORES, Ranks

DRAWS = 1000  # random orders of ties, for metrics without an exact expectation


class Undefined(ValueError):
    """A metric is undefined for these examples, for any model, e.g. the ROC AUC without negatives."""


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of a model and the targets of n examples."""

    scores: Float[np.ndarray, "n Q"] | Float[np.ndarray, "n"]  # of every class; for binary targets: of the positive one
    targets: Integer[np.ndarray, "n"] | Bool[np.ndarray, "n Q"]  # class ids; bool for multi-label targets
    groups: Integer[np.ndarray, "n"] | None = None  # of worst-group metrics; negative: ignored (FMoW's `Other`)
    ignored: Bool[np.ndarray, "n Q"] | None = None  # multi-label: neither positive nor negative (VOC's difficult)
    draws: int = DRAWS  # random orders of ties, for metrics without an exact expectation

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

    def take(self, rows: Integer[np.ndarray, "m"]) -> Predictions:
        """Return a selection of the examples; ranks that are already computed are kept."""
        taken = copy.copy(self)
        vars(taken).update({name: x[rows] for name, x in vars(self).items() if isinstance(x, np.ndarray)})
        if "ranks" in vars(self):
            vars(taken)["ranks"] = self.ranks.take(rows)
        return taken

    @functools.cached_property
    def ranks(self) -> Ranks:
        """The ranks of the correct classes, for one class per example."""
        counts_3n = np.empty((3, len(self.scores)), np.int64)
        for rows, scores_nQ in self._blocks():
            target_n1 = self.targets[rows, None]
            correct_n1 = np.take_along_axis(scores_nQ, target_n1, 1)
            equal_nQ = scores_nQ == correct_n1
            before_nQ = equal_nQ & (np.arange(scores_nQ.shape[1])[None] < target_n1)
            counts_3n[:, rows] = (scores_nQ > correct_n1).sum(1), equal_nQ.sum(1) - 1, before_nQ.sum(1)
        return Ranks(*counts_3n, np.ones_like(counts_3n[0]))

    @functools.cached_property
    def predicted(self) -> Int64[np.ndarray, "n"]:
        """The predicted class ids: the first class of the highest score, for one class per example."""
        start_n, _, class_t = self._highest
        return class_t[start_n[self._example]]

    @functools.cached_property
    def _highest(self) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], Int64[np.ndarray, "m"]]:
        """The classes of the highest score of all examples, with the start and number of each example's."""
        self._example  # noqa: B018 (rows of this table, also after `take`)
        found = [np.nonzero(scores_nQ == scores_nQ.max(1, keepdims=True)) for _, scores_nQ in self._blocks()]
        count_n = np.concatenate([np.bincount(row_t) for row_t, _ in found])
        return np.cumsum(count_n) - count_n, count_n, np.concatenate([class_t for _, class_t in found])

    @functools.cached_property
    def _example(self) -> Int64[np.ndarray, "n"]:
        return np.arange(len(self.scores))

    def tied(self, axis: int = 0) -> int:
        """Return the number of examples (multi-label: of positives) whose score equals a wrong one's.

        axis: of multi-label scores that are compared: 0, the examples of a class, or 1, the classes of an example.
        """
        if self.targets.ndim == 1:
            return int((self.ranks.tied > 0).sum())
        columns = _columns(self, axis)
        return sum(int(np.isin(scores[positive], scores[~positive]).sum()) for scores, positive in columns)

    def break_ties(self, rng: np.random.Generator | None = None, axis: int = 0) -> Predictions:
        """Return equivalent predictions without ties: in a random order, or by index. axis: see `tied`."""
        if self.targets.ndim == 2:
            return dataclasses.replace(self, scores=_places(_comparable(self, axis), rng, axis))
        broken = copy.copy(self)
        if rng is None:
            vars(broken).update(ranks=self.ranks.by_index(), predicted=self.predicted)
            return broken
        start_n, count_n, class_t = self._highest
        start_n, count_n = start_n[self._example], count_n[self._example]
        above_n = self.ranks.draw(rng)
        wrong_n = count_n - (self.ranks.above == 0)  # number of wrong classes of the highest score
        class_n = class_t[start_n + (rng.random(len(start_n)) * wrong_n).astype(np.int64)]
        class_n = np.where(class_n == self.targets, class_t[start_n + count_n - 1], class_n)
        ranks = Ranks(above_n, *(np.full_like(above_n, value) for value in (0, 0, 1)))
        vars(broken).update(ranks=ranks, predicted=np.where(above_n == 0, self.targets, class_n))
        return broken

    def _blocks(self) -> Iterator[tuple[slice, Float64[np.ndarray, "m Q"]]]:
        """Yield slices and their comparable scores, in blocks of limited size."""
        if self.scores.ndim != 2 or self.targets.ndim != 1:
            raise ValueError(
                f"expected scores float[n Q] and targets int[n], got scores{list(self.scores.shape)} and targets"
                f"{list(self.targets.shape)}. Multi-label metrics: map, map_11_points, jaccard"
            )
        n, classes = self.scores.shape
        step = max(1, BLOCK_SCORES // classes)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            correct_nQ = self.targets[rows, None] == np.arange(classes)[None]
            yield rows, _finite_or_last(self.scores[rows].astype(np.float64), correct_nQ, 1)


def _finite_or_last(scores: np.ndarray, correct: np.ndarray, axis: int) -> np.ndarray:
    """Return scores; those that are not finite as -∞ for correct, ∞ for wrong classes, 0 without any finite score."""
    finite = np.isfinite(scores)
    if finite.all():
        return scores
    last = np.where(correct, -np.inf, np.inf)
    return np.where(finite, scores, np.where(finite.any(axis, keepdims=True), last, 0.0))


def _comparable(predictions: Predictions, axis: int) -> Float64[np.ndarray, "n Q"]:
    """Return multi-label scores, with comparable values where they are not finite."""
    scores, targets, ignored = predictions.scores, predictions.targets, predictions.ignored
    if scores.ndim != 2 or targets.dtype != bool:
        raise ValueError(
            f"expected scores float[n Q] and targets bool[n Q], got scores{list(scores.shape)} and targets "
            f"{targets.dtype}{list(targets.shape)}. For class ids: targets[:, None] == np.arange(Q)"
        )
    scores = scores.astype(np.float64)
    return _finite_or_last(scores if ignored is None else np.where(ignored, np.nan, scores), targets, axis)


def _columns(predictions: Predictions, axis: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield scores and targets of each class (axis 0) or of each example (axis 1), without the ignored ones."""
    scores = np.moveaxis(_comparable(predictions, axis), axis, -1)
    targets = np.moveaxis(predictions.targets, axis, -1)
    counted = [slice(None)] * len(scores)
    if predictions.ignored is not None:
        counted = ~np.moveaxis(predictions.ignored, axis, -1)
    for row, kept in enumerate(counted):
        yield scores[row][kept], targets[row][kept]


def _places(scores: np.ndarray, rng: np.random.Generator | None, axis: int) -> Float64[np.ndarray, "n Q"]:
    """Return scores of the same order along an axis without ties: by index, or at random."""
    keys = -np.indices(scores.shape)[axis] if rng is None else rng.random(scores.shape)
    order = np.lexsort((keys, scores), axis=axis)
    places = np.empty(scores.shape)
    np.put_along_axis(places, order, np.indices(scores.shape)[axis].astype(float), axis)
    return places


def hits(predictions: Predictions, k: int = 1) -> Float64[np.ndarray, "n"]:
    """Return for each example the probability that its class is among the top k: 0 or 1 unless it is tied.

    Raises Undefined for k classes or fewer.
    """
    ranks = predictions.ranks
    if k >= (classes := predictions.scores.shape[1]):
        raise Undefined(f"top-{k} accuracy of {classes} classes is always 1: expected k < {classes}")
    return ranks.hit_probability(k)


def correct(predictions: Predictions) -> Bool[np.ndarray, "n"]:
    """Return whether the first class of the highest score is the correct one; False without any finite score."""
    return (predictions.predicted == predictions.targets) & np.isfinite(predictions.scores).any(1)


def _mean_over_orders(metric: Callable[[Predictions], float], predictions: Predictions) -> float:
    """Return the mean of a metric over random orders of the ties; without ties its value."""
    if predictions.targets.ndim == 1:
        ties = predictions._highest[1][predictions._example].max() > 1 or predictions.tied()
    else:
        ties = predictions.tied()
    if not ties:
        return metric(predictions)
    rng = np.random.default_rng(0)
    return math.fsum(metric(predictions.break_ties(rng)) for _ in range(predictions.draws)) / predictions.draws


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
    hits(predictions)  # raises Undefined
    return _mean_over_orders(_macro_f1, predictions)


def _macro_f1(predictions: Predictions) -> float:
    classes, (targets, predicted) = predictions.scores.shape[-1], (predictions.targets, predictions.predicted)
    hits_Q = np.bincount(targets[predicted == targets], minlength=classes)
    support_Q = np.bincount(targets, minlength=classes)
    predicted_Q = np.bincount(predicted, minlength=classes)
    present_Q = support_Q > 0
    return float(np.mean(2 * hits_Q[present_Q] / (support_Q + predicted_Q)[present_Q]))


def worst_group(predictions: Predictions, k: int = 1) -> float:
    """Return the lowest top-k accuracy of a group: FMoW and GeoDE by region, Dollar Street (top 5) by income."""
    if predictions.groups is None:
        raise ValueError("groups: expected Predictions(scores, targets, groups=int[n]), got none")
    counted_n = predictions.groups >= 0
    if not counted_n.any():
        raise Undefined("no example is in a group: all group ids are negative")

    def lowest(predictions: Predictions) -> float:
        return float(_means(hits(predictions, k)[counted_n], predictions.groups[counted_n]).min())

    return _mean_over_orders(lowest, predictions)


def _means(
    values_n: Float[np.ndarray, "n"] | Bool[np.ndarray, "n"], strata_n: Integer[np.ndarray, "n"]
) -> Float64[np.ndarray, "m"]:
    """Return the mean of each stratum with examples."""
    _, stratum_n, sizes = np.unique(strata_n, return_inverse=True, return_counts=True)
    return np.bincount(stratum_n, weights=values_n) / sizes


def roc_auc(predictions: Predictions) -> float:
    """Return the probability that a positive scores above a negative (Hateful Memes); equal scores count half.

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
    positive_n = targets == 1
    if positive_n.all() or not positive_n.any():
        raise Undefined(f"ROC AUC: all {len(targets)} targets are {targets[0]}; use a split with both, or accuracy")
    score_n = _finite_or_last(score_n, positive_n, 0)
    positives, negatives = score_n[positive_n], np.sort(score_n[~positive_n])
    below_P, not_above_P = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    return float(np.mean(below_P + not_above_P) / 2 / len(negatives))


def mean_average_precision(predictions: Predictions) -> float:
    """Return the mean over classes of scikit-learn's average_precision_score.

    Classes without positives or without negatives are ignored (CLIP_benchmark counts the former as 0).
    """
    return _mean_over_columns(average_precision, predictions)


def average_precision(scores_n: Float64[np.ndarray, "n"], positive_n: Bool[np.ndarray, "n"]) -> float:
    """Return the expected mean of the precisions at the positives.

    In a group of s tied examples, p of them positive, after b examples with f positives, the i-th (from 0) is positive
    with probability p / s, and then the expected precision is (f + 1 + i·(p - 1) / (s - 1)) / (b + 1 + i) (McSherry and
    Najork 2008, "Computing information retrieval performance measures efficiently in the presence of tied scores").
    """
    _, group_n, size_g = np.unique(-scores_n, return_inverse=True, return_counts=True)
    positives_g = np.bincount(group_n, weights=positive_n)
    before_g, found_g = np.cumsum(size_g) - size_g, np.cumsum(positives_g) - positives_g
    group_n = np.repeat(np.arange(len(size_g)), size_g)
    i_n = np.arange(len(scores_n)) - before_g[group_n]
    found_n = found_g[group_n] + 1 + i_n * ((positives_g - 1) / np.maximum(size_g - 1, 1))[group_n]
    precision_n = found_n / (before_g[group_n] + 1 + i_n)
    return float(np.sum((positives_g / size_g)[group_n] * precision_n) / positive_n.sum())


def map_11_points(predictions: Predictions) -> float:
    """Return the mean average precision of Pascal VOC 2007 (Everingham et al. 2010, section 4.2).

    The average precision of a class is the mean, over recalls of 0, 0.1 … 1, of the highest precision at that or a
    higher recall. Pass difficult objects as `ignored`.
    """

    def eleven_points(scores_n: np.ndarray, positive_n: np.ndarray) -> float:
        (places,) = np.nonzero(positive_n[np.argsort(-scores_n, kind="stable")])
        found = np.arange(1, len(places) + 1)
        precisions = found / (places + 1)
        # In integers: in floating point a recall of 3/10 is below 3 × 0.1.
        return np.mean([precisions[10 * found >= tenths * len(places)].max(initial=0) for tenths in range(11)])

    return _mean_over_orders(functools.partial(_mean_over_columns, eleven_points), predictions)


def jaccard(predictions: Predictions) -> float:
    """Return the mean over examples of the Jaccard index of the k positives and the k candidates of the highest scores.

    The metric of WinoGAViL (Bitton et al. 2022). Pad rows with fewer candidates by `ignored` ones.
    """

    def jaccard_index(scores: np.ndarray, positive: np.ndarray) -> float:
        selected = int(positive.sum())
        lowest = np.sort(scores)[-selected]
        above, tied = scores > lowest, scores == lowest
        return expected_jaccard(
            selected, int(above.sum()), int((above & positive).sum()), int(tied.sum()), int((tied & positive).sum())
        )

    return _mean_over_columns(jaccard_index, predictions, axis=1)


def expected_jaccard(positives: int, above: int, found: int, tied: int, tied_positives: int) -> float:
    """Return the expected Jaccard index of the positives and as many selected candidates.

    `above` candidates are selected for certain, `found` of them positive; the others at random out of `tied` ones,
    `tied_positives` of them positive. With p positives and a hypergeometric number i of those: E[i / (2p - i)].
    """
    drawn, others = positives - above, tied - tied_positives
    expected = 0.0
    for i in range(max(0, drawn - others), min(drawn, tied_positives) + 1):
        probability = math.comb(tied_positives, i) * math.comb(others, drawn - i) / math.comb(tied, drawn)
        expected += probability * (found + i) / (2 * positives - found - i)
    return expected


def _mean_over_columns(
    metric: Callable[[np.ndarray, np.ndarray], float], predictions: Predictions, *, axis: int = 0, every: bool = False
) -> float:
    """Return the mean of `metric(scores, targets)` over the classes (or examples) with both a positive and a negative.

    every: also over those without negatives, and with 0 over those without positives, as CLIP_benchmark does.
    """
    values = []
    for scores, positive in _columns(predictions, axis):
        if positive.any() and (every or not positive.all()):
            values.append(metric(scores, positive))
        elif every:
            values.append(0.0)
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
AXES = {"jaccard": 1}  # of the scores that a multi-label metric compares, where it is not 0


def undecided(name: str, predictions: Predictions) -> int:
    """Return the number of examples for which a metric of METRICS depends on the order of ties."""
    if name == "roc_auc":
        return 0
    if predictions.targets.ndim == 2:
        return predictions.tied(AXES.get(name, 0))
    hits_n = hits(predictions, 5 if name.endswith("top5") else 1)
    return int(((hits_n > 0) & (hits_n < 1)).sum())


def by_index(name: str, predictions: Predictions) -> float:
    """Return a metric of METRICS with ties ordered by index: the values of CLIP_benchmark 1.6.2.

    Its mean per class recall is of `argmax`. Its top-k accuracies and average precisions are of `torch.topk` and
    `torch.sort`, which return tied classes in an arbitrary order: by index is one of their possible values. Its mean
    average precision counts a class without positives as 0.
    """
    broken = predictions if name == "roc_auc" else predictions.break_ties(axis=AXES.get(name, 0))
    if name == "map":
        return _mean_over_columns(average_precision, broken, every=True)
    return METRICS[name](broken)
