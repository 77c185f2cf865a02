"""TFRecord shards of `tf.train.Example`: img2dataset's features, or those that the options name.

A shard is a sequence of frames: length (u64), checksum of the length (u32), data, checksum of the data (u32); checksums
are CRC-32C, rotated and offset (https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details). A
flipped byte costs one record. A truncated record, or a damaged header and everything after it, is skipped and logged.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from jaxtyping import Int64

from clip_jax.config import DataConfig
from clip_jax.data.index import Read, Scan
from clip_jax.data.sources.fields import Fields
from clip_jax.data.sources.shards import ShardSource
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.typing import BadRecord, Record

HEADER_BYTES, FOOTER_BYTES = 12, 4

Values = bytes | str | int | float | Sequence[bytes | str]


class TFRecordFormat:
    """Frames of TFRecord files."""

    name = "tfrecord"

    def scan(self, read: Read, start: int, stop: int) -> Scan:
        """Return the complete frames between two offsets; their checksums are those of the content."""
        offsets, at, digest = [start], start, hashlib.sha256()
        header = read(at, at + HEADER_BYTES)
        while at + HEADER_BYTES + FOOTER_BYTES <= stop:
            length = _header_length(header)
            if length is None:
                return Scan(np.array(offsets, np.int64), digest.hexdigest()[:16], "has a damaged header")
            end = at + HEADER_BYTES + length + FOOTER_BYTES
            if end > stop:
                break
            between = read(end - FOOTER_BYTES, min(end + HEADER_BYTES, stop))  # a footer and the next header
            digest.update(header)
            digest.update(between[:FOOTER_BYTES])
            header, at = between[FOOTER_BYTES:], end
            offsets.append(at)
        return Scan(np.array(offsets, np.int64), digest.hexdigest()[:16], "is truncated" if at < stop else "")

    def offsets(self, block: bytes) -> Int64[np.ndarray, "n"] | None:
        offsets, at, last = [0], 0, len(block) - HEADER_BYTES - FOOTER_BYTES
        while at <= last:
            at += HEADER_BYTES + struct.unpack_from("<Q", block, at)[0] + FOOTER_BYTES
            offsets.append(at)
        return np.array(offsets, np.int64) if at == len(block) else None


class TFRecordSource(ShardSource):
    """Records of TFRecord shards."""

    format = TFRecordFormat()

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Write three shards of 20 records and return a config for tests."""
        records = [SyntheticSource(60).read(index) for index in range(60)]
        for shard in range(3):
            rows = records[20 * shard : 20 * shard + 20]
            write_tfrecord(folder / f"{shard:05d}.tfrecord", ({"png": row.image, **row.captions} for row in rows))
        return DataConfig(source="tfrecord", files=f"{folder}/*.tfrecord", cache_dir=str(folder))

    def parse(self, data: bytes, index: int) -> Record:
        content = data[HEADER_BYTES:-FOOTER_BYTES]
        if data[-FOOTER_BYTES:] != _masked_crc(content):
            raise BadRecord("checksum mismatch")
        return parse_example(content, self.fields, lambda: self.key(index))


def parse_example(data: bytes, fields: Fields, key: Callable[[], str]) -> Record:
    """Return the record of a serialized `tf.train.Example`, with its feature 'key', or else `key()`.

    Raises:
      BadRecord: if it is no Example, or has no image.
    """
    try:
        features = tf.train.Example.FromString(data).features.feature
    except DecodeError as error:
        raise BadRecord("not a tf.train.Example") from error
    image = fields.image_field(features)
    if image is not None and not features[image].bytes_list.value:
        image = fields.image_field([name for name in features if features[name].bytes_list.value])
    if image is None:
        raise BadRecord(f"no image feature; features are {', '.join(sorted(features))}")
    row = {name: _values(features[name]) for name in fields.caption_fields(features).values()}
    keys = features["key"].bytes_list.value if "key" in features else ()
    own_key = keys[0].decode("utf-8", "replace") if keys else ""
    return Record(
        own_key or key(), fields.image_of({image: features[image].bytes_list.value[0]}), fields.captions_of(row)
    )


def _values(feature: tf.train.Feature) -> Sequence[bytes | int | float]:
    """Return the values of a feature; img2dataset writes a caption such as "2024" as an integer."""
    kind = feature.WhichOneof("kind")
    return tuple(getattr(feature, kind).value) if kind else ()


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
            writer.write(example(record))


def example(record: Mapping[str, Values]) -> bytes:
    """Return the serialized `tf.train.Example` of a record."""
    feature = {name: _feature(value) for name, value in record.items()}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def is_intact(path: str | os.PathLike) -> bool:
    """Return whether a local shard exists and has no truncated or damaged record."""
    if not os.path.isfile(path):
        return False
    content = Path(path).read_bytes()
    scan = TFRecordFormat().scan(lambda start, stop: content[start:stop], 0, len(content))
    frames = (content[start + HEADER_BYTES : end] for start, end in itertools.pairwise(scan.offsets.tolist()))
    return not scan.problem and all(x[-FOOTER_BYTES:] == _masked_crc(x[:-FOOTER_BYTES]) for x in frames)


def _feature(value: Values) -> tf.train.Feature:
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    if isinstance(value, float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
    values = [value] if isinstance(value, (bytes, str)) else value
    encoded = [item.encode() if isinstance(item, str) else item for item in values]
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _header_length(header: bytes) -> int | None:
    """Return the data length of a frame's header, or None if its checksum is wrong."""
    return struct.unpack_from("<Q", header)[0] if header[8:] == _masked_crc(header[:8]) else None


def is_header(data: bytes) -> bool:
    """Return whether these 12 bytes begin a TFRecord file."""
    return len(data) == HEADER_BYTES and _header_length(data) is not None
