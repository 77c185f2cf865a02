"""The held-out part of training data, `data.validation_fraction`: pairs that are never trained on.

A pair is held out by a hash of its key, the name of its file and its number there, if that is below the fraction. So
the choice depends neither on hosts, seed and step, nor on the folder, nor on files that are added later, and a larger
fraction holds out more pairs in addition. Of sources that are read by blocks, such as object stores, where a single
record costs a block, whole files are held out, by the hash of their name. The other pairs have the order of a source of
their own: each occurs once an epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt64

from clip_jax.data import order
from clip_jax.typing import DataSource, Record

CHUNK = 2**20  # keys that are hashed at a time
NUMBERED = re.compile(r"(?:.*/)?([^/]*)#(\d+)", re.DOTALL)  # '<path of the file>#<number of the record in it>'


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out records of a source, in the order of their hashes, or of those of their files."""

    source: DataSource
    ranges: Int64[np.ndarray, "n 2"]  # first record and end of each run of records

    def __len__(self) -> int:
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())

    def __iter__(self) -> Iterator[int]:
        for first, end in self.ranges.tolist():
            yield from range(first, end)


class TrainingPart:
    """The records of a source that are not held out, in the order of the source."""

    def __init__(self, source: DataSource, held_out: HeldOut):
        self._source, self.held_out = source, {"": held_out}  # by dataset, as in `MixtureSource`
        self._ranges = held_out.ranges[np.argsort(held_out.ranges[:, 0])]
        self._before = np.concatenate([[0], np.cumsum(self._ranges[:, 1] - self._ranges[:, 0])])  # held out, to a range
        self._at = self._ranges[:, 0] - self._before[:-1]  # number of records of this part before each range
        self._kept_blocks = np.zeros(0, np.int64)
        self.in_memory = getattr(source, "in_memory", False)

    def __len__(self) -> int:
        return len(self._source) - int(self._before[-1])

    def key(self, index: int) -> str:
        return self._source.key(self._place(index))

    def read(self, index: int) -> Record:
        return self._source.read(self._place(index))

    def fingerprint(self) -> str:
        return hashlib.sha256(self._source.fingerprint().encode() + self._ranges.tobytes()).hexdigest()[:16]

    def order(self, seed: int, batch_size: int) -> order.RecordOrder | order.BlockOrder:
        """Return the order of the examples: that of the source, without the held-out blocks."""
        whole = _block_order(self._source, seed, batch_size)
        if whole is None:
            return order.RecordOrder(len(self), seed)
        starts = np.cumsum(whole.block_records) - whole.block_records
        at = np.searchsorted(self._ranges[:, 0], starts, side="right") - 1
        self._kept_blocks = np.flatnonzero((at < 0) | (starts >= self._ranges[at, 1]))
        records = whole.block_records[self._kept_blocks]
        return order.BlockOrder(records, seed, batch_size, whole.lanes, whole.window)

    def prefetch(self, blocks: Int64[np.ndarray, "n"]) -> None:
        """As `ShardSource.prefetch`."""
        self._source.prefetch(self._kept_blocks[blocks])

    def _place(self, index: int) -> int:
        """Return the number of a record in the source."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return index + int(self._before[np.searchsorted(self._at, index, side="right")])


def split(source: DataSource, fraction: float) -> TrainingPart:
    """Return the part of a source that is trained on; its `held_out` is the other.

    Args:
      fraction: `data.validation_fraction`, above 0.

    Raises:
      ValueError: if nothing is held out, or everything, or if the source has no keys.
    """
    blocks = _block_order(source, 0, 2)
    find = _held_out_records(source, fraction) if blocks is None else _held_out_files(source, blocks, fraction)
    found = list(find)
    ranges = np.concatenate([np.zeros((0, 2), np.int64), *(ranges for ranges, _ in found)])
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hashes for _, hashes in found)])
    held_out = HeldOut(source, ranges[np.argsort(hashes, kind="stable")])
    if not 0 < len(held_out) < len(source):
        files = "" if blocks is None else f" in {len(_files(source, blocks))} files, which are held out whole"
        raise ValueError(
            f"data.validation_fraction={fraction:g} holds out {len(held_out):,} of {len(source):,} pairs{files}; give"
            f" {'a larger' if not len(held_out) else 'a smaller'} fraction{'' if blocks is None else ' or more files'}"
        )
    return TrainingPart(source, held_out)


def key_hash(key: str) -> UInt64[np.ndarray, "1"]:
    """Return the hash of a record's key, by which it is held out."""
    name, number = _parse(key)
    return _hashes(name, np.array([number]))


def _hashes(name: str, *numbers: Int64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Return the hash of each record of a file; without numbers that of the file."""
    digest = hashlib.blake2b(name.encode(errors="backslashreplace"), digest_size=8).digest()
    return order.draw(order.HOLD_OUT, int.from_bytes(digest, "little"), *numbers)


def _parse(key: str) -> tuple[str, int]:
    """Return the name of the file, without its folder, and the record's number in it; or the key and 0.

    >>> _parse("gs://bucket/laion/00017.tar#12"), _parse("cats/1.jpg")
    (('00017.tar', 12), ('cats/1.jpg', 0))
    """
    match = NUMBERED.fullmatch(key)
    return (match[1], int(match[2])) if match else (key, 0)


def _place(source: DataSource, record: int) -> tuple[str, int]:
    key = source.key(record) if hasattr(source, "key") else ""
    if not key:
        raise ValueError(
            f"data.validation_fraction: record {record} of the source has no key, by which it would be held out; give"
            " the source a `key`, or data.validation_fraction=0"
        )
    return _parse(key)


def _held_out_records(source: DataSource, fraction: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ranges of single records and their hashes."""
    for first, count, name, number in _runs(source):
        for start in range(0, count, CHUNK):
            hashes = _hashes(name, number + np.arange(start, min(start + CHUNK, count)))
            found = np.flatnonzero(order.fraction(hashes) < fraction)
            yield first + start + found[:, None] + [0, 1], hashes[found]


def _runs(source: DataSource) -> Iterator[tuple[int, int, str, int]]:
    """Yield runs of records with numbers that follow each other in a file: first record, count, file, first number.

    The keys of a run's ends are enough to find it, as those of a file's records follow each other: of a billion
    records few keys are made.
    """
    parts = [(0, len(source) - 1)]
    while parts:
        first, last = parts.pop()
        (name, number), (other, end) = _place(source, first), _place(source, last)
        if (name, end - number) == (other, last - first):
            yield first, last - first + 1, name, number
        else:
            middle = (first + last) // 2
            parts += [(middle + 1, last), (first, middle)]


def _held_out_files(
    source: DataSource, blocks: order.BlockOrder, fraction: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the range of records of each held-out file, and the hash of its name."""
    files = _files(source, blocks)
    for (first, name), (end, _) in zip(files, [*files[1:], (len(source), "")], strict=True):
        hashes = _hashes(name)
        if order.fraction(hashes)[0] < fraction:
            yield np.array([[first, end]]), hashes


def _files(source: DataSource, blocks: order.BlockOrder) -> list[tuple[int, str]]:
    """Return the first record and the name of each file that has blocks."""
    starts = np.cumsum(blocks.block_records) - blocks.block_records
    found: list[tuple[int, str]] = []
    for start in starts[blocks.block_records > 0].tolist():
        name, _ = _place(source, start)
        if not found or found[-1][1] != name:
            found.append((start, name))
    return found


def _block_order(source: DataSource, seed: int, batch_size: int) -> order.BlockOrder | None:
    """Return the order of a source that is read by blocks; None for others."""
    found = source.order(seed, batch_size) if hasattr(source, "order") else None
    return found if isinstance(found, order.BlockOrder) else None
