"""Linear probe search against scikit-learn with the same values of l2: `make bench-probe`.

10,000 rows of 512 float32 features for training, 2,000 for validation, 2,000 for testing: rows of length 10 in a narrow
cone, like CLIP's embeddings, with variance 1/k along the k-th direction and variance 1/k² of the class centers. 10 and
100 classes. Wall-clock seconds on all cores with default threads; for clip_jax also with compilation, once per size.
OpenBLAS's threads do not accelerate scikit-learn here: with one core each (`taskset -c 0`, OPENBLAS_NUM_THREADS=1) the
ratios were 9 and 5, not 21 and 14.

scikit-learn's `LogisticRegression` has the paper's settings: L-BFGS, at most 1000 steps, default tolerance, which stops
many fits far from the optimum. The last line is the smaller median ratio of scikit-learn's time to clip_jax's.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from clip_jax.evals.linear_probe import Examples, ProbeSearch, search  # noqa: E402
from clip_jax.evals.metrics import accuracy  # noqa: E402

WIDTH, ROWS, LENGTH = 512, (10_000, 2_000, 2_000), 10
SPREADS = {10: 1.3, 100: 1.4}  # of the class centers, by number of classes; within a class it is 1
ROUNDS = 1


def main() -> None:
    """Print times and accuracies for each number of classes, and the lower ratio in the last line."""
    print(f"ratio: {min(_compare(classes) for classes in SPREADS):.1f}")


def _splits(classes: int) -> list[Examples]:
    rng = np.random.default_rng(0)
    deviation_D = np.arange(1, WIDTH + 1) ** -0.5
    cone_D = rng.standard_normal(WIDTH) * deviation_D
    centers_QD = rng.standard_normal((classes, WIDTH)) * deviation_D**2 * SPREADS[classes]
    rotation_DD = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    splits = []
    for rows in ROWS:
        class_ids_n = rng.integers(classes, size=rows)
        features_nD = cone_D + centers_QD[class_ids_n] + rng.standard_normal((rows, WIDTH)) * deviation_D
        features_nD *= LENGTH / np.linalg.norm(features_nD, axis=1, keepdims=True)
        splits.append(Examples((features_nD @ rotation_DD).astype(np.float32), class_ids_n))
    return splits


def _scikit_learn(train: Examples, validation: Examples, found: ProbeSearch) -> tuple[float, LogisticRegression]:
    def fit(examples: Examples, l2: float) -> LogisticRegression:
        return LogisticRegression(C=1 / l2, max_iter=1000).fit(*examples)

    values = {l2: fit(train, l2).score(*validation) for l2 in found.curve}
    l2 = max(values, key=lambda l2: (values[l2], l2))
    return l2, fit(Examples(*(np.concatenate(pair) for pair in zip(train, validation, strict=True))), l2)


def _compare(classes: int) -> float:
    train, validation, test = _splits(classes)
    began = time.perf_counter()
    search(train, validation, classes)
    print(f"{classes} classes, clip_jax with compilation: {time.perf_counter() - began:.1f} s", flush=True)
    ratios = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        found = search(train, validation, classes)
        between = time.perf_counter()
        l2, reference = _scikit_learn(train, validation, found)
        ended = time.perf_counter()
        ratios.append((ended - between) / (between - began))
    fractions = [found.probe.evaluate(accuracy, test), reference.score(*test)]
    for name, seconds, best, fraction in (
        ("clip_jax", between - began, found.l2, fractions[0]),
        ("scikit-learn", ended - between, l2, fractions[1]),
    ):
        print(f"{classes} classes, {name:<13} {seconds:7.1f} s   l2 {best:8.2g}   accuracy {fraction:.4f}", flush=True)
    print(f"{classes} classes: {100 * (fractions[0] - fractions[1]):+.2f} points, {ratios[-1]:.1f} times as fast")
    return statistics.median(ratios)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # scikit-learn: not converged after 1000 steps
    main()
