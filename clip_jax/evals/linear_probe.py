"""The linear probe: logistic regression on frozen features (Radford et al. 2021, appendix A.3).

l2 is found on a validation split by the paper's parametric binary search, then the probe is fitted to training and
validation split together. The objective is that of scikit-learn's `LogisticRegression(C=1/l2)`: `logistic.py`.

Deviations: the paper's 96 values from 1e-6 to 1e6 are no whole number per decade; here there are 97, 8 per decade. Of
values that do equally well the greatest is taken. Examples with any number of classes (Pascal VOC 2007) are fitted with
one sigmoid per class, all with the same l2.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from clip_jax.evals import logistic
from clip_jax.evals.metrics import Metric, Predictions, accuracy

TOLERANCE = 1e-5  # nats per example that the optimum could still win, about
STEPS_PER_DECADE, LAST_STEP = 8, 48  # 8 · 6 decades to either side of 1
FIRST_STRIDE = 16  # the seven first values: 1e-6, 1e-4 … 1e6
NEVER = np.finfo(np.float32).min


class Examples(NamedTuple):
    """A split: features float[n D], and of each row the class id, int[n], or whether each class is right, bool[n Q]."""

    features_nD: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A linear classifier. A class that no example had scores NEVER: the optimum of its intercept is −∞."""

    weight_DQ: Float[np.ndarray, "D Q"]
    bias_Q: Float[np.ndarray, "Q"]

    def scores(self, features_nD: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n Q"]:
        """Return the logits. Raises ValueError where features are not finite."""
        _check_features(features_nD)
        return features_nD.astype(np.float32) @ self.weight_DQ + self.bias_Q[None]

    def evaluate(self, metric: Metric, examples: Examples) -> float:
        """Return a metric of the logits of a split."""
        return metric(Predictions(self.scores(examples.features_nD), examples.targets))


@dataclasses.dataclass(frozen=True)
class ProbeSearch:
    """What a search found.

    l2: the best on the validation split.
    curve: the metric there, by the l2 tried, ascending.
    probe: fitted with it.
    """

    l2: float
    curve: dict[float, float]
    probe: LinearProbe


def fit(
    features_nD: Float[np.ndarray, "n D"],
    targets: Integer[np.ndarray, "m"] | Bool[np.ndarray, "m Q"],
    classes: int,
    l2: float,
    start: LinearProbe | None = None,
    tolerance: float = TOLERANCE,
) -> LinearProbe:
    """Return the probe with the least sum of cross-entropies + l2/2 · ‖weight‖².

    targets: class ids from 0 to classes − 1, or bool[n classes] for one sigmoid per class.
    start: where to begin; it changes how long this takes, not where it ends.
    tolerance: nats per example by which the result may miss the optimum, about. It ends after 1000 steps at most.

    Raises ValueError for features that are not finite, targets that don't suit, no rows, and l2 not above 0.
    """
    if not 0 < l2 < np.inf:
        raise ValueError(f"l2={l2}: without a penalty separable classes have no optimum; use a number such as 1e-6")
    training = _Training(Examples(features_nD, targets), classes, tolerance)
    return training.probe(training.solve(l2, training.coordinates(start)))


def search(
    train: Examples,
    validation: Examples,
    classes: int,
    metric: Metric = accuracy,
    tolerance: float = TOLERANCE,
    *,
    refit: bool = True,
) -> ProbeSearch:
    """Find l2 on the validation split and fit the probe to both splits. Some 15 fits, each begun where others ended.

    metric: one of `metrics.METRICS`, such as `accuracy`, or `map_11_points` for any number of classes.
    refit: otherwise the probe is the one fitted to the training split. Raises as `fit` does.
    """
    train, validation = Examples(*train), Examples(*validation)
    _targets(validation, classes)  # before the work
    peak, values, probe = _walk(train, validation, classes, metric, tolerance)
    if refit:  # what was laid out of the training split is gone by now: devices hold features once
        both = Examples(*(np.concatenate(pair) for pair in zip(train, validation, strict=True)))
        probe = fit(*both, classes, _l2(peak), probe, tolerance)
    return ProbeSearch(_l2(peak), {_l2(step): values[step] for step in sorted(values)}, probe)


def _walk(
    train: Examples, validation: Examples, classes: int, metric: Metric, tolerance: float
) -> tuple[int, dict[int, float], LinearProbe]:
    """Return the best step, the metric at every step tried, and the training split's probe of the best."""
    training = _Training(train, classes, tolerance)
    solved, values = {}, {}

    def visit(step: int) -> None:
        if step not in solved and abs(step) <= LAST_STEP:
            solved[step] = training.solve(_l2(step), _between(solved, step))
            values[step] = training.probe(solved[step]).evaluate(metric, validation)

    for step in range(LAST_STEP, -LAST_STEP - 1, -FIRST_STRIDE):  # the easy ones first
        visit(step)
    stride = FIRST_STRIDE
    while stride > 1:
        stride //= 2
        peak = _peak(values)
        visit(peak + stride)
        visit(peak - stride)

    peak = _peak(values)
    return peak, values, training.probe(solved[peak])


def _l2(step: int) -> float:
    return float(10 ** (step / STEPS_PER_DECADE))


def _peak(values: dict[int, float]) -> int:
    return max(values, key=lambda step: (values[step], step))


def _between(solved: dict, step: int):
    """Return a start: the mean of the optima on both sides, so that its error is of second order; or the nearest."""
    sides = [[s for s in solved if s < step], [s for s in solved if s > step]]
    near = [solved[min(side, key=lambda s: abs(s - step))] for side in sides if side]
    return sum(near) / len(near) if near else None


class _Training:
    """Examples laid out for `logistic`, once for every l2. Classes without an example are left out of it."""

    def __init__(self, examples: Examples, classes: int, tolerance: float):
        targets = _targets(examples, classes)
        exclusive = targets.dtype != bool
        self.present_Q = np.bincount(targets, minlength=classes) > 0 if exclusive else targets.any(0)
        targets = (np.cumsum(self.present_Q) - 1)[targets] if exclusive else targets[:, self.present_Q]
        self.problem = logistic.prepare(examples.features_nD, targets, int(self.present_Q.sum()))
        # Of two classes scikit-learn fits one column, w. Here they get w/2 and −w/2, of half its square together.
        self.factor = 2 if exclusive and self.present_Q.sum() == 2 else 1
        self.tolerance = tolerance

    def solve(self, l2: float, start_QD=None):
        if start_QD is None:
            start_QD = jnp.zeros((self.present_Q.sum(), len(self.problem.penalised_D)))
        return logistic.minimize(self.problem, self.factor * l2, start_QD, self.tolerance).w_QD

    def coordinates(self, probe: LinearProbe | None):
        if probe is None:
            return None
        if probe.weight_DQ.shape != (expected := (len(self.problem.mean_d), len(self.present_Q))):
            raise ValueError(f"start has weights of shape {probe.weight_DQ.shape}, and these examples ask {expected}")
        bias_Q = np.where(probe.bias_Q > NEVER, probe.bias_Q, 0)
        return logistic.to_problem(self.problem, probe.weight_DQ[:, self.present_Q], bias_Q[self.present_Q])

    def probe(self, w_QD) -> LinearProbe:
        weight_DQ = np.zeros((len(self.problem.mean_d), len(self.present_Q)), np.float32)
        bias_Q = np.full(len(self.present_Q), NEVER)
        weight_DQ[:, self.present_Q], bias_Q[self.present_Q] = logistic.from_problem(self.problem, w_QD)
        return LinearProbe(weight_DQ, bias_Q)


def _check_features(features_nD: np.ndarray) -> None:
    bad_nD = ~np.isfinite(features_nD)
    if bad_nD.any():
        row, column = np.argwhere(bad_nD)[0]
        rows = bad_nD.any(1).sum()
        raise ValueError(
            f"features[{row}, {column}] is {features_nD[row, column]}, one of {rows} rows that are not finite: "
            "look at their pictures, or leave these rows out of features and targets"
        )


def _targets(examples: Examples, classes: int) -> np.ndarray:
    """Return the targets, all checked."""
    features_nD, targets = examples
    if not len(features_nD) or len(features_nD) != len(targets):
        raise ValueError(f"{len(features_nD)} rows of features and {len(targets)} targets; give as many, at least 1")
    _check_features(features_nD)
    if targets.dtype == bool:
        if targets.shape != (len(targets), classes):
            raise ValueError(f"targets have shape {targets.shape}; with classes={classes} use {len(targets), classes}")
        return targets
    wrong_n = (targets < 0) | (targets >= classes)
    if wrong_n.any():
        row = int(wrong_n.argmax())
        raise ValueError(f"targets[{row}]={targets[row]} with classes={classes}; use class ids from 0 to {classes - 1}")
    return targets
