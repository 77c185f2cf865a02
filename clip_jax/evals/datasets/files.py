"""Shared by the dataset readers: sequences read on access, class names, fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # in a tar sample with several images the first one counts


class LazySequence(Sequence):
    """A sequence whose items are read on access, e.g. the encoded images of a split.

    fingerprint: hash of the content, by which `DiskCachedEmbedder` finds embeddings; '' for none.
    """

    def __init__(self, length: int, read: Callable[[int], Any], fingerprint: str = ""):
        self._indices, self._read, self.fingerprint = range(length), read, fingerprint

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:  # an integer, of NumPy too, or a slice
        indices = self._indices[index]
        return [self._read(i) for i in indices] if isinstance(indices, range) else self._read(indices)


class FileRanges(LazySequence):
    """Encoded images as byte ranges of files. Memory: 24 bytes per image and the paths."""

    def __init__(self, paths: Sequence[str], file_ids: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]):
        """Image i is stored in `paths[file_ids[i]]`: `sizes[i]` bytes from byte `offsets[i]`."""
        self._paths = tuple(paths)
        self._ranges = np.array([file_ids, offsets, sizes], np.int64).T  # [n 3]
        super().__init__(len(self._ranges), self._read_range)

    def _read_range(self, index: int) -> bytes:
        file_id, offset, size = (int(number) for number in self._ranges[index])
        with open(self._paths[file_id], "rb", buffering=0) as file:  # unbuffered: a buffer would read past the range
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(
                f"{self._paths[file_id]}: image {index}: expected {size} bytes from byte {offset}, got {len(data)}: "
                "the file has changed since it was indexed; open the split again"
            )
        return data


def fingerprint(parts: Iterable[str]) -> str:
    """Return a hash of a dataset's description, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for text in parts:
        digest.update(f"{len(text)} {text}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def read_lines(path: Path) -> tuple[str, ...]:
    """Return the stripped lines of a text file, () without the file. Raises ValueError for an empty line."""
    if not path.is_file():
        return ()
    lines = tuple(line.strip() for line in path.read_text("utf-8").splitlines())
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"{path}, line {number} is empty: expected one entry per line, without empty lines")
    return lines
