"""Image-text retrieval in both directions (Radford et al. 2021, table 13).

As in CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark), a query is a hit at k if any matching candidate is
among the first k. Deviation: ties and NaN count as errors (see `ranking`). The bootstrap of the confidence intervals
draws images together with all their captions, because the captions of one image are not independent.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer

from clip_jax.evals.embed import embed_dataset
from clip_jax.evals.metrics import mean_interval, with_references
from clip_jax.evals.ranking import ranks
from clip_jax.typing import Embedder, EvalDataset, EvalResult

KS = (1, 5, 10)


def retrieval(embedder: Embedder, dataset: EvalDataset) -> EvalResult:
    """Return recall at 1, 5 and 10 in both directions, and the median rank of the matching text (1 is best).

    Texts without a matching image are candidates, not queries. k above the number of candidates are skipped.

    Returns:
      `retrieval/<dataset>/{image_to_text,text_to_image}/recall_at_<k>` and
      `retrieval/<dataset>/image_to_text/median_rank`, each with `/candidates` and `/chance`; recalls also with
      `/ci_low` and `/ci_high`.

    >>> class OneHot:  # the image or text "i" is the unit vector e_i
    ...     image = text = staticmethod(lambda items: np.eye(3)[[int(item) for item in items]])
    >>> dataset = EvalDataset("toy", [b"0", b"1", b"2"], [("0",), ("1",), ("0",)], np.array([0, 1, 2]))
    >>> round(retrieval(OneHot(), dataset)["retrieval/toy/image_to_text/recall_at_1"], 3)
    0.333
    """
    image_nE, text_ME = embed_dataset(embedder, dataset)
    images, texts = len(image_nE), len(text_ME)
    query_T, (image_m, text_m) = dataset.query_texts(), dataset.positive_pairs()
    text_ranks_n = ranks(image_nE, text_ME, (image_m, text_m))
    image_ranks_T = ranks(text_ME[query_T], image_nE, (np.searchsorted(query_T, text_m), image_m))
    texts_per_image_n, images_per_text_M = np.bincount(image_m, minlength=images), np.bincount(text_m, minlength=texts)
    first_image_M = np.zeros(texts, np.int64)  # that matches the text
    first_image_M[text_m[::-1]] = image_m[::-1]

    to_text, to_image = (f"retrieval/{dataset.name}/{way}" for way in ("image_to_text", "text_to_image"))
    median = float(np.floor(np.median(text_ranks_n)) + 1)  # open_clip's definition
    metrics = {
        **_recalls(to_text, text_ranks_n, texts, texts_per_image_n, np.arange(images)),
        **with_references(f"{to_text}/median_rank", median, texts, (texts + 1) / 2),
        **_recalls(to_image, image_ranks_T, images, images_per_text_M[query_T], first_image_M[query_T]),
    }
    return EvalResult(metrics, dataset.prompts)


retrieval.tasks = ("retrieval",)


def chance_recall(candidates: int, positives: Integer[np.ndarray, "N"], k: int) -> float:
    """Return the mean probability that a random order has a positive among its first k.

    Hypergeometric with N = candidates and p = positives: 1 - C(N - p, k) / C(N, k) = 1 - ∏ (N - p - i) / (N - i) over
    i < k; the binomials would overflow.
    """
    drawn_k = np.arange(k)
    negatives_Nk: Float[np.ndarray, "N k"] = np.maximum(candidates - positives[:, None] - drawn_k, 0)
    return float(np.mean(1 - (negatives_Nk / (candidates - drawn_k)).prod(1)))


def _recalls(
    prefix: str,
    ranks_N: Integer[np.ndarray, "N"],
    candidates: int,
    positives_N: Integer[np.ndarray, "N"],
    image_N: Integer[np.ndarray, "N"],
) -> dict[str, float]:
    """Return recalls with their references. image_N: the image of each query, the unit of the bootstrap."""
    _, image_N, queries_P = np.unique(image_N, return_inverse=True, return_counts=True)
    metrics: dict[str, float] = {}
    for k in KS:
        if k <= candidates:
            hits_P = np.bincount(image_N, weights=ranks_N < k) / queries_P.mean()
            recall, chance = float(np.mean(ranks_N < k)), chance_recall(candidates, positives_N, k)
            metrics |= with_references(f"{prefix}/recall_at_{k}", recall, candidates, chance, mean_interval(hits_P))
    return metrics
