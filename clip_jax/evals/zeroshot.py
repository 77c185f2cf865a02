"""Zero-shot evaluation: classification by text (Radford et al. 2021, section 3.1), and WinoGAViL's associations.

Ties and NaN count as errors (see `metrics`), so two classes with the same prompts are both always wrong, where
CLIP_benchmark's `argmax` predicts the first.

Associations (Bitton et al. 2022, https://arxiv.org/abs/2207.12576): for a cue with k associated images, the k
candidates of the highest cosines are selected; the metric is the Jaccard index of selected and associated images. The
prompt, and the restriction to cues with 10 or 12 candidates, are datacomp's:
https://github.com/mlfoundations/datacomp/blob/170b603/eval_utils/wino_eval.py
"""

from __future__ import annotations

import logging
import math

import numpy as np

from clip_jax.evals.embed import embed_dataset, embed_texts
from clip_jax.evals.metrics import (
    METRICS,
    Interval,
    Predictions,
    Undefined,
    confidence_interval,
    jaccard,
    mean_interval,
    with_references,
)
from clip_jax.evals.ranking import ranks, scores
from clip_jax.typing import Embedder, EvalDataset, EvalResult

log = logging.getLogger(__name__)

TOP = 5
MIN_CANDIDATES = 10  # datacomp's metric ignores cues with fewer candidate images


def zeroshot(embedder: Embedder, dataset: EvalDataset) -> EvalResult:
    """Evaluate zero-shot classification, or associations for a dataset with cues.

    Returns:
      `zeroshot/<dataset>/<metric>`: the main metric and, for one class per image, top1, top5 (with more than five
      classes) and mean_per_class; for cues jaccard (10 candidates or more) and jaccard_all. Each has `/candidates`,
      `/ci_low`, `/ci_high` (95 %) and, if known, `/chance`; top1 has `/majority_class`. A metric that is undefined for
      the dataset, e.g. the ROC AUC of one class, is NaN, with a warning.

    >>> class OneHot:  # the image or text "i" is the unit vector e_i
    ...     image = text = staticmethod(lambda items: np.eye(3)[[int(item) for item in items]])
    >>> dataset = EvalDataset("toy", [b"0", b"1", b"1"], [("0",), ("1",)], np.array([0, 1, 0]))
    >>> round(zeroshot(OneHot(), dataset)["zeroshot/toy/top1"], 3)
    0.667
    """
    prefix = f"zeroshot/{dataset.name}"
    if dataset.cues:
        return EvalResult(_associations(prefix, embedder, dataset), dataset.prompts)
    return EvalResult(classification_metrics(prefix, classify(embedder, dataset), dataset.metric), dataset.prompts)


# Values of `datasets.registry.Dataset.task` for which the command runs this evaluator.
zeroshot.tasks = ("zeroshot", "association")


def classify(embedder: Embedder, dataset: EvalDataset) -> Predictions:
    """Return the cosines of all images and classes and, for one class per image, the exact ranks."""
    image_nE, class_QE = embed_dataset(embedder, dataset)
    ranks_n = None
    if dataset.targets.ndim == 1:  # `ranks` returns Q for NaN; the last of Q classes has rank Q - 1
        ranks_n = np.minimum(ranks(image_nE, class_QE, dataset.positive_pairs()), len(class_QE) - 1)
    return Predictions(scores(image_nE, class_QE), dataset.targets, dataset.groups, known_ranks=ranks_n)


def classification_metrics(prefix: str, predictions: Predictions, metric: str) -> dict[str, float]:
    """Return the metrics of `zeroshot` for any scores, such as the logits of a linear probe."""
    targets, classes = predictions.targets, predictions.scores.shape[1]
    names = [metric]
    metrics: dict[str, float] = {}
    if targets.ndim == 1:
        names = ["top1", *["top5"] * (classes > TOP), "mean_per_class", metric]
        metrics[f"{prefix}/top1/majority_class"] = float(np.bincount(targets).max() / len(targets))
    chance = {"top1": 1 / classes, "mean_per_class": 1 / classes, "top5": TOP / classes, "roc_auc": 0.5}
    chance["mean_top1_top5"] = (1 + TOP) / 2 / classes
    for name in dict.fromkeys(names):
        try:
            value, interval = METRICS[name](predictions), confidence_interval(name, predictions)
        except Undefined as error:
            log.warning("%s/%s is undefined: %s", prefix, name, error)
            value, interval = math.nan, Interval(math.nan, math.nan)
        metrics |= with_references(f"{prefix}/{name}", value, classes, chance.get(name), interval)
    return metrics


def cue_prompt(cue: str) -> str:
    """Return datacomp's prompt for a cue: 'A wing', 'An egg'."""
    return f"{'An' if cue[:1].lower() in 'aeiou' else 'A'} {cue.lower()}"


def chance_jaccard(candidates: int, associated: int) -> float:
    """Return the expected Jaccard index of a random selection of `associated` out of `candidates` images.

    With a = associated and a hypergeometric number i of correct ones: E[i / (2a - i)].
    """
    selections, others = math.comb(candidates, associated), candidates - associated
    ways = (math.comb(associated, i) * math.comb(others, associated - i) for i in range(associated + 1))
    return sum(number / selections * i / (2 * associated - i) for i, number in enumerate(ways))


def _associations(prefix: str, embedder: Embedder, dataset: EvalDataset) -> dict[str, float]:
    """Return the mean Jaccard index over cues with MIN_CANDIDATES or more, and over all cues.

    Deviation from datacomp: ties and NaN count as errors, where its `argsort` selects by position.
    """
    cues = dataset.cues
    if not any(len(cue.candidates) >= MIN_CANDIDATES for cue in cues):
        raise Undefined(f"expected cues with at least {MIN_CANDIDATES} candidates, got none among {len(cues)} cues")
    image_nE = embedder.image(dataset.images)
    scores_Cn = scores(embed_texts(embedder, dataset), image_nE)
    pairs = zip(scores_Cn, cues, strict=True)
    jaccard_C = np.array([jaccard(Predictions(s_n[None, c.candidates], c.associated[None])) for s_n, c in pairs])
    candidates_C = np.array([len(cue.candidates) for cue in cues])
    chance_C = np.array([chance_jaccard(len(cue.candidates), int(cue.associated.sum())) for cue in cues])
    metrics = {}
    for metric, counted_C in (("jaccard", candidates_C >= MIN_CANDIDATES), ("jaccard_all", candidates_C > 0)):
        value, candidates, chance = (float(x_C[counted_C].mean()) for x_C in (jaccard_C, candidates_C, chance_C))
        interval = mean_interval(jaccard_C[counted_C])
        metrics |= with_references(f"{prefix}/{metric}", value, candidates, chance, interval)
    return metrics
