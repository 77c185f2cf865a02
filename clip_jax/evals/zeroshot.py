"""Classification by the text nearest to a picture (Radford et al. 2021, section 3.1).

The numbers are those of `metrics`: ties and NaN count against the model, so of two classes with the same name neither
can be told, where CLIP_benchmark's `argmax` gives the first of them.
"""

from __future__ import annotations

import logging
import math

import numpy as np

from clip_jax.evals.embed import embed_set
from clip_jax.evals.metrics import METRICS, Predictions, Undefined, interval_of
from clip_jax.evals.ranking import ranks, scores
from clip_jax.typing import Embedder, EvalDataset

log = logging.getLogger(__name__)

TOP = 5


def zeroshot(embedder: Embedder, eval_set: EvalDataset) -> dict[str, float]:
    """Return the set's own measure and, where one class is right, top-1 and top-5 accuracy and the mean over classes.

    Keys: `zeroshot/<set>/<measure>`, under each `/candidates`, `/ci_low` and `/ci_high` (95 %) and, where it is known,
    `/chance`; and `top1/majority_class`: the share of the most frequent class. Top-5 needs over five classes. A
    metric that the set can't have, such as the AUC of one class, is NaN, and the log says why.
    """
    return measured(f"zeroshot/{eval_set.name}", classified(embedder, eval_set), eval_set.metric)


def classified(embedder: Embedder, eval_set: EvalDataset) -> Predictions:
    """Return the cosine of every picture and class and, where one class is right, its exact ranks."""
    image_nE, class_QE = embed_set(embedder, eval_set)
    ranks_n = None
    if eval_set.targets.ndim == 1:  # a miss is last here, not worse than that
        ranks_n = np.minimum(ranks(image_nE, class_QE, eval_set.right_pairs()), len(class_QE) - 1)
    return Predictions(scores(image_nE, class_QE), eval_set.targets, eval_set.groups, known_ranks=ranks_n)


def measured(prefix: str, scored: Predictions, measure: str) -> dict[str, float]:
    """Return what `zeroshot` does for any scores, such as a probe's logits."""
    targets, classes = scored.targets, scored.scores.shape[1]
    names = [measure]
    metrics: dict[str, float] = {}
    if targets.ndim == 1:
        names = ["top1", *["top5"] * (classes > TOP), "mean_per_class", measure]
        metrics[f"{prefix}/top1/majority_class"] = float(np.bincount(targets).max() / len(targets))
    chances = {"top1": 1 / classes, "mean_per_class": 1 / classes, "top5": TOP / classes, "roc_auc": 0.5}
    chances["mean_top1_top5"] = (1 + TOP) / 2 / classes
    for name in dict.fromkeys(names):
        key = f"{prefix}/{name}"
        try:
            metrics[key], (low, high) = METRICS[name](scored), interval_of(name, scored)
        except Undefined as error:
            log.warning("%s is not defined: %s", key, error)
            metrics[key], low, high = math.nan, math.nan, math.nan
        metrics |= {f"{key}/ci_low": low, f"{key}/ci_high": high, f"{key}/candidates": float(classes)}
        if name in chances:
            metrics[f"{key}/chance"] = chances[name]
    return metrics
