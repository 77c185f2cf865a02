"""ArrayRecord files (https://github.com/google/array_record) of `tf.train.Example`; on local disks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from clip_jax.config import DataConfig
from clip_jax.data import storage
from clip_jax.data.sources.blocks import place
from clip_jax.data.sources.fields import Fields
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.data.sources.tfrecord import example, parse_example
from clip_jax.data.storage import File
from clip_jax.paths import check_local
from clip_jax.typing import BadRecord, Record

FOOTER_BYTES = 64 * 1024  # of the index at the end of a file, hashed for the fingerprint


class ArrayRecordSource:
    """Records of ArrayRecord files, in the order of the files' names."""

    def __init__(self, files: Sequence[File], fields: Fields):
        """Open the files. Raises ValueError if one is not readable as ArrayRecord, or none has a record."""
        self._files = sorted(files, key=File.name_and_path)
        self._fields, self.num_files = fields, len(files)
        self._readers = [_open(file.path) for file in self._files]
        counts = [reader.num_records() for reader in self._readers]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if empty := [file.path for file, count in zip(self._files, counts, strict=True) if not count]:
            raise ValueError(
                f"data.files: {empty[0]}: expected an ArrayRecord file with records, got none; write it again"
            )

    @classmethod
    def from_config(
        cls,
        config: DataConfig,
        image: str = "",
        image_encoding: str = "file",
        text_encoding: str = "utf-8",
    ) -> ArrayRecordSource:
        fields = Fields(tuple(config.captions), image, image_encoding=image_encoding, text_encoding=text_encoding)
        check_local("data.files", config.files)
        return cls(storage.list_files(config.files), fields)

    @classmethod
    def check_files(cls, config: DataConfig) -> None:
        """Raise ValueError if a pattern of `data.files` matches no file; reads none."""
        check_local("data.files", config.files)
        storage.list_files(config.files)

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Write three files of 20 records and return a config for tests."""
        records = [SyntheticSource(60).read(index) for index in range(60)]
        for number in range(3):
            rows = records[20 * number : 20 * number + 20]
            write_array_record(
                folder / f"{number:05d}.array_record", ((row.image, row.captions["txt"][0]) for row in rows)
            )
        return DataConfig(source="array_record", files=f"{folder}/*.array_record")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        """Return '<path>#<number of the record in the file>'."""
        file, number = place(self._starts, index)
        return f"{self._files[file].path}#{number}"

    def read(self, index: int) -> Record:
        file, number = place(self._starts, index)
        try:
            (data,) = self._readers[file].read([number])
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadRecord(f"unreadable: {error}") from error
        return parse_example(data, self._fields, lambda: self.key(index))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file, count in zip(self._files, np.diff(self._starts).tolist(), strict=True):
            footer = storage.read_range(file.path, max(0, file.size - FOOTER_BYTES), file.size)
            digest.update(f"{os.path.basename(file.path)} {file.size} {count}".encode() + footer)
        return digest.hexdigest()[:16]


def write_array_record(path: str | os.PathLike, pairs: Iterable[tuple[bytes, str]]) -> None:
    """Write a file with the features `image` and `caption`, one record per chunk, for random access."""
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    for image, caption in pairs:
        writer.write(example({"image": image, "caption": caption}))
    writer.close()


def _open(path: str) -> array_record_module.ArrayRecordReader:
    try:
        return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"data.files: {path}: expected an ArrayRecord file: {error}") from error
