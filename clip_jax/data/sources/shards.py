"""Shards of sequential records: one file format each in `tfrecord.py` and `tar.py`, read by the blocks of an index.

On local disks each record is read by its offset, in the order of `RecordOrder`. From object stores whole blocks are
read, in the order of `BlockOrder`: the blocks of the window that a lane is in, and those of its next one in advance.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int64

from clip_jax.config import DataConfig
from clip_jax.data import order, storage
from clip_jax.data.index import Format, Index, open_index
from clip_jax.data.sources.blocks import BlockCache, place
from clip_jax.data.sources.fields import IMAGE_FIELDS, Fields
from clip_jax.data.storage import File
from clip_jax.paths import is_url
from clip_jax.typing import BadRecord, Record

log = logging.getLogger(__name__)

FETCH_THREADS = 16  # blocks that are read at the same time
WINDOW_BLOCKS = 2  # that a lane shuffles at a time
LANES = 64  # at least the number of hosts
COMPRESSION = {b"\x1f\x8b": ("gzip", "gunzip"), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"), b"BZh": ("bzip2", "bunzip2")}

Block = tuple[bytes, np.ndarray]  # content, and the offset in it of each record and of the end


class ShardSource:
    """Records of shards, in the order of the shards' file names."""

    format: ClassVar[Format]
    usual_images: ClassVar[tuple[str, ...]] = IMAGE_FIELDS

    def __init__(
        self,
        files: Sequence[str | File],
        captions: Iterable[str],
        cache_dir: str,
        *,
        order: Literal["", "records", "blocks"] = "",
        lanes: int = LANES,
        window_blocks: int = WINDOW_BLOCKS,
        max_bad_fraction: float = 1.0,
        max_stall_seconds: float = 600.0,
    ):
        """Open the shards with their index.

        Args:
          files: paths or URLs.
          captions: names of the fields to return as captions. `fields` has them, and may be replaced.
          cache_dir: local folder for the index of shards that have none in their folder; '' for no cache.
          order: of the examples: 'records' for local files and 'blocks' for an object store, unless given.
          lanes: of the block order, a power of two; at least the number of hosts.
          window_blocks: of the block order, number of blocks that a lane shuffles at a time.
          max_bad_fraction: of the data, that may be lost in damaged, truncated and empty shards.
          max_stall_seconds: how long a store that fails is tried again.

        Raises:
          ValueError: if the shards hold no record, are compressed, or more than `max_bad_fraction` is lost.
        """
        stats = [file if isinstance(file, File) else storage.stat(file) for file in files]
        stats.sort(key=File.name_and_path)
        self.fields = Fields(tuple(captions), usual_images=self.usual_images)
        self._stall, self.num_files = max_stall_seconds, len(stats)
        self._index = open_index(stats, self.format, cache_dir, max_stall_seconds)
        self._starts = np.concatenate([[0], np.cumsum(self._index.records)])  # first record of each block, and the end
        self._shard_starts = self._starts[np.searchsorted(self._index.shard_of, np.arange(len(stats)))]
        self._local = not any(is_url(file.path) for file in stats)
        self._by_blocks = order == "blocks" or (not order and not self._local)
        self.in_memory = self._by_blocks  # a record is read without waiting, once its block is
        self._lanes, self._window_blocks = lanes, window_blocks
        self._offsets: dict[int, np.ndarray] = {}  # of the records of blocks of local files
        self._blocks = BlockCache(self._fetch, FETCH_THREADS)
        _check_complete(self._index, len(self), self.format, max_bad_fraction)

    @classmethod
    def from_config(
        cls,
        config: DataConfig,
        image: str = "",
        image_encoding: str = "file",
        text_encoding: str = "utf-8",
        order: Literal["", "records", "blocks"] = "",
        lanes: int = LANES,
        window_blocks: int = WINDOW_BLOCKS,
    ) -> ShardSource:
        fields = Fields(tuple(config.captions), image, cls.usual_images, image_encoding, text_encoding)
        source = cls(
            storage.list_files(config.files),
            config.captions,
            config.cache_dir,
            order=order,
            lanes=lanes,
            window_blocks=window_blocks,
            max_bad_fraction=config.max_bad_fraction,
            max_stall_seconds=config.max_stall_seconds,
        )
        source.fields = fields
        return source

    @classmethod
    def check_files(cls, config: DataConfig) -> None:
        """Raise ValueError if a pattern of `data.files` matches no file; reads no shard."""
        storage.list_files(config.files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        """Return '<path>#<number of the record in the shard>'."""
        block, _ = place(self._starts, index)
        return f"{self._path(block)}#{index - self._shard_starts[self._index.shard_of[block]]}"

    def read(self, index: int) -> Record:
        try:
            data = self._read(*place(self._starts, index))
        except storage.StorageError:
            raise
        except OSError as error:
            raise BadRecord(f"unreadable: {error}") from error
        return self.parse(data, index)

    def parse(self, data: bytes, index: int) -> Record:
        """Return the record of these bytes of a shard. Raises BadRecord."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        return self._index.fingerprint()

    def order(self, seed: int, batch_size: int) -> order.RecordOrder | order.BlockOrder:
        """Return the order of the examples."""
        if not self._by_blocks:
            return order.RecordOrder(len(self), seed)
        window = self._window_blocks * max(1, round(float(self._index.records.mean())))
        return order.BlockOrder(self._index.records, seed, batch_size, self._lanes, window)

    def prefetch(self, blocks: Int64[np.ndarray, "n"]) -> None:
        """Begin to read these blocks, and free the others, except those of the call before."""
        self._blocks.prefetch(blocks)

    def _path(self, block: int) -> str:
        return self._index.shards[self._index.shard_of[block]].file.path

    def _read(self, block: int, number: int) -> bytes:
        """Return the bytes of a record."""
        if self._by_blocks:
            content, offsets = self._blocks(block)
            return content[offsets[number] : offsets[number + 1]]
        if block not in self._offsets:
            start, stop = int(self._index.start[block]), int(self._index.stop[block])
            self._offsets[block] = self._scan(block, self._reader(block), start, stop)
        first, last = self._offsets[block][number : number + 2].tolist()
        return self._reader(block)(first, last)

    def _fetch(self, block: int) -> Block:
        """Read a block, whose records are checked one by one when they are parsed."""
        start, stop = int(self._index.start[block]), int(self._index.stop[block])
        content = self._reader(block)(start, stop)
        offsets = self.format.offsets(content)
        if offsets is None or len(offsets) - 1 != self._index.records[block]:  # damaged, or changed
            offsets = self._scan(block, lambda first, last: content[first:last], 0, len(content))
        return content, offsets

    def _reader(self, block: int):
        path = self._path(block)
        return lambda start, stop: storage.read_range(path, start, stop, self._stall)

    def _scan(self, block: int, read, start: int, stop: int) -> np.ndarray:
        offsets = self.format.scan(read, start, stop).offsets
        if len(offsets) - 1 != self._index.records[block]:
            start, stop = self._index.start[block], self._index.stop[block]
            raise OSError(
                f"{self._path(block)}: expected {self._index.records[block]} records in bytes {start} to {stop},"
                f" got {len(offsets) - 1}: the file has changed since it was indexed"
            )
        return offsets


def _check_complete(index: Index, records: int, format: Format, max_bad_fraction: float) -> None:
    """Log the bytes that are skipped; raise ValueError if they are too many."""
    lost = []
    sizes = [shard.file.size for shard in index.shards if shard.file.size]
    for shard in index.shards:
        skipped = shard.file.size - shard.stop
        if not shard.file.size:
            log.warning("%s is empty", shard.file.path)
            lost.append((sum(sizes) / max(1, len(sizes)), shard.file.path, "is empty"))
        elif shard.problem:
            check_compression(shard.file)
            found = int(shard.records.sum())
            if not skipped:
                log.warning("%s %s; its %d records are used", shard.file.path, shard.problem, found)
                continue
            log.warning(
                "%s: record %d at byte %d %s; %d records before it are used, %d bytes from it on are skipped",
                *(shard.file.path, found, shard.stop, shard.problem, found, skipped),
            )
            lost.append((skipped, shard.file.path, shard.problem))
    if not records:
        raise ValueError(
            f"data.files: the {len(index.shards)} shards hold no records; the first is {index.shards[0].file.path}. "
            f"Give {format.name} files such as {storage.EXAMPLES}"
        )
    fraction = sum(size for size, _, _ in lost) / max(1, sum(sizes))
    if lost and fraction > max_bad_fraction:
        listed = ", ".join(f"{path} {problem}" for _, path, problem in lost[:3])
        raise ValueError(
            f"{fraction:.1%} of the data is lost in {len(lost)} of {len(index.shards)} shards, more than"
            f" data.max_bad_fraction={max_bad_fraction:g}: {listed}. Repair the shards, or allow more, e.g."
            " --config.data.max_bad_fraction=0.5"
        )


def check_compression(file: File) -> None:
    """Raise ValueError if a file begins as one of gzip, zstd or bzip2, which is not decompressed."""
    head = storage.read_range(file.path, 0, 4)
    for magic, (name, command) in COMPRESSION.items():
        if head.startswith(magic):
            raise ValueError(
                f"{file.path} is compressed by {name}: its records can't be read one by one; decompress it, e.g."
                f" {command} {os.path.basename(file.path)}"
            )
