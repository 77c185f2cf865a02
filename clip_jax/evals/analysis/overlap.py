"""Overlap of the test images with the training data, and its effect on zero-shot accuracy.

Source: Radford et al. 2021, section 5 and figure 17. Examples with a near-duplicate in the training source are
overlapping, the others are clean. `gain` is the accuracy on all examples minus that on the clean ones. `p_value` tests
whether overlapping examples are correct more often than the accuracy on clean ones predicts.

Limitations: near-duplicates may be inherently harder or easier (the paper finds those of Kinetics to be black frames);
the accuracy on clean examples is taken as exact; near-duplicates that the detector misses count as clean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt64

from clip_jax.evals.analysis.near_duplicates import MAX_DISTANCE, hash_images, nearest_hash
from clip_jax.evals.intervals import Interval, binomial_tail, exact_interval, with_references
from clip_jax.evals.metrics import Undefined, correct
from clip_jax.evals.zeroshot import classify
from clip_jax.typing import Embedder, EvalDataset, EvalResult, Unavailable

METRICS = ("fraction", "accuracy", "accuracy_clean", "accuracy_overlapping", "gain", "p_corrected")
LEVEL = 0.995  # of the interval, as in the paper
ALPHA = 0.05  # significance level of corrected p-values


def overlap(
    embedder: Embedder,
    dataset: EvalDataset,
    train_hashes: Sequence[UInt64[np.ndarray, "..."]] = (),
    max_distance: int = MAX_DISTANCE,
    tests: int = 1,
) -> EvalResult:
    """Compare the zero-shot accuracy of test images with and without a near-duplicate in the training data.

    Args:
      train_hashes: perceptual hashes of the training images, in blocks of any size.
      max_distance: bits in which near-duplicates differ at most.
      tests: number of datasets for Bonferroni's correction.

    Returns:
      `overlap/<dataset>/<one of METRICS>`, for accuracy with `/candidates` and `/chance`. The detail is an `Overlap`.

    Raises:
      Unavailable: without hashes or class names.
    """
    if not train_hashes:
        raise Unavailable("expected the hashes of the training images: give --train_hashes")
    predictions = classify(embedder, dataset)
    distances_n, _ = nearest_hash(hash_images(dataset.images), train_hashes)
    found = analyze_overlap(correct(predictions), distances_n <= max_distance, tests)
    metrics = {f"overlap/{dataset.name}/{name}": float(getattr(found, name)) for name in METRICS}
    classes = predictions.scores.shape[1]
    metrics |= with_references(f"overlap/{dataset.name}/accuracy", found.accuracy, classes, 1 / classes)
    hashed = sum(map(len, train_hashes))
    method = f"top-1; near-duplicates among {hashed:,} training images: up to {max_distance} different bits"
    return EvalResult(metrics, f"{dataset.prompts}; {method}", found)


overlap.tasks = ("zeroshot",)


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
        return self.p_corrected < ALPHA  # overlap inflates the accuracy


def analyze_overlap(hits_n: Bool[np.ndarray, "n"], overlapping_n: Bool[np.ndarray, "n"], tests: int = 1) -> Overlap:
    """Compare the accuracy on examples with and without a near-duplicate in the training source.

    tests: number of evaluation datasets, for the Bonferroni correction. Without overlapping examples p is 1 and the
    gain 0. Raises Undefined if all examples overlap.
    """
    n, overlapping = len(hits_n), int(np.sum(overlapping_n))
    if hits_n.dtype != bool or overlapping_n.dtype != bool or hits_n.shape != overlapping_n.shape or not n:
        raise ValueError(
            f"hits, overlapping: expected bool[n] twice, n ≥ 1, such as correct(predictions) and distances <= 8, got "
            f"{hits_n.dtype}{list(hits_n.shape)} and {overlapping_n.dtype}{list(overlapping_n.shape)}"
        )
    if tests < 1:
        raise ValueError(f"tests={tests}: expected the number of evaluation datasets, 1 or more")
    if overlapping == n:
        raise Undefined(f"all {n} examples overlap: no clean example to compare with; the threshold may be too loose")
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
    """
    if not 0 <= correct <= n or not 0 <= probability <= 1:
        raise ValueError(f"expected 0 ≤ correct ≤ n and 0 ≤ probability ≤ 1, got {correct}, {n} and {probability}")
    if correct == 0 or probability == 1:
        return 1.0
    return min(1.0, binomial_tail(correct, n, probability)) if probability else 0.0
