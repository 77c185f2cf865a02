"""Effective robustness: accuracy under distribution shift beyond the accuracy that ImageNet accuracy predicts.

Taori et al. 2020 (https://arxiv.org/abs/2007.00644) and Radford et al. 2021, section 3.3 and figures 13 and 14: over
standard models the logit of accuracy under shift is linear in the logit of accuracy on ImageNet. The effective
robustness of a model is its accuracy under shift minus the accuracy that this line predicts.

Accuracies are fractions. ImageNet-A, ImageNet-R and ObjectNet have a subset of ImageNet's classes: to reproduce figure
13, use ImageNet accuracy over the same classes ("class subsampled"), averaged as the shifts are. Deviation: without the
bootstrapped band around the line.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax.typing import Number

SHIFTS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet")
PAPER_SHIFTS = (*SHIFTS, "imagenet_vid", "youtube_bb")  # the last two, of videos, are rarely evaluated
IMAGENET = "imagenet"


@dataclasses.dataclass(frozen=True)
class LinearFit:
    """logit(accuracy under shift) = slope × logit(accuracy on ImageNet) + intercept, fitted to n standard models."""

    slope: float
    intercept: float
    n: int

    def predict(self, x: Number) -> float:
        """Return the accuracy under shift of a standard model with ImageNet accuracy x."""
        return expit(self.slope * logit(x) + self.intercept)

    def effective_robustness(self, x: Number, y: Number) -> float:
        """Return accuracy under shift y minus the prediction for ImageNet accuracy x: 0.1 is ten points above."""
        return _checked_fraction(y) - self.predict(x)


def fit(points: Sequence[tuple[Number, Number]]) -> LinearFit:
    """Fit the line to (accuracy on ImageNet, accuracy under shift) of standard models by least squares on logits."""
    logits_n2 = np.array([(logit(x), logit(y)) for x, y in points]).reshape(-1, 2)
    if len(np.unique(logits_n2[:, 0])) < 2:
        raise ValueError(
            f"standard models: expected two models of different ImageNet accuracy, got {len(points)} points: "
            f"{list(points)[:3]}; add standard models, such as ResNets of several sizes trained on ImageNet"
        )
    x_n, y_n = logits_n2.T
    centered_n = x_n - x_n.mean()
    slope = float(centered_n @ (y_n - y_n.mean()) / (centered_n @ centered_n))
    return LinearFit(slope, float(y_n.mean() - slope * x_n.mean()), len(points))


def average_shift(accuracies: Mapping[str, Number], shifts: Sequence[str] = SHIFTS) -> float:
    """Return the mean accuracy over `shifts`, which must all be there. The paper averages over PAPER_SHIFTS."""
    if missing := [shift for shift in shifts if shift not in accuracies]:
        available = tuple(shift for shift in PAPER_SHIFTS if shift in accuracies)
        raise ValueError(
            f"accuracies: expected {', '.join(missing)}, got {', '.join(accuracies) or 'none'}; evaluate them, or "
            f"average over fewer shifts, for the model and the standard models alike: shifts={available}"
        )
    if not shifts:
        raise ValueError(f"no shifts to average over; the default is {SHIFTS}")
    return sum(_checked_fraction(accuracies[shift], shift) for shift in shifts) / len(shifts)


def robustness_gap(accuracies: Mapping[str, Number], shifts: Sequence[str] = SHIFTS) -> float:
    """Return accuracy on ImageNet, `accuracies['imagenet']`, minus the average under shift: 0 is ideal."""
    if IMAGENET not in accuracies:
        raise ValueError(f"accuracies: expected {IMAGENET}, got {', '.join(accuracies) or 'none'}")
    return _checked_fraction(accuracies[IMAGENET], IMAGENET) - average_shift(accuracies, shifts)


def summary(metrics: Mapping[str, float], standard_models: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return average accuracy over SHIFTS, the gap to ImageNet and, given standard models, the effective robustness.

    The keys are `robustness/shifts/{average,gap,effective}`. Empty unless zero-shot top-1 of all datasets is available
    and finite; without `effective` for accuracies of 0 or 1, which have no logit.
    """
    found = {name: metrics.get(f"zeroshot/{name}/top1", math.nan) for name in (IMAGENET, *SHIFTS)}
    if not all(map(math.isfinite, found.values())):
        return {}
    average = average_shift(found)
    result = {"average": average, "gap": robustness_gap(found)}
    if standard_models and 0 < found[IMAGENET] < 1 and 0 < average < 1:
        result["effective"] = fit(list(standard_models.values())).effective_robustness(found[IMAGENET], average)
    return {f"robustness/shifts/{name}": value for name, value in result.items()}


def read_standard_models(
    path: str | os.PathLike[str], shifts: Sequence[str] = SHIFTS
) -> dict[str, tuple[float, float]]:
    """Read (accuracy on ImageNet, average accuracy under the shifts) of standard models by name from a CSV file.

    The columns are `model`, `imagenet` and one for each shift, in fractions; other columns are ignored.
    """
    points = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        expected = ("model", IMAGENET, *shifts)
        if missing := [column for column in expected if column not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{path}: no column {', '.join(missing)}; its columns are {', '.join(reader.fieldnames or ())}. "
                f"The first line should be: {','.join(expected)}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{where}: more cells than columns, {row[None]}; write fractions with a decimal point")
            if row["model"] in points:
                raise ValueError(f"{where}: duplicate model {row['model']!r}; list each standard model once")
            accuracies = {column: _parse_fraction(row[column], f"{where}, {column}") for column in expected[1:]}
            points[row["model"]] = accuracies[IMAGENET], average_shift(accuracies, shifts)
    return points


def logit(value: Number) -> float:
    if _checked_fraction(value) in (0, 1):
        raise ValueError(
            f"accuracy {value} has no logit: expected a fraction strictly between 0 and 1; remove the model, or for "
            "`correct` of n examples use (correct + 0.5) / (n + 1)"
        )
    return math.log(value) - math.log1p(-value)


def expit(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _parse_fraction(cell: str | None, where: str) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        raise ValueError(f"{where}: expected a fraction such as 0.762, got {cell!r}") from None
    return _checked_fraction(value, where)


def _checked_fraction(value: Number, where: str = "accuracy") -> float:
    if not 0 <= value <= 1:
        hint = f"; {value} % is {value / 100:.6g}" if 1 < value <= 100 else ""
        raise ValueError(f"{where}: expected a fraction from 0 to 1, got {value}{hint}")
    return float(value)
