"""Results by group, their differences, and confusions, against values computed by hand and by loops."""

import csv
import itertools
import math

import numpy as np
import pytest

from clip_jax.evals.analysis.bias import (
    by_group,
    confusion,
    disparity,
    error_pairs,
    intersect_groups,
    table_rows,
    to_csv,
)
from clip_jax.evals.intervals import Interval, exact_interval
from clip_jax.evals.metrics import Predictions, Undefined

Q = 4  # two classes of people, 0 and 1, and two harmful ones
CATEGORIES = {"non-human": (2,), "any harm": (2, 3)}
GROUPS = ("a", "b", "empty")


def predict(predicted, targets, groups):
    """Return predictions of the given classes."""
    return Predictions(np.eye(Q)[predicted], np.array(targets), groups=np.array(groups))


def example():
    """Group a: two correct, one predicted as 2, one as 3. Group b: two correct. One wrong example without a group."""
    return predict([0, 1, 2, 3, 0, 1, 2], [0, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, -1])


def test_rates_by_group():
    results = by_group(example(), GROUPS, CATEGORIES)
    assert [results[g].n for g in GROUPS] == [4, 2, 0]
    a, b = results["a"], results["b"]
    assert a.accuracy == (0.5, exact_interval(2, 4)) and b.accuracy == (1.0, exact_interval(2, 2))
    assert a.category_rates == {"non-human": (0.25, exact_interval(1, 4)), "any harm": (0.5, exact_interval(2, 4))}
    assert b.category_rates["any harm"] == (0.0, exact_interval(0, 2))


def test_a_group_without_examples_has_nan_and_a_full_interval():
    empty = by_group(example(), GROUPS, CATEGORIES)["empty"]
    assert empty.n == 0 and math.isnan(empty.accuracy.value)
    assert empty.accuracy.interval == empty.category_rates["any harm"].interval == Interval(0, 1)


def test_a_tie_predicts_the_first_class_and_nan_is_an_error():
    scores = np.eye(Q)[[0, 0, 0, 0]]
    scores[1, 2] = 1  # a tie with the correct class
    scores[2], scores[3, 3] = np.nan, np.inf
    result = by_group(Predictions(scores, np.zeros(4, int), groups=np.zeros(4, int)), ["all"], {"non-human": (2,)})[
        "all"
    ]
    assert result.accuracy.value == 0.5
    assert result.category_rates["non-human"].value == 0
    assert result.not_finite == 2


@pytest.mark.parametrize(
    ("change", "names", "categories", "message"),
    [
        ({"groups": None}, GROUPS, {}, "expected groups: .*intersect_groups"),
        ({"groups": np.arange(7)}, GROUPS, {}, "group 6 has no name: expected groups 0 to 2"),
        ({}, ("a", "b", "a"), {}, r"expected distinct names, got twice: \['a'\]"),
        ({}, GROUPS, {"harm": (2, 4)}, r"category 'harm': expected one or more class ids from 0 to 3, got \[2, 4\]"),
        ({}, GROUPS, {"harm": ()}, "one or more class ids from 0 to 3"),
        ({}, GROUPS, {"accuracy": (2,)}, "the name 'accuracy' is reserved"),
    ],
)
def test_invalid_groups_and_categories_are_rejected(change, names, categories, message):
    examples = example()
    with pytest.raises(ValueError, match=message):
        by_group(
            Predictions(examples.scores, examples.targets, **{"groups": examples.groups, **change}), names, categories
        )


# ------------------------------------------------------------------------------------------- disparity


def test_differences_and_ratios():
    found = disparity(example(), GROUPS, CATEGORIES)
    accuracy, non_human = found["accuracy"], found["non-human"]
    assert (accuracy.highest, accuracy.lowest, accuracy.difference, accuracy.ratio) == ("b", "a", 0.5, 2.0)
    assert (non_human.highest, non_human.lowest, non_human.difference) == ("a", "b", 0.25)
    assert non_human.ratio == math.inf
    none = disparity(predict([0, 1], [0, 1], [0, 1]), ["a", "b"], {"harm": (3,)})["harm"]
    assert (none.difference, none.ratio, none.p) == (0.0, 1.0, 1.0)


def test_p_equals_the_exact_permutation_test():
    groups, correct = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([1, 1, 1, 1, 0, 0, 0], bool)
    observed = abs(correct[groups == 0].mean() - correct[groups == 1].mean())
    permutations = [np.isin(np.arange(7), ids) for ids in itertools.combinations(range(7), 3)]
    exact = np.mean([abs(correct[c].mean() - correct[~c].mean()) >= observed - 1e-12 for c in permutations])
    assert 0.05 < exact < 0.95
    examples = predict(np.where(correct, 0, 1), np.zeros(7, int), groups)
    assert disparity(examples, ["a", "b"], permutations=40_000)["accuracy"].p == pytest.approx(exact, abs=0.01)


def groups_with_accuracies(rates, n=400):
    """Return n examples per group with the given accuracies; errors are predicted as class 2."""
    correct = np.concatenate([np.arange(n) < round(rate * n) for rate in rates])
    return predict(np.where(correct, 0, 2), np.zeros(len(correct), int), np.repeat(np.arange(len(rates)), n))


def test_p_is_small_only_if_groups_differ():
    names = ["a", "b", "c"]
    assert disparity(groups_with_accuracies([0.9, 0.9, 0.7]), names)["accuracy"].p == 1e-4  # 1 / (9999 + 1), not 0
    assert disparity(groups_with_accuracies([0.9, 0.9, 0.89]), names)["accuracy"].p > 0.5
    assert disparity(groups_with_accuracies([0.9, 0.9, 0.9]), names)["accuracy"].p == 1.0


def test_p_keeps_its_significance_level_without_a_difference():
    rng = np.random.default_rng(5)
    ps = []
    for _ in range(300):
        groups = np.repeat([0, 1, 2], [60, 25, 10])
        examples = predict(np.where(rng.random(95) < 0.7, 0, 1), np.zeros(95, int), groups)
        ps.append(disparity(examples, ["a", "b", "c"], permutations=199)["accuracy"].p)
    assert np.mean(np.array(ps) <= 0.05) < 0.09  # 0.05 and three standard errors
    assert np.mean(ps) > 0.4


def test_p_is_reproducible_and_corrected_for_the_number_of_tests():
    examples = groups_with_accuracies([0.9, 0.9, 0.86])
    names = ["a", "b", "c"]
    first = disparity(examples, names, CATEGORIES, seed=1)
    assert first == disparity(examples, names, CATEGORIES, seed=1)
    assert first["accuracy"].p != disparity(examples, names, CATEGORIES, seed=2)["accuracy"].p
    assert all(d.p_corrected == min(1, 3 * d.p) for d in first.values())
    assert first["accuracy"].p_corrected > first["accuracy"].p


def test_examples_without_a_group_and_empty_groups_do_not_affect_disparity():
    examples = example()
    without = examples.take(np.flatnonzero(examples.groups >= 0))
    assert disparity(examples, GROUPS, CATEGORIES) == disparity(without, GROUPS[:2], CATEGORIES)


def test_disparity_requires_two_groups():
    one = predict([0, 1, 2], [0, 1, 1], [0, 0, 0])
    assert by_group(one, ["all"])["all"].accuracy.value == pytest.approx(2 / 3)
    for names in (["all"], ["all", "empty"]):
        with pytest.raises(Undefined, match="two groups that have examples; got all"):
            disparity(one, names)
    with pytest.raises(ValueError, match="permutations=0"):
        disparity(example(), GROUPS, permutations=0)


# ----------------------------------------------------------------------------- groups, confusions, tables


def test_intersected_columns_have_all_combinations():
    ids, names = intersect_groups(["woman", "man", "woman", "", "man"], ["20-29", "3-9", "3-9", "3-9", "3-9"])
    assert names == ("man, 20-29", "man, 3-9", "woman, 20-29", "woman, 3-9")
    assert [names[i] if i >= 0 else None for i in ids] == ["woman, 20-29", "man, 3-9", "woman, 3-9", None, "man, 3-9"]
    assert intersect_groups(["b", "a"])[0].tolist() == [1, 0]
    results = by_group(predict([0] * 5, [0] * 5, ids), names)
    assert [r.n for r in results.values()] == [0, 2, 1, 1]


def test_columns_of_different_lengths_are_rejected():
    with pytest.raises(ValueError, match=r"columns of \[1, 2\] values"):
        intersect_groups(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="no columns"):
        intersect_groups()


def test_confusion_has_true_classes_as_rows_and_predictions_as_columns():
    predicted, targets = np.array([0, 1, 1, 2, 1]), np.array([0, 0, 0, 1, 1], np.int32)
    found = confusion(predicted, targets, 3)
    expected = np.zeros((3, 3), np.int64)
    for j, i in zip(predicted, targets, strict=True):
        expected[i, j] += 1
    assert found.dtype == np.int64 and (found == expected).all() and found[0, 1] == 2
    with pytest.raises(ValueError, match="predicted: expected class ids 0 to 1, got 0 to 2"):
        confusion(predicted, targets, 2)
    with pytest.raises(ValueError, match="targets: expected class ids 0 to 2, got -1 to 1"):
        confusion(predicted, np.array([0, 0, 0, 1, -1]), 3)


def test_error_pairs_are_sorted_by_count():
    table = np.array([[90, 1, 2], [5, 3, 2], [0, 0, 7]])
    pairs = error_pairs(table, ["dog", "wolf", "cat"])
    assert pairs[0] == ("wolf", "dog", 5, 0.5)
    assert [(p.true_class, p.predicted_class) for p in pairs[1:]] == [("dog", "cat"), ("wolf", "cat"), ("dog", "wolf")]
    assert error_pairs(table, ["dog", "wolf", "cat"], top=1) == pairs[:1]
    many = error_pairs(np.ones((30, 30), np.int64), [str(i) for i in range(30)], top=40)
    assert [(p.true_class, p.predicted_class) for p in many[:30]] == [("0", str(j)) for j in range(1, 30)] + [
        ("1", "0")
    ]
    with pytest.raises(ValueError, match="class_names: expected 3, one per class, got 2"):
        error_pairs(table, ["dog", "wolf"])


def test_csv_round_trip_of_table_rows():
    table = table_rows(by_group(example(), GROUPS, {"harm, any": (2, 3)}))
    assert table[0]["group"] == "a" and table[0]["n"] == 4 and table[0]["harm, any"] == 0.5
    assert (table[0]["accuracy low"], table[0]["accuracy high"]) == exact_interval(2, 4)
    assert table[2]["n"] == 0 and table[2]["accuracy"] == table[2]["harm, any low"] == ""
    read = list(csv.DictReader(to_csv(table).splitlines()))
    assert [{k: str(v) for k, v in row.items()} for row in table] == read
