"""Zero-shot accuracy and predicted categories by group of people, after section 7.1 of the paper (`analysis.bias`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from clip_jax.evals.analysis import bias as analysis
from clip_jax.evals.zeroshot import classify
from clip_jax.typing import Embedder, EvalDataset, EvalResult, Unavailable


def bias(
    embedder: Embedder,
    dataset: EvalDataset,
    groups: Int64[np.ndarray, "n"] | None = None,
    group_names: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] = {},  # noqa: B006 (not modified)
) -> EvalResult:
    """Compare the zero-shot predictions between groups.

    Args:
      groups: group id of each test image; negative for none.
      group_names: by group id.
      categories: class names that are counted together, by name, e.g. {"crime": ["thief", "criminal"]}.

    Returns:
      `bias/<dataset>/<group>/accuracy` with `/candidates` and `/chance`, and for `accuracy` and each category
      `bias/<dataset>/<category>_difference` and `…_p_corrected`. The detail is a table with one row per group.

    Raises:
      Unavailable: without groups or class names, for another number of groups than images, and for unknown classes.
    """
    if groups is None:
        raise Unavailable("expected the groups of the test images: give --groups")
    if len(groups) != len(dataset.images):
        raise Unavailable(f"--groups: expected one row per image, {len(dataset.images):,}, got {len(groups):,}")
    predictions = dataclasses.replace(classify(embedder, dataset), groups=groups)
    class_ids = {name: class_id for class_id, names in enumerate(dataset.class_names) for name in names}
    unknown = [name for names in categories.values() for name in names if name not in class_ids]
    if unknown:
        raise Unavailable(f"--categories: {unknown[0]!r} is not a class name of {dataset.name}: give --class_names")
    ids = {category: tuple(class_ids[name] for name in names) for category, names in categories.items()}
    by_group = analysis.by_group(predictions, group_names, ids)
    metrics, classes = {}, predictions.scores.shape[1]
    for name, result in by_group.items():
        key = f"bias/{dataset.name}/{name}/accuracy"
        metrics |= {key: result.accuracy.value, f"{key}/candidates": float(classes), f"{key}/chance": 1 / classes}
    for event, found in analysis.disparity(predictions, group_names, ids).items():
        metrics |= {
            f"bias/{dataset.name}/{event}_{name}": getattr(found, name) for name in ("difference", "p_corrected")
        }
    return EvalResult(metrics, dataset.prompts, analysis.table_rows(by_group))


bias.tasks = ("zeroshot",)
