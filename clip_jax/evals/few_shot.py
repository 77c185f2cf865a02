"""Few-shot linear probes with 1, 2, 4, 8 and 16 examples per class (Radford et al. 2021, section 3.1, figure 6).

Draws are nested: with the same seed, a draw contains all smaller draws of the class. Deviation: the paper does not
report how it selected l2; here each draw searches l2 on the validation split, without fitting to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

from clip_jax.evals.linear_probe import Examples, fit, probe_examples, search, training_examples
from clip_jax.evals.metrics import METRICS, Interval, Metric, accuracy
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
    curve = few_shot_curve(
        train, test, classes, validation=validation, shots=shots, seeds=seeds, metric=METRICS[dataset.metric]
    )
    metrics = {}
    for count, values in curve.items():
        key = f"few_shot/{dataset.name}/{count}_shot"
        low, high = values.interval
        metrics |= {key: values.mean, f"{key}/min": low, f"{key}/max": high, f"{key}/candidates": float(classes)}
        if dataset.metric in ("top1", "mean_per_class"):
            metrics[f"{key}/chance"] = 1 / classes
    return EvalResult(metrics, f"mean and range of {len(seeds)} draws, l2 of each selected on {source}")


few_shot.tasks, few_shot.needs_train_split = ("zeroshot",), True


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Metrics on the test split, one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def interval(self) -> Interval:
        """The minimum and maximum over seeds; not a confidence interval."""
        return Interval(min(self.values), max(self.values))


def draw(
    class_ids_n: Integer[np.ndarray, "n"], classes: int, shots: int, seed: int, *, fewer: bool = False
) -> Int64[np.ndarray, "m"]:
    """Return the rows of `shots` random examples of each class, ordered by class. Draws with fewer shots are subsets.

    Args:
      fewer: whether smaller classes contribute all of their examples; otherwise they are a ValueError.

    >>> draw(np.array([0, 1, 0, 1]), classes=2, shots=2, seed=0).tolist()
    [0, 2, 1, 3]
    """
    drawn = []
    for class_id in range(classes):
        rows = np.flatnonzero(class_ids_n == class_id)
        if len(rows) < shots and not fewer:
            raise ValueError(
                f"shots: expected at most {len(rows)}, the examples of class {class_id}, got {shots}; fewer=True takes "
                "all examples of smaller classes"
            )
        # One random stream per class, independent of the sizes of the other classes.
        drawn.append(np.random.default_rng([seed, class_id]).permutation(rows)[:shots])
    return np.concatenate(drawn).astype(np.int64)


def few_shot_curve(
    train: Examples,
    test: Examples,
    classes: int,
    *,
    l2: float | None = None,
    validation: Examples | None = None,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    metric: Metric = accuracy,
    fewer: bool = False,
) -> dict[int, FewShot]:
    """Return the test metrics of probes by the number of shots.

    Args:
      l2: penalty of all probes; otherwise each draw searches it on `validation`.
      fewer: as in `draw`.

    Raises ValueError as `draw` and `fit` do, and for both or neither of l2 and validation.
    """
    if (l2 is None) == (validation is None):
        raise ValueError("expected either l2, e.g. l2=1.0, or validation to select it on")
    train, test = Examples(*train), Examples(*test)

    def evaluate_draw(count: int, seed: int) -> float:
        rows = draw(train.targets, classes, count, seed, fewer=fewer)
        examples = Examples(train.features_nD[rows], train.targets[rows])
        if validation is None:
            probe = fit(*examples, classes, l2)
        else:
            probe = search(examples, validation, classes, metric, refit=False).probe
        return probe.evaluate(metric, test)

    return {count: FewShot(tuple(evaluate_draw(count, seed) for seed in seeds)) for count in shots}
