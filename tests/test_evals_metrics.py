"""Metrics against recorded values of scikit-learn and plain loops; broken models; confidence intervals."""

import dataclasses
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest

from clip_jax.evals import intervals, metrics, ranking
from clip_jax.evals.intervals import bootstrap_interval, bootstrap_metric, exact_interval
from clip_jax.evals.metrics import METRICS, Predictions, Undefined, hits

N, Q = 150, 8
EXACT = 1e-12  # order of float64 sums
MULTI = ("map", "map_11_points", "jaccard")

# By scikit-learn 1.9.1 on NumPy 2.4.6 from the arrays of example(): p = scores.argmax(1) and
#   top1  accuracy_score(targets, p)      top5  top_k_accuracy_score(targets, scores, k=5, labels=range(Q))
#   mean_per_class  balanced_accuracy_score(targets, p)
#   macro_f1  f1_score(targets, p, average="macro", labels=np.unique(targets)); without labels it is 0.5196
#   roc_auc  roc_auc_score(targets % 2, scores[:, 1] - scores[:, 0])
#   map  average_precision_score(several, several_scores)
#   jaccard  np.mean([jaccard_score(t, s >= np.sort(s)[-t.sum()]) for t, s in zip(several, several_scores)
#            if 0 < t.sum() < Q])
SKLEARN = {
    "top1": 0.6733333333333333,
    "top5": 0.9733333333333334,
    "mean_top1_top5": (0.6733333333333333 + 0.9733333333333334) / 2,
    "mean_per_class": 0.6770153809324316,
    "macro_f1": 0.5938191864876411,
    "roc_auc": 0.5677285677285677,
    "map": 0.5841044771983641,
    "jaccard": 0.44857142857142857,
}


def example(name):
    rng = np.random.default_rng(7)
    targets = np.minimum(rng.integers(0, 14, N), 6)  # half of class 6, none of class 7
    scores = rng.random((N, Q)) + 0.5 * (targets[:, None] == np.arange(Q))
    several = rng.random((N, Q)) < np.linspace(0.05, 0.5, Q)
    several_scores = rng.random((N, Q)) + 0.3 * several
    if name in MULTI:
        return Predictions(several_scores, several)
    if name == "roc_auc":
        return Predictions(scores[:, :2], targets % 2)
    return Predictions(scores, targets, groups=targets % 3)


def with_scores(predictions, scores):
    return dataclasses.replace(predictions, scores=scores)


def positives(predictions):
    """Return bool[n Q]: the correct classes."""
    return (
        predictions.targets
        if predictions.targets.ndim == 2
        else predictions.targets[:, None] == np.arange(predictions.scores.shape[1])
    )


@pytest.mark.parametrize("name", SKLEARN)
def test_against_scikit_learn(name):
    assert METRICS[name](example(name)) == pytest.approx(SKLEARN[name], abs=EXACT)


def test_roc_auc_of_positive_scores_equals_that_of_differences():
    two = example("roc_auc")
    assert METRICS["roc_auc"](Predictions(two.scores[:, 1] - two.scores[:, 0], two.targets)) == METRICS["roc_auc"](two)


def test_eleven_point_map_equals_a_loop_over_the_sorted_list():
    predictions = example("map_11_points")
    averages = []
    for scores, positive in zip(predictions.scores.T, predictions.targets.T, strict=True):
        best, found = dict.fromkeys(range(11), Fraction(0)), 0
        for seen, row in enumerate(sorted(range(N), key=lambda i, s=scores: -s[i]), start=1):
            found += int(positive[row])
            for tenths in best:
                if Fraction(found, int(positive.sum())) >= Fraction(tenths, 10):
                    best[tenths] = max(best[tenths], Fraction(found, seen))
        averages.append(float(sum(best.values()) / 11))
    value = METRICS["map_11_points"](predictions)
    assert value == pytest.approx(np.mean(averages), abs=EXACT)
    assert value != pytest.approx(SKLEARN["map"], abs=1e-3)  # differs from the other average precision


def test_a_recall_of_3_of_10_reaches_the_point_0_3():
    """3 × 0.1 > 3 / 10 in floating point."""
    positive = np.array([True] * 3 + [False] * 7 + [True] * 7)
    value = METRICS["map_11_points"](Predictions(-np.arange(17.0)[:, None], positive[:, None]))
    assert value == pytest.approx((4 + 7 * 10 / 17) / 11, abs=EXACT)


def test_worst_group_is_the_minimum_and_negative_groups_are_ignored():
    scores = np.eye(7)[[0, 1, 2, 3, 5, 5]]  # the fifth example is wrong
    targets = np.array([0, 1, 2, 3, 4, 5])
    worst = METRICS["worst_group_top1"]
    assert worst(Predictions(scores, targets, groups=np.array([0, 0, 0, 9, 9, 9]))) == pytest.approx(2 / 3)
    assert worst(Predictions(scores, targets, groups=np.array([0, 0, 0, 9, -1, 9]))) == 1
    second_best = scores + np.linspace(0, 0.5, 7)[None]
    assert METRICS["worst_group_top5"](Predictions(second_best, targets, groups=targets)) == 1
    assert worst(Predictions(second_best, targets, groups=targets)) == 0
    with pytest.raises(ValueError, match=r"expected Predictions\(scores, targets, groups=int"):
        worst(Predictions(scores, targets))


# ------------------------------------------------------------------------------------------------- broken models


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_model_reaches_1_and_a_reversed_one_less(name):
    predictions = example(name)
    perfect = positives(predictions).astype(np.float32)
    assert METRICS[name](with_scores(predictions, perfect)) == 1
    assert METRICS[name](with_scores(predictions, -perfect)) < 0.5


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_examples_does_not_matter(name):
    predictions = example(name)
    predictions = with_scores(predictions, np.round(predictions.scores, 1))  # many ties
    shuffled = predictions.take(np.random.default_rng(1).permutation(N))
    drawn = 0.01 if name in ("macro_f1", "worst_group_top1", "worst_group_top5", "map_11_points") else EXACT
    assert METRICS[name](shuffled) == pytest.approx(METRICS[name](predictions), abs=drawn)


def chance(name, predictions):
    """Return the value of random scores: for average precisions more than the fraction of positives."""
    scores = np.random.default_rng(2).random((400, *predictions.scores.shape))
    samples = [METRICS[name](with_scores(predictions, one)) for one in scores]
    return np.mean(samples), 5 * np.std(samples) * (1 / 400 + 1 / predictions.draws) ** 0.5 + 1e-9


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("value", [0.2, np.nan, np.inf])
def test_constant_and_broken_scores_are_at_chance(name, value):
    predictions = dataclasses.replace(example(name), draws=400)
    expected, margin = chance(name, predictions)
    constant = METRICS[name](with_scores(predictions, np.full(predictions.scores.shape, value)))
    assert constant == pytest.approx(expected, abs=margin)


@pytest.mark.parametrize("name", METRICS)
def test_any_difference_is_no_tie(name):
    predictions, perfect = example(name), positives(example(name))
    assert METRICS[name](with_scores(predictions, 0.2 + 1e-15 * perfect)) == 1
    assert METRICS[name](with_scores(predictions, 0.2 - 1e-15 * perfect)) < 0.5


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_no_better_than_chance(name, broken):
    predictions = dataclasses.replace(example(name), draws=50)
    perfect = positives(predictions)
    constant = METRICS[name](with_scores(predictions, np.zeros(predictions.scores.shape)))
    reversed_value = METRICS[name](with_scores(predictions, -perfect.astype(float)))
    last = 0.5 if name == "roc_auc" else pytest.approx(reversed_value)  # its scores are differences: all not finite
    assert METRICS[name](with_scores(predictions, np.where(perfect, broken, 0))) == last
    assert METRICS[name](with_scores(predictions, np.where(perfect, 1.0, broken))) <= constant
    one = predictions.scores.copy()
    one[np.nonzero(perfect)[0][0], np.nonzero(perfect)[1][0]] = broken  # a single score of a correct class
    assert METRICS[name](with_scores(predictions, one)) <= METRICS[name](predictions)


def test_ranks_equal_those_of_ranking():
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(n, 16)).astype(np.float32) for n in (N, Q))
    images[5], texts[3] = np.nan, texts[4]
    targets = rng.integers(Q, size=N)
    expected = ranking.ranks(images, texts, (np.arange(N), targets))
    assert (expected.above[5], expected.tied[5]) == (0, Q - 1) and expected.tied.sum() > Q
    for found, value in zip(Predictions(ranking.scores(images, texts), targets).ranks, expected, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("name", ["top1", "mean_per_class"])
def test_of_two_classes_with_equal_scores_half_is_correct(name):
    predictions = Predictions(np.eye(4)[[0, 1, 2, 2]][:, [0, 1, 2, 2]], np.arange(4))
    assert METRICS[name](predictions) == 0.75
    assert METRICS[name](predictions.break_ties()) == 0.75  # class 2 is right, 3 is wrong
    assert predictions.tied() == 2


def test_f1_counts_false_positives():
    """Class 0 is found once and missed once, 1 is predicted instead: F1 of 2/3 each; class 2 has no examples."""
    scores = np.eye(3)[[0, 1, 1]]
    assert METRICS["macro_f1"](Predictions(scores, np.array([0, 0, 1]))) == pytest.approx(2 / 3)
    assert METRICS["macro_f1"](Predictions(scores[:, [0, 2, 1]], np.array([0, 0, 1]))) == pytest.approx(1 / 3)
    scores[1, 0] = 1  # a tie with class 1, which is predicted in half of the orders; else both classes have F1 of 1
    assert METRICS["macro_f1"](Predictions(scores, np.array([0, 0, 1]))) == pytest.approx(5 / 6, abs=0.03)


@pytest.mark.parametrize(
    "name, predictions, message",
    [
        ("roc_auc", Predictions(np.arange(3.0), np.ones(3, int)), "all 3 targets are 1"),
        ("roc_auc", Predictions(np.arange(3.0), np.zeros(3, int)), "all 3 targets are 0"),
        ("top1", Predictions(np.ones((3, 1)), np.zeros(3, int)), "top-1 accuracy of 1 classes is always 1"),
        (
            "top5",
            Predictions(np.ones((3, 5)), np.zeros(3, int)),
            "top-5 accuracy of 5 classes is always 1: expected k < 5",
        ),
        ("map", Predictions(np.ones((3, 2)), np.ones((3, 2), bool)), "no class .* both a positive and a negative"),
        ("map_11_points", Predictions(np.ones((3, 2)), np.zeros((3, 2), bool)), "both a positive and a negative"),
        ("jaccard", Predictions(np.ones((3, 2)), np.ones((3, 2), bool)), "both a positive and a negative"),
        ("worst_group_top1", Predictions(np.eye(3), np.arange(3), groups=np.full(3, -1)), "no example is in a group"),
    ],
)
def test_metrics_that_every_model_maximizes_are_undefined(name, predictions, message):
    with pytest.raises(Undefined, match=message):
        METRICS[name](predictions)


@pytest.mark.parametrize("name", MULTI)
def test_ignored_candidates_have_no_effect(name):
    predictions = example(name)
    some = np.arange(N if name != "jaccard" else Q) % 3 == 0
    ignored = np.broadcast_to(some[:, None] if name != "jaccard" else some, predictions.scores.shape)
    kept = (~some, slice(None)) if name != "jaccard" else (slice(None), ~some)
    value = METRICS[name](dataclasses.replace(predictions, ignored=ignored))
    assert (
        value
        == METRICS[name](Predictions(predictions.scores[kept], predictions.targets[kept]))
        != METRICS[name](predictions)
    )


@pytest.mark.parametrize(
    "name, predictions, message",
    [
        (
            "top1",
            example("map"),
            r"targets int\[n\].*targets\[150, 8\].*Multi-label metrics: map, map_11_points, jaccard",
        ),
        ("map", example("top1"), r"targets bool\[n Q\].*targets int64\[150\].*targets\[:, None\] == np.arange"),
        ("roc_auc", example("top1"), r"float\[n 2\].*scores\[150, 8\]"),
    ],
)
def test_targets_of_the_wrong_kind_are_refused(name, predictions, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](predictions)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": np.zeros((0, 2)), "targets": np.zeros(0, int)}, "at least one example"),
        ({"targets": np.array([0, 1, 2])}, r"of scores\[2, 3\], got \[3\]"),
        ({"targets": np.array([0, 3])}, "class ids from 0 to 2, got 0 to 3"),
        ({"targets": np.array([-1, 2])}, "got -1 to 2"),
        ({"scores": np.zeros(2)}, "class ids from 0 to 1, got 0 to 2"),
        ({"groups": np.zeros(3, int)}, r"groups: expected int\[2\], one per example, got shape \[3\]"),
        ({"groups": np.zeros(1, int)}, r"groups: expected int\[2\], one per example, got shape \[1\]"),
        ({"ignored": np.zeros((2, 3), bool)}, r"multi-label targets bool\[2, 3\]"),
    ],
)
def test_inconsistent_arrays_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match=message):
        Predictions(**{"scores": np.zeros((2, 3)), "targets": np.array([0, 2])} | changes)


# --------------------------------------------------------------------------------------- confidence intervals


@pytest.mark.parametrize("name", METRICS)
def test_take_equals_new_predictions_of_the_rows(name):
    predictions = example(name)
    METRICS[name](predictions)
    rows = np.random.default_rng(0).integers(40, size=N)  # only of the first 40
    groups = None if predictions.groups is None else predictions.groups[rows]
    fresh = Predictions(predictions.scores[rows], predictions.targets[rows], groups=groups)
    assert METRICS[name](predictions.take(rows)) == METRICS[name](fresh) != METRICS[name](predictions)


def test_block_sizes_do_not_change_the_values(monkeypatch):
    f1, interval = METRICS["macro_f1"](example("macro_f1")), bootstrap_interval(example("map").scores[:, 0])
    monkeypatch.setattr(intervals, "BLOCK_SCORES", 7 * N)  # seven resamples
    assert bootstrap_interval(example("map").scores[:, 0]) == interval
    monkeypatch.setattr(metrics, "BLOCK_SCORES", 7 * Q)  # seven examples
    assert METRICS["macro_f1"](example("macro_f1")) == f1


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_intervals_have_the_nominal_coverage(level):
    """Of 600 samples; margins: three standard errors and the discreteness of n = 150."""
    rng = np.random.default_rng(0)
    sets = rng.random((600, N)) < 0.7
    inside = np.mean([low <= 0.7 <= high for low, high in (bootstrap_interval(s, level=level) for s in sets)])
    assert level - 0.03 <= inside <= level + 0.09
    of_hits = {int(hits): exact_interval(int(hits), N, level=level) for hits in np.unique(sets.sum(1))}
    exact = np.mean([low <= 0.7 <= high for low, high in (of_hits[int(s.sum())] for s in sets)])
    assert level - 0.01 <= exact <= level + 0.1
    assert exact >= inside


def test_the_two_bootstraps_agree():
    """Percentiles of 2,000 resamples: the standard error of either end is about 0.0015."""
    predictions = example("mean_per_class")
    for name, strata_n in (("top1", None), ("mean_per_class", predictions.targets)):
        by_values = bootstrap_interval(hits(predictions), strata_n=strata_n, resamples=2000)
        by_rows = bootstrap_metric(METRICS[name], predictions, strata_n=strata_n, resamples=2000, seed=1)
        assert by_values == pytest.approx(by_rows, abs=0.015)
        assert by_values.low < METRICS[name](predictions) < by_values.high
    assert by_values != pytest.approx(bootstrap_interval(hits(predictions), resamples=2000), abs=0.005)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_inside_its_interval_which_the_seed_determines(name):
    predictions = example(name)
    first, again, *others = (
        bootstrap_metric(METRICS[name], predictions, resamples=25, seed=s) for s in (3, 3, 4, 5, 6)
    )
    assert 0 <= first.low < first.high <= 1 and first.low <= METRICS[name](predictions) <= first.high
    assert first == again
    assert bootstrap_metric(METRICS[name], predictions, resamples=9) == bootstrap_metric(
        METRICS[name], predictions, resamples=9, seed=0
    )
    assert set(others) != {first}  # another seed may give the same interval of a discrete metric


def test_the_seed_determines_the_interval_of_a_mean():
    values = example("map").scores[:, 0]
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5) != bootstrap_interval(values)
    assert bootstrap_interval(values, seed=0) == bootstrap_interval(values)
    assert bootstrap_interval(values) == pytest.approx(
        values.mean() + np.array([-1.96, 1.96]) * values.std() / N**0.5, abs=0.01
    )


def test_a_mean_of_equal_hits_has_the_exact_interval():
    for value in (0, 1):
        assert intervals.mean_interval(np.full(30, value, float)) == exact_interval(30 * value, 30)
    assert intervals.mean_interval(np.full(30, 0.5)) == (0.5, 0.5)


def test_strata_keep_their_sizes():
    strata = np.repeat([0, 1], [100, 1])
    assert bootstrap_interval(strata == 1, strata_n=strata) == (0.5, 0.5)  # no variance within a stratum
    low, high = bootstrap_interval(strata == 1)
    assert low == 0 and high < 0.1


def test_one_example_has_an_interval():
    assert bootstrap_interval(np.array([True])) == (1, 1)
    assert bootstrap_metric(METRICS["top1"], Predictions(np.eye(3)[:1], np.array([0])), resamples=9) == (1, 1)
    assert exact_interval(1, 1) == pytest.approx((0.025, 1))


def test_undefined_resamples_are_ignored():
    pair = Predictions(np.array([0.0, 1.0]), np.array([0, 1]))
    assert bootstrap_metric(METRICS["roc_auc"], pair, resamples=20) == (1, 1)
    with pytest.raises(Undefined, match="all 2 targets are 1"):
        bootstrap_metric(METRICS["roc_auc"], Predictions(np.array([0.0, 1.0]), np.ones(2, int)))


@pytest.mark.parametrize(
    "correct, n, low, high",
    [  # scipy 1.17.1: binomtest(correct, n).proportion_ci(0.95, "exact")
        (0, 5, 0.0, 0.5218237501049814),
        (1, 1, 0.025000000000000022, 1.0),
        (38, 50, 0.6183092518959618, 0.8693900838025178),
        (4000, 5000, 0.7886390254363731, 0.8110096221215647),
    ],
)
def test_exact_interval_against_scipy(correct, n, low, high):
    assert exact_interval(correct, n) == pytest.approx((low, high), abs=1e-9)


def test_invalid_arguments_of_intervals_are_refused():
    with pytest.raises(ValueError, match="at least one value, all finite"):
        bootstrap_interval(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(np.zeros(0))
    with pytest.raises(ValueError, match="level: expected a fraction between 0 and 1.*got 95.0"):
        bootstrap_interval(np.ones(3), level=95.0)
    with pytest.raises(ValueError, match="got 6 of 5"):
        exact_interval(6, 5)
