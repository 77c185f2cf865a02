"""Linear probe: logistic regression on frozen features (Radford et al. 2021, appendix A.3).

The L2 penalty is searched on a validation split by the paper's parametric binary search; then the probe is fitted to
training and validation split together. The objective is scikit-learn's `LogisticRegression(C=1/l2)`: `logistic.py`.

Deviations: the paper's 96 values from 1e-6 to 1e6 are not a whole number per decade; here there are 97, 8 per decade.
Of equally good values the largest is selected. Multi-label datasets (Pascal VOC 2007) are fitted with one sigmoid per
class and a common l2.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from clip_jax.evals import logistic
from clip_jax.evals.embed import features_of
from clip_jax.evals.metrics import METRICS, Metric, Predictions, accuracy
from clip_jax.evals.zeroshot import classification_metrics
from clip_jax.typing import DatasetSplit, Embedder, EvalDataset, EvalResult, Unavailable

log = logging.getLogger(__name__)

TOLERANCE = 1e-5  # nats per example above the optimum, about
STEPS_PER_DECADE, LAST_STEP = 8, 48  # 6 decades on either side of 1
FIRST_STRIDE = 16  # the first seven values: 1e-6, 1e-4 … 1e6
LOWEST = np.finfo(np.float32).min  # intercept of a class without examples
HELD_OUT = 0.2  # fraction of the training split that replaces a missing validation split


class Examples(NamedTuple):
    """Features float[n D], and class ids int[n] or, for several classes per example, bool[n Q]."""

    features_nD: np.ndarray
    targets: np.ndarray


def linear_probe(embedder: Embedder, dataset: EvalDataset, protocol: str = "expected") -> EvalResult:
    """Fit a linear probe to the training split and evaluate it on the test split.

    Args:
      protocol: of ties, as in `zeroshot`. The method is the paper's: CLIP_benchmark's probe is fitted by ten epochs of
        AdamW on normalized embeddings, and its numbers are others.

    Returns:
      `linear_probe/<dataset>/<metric>`, the metrics and references of `zeroshot`.

    Raises:
      Unavailable: without a training split, classes, features, or with features that are not finite.
    """
    train, validation, source = training_examples(embedder, dataset, dataset.split("train"))
    test = probe_examples(embedder, dataset.images, dataset.targets)
    metric = METRICS["top1" if dataset.groups is not None else dataset.metric]  # training images have no groups
    found = search(train, validation, dataset.num_classes, metric)
    predictions = Predictions(found.probe.scores(test.features_nD), dataset.targets, dataset.groups)
    images = len(train.targets) + len(validation.targets)
    fitted = f"fitted to {images:,} images, l2={found.l2:.3g} selected on {source}"
    metrics = classification_metrics(f"linear_probe/{dataset.name}", predictions, dataset.metric, protocol)
    return EvalResult(metrics, fitted)


linear_probe.tasks, linear_probe.needs_train_split = ("zeroshot",), True


def probe_examples(embedder: Embedder, images: Sequence[bytes], targets: np.ndarray | None) -> Examples:
    """Return features and targets. Raises Unavailable for captions, and for features that are not finite."""
    if targets is None:
        raise Unavailable("expected classes, found captions")
    features_nD = features_of(embedder, images)
    invalid = int((~np.isfinite(features_nD)).any(1).sum())
    if invalid:
        raise Unavailable(f"the features of {invalid:,} of {len(features_nD):,} images are not finite")
    return Examples(features_nD, targets)


def training_examples(embedder: Embedder, dataset: EvalDataset, train: DatasetSplit) -> tuple[Examples, Examples, str]:
    """Return examples to fit to, examples to select l2 on, and a description of the latter.

    Without a validation split, a random but constant HELD_OUT fraction of the training split is held out.
    """
    try:
        validation = dataset.split("validation")
    except Unavailable as error:
        log.info("%s: holding out a fraction of the training split: %s", dataset.name, error)
    else:
        splits = (probe_examples(embedder, split.images, split.targets) for split in (train, validation))
        return *splits, "the validation split"
    order = np.random.default_rng(0).permutation(len(train.images))
    count = max(1, round(HELD_OUT * len(order)))
    features_nD, targets = probe_examples(embedder, train.images, train.targets)
    kept, held_out = (Examples(features_nD[r], targets[r]) for r in (np.sort(order[count:]), np.sort(order[:count])))
    return kept, held_out, f"{count:,} images held out of the training split"


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A linear classifier. Classes without examples have intercept LOWEST: their optimum is −∞."""

    weight_DQ: Float[np.ndarray, "D Q"]
    bias_Q: Float[np.ndarray, "Q"]

    def scores(self, features_nD: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n Q"]:
        """Return the logits. Raises ValueError for features that are not finite."""
        _check_finite(features_nD)
        return features_nD.astype(np.float32) @ self.weight_DQ + self.bias_Q[None]

    def evaluate(self, metric: Metric, examples: Examples) -> float:
        return metric(Predictions(self.scores(examples.features_nD), examples.targets))


class ProbeSearch(NamedTuple):
    """Result of `search`."""

    l2: float  # selected on the validation split
    curve: dict[float, float]  # validation metric by l2, ascending
    probe: LinearProbe  # fitted with l2


def fit(
    features_nD: Float[np.ndarray, "n D"],
    targets: Integer[np.ndarray, "m"] | Bool[np.ndarray, "m Q"],
    classes: int,
    l2: float,
    start: LinearProbe | None = None,
    tolerance: float = TOLERANCE,
) -> LinearProbe:
    """Minimize the sum of cross-entropies + l2/2 · ‖weight‖².

    Args:
      targets: class ids from 0 to classes − 1, or bool[n classes] for one sigmoid per class.
      start: initial value; changes the time, not the result.
      tolerance: distance from the optimum in nats per example, about. At most 1000 steps are taken.

    Raises:
      ValueError: for features that are not finite, targets out of range, no examples, and l2 ≤ 0.

    >>> x = np.array([[0.0], [0.1], [0.9], [1.0]])
    >>> fit(x, np.array([0, 0, 1, 1]), classes=2, l2=0.1).scores(x).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    if not 0 < l2 < np.inf:
        raise ValueError(f"l2: expected a positive number such as 1e-6, got {l2}; without it there may be no optimum")
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
    """Search l2 on the validation split and fit the probe to both splits: about 15 fits, with warm starts.

    With refit=False the probe is fitted to the training split alone. Raises as `fit` does.
    """
    train, validation = Examples(*train), Examples(*validation)
    _checked_targets(validation, classes)  # before the fits
    best, values, probe = _binary_search(train, validation, classes, metric, tolerance)
    if refit:  # the training split is off the devices by now: they hold one copy of the features
        both = Examples(*(np.concatenate(pair) for pair in zip(train, validation, strict=True)))
        probe = fit(*both, classes, _l2(best), probe, tolerance)
    return ProbeSearch(_l2(best), {_l2(step): values[step] for step in sorted(values)}, probe)


def _binary_search(
    train: Examples, validation: Examples, classes: int, metric: Metric, tolerance: float
) -> tuple[int, dict[int, float], LinearProbe]:
    """Return the best step, the validation metric of each step tried, and the best probe of the training split."""
    training = _Training(train, classes, tolerance)
    solved, values = {}, {}

    def visit(step: int) -> None:
        if step not in solved and abs(step) <= LAST_STEP:
            # Start at the mean of the neighboring optima, whose error is of second order, or at the nearest optimum.
            sides = [s for s in solved if s < step], [s for s in solved if s > step]
            near = [solved[min(side, key=lambda s: abs(s - step))] for side in sides if side]
            solved[step] = training.solve(_l2(step), sum(near) / len(near) if near else None)
            values[step] = training.probe(solved[step]).evaluate(metric, validation)

    def best_step() -> int:
        return max(values, key=lambda step: (values[step], step))

    for step in range(LAST_STEP, -LAST_STEP - 1, -FIRST_STRIDE):  # large l2 converge fast
        visit(step)
    stride = FIRST_STRIDE
    while stride > 1:
        stride //= 2
        best = best_step()
        visit(best + stride)
        visit(best - stride)
    best = best_step()
    return best, values, training.probe(solved[best])


def _l2(step: int) -> float:
    return float(10 ** (step / STEPS_PER_DECADE))


class _Training:
    """The training problem on the devices, shared by all l2. Classes without examples are removed from it."""

    def __init__(self, examples: Examples, classes: int, tolerance: float):
        targets = _checked_targets(examples, classes)
        exclusive = targets.dtype != bool
        self.present_Q = np.bincount(targets, minlength=classes) > 0 if exclusive else targets.any(0)
        targets = (np.cumsum(self.present_Q) - 1)[targets] if exclusive else targets[:, self.present_Q]
        self.problem = logistic.prepare(examples.features_nD, targets, int(self.present_Q.sum()))
        # For two classes scikit-learn fits one column w. Here the columns are w/2 and −w/2, with half its squared norm.
        self.factor = 2 if exclusive and self.present_Q.sum() == 2 else 1
        self.tolerance = tolerance

    def solve(self, l2: float, start_QD=None):
        if start_QD is None:
            start_QD = jnp.zeros((self.present_Q.sum(), len(self.problem.penalized_D)))
        return logistic.minimize(self.problem, self.factor * l2, start_QD, self.tolerance).w_QD

    def coordinates(self, probe: LinearProbe | None):
        if probe is None:
            return None
        if probe.weight_DQ.shape != (expected := (len(self.problem.mean_d), len(self.present_Q))):
            raise ValueError(f"start: expected weights of shape {expected}, got {probe.weight_DQ.shape}")
        bias_Q = np.where(probe.bias_Q > LOWEST, probe.bias_Q, 0)
        return logistic.to_problem(self.problem, probe.weight_DQ[:, self.present_Q], bias_Q[self.present_Q])

    def probe(self, w_QD) -> LinearProbe:
        weight_DQ = np.zeros((len(self.problem.mean_d), len(self.present_Q)), np.float32)
        bias_Q = np.full(len(self.present_Q), LOWEST)
        weight_DQ[:, self.present_Q], bias_Q[self.present_Q] = logistic.from_problem(self.problem, w_QD)
        return LinearProbe(weight_DQ, bias_Q)


def _check_finite(features_nD: np.ndarray) -> None:
    bad_nD = ~np.isfinite(features_nD)
    if bad_nD.any():
        row, column = np.argwhere(bad_nD)[0]
        rows = bad_nD.any(1).sum()
        raise ValueError(
            f"features[{row}, {column}]: expected finite numbers, got {features_nD[row, column]} ({rows} such rows); "
            "check their images, or remove the rows from features and targets"
        )


def _checked_targets(examples: Examples, classes: int) -> np.ndarray:
    """Return the targets. Raises ValueError for wrong shapes and class ids."""
    features_nD, targets = examples
    rows = len(features_nD)
    if not rows or rows != len(targets):
        raise ValueError(f"expected one target per row, at least 1, got {rows} rows and {len(targets)} targets")
    _check_finite(features_nD)
    if targets.dtype == bool:
        if targets.shape != (len(targets), classes):
            raise ValueError(f"targets: expected shape {len(targets), classes}, got {targets.shape}")
        return targets
    wrong_n = (targets < 0) | (targets >= classes)
    if wrong_n.any():
        row = int(wrong_n.argmax())
        raise ValueError(f"targets[{row}]: expected a class id from 0 to {classes - 1}, got {targets[row]}")
    return targets
