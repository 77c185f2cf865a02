"""Zero-shot evaluation: classification by text (Radford et al. 2021, section 3.1), and WinoGAViL's associations.

Ties have their expected value (see `metrics`): of two classes with the same prompts, half of the images are right.
CLIP_benchmark's `argmax` predicts the first: `protocol="published"`.

Associations (Bitton et al. 2022, https://arxiv.org/abs/2207.12576): for a cue with k associated images, the k
candidates of the highest cosines are selected; the metric is the Jaccard index of selected and associated images. The
prompt, and the restriction to cues with 10 or 12 candidates, are datacomp's:
https://github.com/mlfoundations/datacomp/blob/170b603/eval_utils/wino_eval.py
"""

from __future__ import annotations

import logging
import math

import numpy as np

from clip_jax.config import check_name
from clip_jax.evals.embed import embed_dataset, embed_texts
from clip_jax.evals.intervals import Interval, confidence_interval, mean_interval, with_references
from clip_jax.evals.metrics import METRICS, Predictions, Undefined, by_index, expected_jaccard, jaccard, undecided
from clip_jax.evals.ranking import scores
from clip_jax.typing import Embedder, EvalDataset, EvalResult

log = logging.getLogger(__name__)

PROTOCOLS = ("expected", "published")  # of ties
TOP = 5
MIN_CANDIDATES = 10  # datacomp's metric ignores cues with fewer candidate images


def zeroshot(embedder: Embedder, dataset: EvalDataset, protocol: str = "expected") -> EvalResult:
    """Evaluate zero-shot classification, or associations for a dataset with cues.

    Args:
      protocol: `expected`, the expected value over the orders of ties, or `published`, CLIP_benchmark's values (for
        associations datacomp's), which order ties by index.

    Returns:
      `zeroshot/<dataset>/<metric>`: the main metric and, for one class per image, top1, top5 (with more than five
      classes) and mean_per_class; for cues jaccard (10 candidates or more) and jaccard_all. Each has `/candidates`,
      `/ci_low`, `/ci_high` (95 %) and, if known, `/chance`; with ties `/ties` and `/by_index`; top1 has
      `/majority_class`. A metric that is undefined for the dataset, e.g. the ROC AUC of one class, is NaN, with a
      warning.

    >>> class OneHot:  # the image or text "i" is the unit vector e_i
    ...     image = text = staticmethod(lambda items: np.eye(3)[[int(item) for item in items]])
    >>> dataset = EvalDataset("toy", [b"0", b"1", b"1"], [("0",), ("1",)], np.array([0, 1, 0]))
    >>> round(zeroshot(OneHot(), dataset)["zeroshot/toy/top1"], 3)
    0.667
    """
    check_name("protocol", protocol, PROTOCOLS)
    prefix = f"zeroshot/{dataset.name}"
    if dataset.cues:
        return EvalResult(_associations(prefix, embedder, dataset, protocol), dataset.prompts)
    metrics = classification_metrics(prefix, classify(embedder, dataset), dataset.metric, protocol)
    return EvalResult(metrics, dataset.prompts)


# Values of `datasets.registry.Dataset.task` for which the command runs this evaluator.
zeroshot.tasks = ("zeroshot", "association")


def classify(embedder: Embedder, dataset: EvalDataset) -> Predictions:
    """Return the cosines of all images and classes."""
    return Predictions(scores(*embed_dataset(embedder, dataset)), dataset.targets, dataset.groups)


def classification_metrics(
    prefix: str, predictions: Predictions, metric: str, protocol: str = "expected"
) -> dict[str, float]:
    """Return the metrics of `zeroshot` for any scores, such as the logits of a linear probe.

    Raises Undefined if all of them are.
    """
    targets, classes = predictions.targets, predictions.scores.shape[1]
    names = [metric]
    metrics: dict[str, float] = {}
    undefined = Undefined("no metric is finite")
    if targets.ndim == 1:
        names = ["top1", *["top5"] * (classes > TOP), "mean_per_class", metric]
        metrics[f"{prefix}/top1/majority_class"] = float(np.bincount(targets).max() / len(targets))
    chance = {"top1": 1 / classes, "mean_per_class": 1 / classes, "top5": TOP / classes, "roc_auc": 0.5}
    chance["mean_top1_top5"] = (1 + TOP) / 2 / classes
    for name in dict.fromkeys(names):
        ties, index_value = 0, None
        try:
            value, interval = METRICS[name](predictions), confidence_interval(name, predictions)
            ties, index_value = undecided(name, predictions), by_index(name, predictions)
        except Undefined as error:
            log.warning("%s/%s is undefined: %s", prefix, name, error)
            value, interval, undefined = math.nan, Interval(math.nan, math.nan), error
        value = value if protocol == "expected" or index_value is None else index_value
        metrics |= with_references(f"{prefix}/{name}", value, classes, chance.get(name), interval, ties, index_value)
    if all(math.isnan(metrics[f"{prefix}/{name}"]) for name in names):
        raise undefined
    return metrics


def cue_prompt(cue: str) -> str:
    """Return datacomp's prompt for a cue: 'A wing', 'An egg'."""
    return f"{'An' if cue[:1].lower() in 'aeiou' else 'A'} {cue.lower()}"


def chance_jaccard(candidates: int, associated: int) -> float:
    """Return the expected Jaccard index of a random selection of `associated` out of `candidates` images."""
    return expected_jaccard(associated, above=0, found=0, tied=candidates, tied_positives=associated)


def _associations(prefix: str, embedder: Embedder, dataset: EvalDataset, protocol: str) -> dict[str, float]:
    """Return the mean Jaccard index over cues with MIN_CANDIDATES or more, and over all cues."""
    cues = dataset.cues
    if not any(len(cue.candidates) >= MIN_CANDIDATES for cue in cues):
        raise Undefined(f"expected cues with at least {MIN_CANDIDATES} candidates, got none among {len(cues)} cues")
    image_nE = embedder.image(dataset.images)
    scores_Cn = scores(embed_texts(embedder, dataset), image_nE)
    pairs = zip(scores_Cn, cues, strict=True)
    predictions_C = [Predictions(s_n[None, c.candidates], c.associated[None]) for s_n, c in pairs]
    expected_C = np.array([jaccard(predictions) for predictions in predictions_C])
    index_C = np.array([by_index("jaccard", predictions) for predictions in predictions_C])
    jaccard_C = expected_C if protocol == "expected" else index_C
    tied_C = np.array([predictions.tied(axis=1) > 0 for predictions in predictions_C])
    candidates_C = np.array([len(cue.candidates) for cue in cues])
    chance_C = np.array([chance_jaccard(len(cue.candidates), int(cue.associated.sum())) for cue in cues])
    metrics = {}
    for metric, counted_C in (("jaccard", candidates_C >= MIN_CANDIDATES), ("jaccard_all", candidates_C > 0)):
        value, candidates, chance = (float(x_C[counted_C].mean()) for x_C in (jaccard_C, candidates_C, chance_C))
        interval = mean_interval(jaccard_C[counted_C])
        ties, index_value = int(tied_C[counted_C].sum()), float(index_C[counted_C].mean())
        metrics |= with_references(f"{prefix}/{metric}", value, candidates, chance, interval, ties, index_value)
    return metrics
