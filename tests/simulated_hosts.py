"""Hosts that read an epoch by blocks, without data: which blocks each of them requests, by the code of the pipeline."""

from collections.abc import Sequence

import numpy as np

from clip_jax.data.order import BlockOrder
from clip_jax.data.pipeline import _Prefetch
from clip_jax.data.sources.blocks import BlockCache
from clip_jax.data.sources.synthetic import SyntheticSource


def requested_blocks(
    ordered: BlockOrder, batch_size: int, hosts: int, steps: range, simulated: Sequence[int] | None = None
) -> dict[int, tuple[list[int], np.ndarray]]:
    """Return the blocks that hosts of a run request, and the examples that they use, by host.

    Raises AssertionError if a host uses a block that is not in its memory then.

    Args:
      steps: of the run.
      simulated: numbers of some hosts; all by default.
    """
    starts, size, found = np.cumsum([0, *ordered.block_records]), batch_size // hosts, {}
    for host in range(hosts) if simulated is None else simulated:
        requests: list[int] = []
        cache = BlockCache(requests.append, 1)
        rows = np.arange(host * size, (host + 1) * size)
        source = SyntheticSource(1)
        source.prefetch = cache.prefetch
        prefetch, examples = _Prefetch(source, ordered, slice(host * size, (host + 1) * size)), []
        for step in steps:
            prefetch(step)
            examples.append(ordered(step * batch_size + rows)[1])
            used = np.unique(np.searchsorted(starts, examples[-1], side="right") - 1)
            assert set(used.tolist()) <= set(cache._blocks)
        cache._pool.shutdown()
        found[host] = requests, np.concatenate(examples)
    return found
