"""Reads prepared TFDS datasets. The only module of `evals` that imports tensorflow_datasets."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.evals.datasets.files import LazySequence
from clip_jax.typing import DatasetSplit, Unavailable

# VOC's `labels` includes the objects marked as difficult, as in CLIP_benchmark's shards.
CLASS_FEATURES = ("label", "labels")


def read_tfds(name: str, split: str, data_dir: str) -> DatasetSplit:
    """Open a split of a TFDS dataset that has been prepared below `data_dir`, in the order of its files.

    From ArrayRecord files, images are read on access, after one pass over the classes. TFRecord has no random access:
    all encoded images of the split stay in memory, 6.7 GB for the validation split of ImageNet.

    Raises Unavailable if the dataset has not been prepared, with the command that prepares it, or has no image classes;
    ValueError for an unknown split. name: such as 'cifar10' or 'imagenet_v2/matched-frequency'.
    """
    import tensorflow_datasets
    from tensorflow_datasets.core import read_only_builder

    data_dir = os.path.expanduser(data_dir)
    try:
        # From files: finds any prepared version, and does not access the network.
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        raise Unavailable(
            f"TFDS has not prepared {name} under {data_dir}; to prepare it: "
            'python -c "import tensorflow_datasets as tfds; '
            f'tfds.builder({name!r}, data_dir={data_dir!r}).download_and_prepare()"'
        ) from error
    splits = ", ".join(sorted(builder.info.splits))
    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(f"TFDS: {name} has no split {split!r}; its splits: {splits}")
    feature, names = _class_feature(name, builder.info.features)
    images, targets = _read_rows(builder, split, feature)
    if feature == "label":
        targets = np.array(targets, np.int64)
        if (targets < 0).any():
            raise Unavailable(f"TFDS: {name} has no classes for {split!r} (class id -1); its splits: {splits}")
    else:
        targets = np.array([np.isin(np.arange(len(names)), row) for row in targets], bool)
    return DatasetSplit(images=images, targets=targets, class_keys=names)


def _class_feature(name: str, features: Any) -> tuple[str, tuple[str, ...]]:
    """Return the name of the class feature, and the class names. Raises Unavailable if there is none."""
    import tensorflow_datasets

    feature = next((key for key in CLASS_FEATURES if key in features), None)
    kind = getattr(features[feature], "feature", features[feature]) if feature else None
    has_image = "image" in features and isinstance(features["image"], tensorflow_datasets.features.Image)
    if has_image and isinstance(kind, tensorflow_datasets.features.ClassLabel):
        return feature, tuple(kind.names)
    got = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in sorted(features.items()))
    raise Unavailable(
        f"TFDS: {name}: expected the features 'image' (Image) and one of {', '.join(map(repr, CLASS_FEATURES))} "
        f"(ClassLabel, or a Sequence of it), got {got}"
    )


def _image(rows: Sequence[dict], index: int) -> bytes:
    return rows[index]["image"]


def _read_rows(builder: Any, split: str, feature: str) -> tuple[Sequence[bytes], list]:
    """Return the encoded images of a split, and their class ids or lists of class ids."""
    import tensorflow_datasets

    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    if builder.info.file_format is tensorflow_datasets.core.FileFormat.ARRAY_RECORD:
        rows = builder.as_data_source(split, decoders=decoders)
        images = LazySequence(len(rows), functools.partial(_image, rows))
        targets = [row[feature] for row in rows]
    else:
        dataset = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders=tensorflow_datasets.decode.PartialDecoding({"image": True, feature: True}, decoders=decoders),
            # Sequential reads: the same order on every machine. No cache: it would be a second copy in memory.
            read_config=tensorflow_datasets.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        pairs = [(row["image"], row[feature]) for row in tensorflow_datasets.as_numpy(dataset)]
        images, targets = [image for image, _ in pairs], [target for _, target in pairs]
    return images, targets
