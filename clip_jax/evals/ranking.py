"""Exact ranks by cosine similarity, in blocks, so that no broken model can look good.

The usual `rank = count(score > score of the right one)` gives rank 0, a recall of 1, to a model whose output is NaN
or constant, since no comparison holds. Here everything that is not surely worse than the right answer stands before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int64

# Cosines closer than this are a tie. Equal embeddings give scores that differ in the last bits, by where in a matrix
# product they stand; float32 dot products of 1024 terms between unit vectors err by some 1e-7.
TIE = 1e-6
BLOCK_SCORES = 2**22  # scores held at a time: 16 MiB of float32


def unit(x_NE: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N E"]:
    """Return the rows at length 1, as float32; NaN throughout for rows that are zero or not finite."""
    x_NE = x_NE.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        length_N1 = np.linalg.norm(x_NE, axis=1, keepdims=True)
        usable_N1 = np.isfinite(length_N1) & (length_N1 > 0)
        return np.where(usable_N1, x_NE / length_N1, np.nan).astype(np.float32)


def score_blocks(
    queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"]
) -> Iterator[tuple[slice, Float[np.ndarray, "n M"]]]:
    """Yield rows of queries with their cosines to every candidate; NaN where either embedding is unusable.

    float32: BLAS sums products of unit vectors to some 1e-7, well below TIE, at twice float64's speed.
    """
    queries_NE, candidates_ME = unit(queries_NE), unit(candidates_ME)
    broken_N, broken_M = np.isnan(queries_NE).any(1), np.isnan(candidates_ME).any(1)
    queries_NE[broken_N], candidates_ME[broken_M] = 0, 0
    step = max(1, BLOCK_SCORES // max(1, len(candidates_ME)))
    for start in range(0, len(queries_NE), step):
        rows = slice(start, start + step)
        scores_nM = queries_NE[rows] @ candidates_ME.T
        scores_nM[broken_N[rows]] = np.nan
        scores_nM[:, broken_M] = np.nan
        yield rows, scores_nM


def scores(queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"]) -> Float[np.ndarray, "N M"]:
    """Return all the cosines at once; NaN where either embedding is unusable."""
    return np.concatenate([scores_nM for _, scores_nM in score_blocks(queries_NE, candidates_ME)])


def ranks(
    queries_NE: Float[np.ndarray, "N E"],
    candidates_ME: Float[np.ndarray, "M E"],
    right: Callable[[slice], Bool[np.ndarray, "n M"]],
) -> Int64[np.ndarray, "N"]:
    """Return how many wrong candidates stand before the best right one, for every query; 0 is best.

    Ties and candidates with a NaN score stand before it; a query whose right answers have no finite score gets M, worse
    than any rank.

    Args:
      right: tells for some rows of the queries which candidates are right.
    """
    result_N = np.empty(len(queries_NE), np.int64)
    for rows, scores_nM in score_blocks(queries_NE, candidates_ME):
        right_nM = right(rows)
        best_n1 = np.where(right_nM & ~np.isnan(scores_nM), scores_nM, -np.inf).max(1, keepdims=True)
        surely_worse_nM = scores_nM < best_n1 - TIE  # False for NaN
        before_n = (~right_nM & ~surely_worse_nM).sum(1)
        result_N[rows] = np.where(np.isfinite(best_n1[:, 0]), before_n, len(candidates_ME))
    return result_N
