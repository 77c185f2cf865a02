"""Reads evaluation datasets of tar shards, in the layout of CLIP_benchmark and DataComp.

    <directory>/classnames.txt                             one class per line, in the order of class ids
    <directory>/zeroshot_classification_templates.txt      one template per line, `{c}` for the class
    <directory>/dataset_type.txt                           classification (the default), multilabel, retrieval
    <directory>/<split>/nshards.txt                        number of shards
    <directory>/<split>/0.tar, 1.tar, …                    s0.webp s0.cls, s1.webp s1.cls, …

A sample is a run of consecutive members with the same key: an image, and `.cls` (class id), `.npy` (multi-label: 0 or 1
for each class; otherwise metadata) or `.txt` (captions, one per line). One pass over the headers indexes the images,
which are read from the shards on access. As in CLIP_benchmark, whose loader decodes them to RGB (`pilrgb`), images of
other modes become RGB before they are resized: alpha is dropped, palettes are not resized by nearest pixel.

Layout: https://github.com/LAION-AI/CLIP_benchmark (`build_wds_dataset`). Keys: https://github.com/webdataset/webdataset.
Deviation: unusable data is an error, and nshards.txt is optional.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.evals.datasets.files import IMAGE_SUFFIXES, FileRanges, read_lines, read_templates, read_text
from clip_jax.typing import DatasetSplit

# Members of a sample by dataset type: the first is required, the others are optional.
SUFFIXES = {"classification": ("cls", "npy"), "multilabel": ("npy",), "retrieval": ("txt",)}
KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # the key ends at the first dot of the base name
BLOCK_BYTES = 512


@dataclasses.dataclass
class Sample:
    """The members of a shard with the same key: byte ranges of images, contents of the other members."""

    shard: Path
    key: str
    images: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # suffix -> (offset, size)
    contents: dict[str, bytes] = dataclasses.field(default_factory=dict)  # suffix -> bytes

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key!r}"

    def image(self) -> tuple[int, int]:
        """Return the image's offset in the shard and its size, in bytes."""
        return next(self.images[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.images)


def read_webdataset(directory: str | os.PathLike, split: str) -> DatasetSplit:
    """Open a split of tar shards in a local folder. The layout: this module's docstring.

    Raises ValueError if a shard is missing or damaged, or a sample has no image or no valid target.
    """
    directory = Path(directory).expanduser()
    path = directory / "dataset_type.txt"
    kind = read_text(path).strip().lower() if path.is_file() else "classification"
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: expected {', '.join(SUFFIXES)}, got {kind!r}; without the file: classification")
    names, templates = read_lines(directory / "classnames.txt"), read_templates(directory)
    shards = _shard_paths(directory / split)
    samples = [sample for shard in shards for sample in _read_shard(shard, SUFFIXES[kind])]
    if not samples:
        raise ValueError(f"{directory / split}: no samples such as s0.webp with s0.cls in {len(shards)} shards")
    targets, captions, metadata = None, (), None
    if kind == "retrieval":
        captions = [_captions(sample) for sample in samples]
    elif kind == "multilabel":
        targets = _stack(samples, [_multilabel_target(sample, len(names)) for sample in samples])
    else:
        targets = np.array([_class_id(sample, len(names)) for sample in samples], np.int64)
        metadata = _metadata(samples)
    file_ids = {shard: number for number, shard in enumerate(shards)}
    offsets, sizes = zip(*(sample.image() for sample in samples), strict=True)
    return DatasetSplit(
        images=RGBRanges([str(shard) for shard in shards], [file_ids[s.shard] for s in samples], offsets, sizes),
        targets=targets,
        captions=captions,
        class_names=names,
        templates=templates,
        metadata=metadata,
    )


class RGBRanges(FileRanges):
    """Encoded images as byte ranges of files; those of other modes than RGB and gray as PPM, uncompressed RGB."""

    def _read_range(self, index: int) -> bytes:
        return to_rgb(super()._read_range(index))


def to_rgb(data: bytes) -> bytes:
    """Return an encoded image; one of another mode than RGB and gray as PPM, uncompressed RGB."""
    try:
        image = Image.open(io.BytesIO(data))  # reads the header
        if image.mode in ("RGB", "L") and "transparency" not in image.info:
            return data
        rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return data  # preprocessing reports the error
    file = io.BytesIO()
    rgb.save(file, "PPM")
    return file.getvalue()


def _shard_paths(folder: Path) -> list[Path]:
    """Return the paths of 0.tar, 1.tar, … Raises ValueError if one is missing."""
    if not folder.is_dir():
        parent = folder.parent
        splits = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
        raise ValueError(f"{folder} is not a folder; splits of {parent}: {', '.join(splits) or 'none'}")
    found = {path.name for path in folder.glob("*.tar")}
    numbers = [int(name.removesuffix(".tar")) for name in found if re.fullmatch(r"(0|[1-9]\d*)\.tar", name)]
    expected = _expected_shards(folder / "nshards.txt")
    count = max(numbers, default=0) + 1 if expected is None else expected
    names = [f"{number}.tar" for number in range(count)]
    if missing := [name for name in names if name not in found]:
        source = "numbers from 0 without gaps" if expected is None else f"{expected} shards as in nshards.txt"
        got = ", ".join(sorted(found)) or "no tar"
        raise ValueError(f"{folder}: {', '.join(missing)} missing; expected {source}, got {got}")
    if unexpected := sorted(found.difference(names)):
        raise ValueError(
            f"{folder}: {', '.join(unexpected)} unexpected; expected {count} shards 0.tar … {count - 1}.tar: remove "
            "the other files, or correct nshards.txt"
        )
    return [folder / name for name in names]


def _expected_shards(path: Path) -> int | None:
    if not path.is_file():
        return None
    text = read_text(path).strip()
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f"{path}: expected the number of shards, such as 4, got {text!r}")
    return int(text)


def _read_shard(path: Path, suffixes: Sequence[str]) -> list[Sample]:
    """Index a shard and read the members with `suffixes`.

    Raises ValueError if the shard is damaged or compressed, or a sample has no image or no `suffixes[0]`.
    """
    samples: list[Sample] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = KEY_AND_SUFFIX.fullmatch(member.name)
                if not (match and member.isfile()):
                    continue
                key, suffix = match[1], match[2].lower()
                if not samples or samples[-1].key != key:
                    samples.append(Sample(path, key))
                sample = samples[-1]
                if suffix in sample.images or suffix in sample.contents:
                    raise ValueError(f"{sample} has .{suffix} twice: expected a unique key for each sample")
                if suffix in IMAGE_SUFFIXES:
                    sample.images[suffix] = (member.offset_data, member.size)
                elif suffix in suffixes:
                    sample.contents[suffix] = tar.extractfile(member).read()
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a complete tar archive: {_damage(path) or error}") from error
    with path.open("rb") as file:  # tarfile treats a damaged header as the end, which is a block of zeros
        file.seek(end)
        if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise ValueError(
                f"{path} is not a complete tar archive: neither a member nor the end of the archive at byte {end}, "
                f"after {len(samples)} samples; copy the shard again"
            )
    for sample in samples:
        got = ", ".join(f".{suffix}" for suffix in (*sample.images, *sample.contents)) or "neither"
        if not sample.images:
            expected = " or ".join(f".{suffix}" for suffix in IMAGE_SUFFIXES)
            raise ValueError(f"{sample} has no image: expected {expected} next to .{suffixes[0]}, got {got}")
        if suffixes[0] not in sample.contents:
            raise ValueError(f"{sample} has no target: expected .{suffixes[0]} next to the image, got {got}")
    return samples


def _damage(path: Path) -> str | None:
    """Return the usual reasons why a file is not a tar archive, None for others."""
    with path.open("rb") as file:
        start = file.read(BLOCK_BYTES)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`"
    if start.startswith(b"\x1f\x8b"):
        return f"it is compressed; run gunzip -S .tar {path.name} and rename the result to {path.name}"
    return None


def _class_id(sample: Sample, classes: int) -> int:
    text = sample.contents["cls"]
    if not re.fullmatch(rb"\s*\d+\s*", text):
        raise ValueError(f"{sample}: .cls: expected a class id such as 7, got {text[:40]!r}")
    if classes and int(text) >= classes:
        raise ValueError(f"{sample}: .cls: expected 0 to {classes - 1} as in classnames.txt, got class id {int(text)}")
    return int(text)


def _captions(sample: Sample) -> tuple[str, ...]:
    try:
        lines = sample.contents["txt"].decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{sample}: .txt is not UTF-8: {error}") from error
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise ValueError(f"{sample}: .txt is empty: expected captions, one per line")
    return captions


def _array(sample: Sample) -> np.ndarray:
    try:
        return np.load(io.BytesIO(sample.contents["npy"]), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{sample}: .npy: expected an array that np.load reads without pickle: {error}") from error


def _multilabel_target(sample: Sample, classes: int) -> np.ndarray:
    array = _array(sample)
    if array.ndim != 1 or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"{sample}: .npy: expected 0 or 1 for each class (dataset_type.txt: multilabel), got "
            f"{array.dtype}{list(array.shape)}"
        )
    if classes and len(array) != classes:
        raise ValueError(f"{sample}: .npy: expected {classes} classes as in classnames.txt, got {len(array)}")
    return array.astype(bool)


def _metadata(samples: Sequence[Sample]) -> np.ndarray | None:
    """Return int64[n F] of `.npy`, None without them. Raises ValueError if only some samples have one."""
    without = [sample for sample in samples if "npy" not in sample.contents]
    if len(without) == len(samples):
        return None
    if without:
        raise ValueError(f"{without[0]} has no .npy, but {len(samples) - len(without)} of {len(samples)} samples do")
    rows = []
    for sample in samples:
        array = _array(sample)
        if array.dtype.kind not in "biuf" or not (array == np.trunc(array.astype(float))).all():
            raise ValueError(f"{sample}: .npy: expected integers as metadata, got {array.dtype}{list(array.shape)}")
        rows.append(array.astype(np.int64).reshape(-1))
    return _stack(samples, rows)


def _stack(samples: Sequence[Sample], rows: Sequence[np.ndarray]) -> np.ndarray:
    size, first = len(rows[0]), samples[0]
    for sample, row in zip(samples, rows, strict=True):
        if len(row) != size:
            raise ValueError(f"{sample}: .npy: expected {size} numbers as in {first}, got {len(row)}")
    return np.stack(rows)
