"""Shared by the dataset readers: sequences read on access, text files, class names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # in a tar sample with several images the first one counts


class LazySequence(Sequence):
    """A sequence whose items are read on access, e.g. the encoded images of a split.

    name_of: returns the name of an item for messages, e.g. its path.
    """

    def __init__(self, length: int, read: Callable[[int], Any], name_of: Callable[[int], str] = str):
        self._indices, self._read, self.name_of = range(length), read, name_of

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
        super().__init__(len(self._ranges), self._read_range, self._name_of)

    def _name_of(self, index: int) -> str:
        file_id, offset, _ = (int(number) for number in self._ranges[index])
        return f"{self._paths[file_id]}, byte {offset}" if offset else self._paths[file_id]

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


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file without a byte order mark, which editors on Windows write."""
    return path.read_text("utf-8-sig")


def _read_local(path: str | Path) -> bytes | None:
    return Path(path).read_bytes() if Path(path).is_file() else None


def read_lines(path: str | Path, read: Callable[[str | Path], bytes | None] = _read_local) -> tuple[str, ...]:
    """Return the stripped lines of a text file, () without the file. Raises ValueError for an empty line.

    read: returns a file's content, or None without the file; for paths in object stores.
    """
    if (content := read(path)) is None:
        return ()
    lines = tuple(line.strip() for line in content.decode("utf-8-sig").splitlines())
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"{path}, line {number} is empty: expected one entry per line, without empty lines")
    return lines


def read_templates(directory: str | Path, read: Callable[[str | Path], bytes | None] = _read_local) -> tuple[str, ...]:
    """Return the templates stored with a dataset, () without the file. Raises ValueError for one without a slot.

    read: as in `read_lines`.
    """
    path = f"{directory}/zeroshot_classification_templates.txt"
    templates = tuple(line.replace("{c}", "{}") for line in read_lines(path, read))
    for number, template in enumerate(templates, start=1):
        if "{}" not in template:
            raise ValueError(f"{path}, line {number}: expected {{c}} as in 'a photo of a {{c}}.', got {template!r}")
    return templates


def in_class_order(names: Sequence[tuple[str, ...]], keys: Sequence[str], source: str) -> tuple[tuple[str, ...], ...]:
    """Return class names in the order of the keys of the stored classes, e.g. of their folders.

    If every key is the name of one class, the names are sorted by them. Keys that are no names, such as WordNet
    ids, number the classes in their order.

    Raises ValueError for another number of keys, or if only some keys are names and one of another class.
    """
    if len(names) != len(keys):
        raise ValueError(
            f"{source}: expected a name for each of the {len(keys)} classes from {keys[0]!r} to {keys[-1]!r}, "
            f"got {len(names)} names; class folders without images count"
        )
    ids_of: dict[str, set[int]] = {}
    for class_id, several in enumerate(names):
        for name in several:
            ids_of.setdefault(_plain(name), set()).add(class_id)
    found = [ids_of.get(_plain(key), set()) for key in keys]
    by_key = [min(ids) if len(ids) == 1 else -1 for ids in found]
    if sorted(by_key) == list(range(len(keys))):
        return tuple(tuple(names[class_id]) for class_id in by_key)
    for class_id, ids in enumerate(found):
        if ids and class_id not in ids:
            raise ValueError(
                f"{source}: class {class_id} is named {names[class_id][0]!r}, but stored as {keys[class_id]!r}, "
                f"which is the name of class {min(ids)}: list the names in the order of the stored classes"
            )
    return tuple(map(tuple, names))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()
