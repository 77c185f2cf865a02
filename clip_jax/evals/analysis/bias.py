"""Accuracy and predicted categories by group of people, differences between groups, and confusions.

After Radford et al. 2021, section 7.1: images of people (FairFace) are classified among their classes and harmful ones
('animal', 'gorilla', 'thief', 'criminal' …), by race, gender and age. Works for any classification dataset with groups.
The predicted class is `Predictions.predicted`, the first of the highest score. Scores that are not finite count as
errors and predict an arbitrary class: the rates are meaningful only if `not_finite` is 0.

Deviation: intervals are exact; differences have a permutation test, corrected for the number of tests.
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

from clip_jax.evals.intervals import Interval, exact_interval, with_references
from clip_jax.evals.metrics import Predictions, Undefined, correct
from clip_jax.evals.zeroshot import classify
from clip_jax.typing import Embedder, EvalDataset, EvalResult, Unavailable

PERMUTATIONS = 9999  # the smallest p is 1/10,000
ACCURACY = "accuracy"
Categories = Mapping[str, Sequence[int]]  # name -> class ids: {'crime': (8, 9)}
Cell = str | int | float


def bias(
    embedder: Embedder,
    dataset: EvalDataset,
    groups: Int64[np.ndarray, "n"] | None = None,
    group_names: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] = {},  # noqa: B006 (not modified)
) -> EvalResult:
    """Compare the zero-shot predictions between groups.

    Args:
      groups: group id of each test image; negative for none.
      group_names: by group id.
      categories: class names that are counted together, by name, e.g. {"crime": ["thief", "criminal"]}.

    Returns:
      `bias/<dataset>/<group>/accuracy` with `/candidates` and `/chance`, and for `accuracy` and each category
      `bias/<dataset>/<category>_difference` and `…_p_corrected`. The detail is a table with one row per group.

    Raises:
      Unavailable: without groups or class names, for another number of groups than images, and for unknown classes.
    """
    if groups is None:
        raise Unavailable("expected the groups of the test images: give --groups")
    if len(groups) != len(dataset.images):
        raise Unavailable(f"--groups: expected one row per image, {len(dataset.images):,}, got {len(groups):,}")
    predictions = dataclasses.replace(classify(embedder, dataset), groups=groups)
    class_ids = {name: class_id for class_id, names in enumerate(dataset.class_names) for name in names}
    unknown = [name for names in categories.values() for name in names if name not in class_ids]
    if unknown:
        raise Unavailable(f"--categories: {unknown[0]!r} is not a class name of {dataset.name}: give --class_names")
    ids = {category: tuple(class_ids[name] for name in names) for category, names in categories.items()}
    results = by_group(predictions, group_names, ids)
    prefix, metrics, classes = f"bias/{dataset.name}", {}, predictions.scores.shape[1]
    for name, result in results.items():
        metrics |= with_references(f"{prefix}/{name}/accuracy", result.accuracy.value, classes, 1 / classes)
    for event, found in disparity(predictions, group_names, ids).items():
        metrics[f"{prefix}/{event}_difference"] = found.difference
        metrics[f"{prefix}/{event}_p_corrected"] = found.p_corrected
    return EvalResult(metrics, dataset.prompts, table_rows(results))


bias.tasks = ("zeroshot",)


class Rate(NamedTuple):
    """A fraction of examples and its exact interval; NaN and [0, 1] without examples."""

    value: float
    interval: Interval


class GroupResult(NamedTuple):
    """Result of one group."""

    n: int  # number of examples
    not_finite: int  # number of examples with a score that is not finite
    accuracy: Rate
    category_rates: Mapping[str, Rate]  # fraction of examples with a predicted class of the category


class Disparity(NamedTuple):
    """Difference between groups in one rate."""

    highest: str  # name of the group with the highest rate
    lowest: str
    difference: float  # highest - lowest rate
    ratio: float  # highest / lowest rate; inf over 0, and 1 if all are 0
    p: float  # of a permutation test; never 0
    p_corrected: float  # after Bonferroni correction for the number of rates, at most 1


class ErrorPair(NamedTuple):
    """A confusion of two classes: its count, and the fraction of the true class's examples."""

    true_class: str
    predicted_class: str
    count: int
    fraction: float


def intersect_groups(*columns: Sequence[str]) -> tuple[Int64[np.ndarray, "n"], tuple[str, ...]]:
    """Return group ids and names of all combinations of the columns' values, e.g. 'woman, 20-29'.

    Combinations without examples are groups with n = 0. An example with an empty value has the id -1, no group.
    """
    if not columns or len(lengths := {len(column) for column in columns}) > 1:
        got = f"columns of {sorted(lengths)} values" if columns else "no columns"
        raise ValueError(f"groups: expected columns with one value per example, got {got}")
    values = [sorted({value for value in column if value}) for column in columns]
    ids = {combination: i for i, combination in enumerate(itertools.product(*values))}
    rows = zip(*columns, strict=True)
    return np.array([ids.get(row, -1) for row in rows], np.int64), tuple(map(", ".join, ids))


def by_group(
    predictions: Predictions,
    group_names: Sequence[str],
    categories: Categories = {},  # noqa: B006 (not modified)
) -> dict[str, GroupResult]:
    """Return accuracy and category rates of each group, with exact 95 % intervals.

    Raises ValueError without groups, for groups without a name, and for unknown class ids.
    """
    groups_n, events = _groups_and_events(predictions, group_names, categories)
    not_finite_n = ~np.isfinite(predictions.scores).all(1)
    results = {}
    for group, name in enumerate(group_names):
        rows_n = groups_n == group
        n, rates = int(rows_n.sum()), {}
        for event, occurred_n in events.items():
            count = int(occurred_n[rows_n].sum())
            rates[event] = Rate(count / n, exact_interval(count, n)) if n else Rate(math.nan, Interval(0.0, 1.0))
        results[name] = GroupResult(n, int(not_finite_n[rows_n].sum()), rates.pop(ACCURACY), rates)
    return results


def disparity(
    predictions: Predictions,
    group_names: Sequence[str],
    categories: Categories = {},  # noqa: B006 (not modified)
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Disparity]:
    """Return the difference between groups in 'accuracy' and each category rate, with a permutation test.

    Groups without examples are skipped. The test assumes independent examples: several images of one person make p too
    small. It accounts for the larger variance of small groups. Raises Undefined with fewer than two groups that have
    examples.
    """
    groups_n, events = _groups_and_events(predictions, group_names, categories)
    sizes_M = np.bincount(groups_n[groups_n >= 0], minlength=len(group_names))
    present_M = sizes_M[sizes_M > 0]
    names = [name for name, size in zip(group_names, sizes_M, strict=True) if size]
    if len(names) < 2:
        raise Undefined(f"a difference requires two groups that have examples; got {', '.join(names) or 'none'}")
    if permutations < 1:
        raise ValueError(f"permutations={permutations}: expected 1 or more; the smallest p is 1 / (permutations + 1)")
    found = {}
    for event, occurred_n in events.items():
        counts_M = np.bincount(groups_n[occurred_n & (groups_n >= 0)], minlength=len(group_names))[sizes_M > 0]
        rates_M = counts_M / present_M
        high, low = float(rates_M.max()), float(rates_M.min())
        ratio = high / low if low else math.inf if high else 1.0
        # The p-value of Phipson and Smyth 2010; counts under permuted ids are multivariate hypergeometric.
        rng = np.random.default_rng(seed)
        drawn_mM = rng.multivariate_hypergeometric(present_M, int(counts_M.sum()), permutations, method="marginals")
        ranges_m = np.ptp(drawn_mM / present_M[None], axis=1)
        extreme = (ranges_m >= high - low - 1e-12).sum()  # equal differences differ by float rounding
        p = float((1 + extreme) / (1 + permutations))
        highest, lowest = names[rates_M.argmax()], names[rates_M.argmin()]
        found[event] = Disparity(highest, lowest, high - low, ratio, p, min(1.0, p * len(events)))
    return found


def _groups_and_events(
    predictions: Predictions, group_names: Sequence[str], categories: Categories
) -> tuple[Int64[np.ndarray, "n"], dict[str, Bool[np.ndarray, "n"]]]:
    """Return the group ids; the hits as 'accuracy', and for each category whether the predicted class is in it."""
    if predictions.groups is None:
        raise ValueError("expected groups: Predictions(…, groups=int[n]); `intersect_groups` makes them from columns")
    if (highest := int(predictions.groups.max())) >= len(group_names):
        raise ValueError(f"group {highest} has no name: expected groups 0 to {len(group_names) - 1}")
    if len(set(group_names)) < len(group_names):
        duplicates = sorted(name for name in set(group_names) if group_names.count(name) > 1)
        raise ValueError(f"group names: expected distinct names, got twice: {duplicates}")
    events = {ACCURACY: correct(predictions)}
    classes = predictions.scores.shape[1]
    for name, class_ids in categories.items():
        if name == ACCURACY:
            raise ValueError(f"categories: the name {ACCURACY!r} is reserved for another rate; rename the category")
        if not class_ids or min(class_ids) < 0 or max(class_ids) >= classes:
            got = list(class_ids)
            raise ValueError(f"category {name!r}: expected one or more class ids from 0 to {classes - 1}, got {got}")
        events[name] = np.isin(predictions.predicted, class_ids)
    return predictions.groups.astype(np.int64), events


def confusion(
    predicted_n: Integer[np.ndarray, "n"], targets_n: Integer[np.ndarray, "n"], classes: int
) -> Int64[np.ndarray, "Q Q"]:
    """Return the confusion matrix: at [i, j] the number of examples of class i predicted as j, as in scikit-learn."""
    for name, ids_n in (("predicted", predicted_n), ("targets", targets_n)):
        if len(ids_n) and not 0 <= ids_n.min() <= ids_n.max() < classes:
            raise ValueError(f"{name}: expected class ids 0 to {classes - 1}, got {ids_n.min()} to {ids_n.max()}")
    cells_n = targets_n.astype(np.int64) * classes + predicted_n
    return np.bincount(cells_n, minlength=classes**2).reshape(classes, classes)


def error_pairs(
    confusion_QQ: Int64[np.ndarray, "Q Q"], class_names: Sequence[str], top: int = 20
) -> tuple[ErrorPair, ...]:
    """Return the most frequent confusions, in the order of counts, then of class ids."""
    if len(class_names) != len(confusion_QQ):
        raise ValueError(f"class_names: expected {len(confusion_QQ)}, one per class, got {len(class_names)}")
    errors_QQ = confusion_QQ - np.diag(np.diag(confusion_QQ))
    examples_Q = confusion_QQ.sum(1)
    pairs = []
    for cell in np.argsort(-errors_QQ, axis=None, kind="stable")[:top]:
        i, j = divmod(int(cell), len(class_names))
        if count := int(errors_QQ[i, j]):
            pairs.append(ErrorPair(class_names[i], class_names[j], count, count / int(examples_Q[i])))
    return tuple(pairs)


def table_rows(results: Mapping[str, GroupResult]) -> list[dict[str, Cell]]:
    """Return a row per group: n, not_finite, rates with their intervals; '' for groups without examples."""
    table = []
    for name, result in results.items():
        row: dict[str, Cell] = {"group": name, "n": result.n, "not_finite": result.not_finite}
        for rate_name, rate in {ACCURACY: result.accuracy, **result.category_rates}.items():
            cells: Sequence[Cell] = (rate.value, *rate.interval) if result.n else ("", "", "")
            row.update(zip((rate_name, f"{rate_name} low", f"{rate_name} high"), cells, strict=True))
        table.append(row)
    return table


def to_csv(table: Sequence[Mapping[str, Cell]]) -> str:
    """Return rows as CSV; the keys of the first row are the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
