"""Exact ranks by cosine similarity, on the accelerator in blocks, so that no broken model can look good.

The usual `rank = count(score > score of the right one)` gives rank 0, a recall of 1, to a model whose output is NaN
or constant, since no comparison holds. Here everything that is not surely worse than the right answer stands before it.

The last bits of a float32 product depend on its shape, on the place in it and on the chip; no rank may. So products
decide what is clear by more than DOUBT, and the host decides what is left, few rows of a block, in float64, as it takes
the cosines of right answers. Ranks are the same integers for any block, batch and number of devices, on any chip.
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

# Cosines closer than this are a tie: a picture's embedding differs in its last bits from batch to batch.
TIE = 1e-6
# What float32 products of unit vectors may be off by. The most seen was 1.2e-6, for 1024 terms of one sign: their
# partial sums come near 1 and are each rounded by up to 2⁻²⁵. 1.5e-7 is usual.
DOUBT = 4e-6
BLOCK_SCORES = 2**22  # scores that a device or the host holds at a time: 16 MiB of float32


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
    """Yield rows of queries with their cosines to every candidate; NaN where either embedding is unusable."""
    queries_NE, candidates_ME = unit(queries_NE), jax.device_put(unit(candidates_ME))
    step = _side(len(queries_NE), BLOCK_SCORES // max(1, len(candidates_ME)))
    for start in range(0, len(queries_NE), step):
        rows = slice(start, start + step)
        queries_nE = queries_NE[rows]
        yield rows, np.array(_cosines(_padded(queries_nE, step), candidates_ME))[: len(queries_nE)]


def scores(queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"]) -> Float[np.ndarray, "N M"]:
    """Return all the cosines at once; NaN where either embedding is unusable."""
    return np.concatenate([scores_nM for _, scores_nM in score_blocks(queries_NE, candidates_ME)])


def ranks(
    queries_NE: Float[np.ndarray, "N E"],
    candidates_ME: Float[np.ndarray, "M E"],
    right: tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]],
) -> Int64[np.ndarray, "N"]:
    """Return how many wrong candidates stand before the best right one, for every query; 0 is best.

    Ties and candidates with a NaN score stand before it; a query whose right answers have no finite score gets M, worse
    than any rank.

    Args:
      right: the queries and the candidates of all pairs that belong together, each pair once.
    """
    queries_NE, candidates_ME = unit(queries_NE), unit(candidates_ME)
    query_m, candidate_m = right
    cosine_m = _cosines_of_pairs(queries_NE, candidates_ME, query_m, candidate_m)
    bar_N = np.full(len(queries_NE), -np.inf)  # below it a candidate is surely worse
    np.fmax.at(bar_N, query_m, cosine_m - TIE)
    best_N = np.full(len(queries_NE), -1)
    is_best_m = cosine_m - TIE == bar_N[query_m]
    best_N[query_m[is_best_m]] = candidate_m[is_best_m]
    before_N = _before(queries_NE, candidates_ME, bar_N, best_N)
    right_before_m = ~(cosine_m < bar_N[query_m]) & (candidate_m != best_N[query_m])  # True for NaN, as there
    before_N -= np.bincount(query_m[right_before_m], minlength=len(before_N))
    return np.where(np.isfinite(bar_N), before_N, len(candidates_ME))


def _cosines_of_pairs(
    queries_NE: Float32[np.ndarray, "N E"],
    candidates_ME: Float32[np.ndarray, "M E"],
    query_m: Integer[np.ndarray, "m"],
    candidate_m: Integer[np.ndarray, "m"],
) -> Float64[np.ndarray, "m"]:
    cosine_m = np.empty(len(query_m))
    step = max(1, BLOCK_SCORES // queries_NE.shape[1])
    for start in range(0, len(query_m), step):
        pairs = slice(start, start + step)
        left_bE, right_bE = queries_NE[query_m[pairs]], candidates_ME[candidate_m[pairs]]
        cosine_m[pairs] = np.einsum("bE,bE->b", left_bE, right_bE, dtype=np.float64)
    return cosine_m


def _before(
    queries_NE: Float32[np.ndarray, "N E"],
    candidates_ME: Float32[np.ndarray, "M E"],
    bar_N: Float64[np.ndarray, "N"],
    best_N: Int64[np.ndarray, "N"],
) -> Int64[np.ndarray, "N"]:
    """Return how many candidates but the best right one are not below each query's bar, those with NaN among them.

    Queries are spread over this process's devices; blocks have two shapes, so this compiles once.
    """
    devices = jax.local_devices()
    by_row, whole = (
        NamedSharding(Mesh(np.array(devices), "devices"), PartitionSpec(*axes)) for axes in (["devices"], [])
    )
    rows_step = _side(-(-len(queries_NE) // len(devices)), math.isqrt(BLOCK_SCORES)) * len(devices)
    columns_step = _side(len(candidates_ME), math.isqrt(BLOCK_SCORES))
    before_N = np.zeros(len(queries_NE), np.int64)

    def settle(rows: slice, columns: slice, counted: list[Int32[Array, "b"]]) -> None:
        bar_n, best_n = bar_N[rows], best_N[rows]
        before_n, doubtful_n, index_n = (np.array(counted_b)[: len(bar_n)] for counted_b in counted)
        (one_o,) = np.nonzero(doubtful_n == 1)
        cosine_o = _cosines_of_pairs(queries_NE, candidates_ME, rows.start + one_o, index_n[one_o])
        before_n[one_o] += ~(cosine_o < bar_n[one_o])
        (several_s,) = np.nonzero(doubtful_n > 1)
        if len(several_s):
            candidates_cE = candidates_ME[columns].astype(np.float64)
            with np.errstate(invalid="ignore"):  # NaN is not below
                not_below_sc = ~(queries_NE[rows.start + several_s] @ candidates_cE.T < bar_n[several_s, None])
            not_below_sc &= columns.start + np.arange(len(candidates_cE))[None] != best_n[several_s, None]
            before_n[several_s] = not_below_sc.sum(1)
        before_N[rows] += before_n

    running = None
    for row in range(0, len(queries_NE), rows_step):
        rows = slice(row, row + rows_step)
        bar_n, best_n = (np.pad(x_N[rows], (0, rows_step - len(x_N[rows]))) for x_N in (bar_N, best_N))
        queries_bE = jax.device_put(_padded(queries_NE[rows], rows_step), by_row)
        low_b, high_b = (jax.device_put((bar_n + off).astype(np.float32), by_row) for off in (-DOUBT, DOUBT))
        best_b = jax.device_put(best_n.astype(np.int32), by_row)
        for column in range(0, len(candidates_ME), columns_step):
            columns = slice(column, column + columns_step)
            candidates_cE = candidates_ME[columns]
            placed_cE = jax.device_put(_padded(candidates_cE, columns_step), whole)
            span = np.int32([column, column + len(candidates_cE)])
            started = rows, columns, _count(queries_bE, low_b, high_b, best_b, placed_cE, span)
            if running:  # the host decides what is left of one block while the devices multiply the next
                settle(*running)
            running = started
    if running:
        settle(*running)
    return before_N


@jax.jit
def _count(
    queries_bE: Array, low_b: Array, high_b: Array, best_b: Array, candidates_cE: Array, span: Array
) -> list[Array]:
    """Return how many candidates but the best right one are not below `high`, how many lie from `low` to it, and which.

    Which: the sum of their indices, of use where it is one.

    span: the index of the first candidate, and of the first padding after them.
    """
    scores_bc = _cosines(queries_bE, candidates_cE)
    index_1c = (span[0] + jnp.arange(len(candidates_cE)))[None]
    asked_bc = (index_1c < span[1]) & (index_1c != best_b[:, None])
    below_bc = scores_bc < high_b[:, None]  # False for NaN
    doubtful_bc = asked_bc & below_bc & (scores_bc >= low_b[:, None])
    counted_bc = [(asked_bc & ~below_bc).astype(jnp.int32), doubtful_bc.astype(jnp.int32), doubtful_bc * index_1c]
    # One pass over the scores: three sums took as long again as the product on a CPU.
    return lax.reduce(counted_bc, [jnp.int32(0)] * 3, lambda left, right: [*map(jnp.add, left, right)], [1])


@jax.jit
def _cosines(queries_bE: Array, candidates_cE: Array) -> Array:
    # Without it a TPU would round to bfloat16, and a GPU to TensorFloat-32.
    return jnp.einsum("bE,cE->bc", queries_bE, candidates_cE, precision=lax.Precision.HIGHEST)


def _side(rows: int, at_most: int) -> int:
    """Return the rows of a block: a power of two for few, so that sets of like sizes share a compilation."""
    return max(1, min(at_most, 1 << max(0, rows - 1).bit_length()))


def _padded(x_nE: Float32[np.ndarray, "n E"], rows: int) -> Float32[np.ndarray, "m E"]:
    return np.pad(x_nE, ((0, rows - len(x_nE)), (0, 0)))
