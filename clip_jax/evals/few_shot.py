"""Few-shot linear probes: what 1, 2, 4, 8, 16 examples per class teach (Radford et al. 2021, section 3.1, figure 6).

Draws are nested: with one seed the two examples of a class contain the one, so that a curve shows what more examples
do, not other ones. Deviation: the paper doesn't say how it chose l2; here the search of `linear_probe` does, on a
validation split, to which the probe is then not fitted. A given l2 needs none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

from clip_jax.evals.linear_probe import Examples, fit, search
from clip_jax.evals.metrics import Interval, Metric, accuracy

SHOTS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class FewShot:
    """What probes measured on the test split, one value per seed: fractions."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> Interval:
        """The least and the greatest of the seeds' values: no interval at a level."""
        return Interval(min(self.values), max(self.values))


def draw(
    class_ids_n: Integer[np.ndarray, "n"], classes: int, shots: int, seed: int, *, fewer: bool = False
) -> Int64[np.ndarray, "m"]:
    """Return the rows of `shots` examples of every class, class after class; those for fewer shots are among them.

    fewer: take what there is of a class with fewer examples; otherwise that is a ValueError, which names the class.
    """
    drawn = []
    for class_id in range(classes):
        rows = np.flatnonzero(class_ids_n == class_id)
        if len(rows) < shots and not fewer:
            raise ValueError(
                f"class {class_id} has {len(rows)} examples, and shots={shots}: "
                f"use at most {len(rows)} shots, or fewer=True to take what there is of such classes"
            )
        # Each class draws from a stream of its own: what others have doesn't change what it draws.
        drawn.append(np.random.default_rng([seed, class_id]).permutation(rows)[:shots])
    return np.concatenate(drawn).astype(np.int64)


def few_shot(
    train: Examples,
    test: Examples,
    classes: int,
    *,
    l2: float | None = None,
    validation: Examples | None = None,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = range(5),
    metric: Metric = accuracy,
    fewer: bool = False,
) -> dict[int, FewShot]:
    """Return by the number of shots what probes fitted to so many examples per class measure on the test split.

    l2: the penalty of all probes; or `validation`, where every draw searches its own.
    fewer: as for `draw`.

    Raises ValueError as `draw` and `fit` do, and where both or neither of l2 and validation are given.
    """
    if (l2 is None) == (validation is None):
        raise ValueError("give either l2, such as l2=1.0, or a validation split to find it on, not both")
    train, test = Examples(*train), Examples(*test)

    def value(count: int, seed: int) -> float:
        rows = draw(train.targets, classes, count, seed, fewer=fewer)
        examples = Examples(train.features_nD[rows], train.targets[rows])
        if validation is None:
            probe = fit(*examples, classes, l2)
        else:
            probe = search(examples, validation, classes, metric, refit=False).probe
        return probe.evaluate(metric, test)

    return {count: FewShot(tuple(value(count, seed) for seed in seeds)) for count in shots}
