"""The user's own data as evaluation datasets, `<format>:<files>`.

    folder:/my/test                          one folder per class, and optionally classnames.txt: classification;
                                             name.jpg with name.txt or .json, or captions.jsonl: retrieval
    wds:/my/test/{00000..00003}.tar          samples with .cls, and classnames.txt in the folder of the shards or above
                                             it: classification; with .txt (one caption per line) or .json: retrieval
    tfrecord:/my/test/*.tfrecord             retrieval
    table:/my/test.csv                       retrieval

Shards, tables and folders of pairs are read by the training sources of `clip_jax.data`, with the captions of
`data.captions`; class folders by `folder.read_folder`. Images are decoded and preprocessed as those of all evaluation
datasets. Unusable data is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clip_jax.config import DataConfig
from clip_jax.evals.datasets.files import LazySequence, read_lines, read_templates
from clip_jax.evals.datasets.folder import ASSOCIATIONS, CAPTIONS, read_folder
from clip_jax.evals.datasets.registry import Dataset
from clip_jax.evals.datasets.webdataset import to_rgb
from clip_jax.paths import is_url
from clip_jax.typing import BadRecord, DatasetSplit, DataSource, Record

FORMATS = {"folder": "folder", "wds": "tar", "tfrecord": "tfrecord", "table": "table"}  # -> key of `data.SOURCES`
CLASS = "cls"  # field of a tar sample
READ_THREADS = 16


def is_own(name: str) -> bool:
    """Return whether a dataset's name is `<format>:<files>`."""
    return ":" in name


@functools.lru_cache(maxsize=256)
def own_dataset(name: str) -> Dataset:
    """Return the row of the user's own data; its task is determined from the files.

    Raises:
      ValueError: for an unknown format, and for files that do not exist or that the source refuses.
    """
    format, _, files = name.partition(":")
    if format not in FORMATS or not files:
        examples = ", ".join(f"{known}:/my/test" for known in FORMATS)
        raise ValueError(f"dataset {name!r}: expected <format>:<files>, one of {examples}")
    task = "retrieval"
    if format == "folder":
        task = _folder_task(_folder(files))
    elif format == "wds":
        task = "zeroshot" if _record(_open(format, files, DataConfig(), [CLASS]), 0).captions else "retrieval"
    else:
        _open(format, files, DataConfig(), only_check=True)
    metric = {"retrieval": "recall", "zeroshot": "top1", "association": "jaccard"}[task]
    return Dataset(
        name=re.sub(r"\W+", "_", files).strip("_"),
        title=name,
        task=task,
        metric=metric,
        train="",
        read=functools.partial(_read, format, files, task),
    )


def _folder(files: str) -> Path:
    folder = Path(files).expanduser()
    if is_url(files) or not folder.is_dir():
        raise ValueError(f"dataset 'folder:{files}': expected a local folder of images, got none; give another path")
    return folder


def _folder_task(folder: Path) -> str:
    """Return the task of a folder, by its lists of images or by the first image below it."""
    if (folder / ASSOCIATIONS).is_file():
        return "association"
    return "retrieval" if (folder / CAPTIONS).is_file() or _has_pairs(folder) else "zeroshot"


def _has_pairs(folder: Path) -> bool:
    """Return whether the first folder with images also has a caption file with the name of one of them."""
    for _, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        texts, others = set(), set()
        for stem, suffix in (os.path.splitext(name) for name in names if not name.startswith(".")):
            (texts if suffix in (".txt", ".json") else others).add(stem)
        if others:
            return bool(texts & others)
    return False


def _open(
    format: str, files: str, data: DataConfig, captions: Iterable[str] = (), *, only_check: bool = False
) -> DataSource | None:
    """Open a training source. only_check: raise ValueError for files that do not exist, without reading them."""
    from clip_jax.data import check_files, make_source  # imports TensorFlow

    source = FORMATS[format]
    config = dataclasses.replace(
        data,
        source=source,
        files=files,
        captions=dict.fromkeys(captions, 1.0),
        options=data.options if data.source == source else {},
        max_bad_fraction=0.0,
        validation_fraction=0.0,
    )
    try:
        return check_files(config) if only_check else make_source(config)
    except ValueError as error:
        raise ValueError(f"dataset '{format}:{files}': {error}") from error


def _record(source: DataSource, index: int) -> Record:
    try:
        return source.read(index)
    except BadRecord as error:
        raise ValueError(f"{source.key(index)}: {error}") from error


def _read(format: str, files: str, task: str, data: DataConfig) -> DatasetSplit:
    """Return the split; its images are read on access."""
    if format == "folder" and not _has_pairs(_folder(files)):
        return read_folder(_folder(files), "")
    fields = (CLASS,) if task == "zeroshot" else tuple(name for name, weight in data.captions.items() if weight > 0)
    source = _open(format, files, data, fields)
    texts_of = _class_id if task == "zeroshot" else functools.partial(_captions, fields, format == "wds")
    indices = range(len(source))
    if getattr(source, "in_memory", False):  # of blocks, which are read in sequence
        found = [texts_of(_record(source, index)) for index in indices]
    else:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = list(pool.map(lambda index: texts_of(_record(source, index)), indices))
    convert = to_rgb if format == "wds" else bytes
    images = LazySequence(len(source), lambda index: convert(_record(source, index).image), source.key)
    if task == "retrieval":
        return DatasetSplit(images, None, found)
    shards = Path(source.key(0).rpartition("#")[0]).parent
    folder = next((place for place in (shards, shards.parent) if (place / "classnames.txt").is_file()), shards)
    names, targets = read_lines(folder / "classnames.txt"), np.array(found, np.int64)
    if names and targets.max() >= len(names):
        raise ValueError(f"{folder}/classnames.txt: expected {targets.max() + 1} classes or more, got {len(names)}")
    return DatasetSplit(images, targets, class_names=names, templates=read_templates(folder))


def _class_id(record: Record) -> int:
    (text,) = record.captions.get(CLASS, ("",))
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise ValueError(f"sample {record.key!r}: .cls: expected a class id such as 7, got {text[:40]!r}")
    return int(text)


def _captions(fields: Iterable[str], by_line: bool, record: Record) -> tuple[str, ...]:
    """Return the distinct captions of a record. by_line: one caption per line, as in CLIP_benchmark."""
    texts = (text for field in fields for text in record.captions.get(field, ()))
    lines = (line.strip() for text in texts for line in (text.splitlines() if by_line else [text]))
    captions = tuple(dict.fromkeys(filter(None, lines)))
    if not captions:
        raise ValueError(f"sample {record.key!r}: expected a caption in {', '.join(fields)}, got none")
    return captions
