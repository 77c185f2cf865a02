"""Measures against scikit-learn's recorded numbers and plain loops; and that no broken model gets a good one."""

import dataclasses
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest

from clip_jax.evals import metrics, ranking
from clip_jax.evals.metrics import (
    METRICS,
    Predictions,
    Undefined,
    bootstrap_interval,
    bootstrap_metric,
    exact_interval,
    hits,
)

N, Q = 150, 8
EXACT = 1e-12  # float64 sums in another order
MULTI = ("map", "map_11_points", "jaccard")

# By scikit-learn 1.9.1 on NumPy 2.4.6, of the arrays that example() and its seed make: p = scores.argmax(1) and
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


def with_scores(scored, scores):
    return dataclasses.replace(scored, scores=scores)


def right(scored):
    """True where a perfect model scores high."""
    return scored.targets if scored.targets.ndim == 2 else scored.targets[:, None] == np.arange(scored.scores.shape[1])


@pytest.mark.parametrize("name", SKLEARN)
def test_against_scikit_learn(name):
    assert METRICS[name](example(name)) == pytest.approx(SKLEARN[name], abs=EXACT)


def test_scores_of_yes_alone_are_those_of_two_classes_subtracted():
    two = example("roc_auc")
    assert METRICS["roc_auc"](Predictions(two.scores[:, 1] - two.scores[:, 0], two.targets)) == METRICS["roc_auc"](two)


def test_eleven_points_equal_a_walk_down_the_list():
    scored = example("map_11_points")
    averages = []
    for scores, positive in zip(scored.scores.T, scored.targets.T, strict=True):
        best, found = dict.fromkeys(range(11), Fraction(0)), 0
        for seen, row in enumerate(sorted(range(N), key=lambda i, s=scores: -s[i]), start=1):
            found += int(positive[row])
            for tenths in best:
                if Fraction(found, int(positive.sum())) >= Fraction(tenths, 10):
                    best[tenths] = max(best[tenths], Fraction(found, seen))
        averages.append(float(sum(best.values()) / 11))
    value = METRICS["map_11_points"](scored)
    assert value == pytest.approx(np.mean(averages), abs=EXACT)
    assert value != pytest.approx(SKLEARN["map"], abs=1e-3)  # or it could be the other average precision


def test_a_recall_of_three_tenths_reaches_the_fourth_point():
    """3 × 0.1 > 3 / 10 in floating point."""
    positive = np.array([True] * 3 + [False] * 7 + [True] * 7)
    value = METRICS["map_11_points"](Predictions(-np.arange(17.0)[:, None], positive[:, None]))
    assert value == pytest.approx((4 + 7 * 10 / 17) / 11, abs=EXACT)


def test_the_worst_group_is_the_lowest_and_no_group_is_none():
    scores = np.eye(7)[[0, 1, 2, 3, 5, 5]]  # the fifth example is named wrongly
    targets = np.array([0, 1, 2, 3, 4, 5])
    worst = METRICS["worst_group_top1"]
    assert worst(Predictions(scores, targets, groups=np.array([0, 0, 0, 9, 9, 9]))) == pytest.approx(2 / 3)
    assert worst(Predictions(scores, targets, groups=np.array([0, 0, 0, 9, -1, 9]))) == 1
    second_best = scores + np.linspace(0, 0.5, 7)[None]
    assert METRICS["worst_group_top5"](Predictions(second_best, targets, groups=targets)) == 1
    assert worst(Predictions(second_best, targets, groups=targets)) == 0
    with pytest.raises(ValueError, match=r"needs groups: Predictions\(scores, targets, groups=int"):
        worst(Predictions(scores, targets))


# --------------------------------------------------------------------------------------------- no good number


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_model_gets_one_and_a_reversed_one_less(name):
    scored = example(name)
    perfect = right(scored).astype(np.float32)
    assert METRICS[name](with_scores(scored, perfect)) == 1
    assert METRICS[name](with_scores(scored, -perfect)) < 0.5


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_examples_does_not_matter(name):
    scored = example(name)
    scored = with_scores(scored, np.round(scored.scores, 1))  # many ties
    shuffled = scored.take(np.random.default_rng(1).permutation(N))
    assert METRICS[name](shuffled) == pytest.approx(METRICS[name](scored), abs=EXACT)


@pytest.mark.parametrize("name", METRICS)
def test_constant_scores_get_no_more_than_chance_whatever_their_last_bits(name):
    scored, perfect = example(name), right(example(name))
    constant = METRICS[name](with_scores(scored, np.full(scored.scores.shape, 0.2)))
    chance = {"roc_auc": 0.5, "map": scored.targets.mean(), "map_11_points": scored.targets.mean()}
    assert constant == pytest.approx(chance.get(name, 0), abs=EXACT)
    for last_bits in (4e-7 * perfect, -4e-7 * perfect):  # 8e-7 apart where AUC subtracts, still a tie
        value = METRICS[name](with_scores(scored, 0.2 + last_bits))
        assert value == pytest.approx(0.5, abs=EXACT) if name == "roc_auc" else value <= constant + EXACT
    untold = dataclasses.replace(scored, scores=np.zeros(scored.scores.shape), tie=0.0)
    assert METRICS[name](untold) == pytest.approx(constant, abs=EXACT)
    assert METRICS[name](with_scores(scored, 0.2 + 4e-6 * perfect)) == 1


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_count_against_the_model(name, broken):
    scored, perfect = example(name), right(example(name))
    chance = METRICS[name](with_scores(scored, np.zeros(scored.scores.shape)))
    assert METRICS[name](with_scores(scored, np.full(scored.scores.shape, broken))) == 0
    assert METRICS[name](with_scores(scored, np.where(perfect, broken, 0))) == 0
    assert METRICS[name](with_scores(scored, np.where(perfect, 1.0, broken))) <= chance
    one = scored.scores.copy()
    one[np.nonzero(perfect)[0][0]] = broken  # a single picture
    assert METRICS[name](with_scores(scored, one)) <= METRICS[name](scored)


def test_ranks_are_those_of_ranking_but_for_last_where_that_has_worse_than_any():
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(n, 16)).astype(np.float32) for n in (N, Q))
    images[5], texts[3] = np.nan, texts[4]
    targets = rng.integers(Q, size=N)
    scores = np.concatenate([scores for _, scores in ranking.score_blocks(images, texts)])
    expected = ranking.ranks(images, texts, (np.arange(N), targets))
    assert expected[5] == Q
    np.testing.assert_array_equal(Predictions(scores, targets).ranks, np.minimum(expected, Q - 1))


@pytest.mark.parametrize("name", ["top1", "mean_per_class", "macro_f1"])
def test_classes_of_the_same_name_can_not_be_told_apart(name):
    scored = Predictions(np.eye(4)[[0, 1, 2, 2]][:, [0, 1, 2, 2]], np.arange(4))
    assert METRICS[name](scored) == 0.5


def test_f1_charges_the_class_that_is_named_instead():
    """0 is found once and missed once, 1 is named in its place: F1 of 2/3 each, and class 2 is not asked for."""
    scores = np.eye(3)[[0, 1, 1]]
    assert METRICS["macro_f1"](Predictions(scores, np.array([0, 0, 1]))) == pytest.approx(2 / 3)
    assert METRICS["macro_f1"](Predictions(scores[:, [0, 2, 1]], np.array([0, 0, 1]))) == pytest.approx(1 / 3)
    scores[1, 0] = 1  # a tie of the right one with 1, which is named then
    assert METRICS["macro_f1"](Predictions(scores, np.array([0, 0, 1]))) == pytest.approx(2 / 3)


def test_a_tie_of_many_steps_is_scaled_with_the_scores():
    logits = 100 * np.array([[0.2, 0.2 + 5e-7]])
    assert METRICS["top1"](Predictions(logits, np.array([1]))) == 1
    assert METRICS["top1"](Predictions(logits, np.array([1]), tie=1e-4)) == 0


@pytest.mark.parametrize(
    "name, scored, message",
    [
        ("roc_auc", Predictions(np.arange(3.0), np.ones(3, int)), "all 3 targets are 1"),
        ("roc_auc", Predictions(np.arange(3.0), np.zeros(3, int)), "all 3 targets are 0"),
        ("top1", Predictions(np.ones((3, 1)), np.zeros(3, int)), "1 classes is always among the first 1"),
        (
            "top5",
            Predictions(np.ones((3, 5)), np.zeros(3, int)),
            "5 classes is always among the first 5; take k below",
        ),
        ("map", Predictions(np.ones((3, 2)), np.ones((3, 2), bool)), "no class .* both a positive and a negative"),
        ("map_11_points", Predictions(np.ones((3, 2)), np.zeros((3, 2), bool)), "both a positive and a negative"),
        ("jaccard", Predictions(np.ones((3, 2)), np.ones((3, 2), bool)), "both a positive and a negative"),
        ("worst_group_top1", Predictions(np.eye(3), np.arange(3), groups=np.full(3, -1)), "no example is in a group"),
    ],
)
def test_what_no_model_can_get_wrong_is_no_measurement(name, scored, message):
    with pytest.raises(Undefined, match=message):
        METRICS[name](scored)


@pytest.mark.parametrize("name", MULTI)
def test_what_is_ignored_might_as_well_not_be_there(name):
    scored = example(name)
    some = np.arange(N if name != "jaccard" else Q) % 3 == 0
    ignored = np.broadcast_to(some[:, None] if name != "jaccard" else some, scored.scores.shape)
    kept = (~some, slice(None)) if name != "jaccard" else (slice(None), ~some)
    value = METRICS[name](dataclasses.replace(scored, ignored=ignored))
    assert value == METRICS[name](Predictions(scored.scores[kept], scored.targets[kept])) != METRICS[name](scored)


@pytest.mark.parametrize(
    "name, scored, message",
    [
        ("top1", example("map"), r"one right class each.*targets\[150, 8\].*take map, map_11_points or jaccard"),
        ("map", example("top1"), r"several right at once.*targets int64\[150\].*targets\[:, None\] == np.arange"),
        ("roc_auc", example("top1"), r"of two classes.*scores\[150, 8\]"),
    ],
)
def test_the_wrong_kind_of_targets_is_told_what_to_take(name, scored, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](scored)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": np.zeros((0, 2)), "targets": np.zeros(0, int)}, "no examples"),
        ({"targets": np.array([0, 1, 2])}, r"targets\[3\] don't belong to scores\[2, 3\]"),
        ({"targets": np.array([0, 3])}, "targets from 0 to 3, but there are 3 classes: 0 to 2"),
        ({"targets": np.array([-1, 2])}, "targets from -1 to 2"),
        ({"groups": np.zeros(3, int)}, r"groups\[3\] for 2 examples"),
        ({"ignored": np.zeros((2, 3), bool)}, r"goes with multi-label targets bool\[2, 3\]"),
        ({"tie": -1.0}, "tie=-1.0"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests, where shapes aren't checked
    with pytest.raises(ValueError, match=message):
        Predictions(**{"scores": np.zeros((2, 3)), "targets": np.array([0, 2])} | changes)


# ----------------------------------------------------------------------------------------------- how sure it is


@pytest.mark.parametrize("name", METRICS)
def test_taking_rows_is_a_set_of_these_rows_also_when_ranks_are_known(name):
    scored = example(name)
    METRICS[name](scored)
    rows = np.random.default_rng(0).integers(40, size=N)  # of the first 40 only, which are not like all
    groups = None if scored.groups is None else scored.groups[rows]
    fresh = Predictions(scored.scores[rows], scored.targets[rows], groups=groups)
    assert METRICS[name](scored.take(rows)) == METRICS[name](fresh) != METRICS[name](scored)


def test_blocks_change_nothing(monkeypatch):
    f1, interval = METRICS["macro_f1"](example("macro_f1")), bootstrap_interval(example("map").scores[:, 0])
    monkeypatch.setattr(metrics, "BLOCK_SCORES", 7 * N)  # seven resamples
    assert bootstrap_interval(example("map").scores[:, 0]) == interval
    monkeypatch.setattr(metrics, "BLOCK_SCORES", 7 * Q)  # seven examples
    assert METRICS["macro_f1"](example("macro_f1")) == f1


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_intervals_cover_what_they_should(level):
    """Of 600 sets, as many as `level` says contain the truth; three standard errors and the grid of n = 150 apart."""
    rng = np.random.default_rng(0)
    sets = rng.random((600, N)) < 0.7
    inside = np.mean([low <= 0.7 <= high for low, high in (bootstrap_interval(s, level=level) for s in sets)])
    assert level - 0.03 <= inside <= level + 0.09
    of_hits = {int(right): exact_interval(int(right), N, level=level) for right in np.unique(sets.sum(1))}
    exact = np.mean([low <= 0.7 <= high for low, high in (of_hits[int(s.sum())] for s in sets)])
    assert level - 0.01 <= exact <= level + 0.1
    assert exact >= inside


def test_the_two_bootstraps_agree():
    """To the noise of percentiles of 2,000 resamples: the standard error of either end is some 0.0015."""
    scored = example("mean_per_class")
    for name, strata_n in (("top1", None), ("mean_per_class", scored.targets)):
        by_values = bootstrap_interval(hits(scored), strata_n=strata_n, resamples=2000)
        by_rows = bootstrap_metric(METRICS[name], scored, strata_n=strata_n, resamples=2000, seed=1)
        assert by_values == pytest.approx(by_rows, abs=0.015)
        assert by_values.low < METRICS[name](scored) < by_values.high
    assert by_values != pytest.approx(bootstrap_interval(hits(scored), resamples=2000), abs=0.005)


@pytest.mark.parametrize("name", METRICS)
def test_every_measure_has_an_interval_around_it_and_a_seed_repeats_it(name):
    scored = example(name)
    first, again, *others = (bootstrap_metric(METRICS[name], scored, resamples=25, seed=s) for s in (3, 3, 4, 5, 6))
    assert 0 <= first.low < first.high <= 1 and first.low <= METRICS[name](scored) <= first.high
    assert first == again
    assert set(others) != {first}  # one other seed may give the same, of the few values that an accuracy has


def test_a_seed_repeats_the_interval_of_a_mean():
    values = example("map").scores[:, 0]
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5) != bootstrap_interval(values)
    assert bootstrap_interval(values) == pytest.approx(
        values.mean() + np.array([-1.96, 1.96]) * values.std() / N**0.5, abs=0.01
    )


def test_strata_keep_their_sizes():
    strata = np.repeat([0, 1], [100, 1])
    assert bootstrap_interval(strata == 1, strata_n=strata) == (0.5, 0.5)  # each stratum is sure of its mean
    low, high = bootstrap_interval(strata == 1)
    assert low == 0 and high < 0.1


def test_one_example_has_an_interval():
    assert bootstrap_interval(np.array([True])) == (1, 1)
    assert bootstrap_metric(METRICS["top1"], Predictions(np.eye(3)[:1], np.array([0])), resamples=9) == (1, 1)
    assert exact_interval(1, 1) == pytest.approx((0.025, 1))


def test_resamples_that_have_no_value_are_left_out():
    pair = Predictions(np.array([0.0, 1.0]), np.array([0, 1]))
    assert bootstrap_metric(METRICS["roc_auc"], pair, resamples=20) == (1, 1)
    with pytest.raises(Undefined, match="all 2 targets are 1"):
        bootstrap_metric(METRICS["roc_auc"], Predictions(np.array([0.0, 1.0]), np.ones(2, int)))


@pytest.mark.parametrize(
    "right, n, low, high",
    [  # scipy 1.17.1: binomtest(right, n).proportion_ci(0.95, "exact")
        (0, 5, 0.0, 0.5218237501049814),
        (1, 1, 0.025000000000000022, 1.0),
        (38, 50, 0.6183092518959618, 0.8693900838025178),
        (4000, 5000, 0.7886390254363731, 0.8110096221215647),
    ],
)
def test_exact_interval_against_scipy(right, n, low, high):
    assert exact_interval(right, n) == pytest.approx((low, high), abs=1e-9)


def test_intervals_refuse_what_they_can_not_do():
    with pytest.raises(ValueError, match="all finite: count what is not as a miss"):
        bootstrap_interval(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(np.zeros(0))
    with pytest.raises(ValueError, match="level=95.0 is a fraction"):
        bootstrap_interval(np.ones(3), level=95.0)
    with pytest.raises(ValueError, match="6 right of 5"):
        exact_interval(6, 5)
