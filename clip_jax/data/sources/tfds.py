"""Datasets that TensorFlow Datasets has prepared: the folder of a version, with TFRecord or ArrayRecord files.

TFDS stores every example as a `tf.train.Example`, images encoded and nested features as `captions/text`
(https://www.tensorflow.org/datasets/features), so records are read as those of the other two sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from jaxtyping import Int64

from clip_jax.config import DataConfig
from clip_jax.data import order, storage
from clip_jax.data.sources.array_record import ArrayRecordSource
from clip_jax.data.sources.blocks import place
from clip_jax.data.sources.fields import TEMPLATE, Fields
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.data.sources.tfrecord import TFRecordSource
from clip_jax.data.storage import File
from clip_jax.typing import Record

FORMATS = ("tfrecord", "array_record")


class TFDSSource:
    """Records of a split or a part of one, in the order of its files."""

    def __init__(self, reader: TFRecordSource | ArrayRecordSource, pieces: Sequence[tuple[int, int]], split: str):
        """
        Args:
          reader: of all files of the split.
          pieces: first record and number of records of each part of the reader that belongs to the split.
          split: expression of TFDS, for the fingerprint.
        """
        self._reader, self._split = reader, split
        self._first = np.array([first for first, _ in pieces], np.int64)
        self._starts = np.concatenate([[0], np.cumsum([count for _, count in pieces], dtype=np.int64)])
        self._complete = pieces == [(0, len(reader))]
        self.num_files = reader.num_files

    @classmethod
    def from_config(
        cls, config: DataConfig, split: str = "train", image: str = "", templates: Sequence[str] = (TEMPLATE,)
    ) -> TFDSSource:
        """Open a prepared dataset.

        Args:
          split: such as 'train', 'train[:90%]' or 'train+validation'.
          image: name of the image feature; '' for the first.
          templates: of captions from class names.

        Raises:
          ValueError: for another file format, an unknown split, or features without image or captions.
        """
        import tensorflow_datasets

        cls.check_files(config)
        info = tensorflow_datasets.builder_from_directory(config.files).info
        if info.file_format.value not in FORMATS:
            raise ValueError(f"data.files={config.files!r}: expected files in {FORMATS}, got {info.file_format.value}")
        try:
            instructions = info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"data.options.split={split!r}: {info.name} has the splits {', '.join(info.splits)}"
            ) from error
        fields = _fields(config, info.features, image, templates)
        sizes = {str(part.filename): part.examples_in_shard for part in instructions}
        files = [storage.stat(path) for path in sizes]
        if info.file_format.value == "array_record":
            reader: TFRecordSource | ArrayRecordSource = ArrayRecordSource(files, fields)
        else:
            reader = TFRecordSource(
                files, config.captions, config.cache_dir, max_stall_seconds=config.max_stall_seconds
            )
            reader.fields = fields
        if len(reader) != sum(sizes.values()):
            raise ValueError(
                f"data.files={config.files!r}: expected {sum(sizes.values())} examples in {len(files)} files, as"
                f" dataset_info.json has it, got {len(reader)}: files are damaged; prepare the dataset again"
            )
        ordered = [file.path for file in sorted(files, key=File.name_and_path)]  # as both readers do
        starts = dict(zip(ordered, np.cumsum([0, *(sizes[path] for path in ordered)]).tolist(), strict=False))
        pieces = [(starts[str(part.filename)] + part.skip, part.take) for part in instructions if part.take]
        return cls(reader, list(_merged(pieces)), split)

    @classmethod
    def check_files(cls, config: DataConfig) -> None:
        """Raise ValueError if `data.files` is not the folder of a prepared dataset."""
        try:
            storage.stat(f"{config.files.rstrip('/')}/dataset_info.json")
        except FileNotFoundError as error:
            raise ValueError(
                f"data.files={config.files!r}: expected the folder of a version that TFDS has prepared, with"
                " dataset_info.json, e.g. ~/tensorflow_datasets/coco_captions/2014/1.1.0"
            ) from error

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Prepare a dataset of three files, of which two thirds are read, and return a config for tests."""
        return write_tfds(folder, "tfrecord")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        return self._reader.key(self._place(index))

    def read(self, index: int) -> Record:
        return self._reader.read(self._place(index))

    def fingerprint(self) -> str:
        pieces = [self._first.tolist(), self._starts.tolist()]
        return hashlib.sha256(f"{self._reader.fingerprint()} {pieces}".encode()).hexdigest()[:16]

    def order(self, seed: int, batch_size: int) -> order.RecordOrder | order.BlockOrder:
        """Return the order of the examples: that of the files if all are read, else record order."""
        if self._complete and isinstance(self._reader, TFRecordSource):
            return self._reader.order(seed, batch_size)
        return order.RecordOrder(len(self), seed)

    def prefetch(self, blocks: Int64[np.ndarray, "n"]) -> None:
        """As `ShardSource.prefetch`."""
        self._reader.prefetch(blocks)

    def _place(self, index: int) -> int:
        piece, number = place(self._starts, index)
        return int(self._first[piece]) + number


def write_tfds(folder: Path, file_format: str) -> DataConfig:
    """Prepare a dataset of 80 pairs and return a config of 60 of them, for tests."""
    import tensorflow_datasets as tfds

    records = [SyntheticSource(80).read(index) for index in range(80)]
    pairs = {"image": [row.image for row in records], "caption": [row.captions["txt"][0] for row in records]}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="pairs",
        version="1.0.0",
        data_dir=str(folder),
        split_datasets={"train": tf.data.Dataset.from_tensor_slices(pairs)},
        features=tfds.features.FeaturesDict({"image": tfds.features.Image(), "caption": tfds.features.Text()}),
        file_format=file_format,
        disable_shuffling=True,
    )
    return DataConfig(
        source="tfds", files=f"{folder}/pairs/1.0.0", cache_dir=str(folder), options={"split": "train[:75%]"}
    )


def _fields(config: DataConfig, features: Any, image: str, templates: Sequence[str]) -> Fields:
    """Return the fields of a dataset's features. Raises ValueError without image or captions."""
    import tensorflow_datasets

    leaves = dict(_leaves(features))
    images = [name for name, kind in leaves.items() if isinstance(kind, tensorflow_datasets.features.Image)]
    classes = {
        name: tuple(kind.names)
        for name, kind in leaves.items()
        if isinstance(kind, tensorflow_datasets.features.ClassLabel)
    }
    fields = Fields(tuple(config.captions), image, tuple(images), class_names=classes, templates=tuple(templates))
    listed = ", ".join(f"{name!r} ({type(kind).__name__})" for name, kind in leaves.items())
    if fields.image_field(images) is None:
        raise ValueError(f"data.files={config.files!r}: expected an Image feature {image!r}, got {listed}")
    if not fields.caption_fields(leaves):
        raise ValueError(
            f"data.files={config.files!r}: expected features of data.captions ({', '.join(config.captions)}), got"
            f" {listed}; set e.g. data.captions={{{list(leaves)[-1]!r}: 1.0}}"
        )
    return fields


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name in the Example and the type of each feature; of a sequence, that of its items."""
    for name, kind in features.items():
        inner = getattr(kind, "feature", kind)
        if hasattr(inner, "items"):  # FeaturesDict
            yield from _leaves(inner, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", inner


def _merged(pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield pieces, adjacent ones as one."""
    first, count = pieces[0]
    for start, more in pieces[1:]:
        if start == first + count:
            count += more
        else:
            yield first, count
            first, count = start, more
    yield first, count
