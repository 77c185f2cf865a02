"""Classification by the text nearest to a picture (Radford et al. 2021, section 3.1).

Differs from CLIP_benchmark in that ties and NaN count against the model: of two classes with the same name neither can
be told, where `argmax` would give the first of them.
"""

from __future__ import annotations

import numpy as np

from clip_jax.evals.embed import embed_set
from clip_jax.evals.ranking import ranks
from clip_jax.typing import Embedder, EvalSet

TOP = 5


def zeroshot(embedder: Embedder, eval_set: EvalSet) -> dict[str, float]:
    """Return the accuracy, the accuracy among the first five where there are more classes, and the mean over classes.

    Keys: `zeroshot/<set>/{top1,top5,mean_per_class}`, under each `/candidates` and `/chance`, and `top1/majority`: what
    always naming the most frequent class gives. The mean per class is over the classes that have pictures.
    """
    image_nE, class_QE = embed_set(embedder, eval_set)
    classes = len(class_QE)
    ranks_n = ranks(image_nE, eval_set.targets, class_QE, np.arange(classes))
    pictures_Q = np.bincount(eval_set.targets, minlength=classes)
    hits_Q = np.bincount(eval_set.targets, weights=ranks_n < 1, minlength=classes)
    present_Q = pictures_Q > 0

    prefix = f"zeroshot/{eval_set.name}"
    values = {"top1": (np.mean(ranks_n < 1), 1 / classes)}
    if classes > TOP:
        values["top5"] = (np.mean(ranks_n < TOP), TOP / classes)
    values["mean_per_class"] = (np.mean(hits_Q[present_Q] / pictures_Q[present_Q]), 1 / classes)

    metrics: dict[str, float] = {f"{prefix}/top1/majority": float(pictures_Q.max() / pictures_Q.sum())}
    for name, (value, chance) in values.items():
        metrics[f"{prefix}/{name}"] = float(value)
        metrics[f"{prefix}/{name}/candidates"] = float(classes)
        metrics[f"{prefix}/{name}/chance"] = chance
    return metrics
