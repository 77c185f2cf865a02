"""Exact ranks by cosine similarity, computed in blocks on the accelerator.

The usual `rank = count(score > positive score)` gives rank 0, a recall of 1, to a model whose output is NaN or
constant. Here every candidate that is not lower than the positive by more than a tie ranks before it.

The last bits of a float32 matmul depend on its shape, the position in it and the chip; ranks must not. So float32
scores decide comparisons with a margin above UNCERTAINTY, and the host computes the few other cosines in float64.
Ranks are the same integers for any block size, batch size, number of devices and chip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Float64, Int32, Int64, Integer

# Cosines closer than this are a tie: the last bits of an embedding depend on the batch.
TIE = 1e-6
# Bound of the error of float32 cosines. The largest observed was 1.2e-6, for 1024 terms of one sign, whose partial sums
# are near 1 and each rounded by up to 2⁻²⁵; 1.5e-7 is typical.
UNCERTAINTY = 4e-6
BLOCK_SCORES = 2**22  # scores per block, on a device or the host: 16 MiB of float32


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


def scores(queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"]) -> Float[np.ndarray, "N M"]:
    """Return all cosines as one array; NaN if either embedding is zero or not finite."""
    return np.concatenate([scores_nM for _, scores_nM in score_blocks(queries_NE, candidates_ME)])


def ranks(
    queries_NE: Float[np.ndarray, "N E"],
    candidates_ME: Float[np.ndarray, "M E"],
    positives: tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]],
) -> Int64[np.ndarray, "N"]:
    """Return for each query the number of negative candidates ranked before its best positive; 0 is best.

    Ties and NaN scores rank before it. A query without a positive of finite score gets M, worse than any rank.
    `positives` are the query indices and candidate indices of all matching pairs, each pair once.
    """
    queries_NE, candidates_ME = unit(queries_NE), unit(candidates_ME)
    query_m, candidate_m = positives
    cosine_m = _pair_cosines(queries_NE, candidates_ME, query_m, candidate_m)
    threshold_N = np.full(len(queries_NE), -np.inf)  # candidates below rank after the positive
    np.fmax.at(threshold_N, query_m, cosine_m - TIE)
    best_N = np.full(len(queries_NE), -1)
    is_best_m = cosine_m - TIE == threshold_N[query_m]
    best_N[query_m[is_best_m]] = candidate_m[is_best_m]
    before_N = _count_before(queries_NE, candidates_ME, threshold_N, best_N)
    is_before_m = ~(cosine_m < threshold_N[query_m])  # True for NaN, as in _count_before
    positives_before_m = is_before_m & (candidate_m != best_N[query_m])
    before_N -= np.bincount(query_m[positives_before_m], minlength=len(before_N))
    return np.where(np.isfinite(threshold_N), before_N, len(candidates_ME))


def _pair_cosines(
    queries_NE: Float32[np.ndarray, "N E"],
    candidates_ME: Float32[np.ndarray, "M E"],
    query_m: Integer[np.ndarray, "m"],
    candidate_m: Integer[np.ndarray, "m"],
) -> Float64[np.ndarray, "m"]:
    cosine_m = np.empty(len(query_m))
    step = max(1, BLOCK_SCORES // queries_NE.shape[1])
    for start in range(0, len(query_m), step):
        pairs = slice(start, start + step)
        query_bE, candidate_bE = queries_NE[query_m[pairs]], candidates_ME[candidate_m[pairs]]
        cosine_m[pairs] = np.einsum("bE,bE->b", query_bE, candidate_bE, dtype=np.float64)
    return cosine_m


def _count_before(
    queries_NE: Float32[np.ndarray, "N E"],
    candidates_ME: Float32[np.ndarray, "M E"],
    threshold_N: Float64[np.ndarray, "N"],
    best_N: Int64[np.ndarray, "N"],
) -> Int64[np.ndarray, "N"]:
    """Return for each query the number of candidates, without the best positive, not below its threshold or NaN.

    Queries are sharded over this process's devices. All blocks have the same shapes: one compilation.
    """
    devices = jax.local_devices()
    by_row, replicated = (
        NamedSharding(Mesh(np.array(devices), "devices"), PartitionSpec(*axes)) for axes in (["devices"], [])
    )
    rows_step = _block_rows(-(-len(queries_NE) // len(devices)), math.isqrt(BLOCK_SCORES)) * len(devices)
    columns_step = _block_rows(len(candidates_ME), math.isqrt(BLOCK_SCORES))
    before_N = np.zeros(len(queries_NE), np.int64)

    def add_block(rows: slice, columns: slice, counted: list[Int32[Array, "b"]]) -> None:
        threshold_n, best_n = threshold_N[rows], best_N[rows]
        before_n, uncertain_n, index_n = (np.array(counted_b)[: len(threshold_n)] for counted_b in counted)
        (one_o,) = np.nonzero(uncertain_n == 1)
        cosine_o = _pair_cosines(queries_NE, candidates_ME, rows.start + one_o, index_n[one_o])
        before_n[one_o] += ~(cosine_o < threshold_n[one_o])
        (several_s,) = np.nonzero(uncertain_n > 1)
        if len(several_s):
            candidates_cE = candidates_ME[columns].astype(np.float64)
            with np.errstate(invalid="ignore"):  # NaN counts as not below
                not_below_sc = ~(queries_NE[rows.start + several_s] @ candidates_cE.T < threshold_n[several_s, None])
            not_below_sc &= columns.start + np.arange(len(candidates_cE))[None] != best_n[several_s, None]
            before_n[several_s] = not_below_sc.sum(1)
        before_N[rows] += before_n

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
    return before_N


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
