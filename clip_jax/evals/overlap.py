"""Overlap of the test images with the training data, and its effect on zero-shot accuracy (`analysis.overlap`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt64

from clip_jax.evals.analysis.near_duplicates import MAX_DISTANCE, hash_images, nearest_hash
from clip_jax.evals.analysis.overlap import analyze_overlap
from clip_jax.evals.metrics import hits
from clip_jax.evals.zeroshot import classify
from clip_jax.typing import Embedder, EvalDataset, EvalResult, Unavailable

METRICS = ("fraction", "accuracy", "accuracy_clean", "accuracy_overlapping", "gain", "p_corrected")


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
      `overlap/<dataset>/<one of METRICS>`, for accuracy with `/candidates` and `/chance`. The detail is the
      `analysis.overlap.Overlap`.

    Raises:
      Unavailable: without hashes or class names.
    """
    if not train_hashes:
        raise Unavailable("expected the hashes of the training images: give --overlap")
    predictions = classify(embedder, dataset)
    distances_n, _ = nearest_hash(hash_images(dataset.images), train_hashes)
    found = analyze_overlap(hits(predictions), distances_n <= max_distance, tests)
    metrics = {f"overlap/{dataset.name}/{name}": float(getattr(found, name)) for name in METRICS}
    key, classes = f"overlap/{dataset.name}/accuracy", predictions.scores.shape[1]
    metrics |= {f"{key}/candidates": float(classes), f"{key}/chance": 1 / classes}
    hashed = sum(map(len, train_hashes))
    method = f"top-1; near-duplicates among {hashed:,} training images: up to {max_distance} different bits"
    return EvalResult(metrics, f"{dataset.prompts}; {method}", found)


overlap.tasks = ("zeroshot",)
