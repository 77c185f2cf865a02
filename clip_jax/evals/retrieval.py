"""Finding the text of a picture and the picture of a text among all of a set (Radford et al. 2021, table 13).

As in CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark) a query counts as answered if any right candidate is
among the first k. Two deviations: ties and NaN count against the model (see `ranking`), and every metric comes with the
number of its candidates and the level that a random order reaches.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer

from clip_jax.evals.embed import embed_set
from clip_jax.evals.ranking import ranks
from clip_jax.typing import Embedder, EvalSet

KS = (1, 5, 10)


def retrieval(embedder: Embedder, eval_set: EvalSet) -> dict[str, float]:
    """Return recall at 1, 5, 10 in both directions and the median rank of the right text, 1 being best.

    Keys: `retrieval/<set>/{image_to_text,text_to_image}/recall_at_<k>` and `retrieval/<set>/image_to_text/median_rank`;
    under each `/candidates` and `/chance`. A k above the number of candidates is left out. Texts that no picture
    belongs to are candidates, not queries.
    """
    image_nE, text_ME = embed_set(embedder, eval_set)
    text_ids_M = np.arange(len(text_ME))
    asked_T = np.unique(eval_set.targets)
    text_ranks_n = ranks(image_nE, eval_set.targets, text_ME, text_ids_M)
    image_ranks_T = ranks(text_ME[asked_T], asked_T, image_nE, eval_set.targets)
    right_images_T = np.bincount(eval_set.targets, minlength=len(text_ME))[asked_T]

    prefix = f"retrieval/{eval_set.name}"
    median_rank = f"{prefix}/image_to_text/median_rank"
    return {
        **_recalls(f"{prefix}/image_to_text", text_ranks_n, len(text_ME), np.ones_like(text_ranks_n)),
        median_rank: float(np.floor(np.median(text_ranks_n)) + 1),  # open_clip's definition
        f"{median_rank}/candidates": float(len(text_ME)),
        f"{median_rank}/chance": (len(text_ME) + 1) / 2,
        **_recalls(f"{prefix}/text_to_image", image_ranks_T, len(image_nE), right_images_T),
    }


def chance_of_recall(candidates: int, right: Integer[np.ndarray, "N"], k: int) -> float:
    """Return the mean probability that a random order has one of `right` among its first k, exactly.

    Hypergeometric: 1 - C(candidates - right, k) / C(candidates, k), as a product, since the binomials overflow.
    """
    drawn_k = np.arange(k)
    wrong_Nk: Float[np.ndarray, "N k"] = np.maximum(candidates - right[:, None] - drawn_k, 0) / (candidates - drawn_k)
    return float(np.mean(1 - wrong_Nk.prod(1)))


def _recalls(
    prefix: str, ranks_N: Integer[np.ndarray, "N"], candidates: int, right_N: Integer[np.ndarray, "N"]
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for k in KS:
        if k <= candidates:
            key = f"{prefix}/recall_at_{k}"
            metrics[key] = float(np.mean(ranks_N < k))
            metrics[f"{key}/candidates"] = float(candidates)
            metrics[f"{key}/chance"] = chance_of_recall(candidates, right_N, k)
    return metrics
