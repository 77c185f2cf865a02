"""Image-text retrieval in both directions (Radford et al. 2021, table 13).

As in CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark), a query is a hit at k if any matching candidate is
among the first k. Deviation: ties have their expected value (see `ranking`); `protocol="published"` orders them by
index, as CLIP_benchmark does. The bootstrap of the confidence intervals draws images together with all their captions,
because the captions of one image are not independent.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer

from clip_jax.config import check_name
from clip_jax.evals.embed import embed_dataset
from clip_jax.evals.intervals import mean_interval, with_references
from clip_jax.evals.metrics import DRAWS
from clip_jax.evals.ranking import BLOCK_SCORES, Ranks, hit_probability, ranks
from clip_jax.evals.zeroshot import PROTOCOLS
from clip_jax.typing import Embedder, EvalDataset, EvalResult

KS = (1, 5, 10)


def retrieval(embedder: Embedder, dataset: EvalDataset, protocol: str = "expected") -> EvalResult:
    """Return recall at 1, 5 and 10 in both directions, and the median rank of the matching text (1 is best).

    Texts without a matching image are candidates, not queries. k above the number of candidates are skipped.

    Args:
      protocol: `expected`, the expected value over the orders of ties, or `published`, CLIP_benchmark's values, which
        order ties by index.

    Returns:
      `retrieval/<dataset>/{image_to_text,text_to_image}/recall_at_<k>` and
      `retrieval/<dataset>/image_to_text/median_rank`, each with `/candidates` and `/chance`, and with ties `/ties` (the
      number of queries) and `/by_index`; recalls also with `/ci_low` and `/ci_high`.

    >>> class OneHot:  # the image or text "i" is the unit vector e_i
    ...     image = text = staticmethod(lambda items: np.eye(3)[[int(item) for item in items]])
    >>> dataset = EvalDataset("toy", [b"0", b"1", b"2"], [("0",), ("1",), ("0",)], np.array([0, 1, 2]))
    >>> round(retrieval(OneHot(), dataset)["retrieval/toy/image_to_text/recall_at_1"], 3)
    0.611
    """
    check_name("protocol", protocol, PROTOCOLS)
    image_nE, text_ME = embed_dataset(embedder, dataset)
    images, texts = len(image_nE), len(text_ME)
    query_T, (image_m, text_m) = dataset.query_texts(), dataset.positive_pairs()
    text_ranks_n = ranks(image_nE, text_ME, (image_m, text_m))
    image_ranks_T = ranks(text_ME[query_T], image_nE, (np.searchsorted(query_T, text_m), image_m))
    texts_per_image_n, images_per_text_M = np.bincount(image_m, minlength=images), np.bincount(text_m, minlength=texts)
    first_image_M = np.zeros(texts, np.int64)  # that matches the text
    first_image_M[text_m[::-1]] = image_m[::-1]

    to_text, to_image = (f"retrieval/{dataset.name}/{way}" for way in ("image_to_text", "text_to_image"))
    expected = protocol == "expected"
    by_index, ties = _median(text_ranks_n.by_index()), int((text_ranks_n.tied > 0).sum())
    median = _median(text_ranks_n) if expected else by_index
    zeros_n = np.zeros_like(texts_per_image_n)
    chance = _median(Ranks(zeros_n, texts - texts_per_image_n, zeros_n, texts_per_image_n))
    metrics = {
        **_recalls(to_text, text_ranks_n, texts, texts_per_image_n, np.arange(images), expected),
        **with_references(f"{to_text}/median_rank", median, texts, chance, ties=ties, by_index=by_index),
        **_recalls(to_image, image_ranks_T, images, images_per_text_M[query_T], first_image_M[query_T], expected),
    }
    return EvalResult(metrics, dataset.prompts)


retrieval.tasks = ("retrieval",)


def chance_recall(candidates: int, positives: Integer[np.ndarray, "N"], k: int) -> float:
    """Return the mean probability that a random order has a positive among its first k."""
    return float(hit_probability(candidates - positives, positives, np.full(len(positives), k)).mean())


def _median(ranks_N: Ranks) -> float:
    """Return open_clip's median rank, counted from 1: with ties the mean over random orders."""
    if not ranks_N.tied.any():
        return float(np.floor(np.median(ranks_N.above)) + 1)
    rng = np.random.default_rng(0)
    draws = min(DRAWS, max(1, 16 * BLOCK_SCORES // len(ranks_N.tied)))
    return float(np.mean([np.floor(np.median(ranks_N.draw(rng))) + 1 for _ in range(draws)]))


def _recalls(
    prefix: str,
    ranks_N: Ranks,
    candidates: int,
    positives_N: Integer[np.ndarray, "N"],
    image_N: Integer[np.ndarray, "N"],
    expected: bool,
) -> dict[str, float]:
    """Return recalls with their references. image_N: the image of each query, the unit of the bootstrap."""
    _, image_N, queries_P = np.unique(image_N, return_inverse=True, return_counts=True)
    by_index_N = ranks_N.by_index()
    metrics: dict[str, float] = {}
    for k in KS:
        if k <= candidates:
            index_hits_N = by_index_N.hit_probability(k)
            expected_N = ranks_N.hit_probability(k)
            hits_N = expected_N if expected else index_hits_N
            hits_P = np.bincount(image_N, weights=hits_N) / queries_P.mean()
            metrics |= with_references(
                f"{prefix}/recall_at_{k}",
                float(hits_N.mean()),
                candidates,
                chance_recall(candidates, positives_N, k),
                mean_interval(hits_P),
                int(((expected_N > 0) & (expected_N < 1)).sum()),
                float(index_hits_N.mean()),
            )
    return metrics
