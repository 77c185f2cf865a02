"""Few-shot linear probes with 1, 2, 4, 8 and 16 examples per class (Radford et al. 2021, section 3.1, figure 6).

Draws are nested: with the same seed, a draw contains all smaller draws of the class. Deviation: the paper does not
report how it selected l2; here each draw searches l2 on the validation split, without fitting to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

from clip_jax.evals.intervals import with_references
from clip_jax.evals.linear_probe import Examples, probe_examples, search, training_examples
from clip_jax.evals.metrics import METRICS, Metric, accuracy
from clip_jax.typing import Embedder, EvalDataset, EvalResult, Unavailable

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2, 3, 4)


def few_shot(
    embedder: Embedder, dataset: EvalDataset, shots: Sequence[int] = SHOTS, seeds: Sequence[int] = SEEDS
) -> EvalResult:
    """Evaluate few-shot linear probes on image features.

    Returns:
      `few_shot/<dataset>/<k>_shot`: the dataset's main metric, averaged over `seeds`, for each k of `shots` up to the
      size of the smallest class; each with `/min`, `/max` (over seeds), `/candidates` and, for accuracies, `/chance`.

    Raises:
      Unavailable: without a training split or features, for several classes per image, and for metrics by group.
    """
    if dataset.groups is not None:
        raise Unavailable(f"few-shot evaluation of {dataset.metric} is not supported: draws are by class, not by group")
    train_split = dataset.split("train")
    if np.ndim(train_split.targets) == 2:
        raise Unavailable("few-shot evaluation needs one class per image; this dataset has several classes per image")
    train, validation, source = training_examples(embedder, dataset, train_split)
    classes = dataset.num_classes
    smallest = int(np.bincount(train.targets, minlength=classes).min())
    shots = [count for count in shots if count <= smallest]
    if not shots:
        raise Unavailable("a class has no training images")
    test = probe_examples(embedder, dataset.images, dataset.targets)
    metrics = {}
    curve = few_shot_curve(train, validation, test, classes, shots, seeds, METRICS[dataset.metric])
    for count, values in curve.items():
        key = f"few_shot/{dataset.name}/{count}_shot"
        chance = 1 / classes if dataset.metric in ("top1", "mean_per_class") else None
        metrics |= with_references(key, float(np.mean(values)), classes, chance)
        metrics |= {f"{key}/min": min(values), f"{key}/max": max(values)}
    return EvalResult(metrics, f"mean and range of {len(seeds)} draws, l2 of each selected on {source}")


few_shot.tasks, few_shot.needs_train_split = ("zeroshot",), True


def draw(class_ids_n: Integer[np.ndarray, "n"], classes: int, shots: int, seed: int) -> Int64[np.ndarray, "m"]:
    """Return the rows of `shots` random examples per class, ordered by class. Draws with fewer shots are subsets."""
    drawn = []
    for class_id in range(classes):
        rows = np.flatnonzero(class_ids_n == class_id)
        if len(rows) < shots:
            raise ValueError(f"shots: expected at most {len(rows)}, the examples of class {class_id}, got {shots}")
        # One random stream per class, independent of the sizes of the other classes.
        drawn.append(np.random.default_rng([seed, class_id]).permutation(rows)[:shots])
    return np.concatenate(drawn).astype(np.int64)


def few_shot_curve(
    train: Examples,
    validation: Examples,
    test: Examples,
    classes: int,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    metric: Metric = accuracy,
) -> dict[int, list[float]]:
    """Return the test metrics of the draws by the number of shots; each draw searches l2 on `validation`."""

    def evaluate_draw(count: int, seed: int) -> float:
        rows = draw(train.targets, classes, count, seed)
        examples = Examples(train.features_nD[rows], train.targets[rows])
        return search(examples, validation, classes, metric, refit=False).probe.evaluate(metric, test)

    return {count: [evaluate_draw(count, seed) for seed in seeds] for count in shots}
