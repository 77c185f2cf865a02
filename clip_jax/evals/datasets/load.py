"""Loads a split of a dataset of the registry from this machine. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from clip_jax.evals.datasets.builtin import read_builtin
from clip_jax.evals.datasets.folder import ASSOCIATIONS, CAPTIONS, read_folder
from clip_jax.evals.datasets.registry import Dataset
from clip_jax.evals.datasets.tfds import read_tfds
from clip_jax.evals.datasets.webdataset import read_webdataset
from clip_jax.typing import DatasetSplit, Unavailable


def load_split(row: Dataset, part: str, data_dir: str) -> DatasetSplit:
    """Load a split from a Python package, else from `<data_dir>/<row.folder>/<split>`, else from TFDS below `data_dir`.

    Args:
      part: 'test', 'train' or 'validation'.

    Raises:
      Unavailable: if the split is not on this machine. The message lists the places and how to prepare the data.
      ValueError: if the stored data is damaged or incomplete.
    """
    if row.builtin:
        return read_builtin(row.builtin, part)
    if not data_dir:
        raise Unavailable("expected the directory of the evaluation data: set --data_dir or eval.data_dir")
    split, tfds_split = row.split(part), row.split(part, tfds=True)
    root = Path(data_dir).expanduser()
    folder = root / row.folder / split
    if row.folder and split and folder.is_dir():
        return (read_webdataset if any(folder.glob("*.tar")) else read_folder)(root / row.folder, split)
    problems = []
    if row.folder and split:
        problems.append(
            f"{folder} is not a folder. Expected tar shards 0.tar, 1.tar, … of images with .cls, .npy or .txt,\n"
            f"or images in one folder per class, or images and {CAPTIONS} or {ASSOCIATIONS}"
        )
    if row.tfds and tfds_split:
        try:
            return read_tfds(row.tfds, tfds_split, data_dir)
        except Unavailable as error:
            problems.append(str(error))
    raise Unavailable(
        "\n".join([f"{row.folder or row.tfds} ({split or tfds_split}) is not on this machine:", *problems, row.note])
        .rstrip()
    )  # fmt: skip
