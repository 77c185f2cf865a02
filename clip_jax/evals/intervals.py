"""Confidence intervals of metrics, and metrics with their reference values."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer

from clip_jax.evals.metrics import METRICS, Metric, Predictions, Undefined, hits
from clip_jax.evals.ranking import BLOCK_SCORES

LEVEL, RESAMPLES = 0.95, 1000


class Interval(NamedTuple):
    low: float
    high: float


def with_references(
    key: str,
    value: float,
    candidates: int | float,
    chance: float | None = None,
    interval: Interval | None = None,
    ties: int = 0,
    by_index: float | None = None,
) -> dict[str, float]:
    """Return a metric with its reference values `/candidates`, `/chance`, `/ci_low`, `/ci_high`.

    With ties also `/ties`, the number of tied examples, and `/by_index`, the value with ties ordered by index.
    """
    low, high = interval or (None, None)
    found = {"": value, "/candidates": float(candidates), "/chance": chance, "/ci_low": low, "/ci_high": high}
    if ties:
        found |= {"/ties": float(ties), "/by_index": by_index}
    return {key + name: number for name, number in found.items() if number is not None}


def bootstrap_interval(
    values_n: Float[np.ndarray, "n"] | Bool[np.ndarray, "n"],
    *,
    strata_n: Integer[np.ndarray, "n"] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of a mean, or with strata of the mean of the strata's means.

    The counts of each distinct value in a resample are multinomial, so hits need one binomial number per resample.
    Equal values, as for n = 1, give an interval of width 0: use `exact_interval`. With strata, e.g. the targets for the
    mean per class, examples are drawn within each stratum.
    """
    if len(values_n) == 0 or not np.isfinite(values_n).all():
        raise ValueError("expected at least one value, all finite; count other values as errors, do not drop them")
    rng = np.random.default_rng(seed)
    strata = _rows_by_stratum(strata_n, len(values_n))
    means = np.zeros(resamples)
    for rows in strata:
        values, counts = np.unique(values_n[rows].astype(np.float64), return_counts=True)
        size = len(rows)
        step = max(1, BLOCK_SCORES // len(values))  # resamples per block
        for start in range(0, resamples, step):
            block = slice(start, min(start + step, resamples))
            drawn = rng.multinomial(size, counts / size, block.stop - block.start)
            means[block] += drawn @ values / size
    return _percentiles(means / len(strata), level)


def _rows_by_stratum(strata_n: Integer[np.ndarray, "n"] | None, n: int) -> list[np.ndarray]:
    if strata_n is None:
        return [np.arange(n)]
    return [np.flatnonzero(strata_n == stratum) for stratum in np.unique(strata_n)]


def mean_interval(values_n: Float[np.ndarray, "n"] | Bool[np.ndarray, "n"]) -> Interval:
    """Return the bootstrap interval of a mean of fractions, or the exact one if all are 0 or all are 1."""
    if values_n.min() == values_n.max() and values_n[0] in (0, 1):
        return exact_interval(int(values_n.sum()), len(values_n))
    return bootstrap_interval(values_n)


def confidence_interval(name: str, predictions: Predictions) -> Interval:
    """Return the 95 % interval of a metric of METRICS by the fastest bootstrap for it."""
    if name in ("top1", "top5"):
        return mean_interval(hits(predictions, 1 if name == "top1" else 5))
    if name == "mean_per_class":
        hits_n = hits(predictions)
        return bootstrap_interval(hits_n, strata_n=predictions.targets) if hits_n.std() else mean_interval(hits_n)
    return bootstrap_metric(METRICS[name], predictions)


def bootstrap_metric(
    metric: Metric,
    predictions: Predictions,
    *,
    strata_n: Integer[np.ndarray, "n"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of any metric, which is computed for every resample.

    With strata, examples are drawn within each stratum. Resamples for which the metric is undefined (e.g. without
    negatives) are ignored. A minimum over groups is biased low in resamples.
    """
    predictions = dataclasses.replace(predictions, draws=1)  # each resample has one random order of the ties
    metric(predictions)  # raises its errors, and caches the ranks
    rng = np.random.default_rng(seed)
    strata = _rows_by_stratum(strata_n, len(predictions.scores))
    values = []
    for _ in range(resamples):
        rows = np.concatenate([rng.choice(rows, len(rows)) for rows in strata])
        try:
            values.append(metric(predictions.take(rows)))
        except Undefined:
            continue
    if not values:
        raise Undefined(f"undefined in all {resamples} resamples of {len(predictions.scores)} examples")
    return _percentiles(np.array(values))


def exact_interval(correct: int, n: int, *, level: float = LEVEL) -> Interval:
    """Return the exact interval of an accuracy, `correct` of n (Clopper and Pearson 1934), by bisection.

    Conservative: it covers at least `level`, and is wider than the bootstrap's.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"correct: expected 0 ≤ correct ≤ n and n ≥ 1, got {correct} of {n}")

    def lower_bound(correct: int) -> float:
        """Return the p at which `correct` or more of n have the probability (1 - level) / 2."""
        low, high = 0.0, correct / n
        for _ in range(60 if correct else 0):
            p = (low + high) / 2
            low, high = (p, high) if binomial_tail(correct, n, p) < (1 - level) / 2 else (low, p)
        return high

    return Interval(lower_bound(correct), 1 - lower_bound(n - correct))


def binomial_tail(correct: int, n: int, probability: float) -> float:
    """Return P(X ≥ correct) for X ~ Binomial(n, probability), exactly, for 0 < probability < 1."""
    log_binomial_i = _log_binomials(n)[correct:]
    i = np.arange(correct, n + 1)
    return float(np.exp(log_binomial_i + i * np.log(probability) + (n - i) * np.log1p(-probability)).sum())


@functools.lru_cache(maxsize=4)
def _log_binomials(n: int) -> Float64[np.ndarray, "m"]:
    """Return the logarithms of the binomial coefficients of n."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return log_factorial[n] - log_factorial - log_factorial[::-1]


def _percentiles(values: Float64[np.ndarray, "m"], level: float = LEVEL) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a fraction between 0 and 1, e.g. {LEVEL}, got {level}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
