"""A mixture of datasets, `data.mixture`: every global batch has the same number of pairs of each.

The rows of a batch are dealt to the datasets evenly, the same rows in every batch, so that all hosts read all datasets.
In its rows a dataset has its own order, as if there were no others. So the mixture is a function of (datasets, weights,
batch size, seed, step), and resumes at any step on any number of hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Int64

from clip_jax.config import DataConfig
from clip_jax.data import order
from clip_jax.data.sources.blocks import place
from clip_jax.typing import DataSource, Record

log = logging.getLogger(__name__)

SHARES = 256  # shares of a batch are exact to this part of it
SEEDS = 1_000_003  # distance of the datasets' seeds


def dataset_configs(config: DataConfig) -> dict[str, DataConfig]:
    """Return the config of each dataset of `data.mixture`, by their sorted names.

    Raises:
      ValueError: if `data` names another dataset than those of the mixture.
    """
    for key in ("source", "files", "options"):
        if value := getattr(config, key):
            raise ValueError(
                f"data.{key}={value!r}, and data.mixture has datasets; give it in one of them, or no mixture"
            )
    return {
        name: dataclasses.replace(
            config, mixture={}, source=dataset.source, files=dataset.files, options=dataset.options
        )
        for name, dataset in sorted(config.mixture.items())
    }


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the key of a dataset."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.mixture.{name}: {error}") from error


class MixtureSource:
    """The records of all datasets, one dataset after the other; their order has the mixture."""

    def __init__(self, datasets: Mapping[str, DataSource], weights: Mapping[str, float]):
        """`weights` are the datasets' shares of a batch, relative to their sum."""
        self._names, self._datasets = list(datasets), list(datasets.values())
        self._weights = {name: weights[name] for name in datasets}
        self._starts = np.concatenate([[0], np.cumsum([len(dataset) for dataset in self._datasets], dtype=np.int64)])
        self.in_memory = all(getattr(dataset, "in_memory", False) for dataset in self._datasets)
        self._first_blocks = np.zeros(len(datasets) + 1, np.int64)  # number of the first block of each dataset
        self.held_out = {name: part for name in datasets for part in getattr(datasets[name], "held_out", {}).values()}

    @classmethod
    def from_config(cls, config: DataConfig, open_source: Callable[[DataConfig], DataSource]) -> MixtureSource:
        """Open the datasets of `data.mixture`."""
        datasets = {}
        for name, dataset in dataset_configs(config).items():
            with named_errors(name):
                datasets[name] = open_source(dataset)
        return cls(datasets, {name: config.mixture[name].weight for name in datasets})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        """Return '<dataset>:<key in it>'."""
        number, at = place(self._starts, index)
        return f"{self._names[number]}:{self._datasets[number].key(at)}"

    def read(self, index: int) -> Record:
        number, at = place(self._starts, index)
        record = self._datasets[number].read(at)
        return dataclasses.replace(record, key=f"{self._names[number]}:{record.key}")

    def fingerprint(self) -> str:
        parts = zip(self._weights.items(), self._datasets, strict=True)
        text = "\n".join(f"{name} {weight:g} {dataset.fingerprint()}" for (name, weight), dataset in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def order(self, seed: int, batch_size: int) -> order.MixtureOrder:
        """Return the order of the examples, and log the datasets' rows.

        Raises:
          ValueError: if a dataset has no row in a batch.
        """
        rows = rows_of_datasets(self._weights, batch_size)
        orders = []
        for number, (name, dataset) in enumerate(zip(self._names, self._datasets, strict=True)):
            own_seed, count = seed + SEEDS * number, rows[name]
            by_blocks = hasattr(dataset, "order")
            orders.append(dataset.order(own_seed, count) if by_blocks else order.RecordOrder(len(dataset), own_seed))
            log.info("%s: %d of %d rows of a batch, %.1f steps an epoch", name, count, batch_size, len(dataset) / count)
        blocks = [len(o.block_records) if isinstance(o, order.BlockOrder) else 0 for o in orders]
        self._first_blocks = np.concatenate([[0], np.cumsum(blocks)])
        return order.MixtureOrder(orders, list(rows.values()), self._starts, self._first_blocks)

    def prefetch(self, blocks: Int64[np.ndarray, "n"]) -> None:
        """Begin to read these blocks, numbers of `MixtureOrder.blocks`, and free others."""
        for number, dataset in enumerate(self._datasets):
            first, end = self._first_blocks[number : number + 2]
            if end > first:
                dataset.prefetch(blocks[(first <= blocks) & (blocks < end)] - first)


def rows_of_datasets(weights: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Return the number of rows of each dataset in a batch: its share, to 1 / SHARES, by largest remainders.

    They are multiples of a power of two where batch and shares are large, because all lanes of a `BlockOrder` have the
    same number of rows.

    >>> rows_of_datasets({"laion": 3.0, "cc3m": 1.0}, 4096), rows_of_datasets({"laion": 7.0, "cc3m": 3.0}, 32768)
    ({'laion': 3072, 'cc3m': 1024}, {'laion': 22912, 'cc3m': 9856})
    """
    shares = np.array(list(weights.values())) / sum(weights.values())
    unit = 1
    while batch_size % (2 * unit) == 0 and 2 * unit * max(SHARES, 8 / shares.min()) <= batch_size:
        unit *= 2
    exact = shares * (batch_size // unit)
    units = np.floor(exact + 1e-9).astype(int)
    for number in np.argsort(units - exact, kind="stable")[: batch_size // unit - units.sum()]:
        units[number] += 1
    rows = dict(zip(weights, (units * unit).tolist(), strict=True))
    if none := [name for name, count in rows.items() if not count]:
        raise ValueError(
            f"data.mixture.{none[0]}.weight={weights[none[0]]:g} of {sum(weights.values()):g} is no row of a batch of"
            f" {batch_size:,}; give a larger weight, or a larger batch"
        )
    return rows
