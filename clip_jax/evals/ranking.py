"""Exact ranks by cosine similarity, computed in blocks on the accelerator, and their distribution over ties.

The last bits of a float32 matmul depend on its shape, the position in it and the chip; ranks must not. So float32
scores decide comparisons with a margin above UNCERTAINTY, and the host computes the few other cosines in float64.
Ranks are the same integers for any block size, batch size, number of devices and chip.

Ties are exact: equal embeddings have equal cosines at any position. Ranks are random variables over the orders of tied
candidates, all equally likely, so a constant embedding has the rank of a random order (`Ranks`). A cosine is not finite
if either embedding is zero or not finite. A query without any finite cosine ties with all candidates; otherwise such a
cosine ranks last for a positive and first for a negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Float64, Int32, Int64, Integer, Shaped

# Bound of the error of float32 cosines. The largest observed was 1.2e-6, for 1024 terms of one sign, whose partial sums
# are near 1 and each rounded by up to 2⁻²⁵; 1.5e-7 is typical.
UNCERTAINTY = 4e-6
# Bound of the error of a float64 matmul of unit vectors: 2⁻⁵³ per term, 4,096 terms.
UNCERTAINTY64 = 5e-13
BLOCK_SCORES = 2**22  # scores per block, on a device or the host: 16 MiB of float32


class Ranks(NamedTuple):
    """The rank of the best positive of each query: certain numbers of negatives, and those tied with it."""

    above: Int64[np.ndarray, "N"]  # negatives of higher score
    tied: Int64[np.ndarray, "N"]  # negatives of exactly its score
    before: Int64[np.ndarray, "N"]  # of those: negatives with a lower index than the first of the tied positives
    positives: Int64[np.ndarray, "N"]  # positives of exactly its score, at least 1

    def by_index(self) -> Ranks:
        """Return the ranks if ties are ordered by index, as `argmax` and a stable sort do."""
        return Ranks(self.above + self.before, *(np.full_like(self.above, value) for value in (0, 0, 1)))

    def draw(self, rng: np.random.Generator) -> Int64[np.ndarray, "N"]:
        """Return the ranks for a random order of the ties.

        The first of p positives among t negatives is at the minimum of p uniform variables, Beta(1, p); each negative
        is before it with that probability.
        """
        return self.above + rng.binomial(self.tied, rng.beta(1, self.positives))

    def hit_probability(self, k: int) -> Float64[np.ndarray, "N"]:
        """Return for each query the probability that a positive is among the first k, over the orders of the ties."""
        return hit_probability(self.tied, self.positives, k - self.above)

    def take(self, rows: Integer[np.ndarray, "m"]) -> Ranks:
        return Ranks(*(values_N[rows] for values_N in self))


def hit_probability(
    negatives_N: Integer[np.ndarray, "N"], positives_N: Integer[np.ndarray, "N"], drawn_N: Integer[np.ndarray, "N"]
) -> Float64[np.ndarray, "N"]:
    """Return the probability that the first `drawn` of a random order of negatives and positives have a positive.

    Hypergeometric: 1 - ∏ (negatives - i) / (negatives + positives - i) over i < drawn; the binomials would overflow.
    """
    miss_N = np.ones(len(negatives_N))
    for i in range(max(0, int(drawn_N.max(initial=0)))):
        left_N = np.maximum(negatives_N - i, 0)
        factor_N = left_N / np.maximum(negatives_N + positives_N - i, 1)
        miss_N = np.where(i < drawn_N, miss_N * factor_N, miss_N)
    return 1 - miss_N


def unit(x_NE: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N E"]:
    """Return the rows normalized to length 1, as float32; rows that are zero or not finite become NaN."""
    x_NE = x_NE.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        length_N1 = np.linalg.norm(x_NE, axis=1, keepdims=True)
        usable_N1 = np.isfinite(length_N1) & (length_N1 > 0)
        return np.where(usable_N1, x_NE / length_N1, np.nan).astype(np.float32)


def score_blocks(
    queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"]
) -> Iterator[tuple[slice, Float[np.ndarray, "n M"]]]:
    """Yield slices of queries with their cosines to all candidates; NaN if either embedding is zero or not finite."""
    queries_NE, candidates_ME = unit(queries_NE), jax.device_put(unit(candidates_ME))
    step = _block_rows(len(queries_NE), BLOCK_SCORES // max(1, len(candidates_ME)))
    for start in range(0, len(queries_NE), step):
        rows = slice(start, start + step)
        queries_nE = queries_NE[rows]
        yield rows, np.array(_cosines(_padded(queries_nE, step), candidates_ME))[: len(queries_nE)]


def scores(queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"]) -> Float64[np.ndarray, "N M"]:
    """Return all cosines in float64, equal for equal embeddings; NaN if either embedding is zero or not finite."""
    queries_nE, query_N = unique_rows(unit(queries_NE))
    candidates_mE, candidate_M = unique_rows(unit(candidates_ME))
    scores_nm = queries_nE.astype(np.float64) @ candidates_mE.T.astype(np.float64)
    return scores_nm[np.ix_(query_N, candidate_M)]


def unique_rows(x_NE: Shaped[np.ndarray, "N E"]) -> tuple[Shaped[np.ndarray, "n E"], Int64[np.ndarray, "N"]]:
    """Return the distinct rows by their bytes, in the order of their first occurrence, and the index of each row's."""
    bytes_N = np.ascontiguousarray(x_NE).view(np.dtype((np.void, x_NE.shape[1] * x_NE.itemsize)))[:, 0]
    _, first_n, inverse_N = np.unique(bytes_N, return_index=True, return_inverse=True)
    order_n = np.argsort(first_n)
    return x_NE[first_n[order_n]], np.argsort(order_n)[inverse_N.reshape(-1)]


def ranks(
    queries_NE: Float[np.ndarray, "N E"],
    candidates_ME: Float[np.ndarray, "M E"],
    positives: tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]],
) -> Ranks:
    """Return for each query the number of negative candidates ranked before its best positive, and the ties.

    A query without a positive has M, worse than any rank. `positives` are the query indices and candidate indices of
    all matching pairs, each pair once. Scores that are not finite: see the module.
    """
    queries_NE, candidates_ME = unit(queries_NE), unit(candidates_ME)
    (queries, _), (candidates, _) = queries_NE.shape, candidates_ME.shape
    query_m, candidate_m = positives
    positives_N = np.bincount(query_m, minlength=queries)
    finite_M = np.isfinite(candidates_ME).all(1)
    cosine_m = _pair_cosines(queries_NE, candidates_ME, query_m, candidate_m)
    threshold_N = np.full(queries, -np.inf)  # the score of the best positive
    np.fmax.at(threshold_N, query_m, cosine_m)
    is_best_m = cosine_m == threshold_N[query_m]  # False for NaN
    best_N = np.full(queries, candidates)  # the first of the best positives
    np.minimum.at(best_N, query_m[is_best_m], candidate_m[is_best_m])
    best_positives_N = np.bincount(query_m[is_best_m], minlength=queries)
    first_N = np.full(queries, candidates)  # the first positive
    np.minimum.at(first_N, query_m, candidate_m)

    # Among the finite candidates, without the best positive. All candidates tied with it and before it are negatives.
    index_M = np.cumsum(finite_M) - 1
    best_index_N = np.where(best_positives_N > 0, index_M[np.minimum(best_N, candidates - 1)], -1)
    above_N, equal_N, before_N = _compare(queries_NE, candidates_ME[finite_M], threshold_N, best_index_N)
    bad_positives_N = np.bincount(query_m[~finite_M[candidate_m]], minlength=queries)
    above_N += (~finite_M).sum() - bad_positives_N

    negatives_N = candidates - positives_N
    none_N = best_positives_N == 0  # no positive of finite score: last, or tied with all if there is no finite score
    all_tied_N = (positives_N > 0) & (~np.isfinite(queries_NE).all(1) | ~finite_M.any())
    return Ranks(
        np.where(all_tied_N, 0, np.where(none_N, negatives_N, above_N)),
        np.where(all_tied_N, negatives_N, np.where(none_N, 0, equal_N - best_positives_N + 1)),
        np.where(all_tied_N, first_N, np.where(none_N, 0, before_N)),
        np.maximum(np.where(none_N, positives_N, best_positives_N), 1),
    )


def _pair_cosines(
    queries_NE: Float32[np.ndarray, "N E"],
    candidates_ME: Float32[np.ndarray, "M E"],
    query_m: Integer[np.ndarray, "m"],
    candidate_m: Integer[np.ndarray, "m"],
) -> Float64[np.ndarray, "m"]:
    """Return the cosines of pairs. The order of summation depends on E alone: equal embeddings have equal cosines."""
    cosine_m = np.empty(len(query_m))
    step = max(1, BLOCK_SCORES // queries_NE.shape[1])
    for start in range(0, len(query_m), step):
        pairs = slice(start, start + step)
        products_bE = np.multiply(queries_NE[query_m[pairs]], candidates_ME[candidate_m[pairs]], dtype=np.float64)
        cosine_m[pairs] = products_bE.sum(1)
    return cosine_m


def _compare(
    queries_NE: Float32[np.ndarray, "N E"],
    candidates_ME: Float32[np.ndarray, "M E"],
    threshold_N: Float64[np.ndarray, "N"],
    best_N: Int64[np.ndarray, "N"],
) -> Int64[np.ndarray, "3 N"]:
    """Return for each query the numbers of candidates, without the best positive, above and at its threshold.

    The third number: those at the threshold with a lower index than the best positive. Queries are sharded over this
    process's devices. All blocks have the same shapes: one compilation.
    """
    devices = jax.local_devices()
    by_row, replicated = (
        NamedSharding(Mesh(np.array(devices), "devices"), PartitionSpec(*axes)) for axes in (["devices"], [])
    )
    rows_step = _block_rows(-(-len(queries_NE) // len(devices)), math.isqrt(BLOCK_SCORES)) * len(devices)
    columns_step = _block_rows(len(candidates_ME), math.isqrt(BLOCK_SCORES))
    counts_3N = np.zeros((3, len(queries_NE)), np.int64)

    def add_block(rows: slice, columns: slice, counted: list[Int32[Array, "b"]]) -> None:
        threshold_n, best_n = threshold_N[rows], best_N[rows]
        above_n, uncertain_n, index_n = (np.array(counted_b)[: len(threshold_n)] for counted_b in counted)
        counts_3N[0, rows] += above_n
        (one_o,) = np.nonzero(uncertain_n == 1)
        cosine_o = _pair_cosines(queries_NE, candidates_ME, rows.start + one_o, index_n[one_o])
        equal_o = cosine_o == threshold_n[one_o]
        counts_3N[:, rows.start + one_o] += (
            cosine_o > threshold_n[one_o],
            equal_o,
            equal_o & (index_n < best_n)[one_o],
        )
        (several_s,) = np.nonzero(uncertain_n > 1)
        if len(several_s):
            index_1c = np.arange(columns.start, columns.start + len(candidates_ME[columns]))[None]
            best_s1 = best_n[several_s, None]
            several_S = rows.start + several_s
            sign_sc = _signs(queries_NE[several_S], candidates_ME[columns], threshold_n[several_s])
            sign_sc[index_1c == best_s1] = -1
            counts_3N[0, several_S] += (sign_sc > 0).sum(1) - above_n[several_s]
            counts_3N[1:, several_S] += ((sign_sc == 0).sum(1), ((sign_sc == 0) & (index_1c < best_s1)).sum(1))

    running = None
    for row in range(0, len(queries_NE), rows_step):
        rows = slice(row, row + rows_step)
        threshold_n, best_n = (np.pad(x_N[rows], (0, rows_step - len(x_N[rows]))) for x_N in (threshold_N, best_N))
        queries_bE = jax.device_put(_padded(queries_NE[rows], rows_step), by_row)
        low_b, high_b = (
            jax.device_put((threshold_n + off).astype(np.float32), by_row) for off in (-UNCERTAINTY, UNCERTAINTY)
        )
        best_b = jax.device_put(best_n.astype(np.int32), by_row)
        for column in range(0, len(candidates_ME), columns_step):
            columns = slice(column, column + columns_step)
            candidates_cE = candidates_ME[columns]
            placed_cE = jax.device_put(_padded(candidates_cE, columns_step), replicated)
            span = np.int32([column, column + len(candidates_cE)])
            started = rows, columns, _count(queries_bE, low_b, high_b, best_b, placed_cE, span)
            if running:  # the host finishes one block while the devices compute the next
                add_block(*running)
            running = started
    if running:
        add_block(*running)
    return counts_3N


def _signs(
    queries_sE: Float32[np.ndarray, "n E"],
    candidates_cE: Float32[np.ndarray, "m E"],
    threshold_s: Float64[np.ndarray, "n"],
) -> Integer[np.ndarray, "n m"]:
    """Return the signs of cosine - threshold, exactly."""
    unique_uE, index_c = unique_rows(candidates_cE)  # constant embeddings: one row
    difference_su = queries_sE.astype(np.float64) @ unique_uE.T.astype(np.float64) - threshold_s[:, None]
    sign_su = np.sign(difference_su).astype(np.int8)
    close_m = np.nonzero(np.abs(difference_su) <= UNCERTAINTY64)
    sign_su[close_m] = np.sign(_pair_cosines(queries_sE, unique_uE, *close_m) - threshold_s[close_m[0]])
    return sign_su[:, index_c]


@jax.jit
def _count(
    queries_bE: Array, low_b: Array, high_b: Array, best_b: Array, candidates_cE: Array, span: Array
) -> list[Array]:
    """Return for each query, without its best positive, three sums over the candidates of a block.

    The number not below `high`, the number from `low` to `high`, and the sum of the indices of the latter, which is the
    index if there is one. span: index of the first candidate, and of the first padding row after them.
    """
    scores_bc = _cosines(queries_bE, candidates_cE)
    index_1c = (span[0] + jnp.arange(len(candidates_cE)))[None]
    counted_bc = (index_1c < span[1]) & (index_1c != best_b[:, None])
    below_bc = scores_bc < high_b[:, None]  # False for NaN
    uncertain_bc = counted_bc & below_bc & (scores_bc >= low_b[:, None])
    sums_bc = [(counted_bc & ~below_bc).astype(jnp.int32), uncertain_bc.astype(jnp.int32), uncertain_bc * index_1c]
    # One pass over the scores: three separate sums took as long as the matmul on a CPU.
    return lax.reduce(sums_bc, [jnp.int32(0)] * 3, lambda left, right: [*map(jnp.add, left, right)], [1])


@jax.jit
def _cosines(queries_bE: Array, candidates_cE: Array) -> Array:
    # The default precision is bfloat16 on TPUs and TensorFloat-32 on GPUs.
    return jnp.einsum("bE,cE->bc", queries_bE, candidates_cE, precision=lax.Precision.HIGHEST)


def _block_rows(rows: int, limit: int) -> int:
    """Return the rows of a block: a power of two if small, so that datasets of similar sizes share a compilation."""
    return max(1, min(limit, 1 << max(0, rows - 1).bit_length()))


def _padded(x_nE: Float32[np.ndarray, "n E"], rows: int) -> Float32[np.ndarray, "m E"]:
    return np.pad(x_nE, ((0, rows - len(x_nE)), (0, 0)))
