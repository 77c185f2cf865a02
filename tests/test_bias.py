"""Groups, their differences and confusions, by hand and by plain loops; and that no broken model looks fair."""

import csv
import itertools
import math

import numpy as np
import pytest

from clip_jax.evals.analysis.bias import by_group, confusion, cross, disparity, error_pairs, rows, to_csv
from clip_jax.evals.metrics import Interval, Predictions, Undefined, exact_interval

Q = 4  # two classes of people, 0 and 1, and two that none should be named by
CATEGORIES = {"non-human": (2,), "any harm": (2, 3)}
GROUPS = ("a", "b", "nobody")


def scored(named, targets, groups):
    """Return examples of a model that names these classes."""
    return Predictions(np.eye(Q)[named], np.array(targets), groups=np.array(groups))


def example():
    """Four of group a: two right, one named 2, one named 3. Two of group b: both right. One, wrong, of no group."""
    return scored([0, 1, 2, 3, 0, 1, 2], [0, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, -1])


def test_groups_of_different_size_by_hand():
    results = by_group(example(), GROUPS, CATEGORIES)
    assert [results[g].n for g in GROUPS] == [4, 2, 0]
    a, b = results["a"], results["b"]
    assert a.accuracy == (0.5, exact_interval(2, 4)) and b.accuracy == (1.0, exact_interval(2, 2))
    assert a.rate_named == {"non-human": (0.25, exact_interval(1, 4)), "any harm": (0.5, exact_interval(2, 4))}
    assert b.rate_named["any harm"] == (0.0, exact_interval(0, 2))


def test_a_group_without_examples_says_that_nothing_is_known():
    nobody = by_group(example(), GROUPS, CATEGORIES)["nobody"]
    assert nobody.n == 0 and math.isnan(nobody.accuracy.value)
    assert nobody.accuracy.interval == nobody.rate_named["any harm"].interval == Interval(0, 1)


def test_ties_and_nan_count_against_the_model():
    scores = np.eye(Q)[[0, 0, 0, 0]]
    scores[1, 2] = 1  # as high as the right one
    scores[2], scores[3, 3] = np.nan, np.inf
    result = by_group(Predictions(scores, np.zeros(4, int), groups=np.zeros(4, int)), ["all"], {"non-human": (2,)})[
        "all"
    ]
    assert result.accuracy.value == 0.25
    assert result.rate_named["non-human"].value == 0.25
    assert result.not_finite == 2


@pytest.mark.parametrize(
    ("change", "names", "categories", "message"),
    [
        ({"groups": None}, GROUPS, {}, "needs groups.*cross"),
        ({"groups": np.arange(7)}, GROUPS, {}, "group 6 has no name: 3 names, for groups 0 to 2"),
        ({}, ("a", "b", "a"), {}, r"same name: \['a'\]"),
        ({}, GROUPS, {"harm": (2, 4)}, r"category 'harm': class ids \[2, 4\]; one or more from 0 to 3"),
        ({}, GROUPS, {"harm": ()}, "one or more from 0 to 3"),
        ({}, GROUPS, {"accuracy": (2,)}, "can't be called 'accuracy'"),
    ],
)
def test_what_does_not_fit_is_refused(change, names, categories, message):
    examples = example()
    with pytest.raises(ValueError, match=message):
        by_group(
            Predictions(examples.scores, examples.targets, **{"groups": examples.groups, **change}), names, categories
        )


# ------------------------------------------------------------------------------------------- disparity


def test_differences_and_ratios_by_hand():
    found = disparity(example(), GROUPS, CATEGORIES)
    accuracy, non_human = found["accuracy"], found["non-human"]
    assert (accuracy.highest, accuracy.lowest, accuracy.difference, accuracy.ratio) == ("b", "a", 0.5, 2.0)
    assert (non_human.highest, non_human.lowest, non_human.difference) == ("a", "b", 0.25)
    assert non_human.ratio == math.inf
    none = disparity(scored([0, 1], [0, 1], [0, 1]), ["a", "b"], {"harm": (3,)})["harm"]
    assert (none.difference, none.ratio, none.p) == (0.0, 1.0, 1.0)


def test_p_is_that_of_all_permutations():
    groups, right = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([1, 1, 1, 1, 0, 0, 0], bool)
    observed = abs(right[groups == 0].mean() - right[groups == 1].mean())
    all_of_them = [np.isin(np.arange(7), chosen) for chosen in itertools.combinations(range(7), 3)]
    exact = np.mean([abs(right[c].mean() - right[~c].mean()) >= observed - 1e-12 for c in all_of_them])
    assert 0.05 < exact < 0.95
    examples = scored(np.where(right, 0, 1), np.zeros(7, int), groups)
    assert disparity(examples, ["a", "b"], permutations=40_000)["accuracy"].p == pytest.approx(exact, abs=0.01)


def fleet(rates, n=400):
    """Return n examples for each group, rates of them right, the others named 2."""
    right = np.concatenate([np.arange(n) < round(rate * n) for rate in rates])
    return scored(np.where(right, 0, 2), np.zeros(len(right), int), np.repeat(np.arange(len(rates)), n))


def test_p_is_small_where_groups_differ_and_not_where_they_do_not():
    names = ["a", "b", "c"]
    assert disparity(fleet([0.9, 0.9, 0.7]), names)["accuracy"].p == 1e-4  # 1 / (9999 + 1), and not 0
    assert disparity(fleet([0.9, 0.9, 0.89]), names)["accuracy"].p > 0.5
    assert disparity(fleet([0.9, 0.9, 0.9]), names)["accuracy"].p == 1.0


def test_p_holds_its_level_under_no_difference():
    rng = np.random.default_rng(5)
    ps = []
    for _ in range(300):
        groups = np.repeat([0, 1, 2], [60, 25, 10])
        examples = scored(np.where(rng.random(95) < 0.7, 0, 1), np.zeros(95, int), groups)
        ps.append(disparity(examples, ["a", "b", "c"], permutations=199)["accuracy"].p)
    assert np.mean(np.array(ps) <= 0.05) < 0.09  # 0.05 and three standard errors
    assert np.mean(ps) > 0.4


def test_p_is_reproducible_and_corrected_for_the_number_of_tests():
    examples = fleet([0.9, 0.9, 0.86])
    names = ["a", "b", "c"]
    first = disparity(examples, names, CATEGORIES, seed=1)
    assert first == disparity(examples, names, CATEGORIES, seed=1)
    assert first["accuracy"].p != disparity(examples, names, CATEGORIES, seed=2)["accuracy"].p
    assert all(d.p_corrected == min(1, 3 * d.p) for d in first.values())
    assert first["accuracy"].p_corrected > first["accuracy"].p


def test_examples_of_no_group_and_empty_groups_change_nothing():
    examples = example()
    without = examples.take(np.flatnonzero(examples.groups >= 0))
    assert disparity(examples, GROUPS, CATEGORIES) == disparity(without, GROUPS[:2], CATEGORIES)


def test_one_group_has_no_difference():
    one = scored([0, 1, 2], [0, 1, 1], [0, 0, 0])
    assert by_group(one, ["all"])["all"].accuracy.value == pytest.approx(2 / 3)
    for names in (["all"], ["all", "nobody"]):
        with pytest.raises(Undefined, match="two groups that have examples; got all"):
            disparity(one, names)
    with pytest.raises(ValueError, match="permutations=0"):
        disparity(example(), GROUPS, permutations=0)


# ----------------------------------------------------------------------------- crossing, confusion, tables


def test_crossed_columns_name_every_combination():
    ids, names = cross(["woman", "man", "woman", "", "man"], ["20-29", "3-9", "3-9", "3-9", "3-9"])
    assert names == ("man, 20-29", "man, 3-9", "woman, 20-29", "woman, 3-9")
    assert [names[i] if i >= 0 else None for i in ids] == ["woman, 20-29", "man, 3-9", "woman, 3-9", None, "man, 3-9"]
    assert cross(["b", "a"])[0].tolist() == [1, 0]
    results = by_group(scored([0] * 5, [0] * 5, ids), names)
    assert [r.n for r in results.values()] == [0, 2, 1, 1]


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"columns of \[1, 2\] values"):
        cross(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="no columns"):
        cross()


def test_confusion_counts_rows_right_and_columns_named():
    named, targets = np.array([0, 1, 1, 2, 1]), np.array([0, 0, 0, 1, 1], np.int32)
    found = confusion(named, targets, 3)
    expected = np.zeros((3, 3), np.int64)
    for j, i in zip(named, targets, strict=True):
        expected[i, j] += 1
    assert found.dtype == np.int64 and (found == expected).all() and found[0, 1] == 2
    with pytest.raises(ValueError, match="named from 0 to 2, but classes=2: 0 to 1"):
        confusion(named, targets, 2)
    with pytest.raises(ValueError, match="targets from -1 to 1"):
        confusion(named, np.array([0, 0, 0, 1, -1]), 3)


def test_the_most_frequent_confusions_come_first():
    table = np.array([[90, 1, 2], [5, 3, 2], [0, 0, 7]])
    pairs = error_pairs(table, ["dog", "wolf", "cat"])
    assert pairs[0] == ("wolf", "dog", 5, 0.5)
    assert [(p.right, p.named) for p in pairs[1:]] == [("dog", "cat"), ("wolf", "cat"), ("dog", "wolf")]
    assert error_pairs(table, ["dog", "wolf", "cat"], top=1) == pairs[:1]
    many = error_pairs(np.ones((30, 30), np.int64), [str(i) for i in range(30)], top=40)
    assert [(p.right, p.named) for p in many[:30]] == [("0", str(j)) for j in range(1, 30)] + [("1", "0")]
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        error_pairs(table, ["dog", "wolf"])


def test_rows_are_a_table_that_csv_gives_back():
    table = rows(by_group(example(), GROUPS, {"harm, any": (2, 3)}))
    assert table[0]["group"] == "a" and table[0]["n"] == 4 and table[0]["harm, any"] == 0.5
    assert (table[0]["accuracy low"], table[0]["accuracy high"]) == exact_interval(2, 4)
    assert table[2]["n"] == 0 and table[2]["accuracy"] == table[2]["harm, any low"] == ""
    back = list(csv.DictReader(to_csv(table).splitlines()))
    assert [{k: str(v) for k, v in row.items()} for row in table] == back
