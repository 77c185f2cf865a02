"""TFRecord shards with img2dataset's features, read by random access.

A shard is a sequence of frames: length (u64), checksum of the length (u32), data, checksum of the data (u32); checksums
are CRC-32C, rotated and offset (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details). The
headers of every shard are read once, by seeking; each record is then read by its offset, so a flipped byte costs one
record. A truncated record, or a damaged header and everything after it, can't be indexed: it is skipped and logged.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import logging
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from clip_jax.config import DataConfig
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.paths import is_url, write_atomically
from clip_jax.typing import BadRecord, Record

log = logging.getLogger(__name__)

IMAGE_FEATURES = ("jpg", "jpeg", "png", "webp", "image")
HEADER_BYTES, FOOTER_BYTES = 12, 4
SCAN_THREADS = 16
EXAMPLES = "'/data/cc3m/*.tfrecord', '/data/cc3m/{00000..00331}.tfrecord' or 'a.tfrecord,b.tfrecord'"

Values = bytes | str | int | float | Sequence[bytes | str]


class TFRecordSource:
    """Records of TFRecord shards, in the order of the shards' file names."""

    def __init__(self, files: Sequence[str], captions: Iterable[str], cache_dir: str):
        """Index the shards, which may be URLs. Raises ValueError if they hold no record.

        Args:
          captions: names of the features to return as captions.
          cache_dir: local folder for the shards' indices, by path, size and modification time; '' for no cache.
        """
        self._files = sorted(files, key=lambda path: (os.path.basename(path), path))
        self._captions = tuple(captions)
        cache = Path(cache_dir).expanduser() if cache_dir else None
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            shards = list(pool.map(lambda path: _cached_index(path, cache), self._files))
        self._offsets = [offsets for offsets, _ in shards]
        self._sizes = [size for _, size in shards]
        counts = [len(offsets) - 1 for offsets in self._offsets]
        self._starts = np.cumsum([0, *counts])
        for path, offsets, size in zip(self._files, self._offsets, self._sizes, strict=True):
            _log_skipped_bytes(path, offsets, size)
        if not len(self):
            raise ValueError(
                f"data.files: the {len(self._files)} shards hold no records; the first is {self._files[0]}. "
                f"Give TFRecord files such as {EXAMPLES}"
            )

    @classmethod
    def from_config(cls, config: DataConfig) -> TFRecordSource:
        return cls(expand_files(config.files), config.captions, config.cache_dir)

    @classmethod
    def check_files(cls, config: DataConfig) -> None:
        """Raise ValueError if a pattern of `data.files` matches no file; reads no shard."""
        expand_files(config.files)

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Write three shards of 20 records and return a config for tests."""
        records = [SyntheticSource(60).read(index) for index in range(60)]
        for shard in range(3):
            rows = records[20 * shard : 20 * shard + 20]
            write_tfrecord(folder / f"{shard:05d}.tfrecord", ({"png": row.image, **row.captions} for row in rows))
        return DataConfig(source="tfrecord", files=f"{folder}/*.tfrecord", cache_dir=str(folder))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        """Return '<path>#<number of the record in the shard>'."""
        shard, number = self._locate(index)
        return f"{self._files[shard]}#{number}"

    def read(self, index: int) -> Record:
        shard, number = self._locate(index)
        start, end = (int(offset) for offset in self._offsets[shard][number : number + 2])
        try:
            with _open(self._files[shard]) as file:
                file.seek(start + HEADER_BYTES)
                framed = file.read(end - start - HEADER_BYTES)
        except (OSError, tf.errors.OpError) as error:
            raise BadRecord(f"unreadable: {error}") from error
        data, footer = framed[:-FOOTER_BYTES], framed[-FOOTER_BYTES:]
        if len(framed) != end - start - HEADER_BYTES or footer != _masked_crc(data):
            raise BadRecord("checksum mismatch")
        return self._parse(data, self.key(index))

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sizes and record counts in order; independent of their folder."""
        digest = hashlib.sha256()
        for path, size, offsets in zip(self._files, self._sizes, self._offsets, strict=True):
            digest.update(f"{os.path.basename(path)} {size} {len(offsets) - 1}\n".encode())
        return digest.hexdigest()[:16]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _parse(self, data: bytes, key: str) -> Record:
        try:
            features = tf.train.Example.FromString(data).features.feature
        except DecodeError as error:
            raise BadRecord("not a tf.train.Example") from error
        names = [name for name in IMAGE_FEATURES if name in features and features[name].bytes_list.value]
        if not names:
            raise BadRecord(f"no image feature; features are {', '.join(sorted(features))}")
        image = features[names[0]].bytes_list.value[0]
        if not image:
            raise BadRecord("empty image")
        if "key" in features and features["key"].bytes_list.value:
            key = features["key"].bytes_list.value[0].decode("utf-8", "replace") or key
        captions = {name: _texts(name, features[name].bytes_list.value) for name in self._captions if name in features}
        return Record(key=key, image=image, captions=captions)


def expand_files(files: str) -> list[str]:
    """Return the paths of a glob, a brace range or a comma-separated list of these. Raises ValueError for no file."""
    if not files.strip():
        raise ValueError(f"data.source='tfrecord' reads the shards of data.files, which is empty; give e.g. {EXAMPLES}")
    paths = []
    for pattern in files.split(","):
        for path in _expand_braces(os.path.expanduser(pattern.strip())):
            found = _glob(path)
            if not found:
                problem = "matches no file" if glob.has_magic(path) else "does not exist"
                raise ValueError(f"data.files={files!r}: {path!r} {problem}. Give files such as {EXAMPLES}")
            paths += found
    return paths


def write_tfrecord(path: str | os.PathLike, records: Iterable[Mapping[str, Values]]) -> None:
    """Write a shard with img2dataset's features.

    >>> import tempfile
    >>> from clip_jax.data.sources.tfrecord import TFRecordSource
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tfrecord(f"{folder}/00000.tfrecord", [{"jpg": b"<bytes of a JPEG>", "txt": "a dog", "key": "0"}])
    ...     TFRecordSource([f"{folder}/00000.tfrecord"], captions=["txt"], cache_dir="").read(0)
    Record(key='0', image=b'<bytes of a JPEG>', captions={'txt': ('a dog',)})

    Args:
      path: of the new shard, local or URL.
      records: features by name: `key`, one of `jpg`, `png`, `webp`, and texts such as `txt`.
    """
    with tf.io.TFRecordWriter(os.fspath(path)) as writer:
        for record in records:
            feature = {name: _feature(value) for name, value in record.items()}
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def is_intact(path: str | os.PathLike) -> bool:
    """Return whether a local shard exists and has no truncated or damaged record."""
    if not os.path.isfile(path):
        return False
    content = Path(path).read_bytes()
    offsets = _index(io.BytesIO(content), len(content)).tolist()
    frames = (content[start + HEADER_BYTES : end] for start, end in itertools.pairwise(offsets))
    return offsets[-1] == len(content) and all(x[-FOOTER_BYTES:] == _masked_crc(x[:-FOOTER_BYTES]) for x in frames)


def _feature(value: Values) -> tf.train.Feature:
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    if isinstance(value, float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
    values = [value] if isinstance(value, (bytes, str)) else value
    encoded = [item.encode() if isinstance(item, str) else item for item in values]
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))


def _texts(name: str, values: Iterable[bytes]) -> tuple[str, ...]:
    try:
        return tuple(value.decode() for value in values)
    except UnicodeDecodeError as error:
        raise BadRecord(f"caption {name!r} is not UTF-8") from error


def _expand_braces(pattern: str) -> list[str]:
    """Expand each '{00..12}' of a pattern, keeping leading zeros."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        if "{" in pattern:
            raise ValueError(f"data.files: {pattern!r} has a brace that is no range such as {{00000..00331}}")
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"data.files: {pattern!r} counts down; write {{{last}..{first}}}")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    numbers = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    return [path for n in numbers for path in _expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _glob(path: str) -> list[str]:
    """Return the files of a pattern, without hidden ones such as macOS's `._00000.tfrecord`, in any store."""
    if is_url(path):
        hidden = os.path.basename(path).startswith(".")
        return sorted(x for x in tf.io.gfile.glob(path) if hidden or not os.path.basename(x).startswith("."))
    if glob.has_magic(path) and not os.path.exists(path):
        return sorted(glob.glob(path, recursive=True))
    return [path] if os.path.isfile(path) else []


def _open(path: str):
    """Open a file for seeking; local files without a buffer, since every read has a known length."""
    return tf.io.gfile.GFile(path, "rb") if is_url(path) else open(path, "rb", buffering=0)


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _header_length(header: bytes) -> int | None:
    """Return the data length of a frame's header, or None if its checksum is wrong."""
    return struct.unpack_from("<Q", header)[0] if header[8:] == _masked_crc(header[:8]) else None


def _index(file, size: int) -> np.ndarray:
    """Return the offsets of the complete frames at the beginning of a shard, and the offset where they end."""
    offsets, at = [0], 0
    while at + HEADER_BYTES + FOOTER_BYTES <= size:
        file.seek(at)
        length = _header_length(file.read(HEADER_BYTES))
        if length is None or at + HEADER_BYTES + length + FOOTER_BYTES > size:
            break
        at += HEADER_BYTES + length + FOOTER_BYTES
        offsets.append(at)
    return np.array(offsets, np.int64)


def _stored_index(cached: Path, size: int) -> np.ndarray | None:
    """Return the offsets of a cached index, None if it is missing or damaged."""
    try:
        offsets = np.load(cached, allow_pickle=False)
        if offsets.dtype != np.int64 or offsets.ndim != 1 or not 0 <= offsets[0] <= offsets[-1] <= size:
            raise ValueError(f"expected offsets up to {size}, got {offsets.dtype}{list(offsets.shape)}")
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 (damaged headers raise tokenize's errors too)
        log.warning("%s: damaged, indexed again: %s", cached, error)
        return None
    return offsets


def _cached_index(path: str, cache: Path | None) -> tuple[np.ndarray, int]:
    """Return a shard's offsets and size in bytes; from the cache if size and modification time are unchanged."""
    size, modified = _stat(path)
    name = hashlib.sha256(f"{path if is_url(path) else os.path.abspath(path)} {size} {modified}".encode())
    cached = cache / "tfrecord-index" / f"{name.hexdigest()[:32]}.npy" if cache else None
    if cached and (stored := _stored_index(cached, size)) is not None:
        return stored, size
    with _open(path) as file:
        offsets = _index(file, size)
    if cached:
        try:  # other processes may write the same file
            write_atomically(cached, lambda file: np.save(file, offsets))
        except (OSError, ValueError) as error:  # disk full or read-only; a folder of that name
            log.warning("%s: index not cached: %s", cached, error)
    return offsets, size


def _stat(path: str) -> tuple[int, int]:
    """Return size in bytes and modification time in ns."""
    if is_url(path):
        stat = tf.io.gfile.stat(path)
        return stat.length, stat.mtime_nsec
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _log_skipped_bytes(path: str, offsets: np.ndarray, size: int) -> None:
    complete, end = len(offsets) - 1, int(offsets[-1])
    if not size:
        log.warning("%s is empty", path)
    elif end < size:
        with _open(path) as file:
            file.seek(end)
            header = file.read(HEADER_BYTES)
        damaged = len(header) == HEADER_BYTES and _header_length(header) is None
        problem = "has a damaged header" if damaged else "is truncated"
        message = "%s: record %d at byte %d %s; %d records before it are used, %d bytes from it on are skipped"
        log.warning(message, path, complete, end, problem, complete, size - end)
