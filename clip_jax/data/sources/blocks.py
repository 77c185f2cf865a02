"""Blocks of records: the place of a record among them, and those that are in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int64


def place(starts: Int64[np.ndarray, "n"], index: int) -> tuple[int, int]:
    """Return the part (a block or a file) that has a record, and the record's number in it.

    Args:
      starts: index of the first record of each part, and the number of all records.

    Raises:
      IndexError: if there is no such record.

    >>> place(np.array([0, 10, 15]), 12)
    (1, 2)
    """
    if not 0 <= index < starts[-1]:
        raise IndexError(f"record {index} of {starts[-1]}")
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, index - int(starts[part])


class BlockCache:
    """Blocks that are read by threads, in advance or on demand. Thread-safe."""

    def __init__(self, read: Callable[[int], Any], threads: int):
        """`read` returns the content of a block; `threads` blocks are read at the same time."""
        self._read, self._pool, self._lock = read, ThreadPoolExecutor(threads, "clip_jax-block"), threading.Lock()
        self._blocks: dict[int, Future[Any]] = {}
        self._planned: set[int] = set()

    def prefetch(self, blocks: Int64[np.ndarray, "n"]) -> None:
        """Begin to read these blocks, and free the others, except those of the call before."""
        wanted = list(dict.fromkeys(blocks.tolist()))
        with self._lock:
            keep = self._planned | set(wanted)
            self._planned = set(wanted)
            self._blocks = {block: loading for block, loading in self._blocks.items() if block in keep}
            for block in wanted:
                self._begin(block)

    def __call__(self, block: int) -> Any:
        """Return a block's content; of blocks that were not prefetched, the last two are kept."""
        with self._lock:
            if block not in self._blocks:
                for other in [other for other in self._blocks if other not in self._planned][:-1]:
                    del self._blocks[other]
            loading = self._begin(block)
        return loading.result()

    def _begin(self, block: int) -> Future[Any]:
        if block not in self._blocks:
            self._blocks[block] = self._pool.submit(self._read, block)
        return self._blocks[block]
