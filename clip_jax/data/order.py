"""The order of examples, as a pure function of integers.

Position p of the infinite sequence of examples is row p % B of step p // B, with B pairs in the global batch. An order
maps positions to epochs and examples, independently of the number of hosts:

* `RecordOrder`, for local files and memory: a keyed permutation of all examples.
* `BlockOrder`, for object stores: the blocks (contiguous records of a shard) are permuted, dealt to lanes, and shuffled
  within windows of the lanes, so that every host reads whole blocks, each once per epoch.
* `MixtureOrder`, for `data.mixture`: these orders of its datasets.

All other randomness of an example (caption, augmentation, replacement of a damaged record) is a hash of (seed, epoch,
example, purpose) by the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"), so it depends neither on the host nor on the thread.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import tensorflow as tf

# Of TensorFlow's `RandomIndexShuffle`, a block cipher with cycle walking; even. With 4 rounds, as in its Python wrapper
# `tf.random.experimental.index_shuffle`, neighbors of a million examples correlate by up to 0.4; 24 leave 0.003, the
# level of chance.
ROUNDS = 24

# Purposes of draws. The numbers are part of the meaning of a seed: append, never renumber.
FEATURE, VALUE, AUGMENT, REPLACE, COUNT, SHUFFLE, HOLD_OUT = range(7)

BLOCK_ATTEMPTS = 50  # replacements that are searched in the block of a damaged record


class RecordOrder:
    """Every epoch is a keyed permutation of the examples."""

    def __init__(self, examples: int, seed: int):
        self._examples, self._seed = examples, seed

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return epoch and example of each position, int64[n] each."""
        epochs, offsets = np.divmod(positions, self._examples)
        return epochs, _shuffled(offsets, self._examples, self._seed, epochs)

    def replacement(self, examples: np.ndarray, attempt: int, *words: np.ndarray) -> np.ndarray:
        """Return the example that replaces each of these, int64[n]; `attempt` counts from 1.

        words: more of the draw, e.g. the epochs, int64[n].
        """
        return (draw(REPLACE, examples, attempt, *words) % np.uint64(self._examples)).astype(np.int64)


class BlockOrder:
    """Every epoch is a permutation of blocks, which lanes read in sequence and shuffle within windows.

    Row r of a batch belongs to lane r·L // B. The epochs' examples are dealt to the L lanes like cards: number g = o·L
    + l of the infinite sequence is number o of lane l, in epoch g // N. So lanes begin an epoch within one example of
    each other, and every example occurs once per epoch. Lane l reads a contiguous part of the epoch's blocks in their
    permuted order, divided into windows of about `window` records, which are permuted.
    """

    def __init__(self, block_records: np.ndarray, seed: int, batch_size: int, lanes: int, window: int):
        """
        Args:
          block_records: number of records of each block, int64[n].
          lanes: a power of two; halved until it divides the batch.
          window: number of records that a lane shuffles, and a host holds in memory twice.
        """
        self.block_records = block_records
        self._starts = np.concatenate([[0], np.cumsum(block_records)])  # first example of each block, and the end
        self._examples, self._seed, self._batch_size, self.window = int(self._starts[-1]), seed, batch_size, window
        self.lanes = math.gcd(batch_size, lanes)
        self._epoch = functools.lru_cache(maxsize=4)(self._permuted_blocks)
        self._window_order = functools.lru_cache(maxsize=2 * self.lanes)(self._permuted_window)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return epoch and example of each position, int64[n] each."""
        steps, rows = np.divmod(positions, self._batch_size)
        lane_rows = self._batch_size // self.lanes
        lanes, rows = np.divmod(rows, lane_rows)
        offsets = steps * lane_rows + rows  # in the infinite sequence of the lane
        epochs, first, size, at = self._windows(lanes, offsets)
        numbers = first + self._permuted(epochs, first, size, at)  # in the epoch's blocks
        examples = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            blocks, ends = self._epoch(int(epoch))
            of_epoch = epochs == epoch
            index = np.searchsorted(ends, numbers[of_epoch], side="right")
            from_end = ends[index] - numbers[of_epoch]
            examples[of_epoch] = self._starts[blocks[index] + 1] - from_end
        return epochs, examples

    def replacement(self, examples: np.ndarray, attempt: int, *words: np.ndarray) -> np.ndarray:
        """As that of RecordOrder; at the first attempts of the example's block, which is in memory."""
        first, end = np.zeros_like(examples), np.full_like(examples, self._examples)
        if attempt <= BLOCK_ATTEMPTS:
            blocks = np.searchsorted(self._starts, examples, side="right") - 1
            first, end = self._starts[blocks], self._starts[blocks + 1]
        return first + (draw(REPLACE, examples, attempt, *words) % (end - first).astype(np.uint64)).astype(np.int64)

    def blocks(self, step: int, rows: slice, ahead: int = 1) -> list[np.ndarray]:
        """Return the blocks that these rows need from a step on, one array for each window.

        First the windows of the step, one per lane of the rows, then their successors, `ahead` times.
        """
        lane_rows = self._batch_size // self.lanes
        lanes = np.arange(rows.start // lane_rows, -(-rows.stop // lane_rows))
        offsets = np.full(len(lanes), step * lane_rows)
        found = []
        for _ in range(1 + ahead):
            epochs, first, size, at = self._windows(lanes, offsets)
            for epoch, start, count in zip(epochs.tolist(), first.tolist(), size.tolist(), strict=True):
                blocks, ends = self._epoch(epoch)
                begin, last = np.searchsorted(ends, [start, start + count - 1], side="right")
                found.append(blocks[begin : last + 1])
            offsets = offsets + size - at
        return found

    def _windows(self, lanes: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return of each offset of a lane: the epoch, the window's first number in it and its size, the place in it."""
        epochs = (offsets * self.lanes + lanes) // self._examples
        begin, end = (-(-(epoch * self._examples - lanes) // self.lanes) for epoch in (epochs, epochs + 1))
        count, at = end - begin, offsets - begin
        windows = np.maximum(1, count // self.window)
        window = ((at + 1) * windows - 1) // count
        first = window * count // windows
        size = (window + 1) * count // windows - first
        before = self._dealt((epochs + 1) * self._examples, lanes) - self._dealt(epochs * self._examples, lanes)
        return epochs, before + first, size, at - first

    def _permuted(self, epochs: np.ndarray, first: np.ndarray, size: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Return the place in its window that each place is permuted to."""
        found = np.empty_like(at)
        for row in np.unique(epochs * self._examples + first, return_index=True)[1].tolist():
            same = (epochs == epochs[row]) & (first == first[row])
            found[same] = self._window_order(int(epochs[row]), int(first[row]), int(size[row]))[at[same]]
        return found

    def _permuted_window(self, epoch: int, first: int, size: int) -> np.ndarray:
        """Sort by hashes, 0.1 µs a record; cycle walking takes 30 µs in windows of 60."""
        return np.argsort(draw(SHUFFLE, self._seed, epoch, first, np.arange(size)), kind="stable").astype(np.int32)

    def _dealt(self, examples: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Return how many of the first examples of the infinite sequence go to the lanes before each lane."""
        rounds, rest = np.divmod(examples, self.lanes)
        return rounds * lanes + np.minimum(rest, lanes)

    def _permuted_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the blocks in the order of an epoch, and how many examples each and those before it have."""
        count = len(self._starts) - 1
        blocks = _shuffled(np.arange(count), count, self._seed, epoch)
        return blocks, np.cumsum(np.diff(self._starts)[blocks])


class MixtureOrder:
    """The order of several datasets: their own orders, each in its rows of the batch, the same in every batch."""

    def __init__(
        self,
        orders: list[RecordOrder | BlockOrder],
        rows: list[int],
        starts: np.ndarray,
        first_blocks: np.ndarray,
    ):
        """
        Args:
          rows: number of each dataset's rows in a batch.
          starts: first example of each dataset, and the end.
          first_blocks: number of the first block of each dataset, and the end.
        """
        self._orders, self._counts, self._starts, self._first_blocks = orders, rows, starts, first_blocks
        # Row i of n of a dataset is at (i + 1/2) / n of the batch.
        at = np.concatenate([(np.arange(count) + 0.5) / count for count in rows])
        by_place = np.argsort(at, kind="stable")
        self._dataset = np.repeat(np.arange(len(rows)), rows)[by_place]  # of each row of the batch
        self._row = np.concatenate([np.arange(count) for count in rows])[by_place]  # among those of its dataset

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch of its dataset and the example of each position."""
        steps, rows = np.divmod(positions, len(self._row))
        epochs, examples = np.empty_like(positions), np.empty_like(positions)
        for number, count in enumerate(self._counts):
            mine = self._dataset[rows] == number
            if mine.any():
                own = steps[mine] * count + self._row[rows[mine]]
                epochs[mine], examples[mine] = self._orders[number](own)
                examples[mine] += self._starts[number]
        return epochs, examples

    def replacement(self, examples: np.ndarray, attempt: int, *words: np.ndarray) -> np.ndarray:
        """Return the example of the same dataset that replaces each of these; `attempt` counts from 1."""
        found = np.empty_like(examples)
        datasets = np.searchsorted(self._starts, examples, side="right") - 1
        for number in np.unique(datasets).tolist():
            mine, start = datasets == number, self._starts[number]
            own = self._orders[number].replacement(examples[mine] - start, attempt, *(word[mine] for word in words))
            found[mine] = own + start
        return found

    def blocks(self, step: int, rows: slice, ahead: int = 1) -> list[np.ndarray]:
        """Return the blocks that these rows need, as those of `BlockOrder`, of all datasets that have blocks."""
        found = []
        for number, own in enumerate(self._orders):
            mine = self._row[rows][self._dataset[rows] == number]
            if isinstance(own, BlockOrder) and len(mine):
                blocks = own.blocks(step, slice(int(mine[0]), int(mine[-1]) + 1), ahead)
                found += [block + self._first_blocks[number] for block in blocks]
        return found


Order = RecordOrder | BlockOrder | MixtureOrder


def _shuffled(index: np.ndarray, count: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """Return the image of each index under a keyed permutation of [0, count), int64[n]; arguments broadcast."""
    key = np.stack(np.broadcast_arrays(np.int64(seed), epoch, np.int64(0), index)[:3], axis=1)
    count = np.broadcast_to(np.int64(count) - 1, index.shape)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=key, max_index=count, rounds=ROUNDS).numpy()


def draw(purpose: np.ndarray | int, *words: np.ndarray | int) -> np.ndarray:
    """Return a uint64 hash of the purpose and the words (seed, epoch, example, …), which broadcast."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        state = _mix(np.atleast_1d(purpose).astype(np.uint64) + np.uint64(1))
        for word in words:
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + _mix(np.atleast_1d(word).astype(np.uint64)))
    return state


def fraction(bits: np.ndarray) -> np.ndarray:
    """Return uint64 draws as float64 in [0, 1), from their 53 highest bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augmentation_seeds(seed: int, epochs: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Return int64[n, 2], seeds of `philox.uniform`, one per example and epoch."""
    halves = [draw(AUGMENT, seed, epochs, example_ids, half) for half in (0, 1)]
    return np.stack(halves, axis=1).astype(np.int64)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
