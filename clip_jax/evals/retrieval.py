"""Finding the text of a picture and the picture of a text among all of a set (Radford et al. 2021, table 13).

As in CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark) a query counts as answered if any right candidate is
among the first k. Two deviations: ties and NaN count against the model (see `ranking`), and every metric comes with the
number of its candidates, the level that a random order reaches, and the interval at 95 %: pictures are drawn anew, with
all their captions, because those of one picture are right or wrong together.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer

from clip_jax.evals.embed import embed_set
from clip_jax.evals.metrics import interval_of_mean
from clip_jax.evals.ranking import ranks
from clip_jax.typing import Embedder, EvalDataset

KS = (1, 5, 10)


def retrieval(embedder: Embedder, eval_set: EvalDataset) -> dict[str, float]:
    """Return recall at 1, 5, 10 in both directions and the median rank of the right text, 1 being best.

    Keys: `retrieval/<set>/{image_to_text,text_to_image}/recall_at_<k>`, `retrieval/<set>/image_to_text/median_rank`;
    under each `/candidates` and `/chance`, under a recall `/ci_low` and `/ci_high`. k above the number of candidates is
    skipped. Texts that no picture belongs to are candidates, not queries.
    """
    image_nE, text_ME = embed_set(embedder, eval_set)
    right_texts_n, images_M, picture_M = _counts(eval_set)
    asked_T = eval_set.asked_texts()
    image_m, text_m = eval_set.right_pairs()
    text_ranks_n = ranks(image_nE, text_ME, (image_m, text_m))
    image_ranks_T = ranks(text_ME[asked_T], image_nE, (np.searchsorted(asked_T, text_m), image_m))

    prefix = f"retrieval/{eval_set.name}"
    median_rank = f"{prefix}/image_to_text/median_rank"
    pictures_n = np.arange(len(image_nE))
    return {
        **_recalls(f"{prefix}/image_to_text", text_ranks_n, len(text_ME), right_texts_n, pictures_n),
        median_rank: float(np.floor(np.median(text_ranks_n)) + 1),  # open_clip's definition
        f"{median_rank}/candidates": float(len(text_ME)),
        f"{median_rank}/chance": (len(text_ME) + 1) / 2,
        **_recalls(f"{prefix}/text_to_image", image_ranks_T, len(image_nE), images_M[asked_T], picture_M[asked_T]),
    }


def _counts(eval_set: EvalDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how many texts are right of every image, how many images of every text, and the first of those."""
    targets, texts = eval_set.targets, len(eval_set.texts)
    if targets.ndim == 2:
        return targets.sum(1), targets.sum(0), targets.argmax(0)
    first_M = np.zeros(texts, np.int64)
    first_M[targets[::-1]] = np.arange(len(targets))[::-1]
    return np.ones_like(targets), np.bincount(targets, minlength=texts), first_M


def chance_of_recall(candidates: int, right: Integer[np.ndarray, "N"], k: int) -> float:
    """Return the mean probability that a random order has one of `right` among its first k, exactly.

    Hypergeometric: 1 - C(candidates - right, k) / C(candidates, k), as a product, since the binomials overflow.
    """
    drawn_k = np.arange(k)
    wrong_Nk: Float[np.ndarray, "N k"] = np.maximum(candidates - right[:, None] - drawn_k, 0) / (candidates - drawn_k)
    return float(np.mean(1 - wrong_Nk.prod(1)))


def _recalls(
    prefix: str,
    ranks_N: Integer[np.ndarray, "N"],
    candidates: int,
    right_N: Integer[np.ndarray, "N"],
    picture_N: Integer[np.ndarray, "N"],
) -> dict[str, float]:
    _, picture_N, queries_P = np.unique(picture_N, return_inverse=True, return_counts=True)
    metrics: dict[str, float] = {}
    for k in KS:
        if k <= candidates:
            key = f"{prefix}/recall_at_{k}"
            metrics[key] = float(np.mean(ranks_N < k))
            metrics[f"{key}/candidates"] = float(candidates)
            metrics[f"{key}/chance"] = chance_of_recall(candidates, right_N, k)
            hits_P = np.bincount(picture_N, weights=ranks_N < k) / queries_P.mean()
            metrics[f"{key}/ci_low"], metrics[f"{key}/ci_high"] = interval_of_mean(hits_P)
    return metrics
