"""Effect of overlap with the training data on the accuracy of an evaluation dataset.

    distances, rows = nearest_hash(hash_images(images), blocks)            # clip_jax.evals.analysis.near_duplicates
    overlap = analyze_overlap(hits(predictions), distances <= MAX_DISTANCE, tests=len(names))

Source: Radford et al. 2021, section 5 and figure 17. Examples with a near-duplicate in the training source are
overlapping, the others are clean. `gain` is the accuracy on all examples minus that on the clean ones. `p_value` tests
whether overlapping examples are correct more often than the accuracy on clean ones predicts.

Limitations: near-duplicates may be inherently harder or easier (the paper finds those of Kinetics to be black frames);
the accuracy on clean examples is taken as exact; near-duplicates that the detector misses count as clean.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Bool

from clip_jax.evals.metrics import Interval, Undefined, exact_interval

LEVEL = 0.995  # of the interval, as in the paper
ALPHA = 0.05  # significance level of corrected p-values


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Accuracy on all, clean and overlapping examples; NaN for overlapping ones if there are none."""

    n: int  # number of examples
    overlapping: int  # number of overlapping examples
    accuracy: float
    accuracy_clean: float
    accuracy_overlapping: float
    interval: Interval  # of accuracy_overlapping - accuracy_clean, 99.5 % (Clopper-Pearson, of the former)
    p_value: float  # of a one-sided exact binomial test
    p_corrected: float  # after Bonferroni correction for the number of evaluation datasets

    @property
    def fraction(self) -> float:
        return self.overlapping / self.n

    @property
    def gain(self) -> float:
        """Accuracy on all minus on clean examples."""
        return self.accuracy - self.accuracy_clean

    @property
    def difference(self) -> float:
        """Accuracy on overlapping minus on clean examples."""
        return self.accuracy_overlapping - self.accuracy_clean

    @property
    def significant(self) -> bool:
        """Whether p_corrected < 0.05: overlap inflates the accuracy."""
        return self.p_corrected < ALPHA


def analyze_overlap(hits_n: Bool[np.ndarray, "n"], overlapping_n: Bool[np.ndarray, "n"], tests: int = 1) -> Overlap:
    """Compare the accuracy on examples with and without a near-duplicate in the training source.

    Args:
      hits_n: whether each example is classified correctly.
      overlapping_n: whether each example has a near-duplicate.
      tests: number of evaluation datasets, for the Bonferroni correction.

    Returns:
      The comparison; without overlapping examples p is 1 and the gain 0.

    Raises:
      Undefined: if all examples overlap.

    >>> overlap = analyze_overlap(np.array([1, 1, 1, 0, 1, 0], bool), np.array([1, 1, 0, 0, 0, 0], bool))
    >>> round(overlap.fraction, 3), round(overlap.gain, 3), overlap.p_value
    (0.333, 0.167, 0.25)
    """
    n, overlapping = len(hits_n), int(np.sum(overlapping_n))
    if hits_n.dtype != bool or overlapping_n.dtype != bool or hits_n.shape != overlapping_n.shape or not n:
        raise ValueError(
            f"hits, overlapping: expected bool[n] twice, n ≥ 1, such as hits(predictions) and distances <= 8, got "
            f"{hits_n.dtype}{list(hits_n.shape)} and {overlapping_n.dtype}{list(overlapping_n.shape)}"
        )
    if tests < 1:
        raise ValueError(f"tests={tests}: expected the number of evaluation datasets, 1 or more")
    if overlapping == n:
        raise Undefined(
            f"all {n} examples overlap: no clean example to compare with; the detector's threshold may be too loose"
        )
    correct, clean = int(hits_n[overlapping_n].sum()), float(hits_n[~overlapping_n].mean())
    low, high, p_value = math.nan, math.nan, 1.0
    if overlapping:
        low, high = exact_interval(correct, overlapping, level=LEVEL)
        p_value = binomial_p_value(correct, overlapping, clean)
    return Overlap(
        n=n,
        overlapping=overlapping,
        accuracy=float(hits_n.mean()),
        accuracy_clean=clean,
        accuracy_overlapping=correct / overlapping if overlapping else math.nan,
        interval=Interval(low - clean, high - clean),
        p_value=p_value,
        p_corrected=min(1.0, p_value * tests),
    )


def binomial_p_value(correct: int, n: int, probability: float) -> float:
    """Return P(X ≥ correct) for X ~ Binomial(n, probability), exactly.

    One-sided as in the paper: it tests whether overlap inflates the accuracy, not whether it changes it.

    >>> round(binomial_p_value(9, 10, 0.5), 6)
    0.010742
    """
    if not 0 <= correct <= n or not 0 <= probability <= 1:
        raise ValueError(f"expected 0 ≤ correct ≤ n and 0 ≤ probability ≤ 1, got {correct}, {n} and {probability}")
    if correct == 0 or probability == 1:
        return 1.0
    if probability == 0:
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    i = np.arange(correct, n + 1)
    log_binomial = log_factorial[n] - log_factorial[i] - log_factorial[n - i]
    return min(1.0, float(np.exp(log_binomial + i * np.log(probability) + (n - i) * np.log1p(-probability)).sum()))
