"""Who a model is wrong about: accuracy and named classes by group, how much they differ, and what is confused.

After Radford et al. 2021, section 7.1: FairFace's people classified among its classes and others that no picture of a
person should be named by ('animal', 'gorilla', 'thief', 'criminal' …), by race, gender and age. Works for any test set
with groups. The predicted class is `Predictions.named`: ties and scores that aren't finite count against it.
A row of NaN predicts the first wrong class, so that `not_finite` has to be 0 for the rates to be meaningful.

Deviation: intervals are exact and differences are tested, by permutation, corrected for the number of tests.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer

from clip_jax.evals.metrics import Interval, Predictions, Undefined, exact_interval, hits

PERMUTATIONS = 9999  # so that the smallest p is 1/10,000
ACCURACY = "accuracy"
Categories = Mapping[str, Sequence[int]]  # by name the class ids that count as it: {'crime': (8, 9)}
Cell = str | int | float


class Rate(NamedTuple):
    """A share of examples and its exact interval; NaN between 0 and 1 where there are no examples."""

    value: float
    interval: Interval


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """One group: how many examples, how many of them with a score that isn't finite, and how the model did.

    rate_named: by category how often the model names one of its classes.
    """

    n: int
    not_finite: int
    accuracy: Rate
    rate_named: Mapping[str, Rate]


@dataclasses.dataclass(frozen=True)
class Disparity:
    """How far the groups are apart in one rate.

    difference, ratio: of the highest to the lowest group's rate; the ratio is inf over 0, and 1 where all are 0.
    p: how often groups drawn at random from all examples are as far apart; never 0.
    p_corrected: Bonferroni's, p times the number of rates tested together, at most 1.
    """

    highest: str
    lowest: str
    difference: float
    ratio: float
    p: float
    p_corrected: float


class ErrorPair(NamedTuple):
    """A class taken for another one: how often, and in what share of its examples."""

    right: str
    named: str
    count: int
    share: float


def cross(*columns: Sequence[str]) -> tuple[Int64[np.ndarray, "n"], tuple[str, ...]]:
    """Return group ids and names from what is written of each example: of gender and age 'woman, 20-29'.

    Names are all combinations, sorted, so that one that nobody is in shows with n = 0. An example with an empty value
    is in no group: its id is -1.

    Raises: ValueError without columns or for columns of different length.
    """
    if not columns or len(lengths := {len(column) for column in columns}) > 1:
        got = f"columns of {sorted(lengths)} values" if columns else "no columns"
        raise ValueError(f"groups need columns with a value for each example; got {got}")
    values = [sorted({value for value in column if value}) for column in columns]
    names = tuple(", ".join(combination) for combination in itertools.product(*values))
    ids = {combination: i for i, combination in enumerate(itertools.product(*values))}
    return np.array([ids.get(row, -1) for row in zip(*columns, strict=True)], np.int64), names


def by_group(
    scored: Predictions, group_names: Sequence[str], categories: Categories | None = None
) -> dict[str, GroupResult]:
    """Return for each group its accuracy and how often each category is named, with exact 95 % intervals.

    categories: by name class ids, e.g. {'non-human': (7, 8, 9), 'crime': (10, 11)}; no matter what is right.

    Raises: ValueError without groups, for groups without a name, and for class ids that there are none of.
    """
    groups_n = _groups(scored, group_names)
    events = _events(scored, categories or {})
    broken_n = ~np.isfinite(scored.scores).all(1)
    results = {}
    for group, name in enumerate(group_names):
        rows_n = groups_n == group
        rates = {event: _rate(happened_n[rows_n]) for event, happened_n in events.items()}
        accuracy = rates.pop(ACCURACY)
        results[name] = GroupResult(int(rows_n.sum()), int(broken_n[rows_n].sum()), accuracy, rates)
    return results


def disparity(
    scored: Predictions,
    group_names: Sequence[str],
    categories: Categories | None = None,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Disparity]:
    """Return for 'accuracy' and each category how far apart the groups are, with a permutation test's p.

    Groups without examples are left out. The test takes examples as independent: several pictures of one person make p
    too small. A small group's rate is the likeliest to be the highest or the lowest, and p allows for that.

    Raises: Undefined with fewer than two groups that have examples; ValueError as `by_group` does.
    """
    groups_n = _groups(scored, group_names)
    sizes_M = np.bincount(groups_n[groups_n >= 0], minlength=len(group_names))
    names = [name for name, size in zip(group_names, sizes_M, strict=True) if size]
    if len(names) < 2:
        raise Undefined(f"a difference needs two groups that have examples; got {', '.join(names) or 'none'}")
    if permutations < 1:
        raise ValueError(f"permutations={permutations}: at least 1, and p is no smaller than 1 / (permutations + 1)")
    events, found = _events(scored, categories or {}), {}
    for event, happened_n in events.items():
        counts_M = np.bincount(groups_n[happened_n & (groups_n >= 0)], minlength=len(group_names))[sizes_M > 0]
        rates_M = counts_M / sizes_M[sizes_M > 0]
        high, low = float(rates_M.max()), float(rates_M.min())
        ratio = high / low if low else math.inf if high else 1.0
        p = _permutation_p(counts_M, sizes_M[sizes_M > 0], permutations, seed)
        highest, lowest = names[rates_M.argmax()], names[rates_M.argmin()]
        found[event] = Disparity(highest, lowest, high - low, ratio, p, min(1.0, p * len(events)))
    return found


def _permutation_p(
    counts_M: Int64[np.ndarray, "M"], sizes_M: Int64[np.ndarray, "M"], permutations: int, seed: int
) -> float:
    """Return how often M groups at random are as far apart, their own order counted in (Phipson and Smyth 2010).

    What shuffling group ids does to the counts is to draw them from the multivariate hypergeometric distribution.
    """
    rng = np.random.default_rng(seed)
    drawn_mM = rng.multivariate_hypergeometric(sizes_M, int(counts_M.sum()), permutations, method="marginals")
    rates_mM, rates_M = drawn_mM / sizes_M[None], counts_M / sizes_M
    as_far = np.ptp(rates_mM, axis=1) >= np.ptp(rates_M) - 1e-12  # equal differences differ in their last bits
    return float((1 + as_far.sum()) / (1 + permutations))


def _groups(scored: Predictions, group_names: Sequence[str]) -> Int64[np.ndarray, "n"]:
    if scored.groups is None:
        raise ValueError("needs groups: Predictions(scores, targets, groups=int[n]); `cross` makes them from columns")
    if (highest := int(scored.groups.max())) >= len(group_names):
        raise ValueError(
            f"group {highest} has no name: {len(group_names)} names, for groups 0 to {len(group_names) - 1}"
        )
    if len(set(group_names)) < len(group_names):
        raise ValueError(f"groups of the same name: {sorted(n for n in set(group_names) if group_names.count(n) > 1)}")
    return scored.groups.astype(np.int64)


def _events(scored: Predictions, categories: Categories) -> dict[str, Bool[np.ndarray, "n"]]:
    """Return accuracy's hits, and for each category whether the model names one of its classes."""
    events = {ACCURACY: hits(scored)}
    classes = scored.scores.shape[1]
    for name, class_ids in categories.items():
        if name == ACCURACY:
            raise ValueError(f"a category can't be called {ACCURACY!r}: that is the name of another rate")
        if not class_ids or min(class_ids) < 0 or max(class_ids) >= classes:
            raise ValueError(f"category {name!r}: class ids {list(class_ids)}; one or more from 0 to {classes - 1}")
        events[name] = np.isin(scored.named, class_ids)
    return events


def _rate(happened_n: Bool[np.ndarray, "n"]) -> Rate:
    n, count = len(happened_n), int(happened_n.sum())
    return Rate(count / n, exact_interval(count, n)) if n else Rate(math.nan, Interval(0.0, 1.0))


# ---------------------------------------------------------------------------------------------- what is confused


def confusion(
    named_n: Integer[np.ndarray, "n"], targets_n: Integer[np.ndarray, "n"], classes: int
) -> Int64[np.ndarray, "Q Q"]:
    """Return how many examples of class i were named class j, at [i, j], as scikit-learn's confusion_matrix.

    Raises: ValueError for ids outside 0 … classes - 1.
    """
    for what, ids_n in (("named", named_n), ("targets", targets_n)):
        if len(ids_n) and not 0 <= ids_n.min() <= ids_n.max() < classes:
            raise ValueError(f"{what} from {ids_n.min()} to {ids_n.max()}, but classes={classes}: 0 to {classes - 1}")
    cells_n = targets_n.astype(np.int64) * classes + named_n
    return np.bincount(cells_n, minlength=classes**2).reshape(classes, classes)


def error_pairs(
    confusion_QQ: Int64[np.ndarray, "Q Q"], class_names: Sequence[str], top: int = 20
) -> tuple[ErrorPair, ...]:
    """Return the most frequent confusions, most frequent first, then in the order of class ids.

    Raises: ValueError if names and classes differ in number.
    """
    if len(class_names) != len(confusion_QQ):
        raise ValueError(f"{len(class_names)} class names for {len(confusion_QQ)} classes: one each, in their order")
    errors_QQ = confusion_QQ - np.diag(np.diag(confusion_QQ))
    there_Q = confusion_QQ.sum(1)
    pairs = []
    for cell in np.argsort(-errors_QQ, axis=None, kind="stable")[:top]:
        i, j = divmod(int(cell), len(class_names))
        if count := int(errors_QQ[i, j]):
            pairs.append(ErrorPair(class_names[i], class_names[j], count, count / int(there_Q[i])))
    return tuple(pairs)


# ------------------------------------------------------------------------------------------------------- tables


def rows(results: Mapping[str, GroupResult]) -> list[dict[str, Cell]]:
    """Return a table's rows, one for each group, rates with their intervals; '' where a group has no examples."""
    table = []
    for name, result in results.items():
        row: dict[str, Cell] = {"group": name, "n": result.n, "not_finite": result.not_finite}
        for rate_name, rate in {ACCURACY: result.accuracy, **result.rate_named}.items():
            cells: Sequence[Cell] = (rate.value, *rate.interval) if result.n else ("", "", "")
            row.update(zip((rate_name, f"{rate_name} low", f"{rate_name} high"), cells, strict=True))
        table.append(row)
    return table


def to_csv(table: Sequence[Mapping[str, Cell]]) -> str:
    """Write rows as CSV, the first row's keys as its head."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
