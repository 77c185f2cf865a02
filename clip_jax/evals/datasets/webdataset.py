"""Evaluation datasets as tar shards, in the layout that CLIP benchmark and DataComp store theirs in.

    <directory>/classnames.txt                             one class a line, in the order of class ids
    <directory>/zeroshot_classification_templates.txt      one a line, `{c}` for the class
    <directory>/dataset_type.txt                           classification (also without the file), multilabel, retrieval
    <directory>/<split>/nshards.txt                        how many shards there are
    <directory>/<split>/0.tar, 1.tar, …                    s0.webp s0.cls, s1.webp s1.cls, …

A sample is the members that follow each other under one key: a picture, and `.cls` (its class id), `.npy` (for several
classes at once 0 or 1 for each, elsewhere metadata) or `.txt` (captions, one a line). One pass over the headers finds
the pictures; they stay in the shards until they are asked for.

Layout: https://github.com/LAION-AI/CLIP_benchmark (`build_wds_dataset`). Keys: https://github.com/webdataset/webdataset.
Deviation: what can't be used is an error here, and nshards.txt may be absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from clip_jax.typing import DatasetSplit

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # the first that a sample has is its picture
# What a sample of each type must have beside its picture, and what it may have.
SUFFIXES = {"classification": ("cls", "npy"), "multilabel": ("npy",), "retrieval": ("txt",)}
KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # up to the first dot of the base name
BLOCK_BYTES = 512


class FileRanges(Sequence):
    """Pictures as ranges of bytes in files, each read when it is asked for: 24 bytes and a path for each."""

    def __init__(self, paths: Sequence[str], file_ids: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]):
        """Picture i is `sizes[i]` bytes from byte `offsets[i]` of `paths[file_ids[i]]`."""
        self._paths = tuple(paths)
        self._ranges = np.array([file_ids, offsets, sizes], np.int64).T  # [n 3]

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index):
        """Return a picture's bytes, or for a slice a list. Raises ValueError if its file has become shorter."""
        chosen = range(len(self))[index]
        return [self._read(i) for i in chosen] if isinstance(chosen, range) else self._read(chosen)

    def _read(self, index: int) -> bytes:
        file_id, offset, size = (int(number) for number in self._ranges[index])
        with open(self._paths[file_id], "rb", buffering=0) as file:  # of a known length: a buffer would read beyond it
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(
                f"{self._paths[file_id]}: picture {index} is {size} bytes from byte {offset}, got {len(data)}: "
                "the file has changed since it was indexed; open the split again"
            )
        return data


@dataclasses.dataclass
class Sample:
    """The members of a shard that share a key: where pictures are, and what is in the small ones."""

    shard: Path
    key: str
    pictures: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # suffix -> offset, size
    small: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key!r}"

    def picture(self) -> tuple[int, int]:
        """Return the picture's offset in the shard and its size."""
        return next(self.pictures[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.pictures)


def webdataset(directory: str | os.PathLike, split: str) -> DatasetSplit:
    """Open a split of tar shards in a local folder; the module's first lines show the layout.

    Raises:
      ValueError: if a shard is missing or damaged, or a sample lacks its picture or has no usable target. It names the
        file and the sample.
    """
    directory = Path(directory).expanduser()
    kind = dataset_type(directory)
    names, templates = class_names(directory), zero_shot_templates(directory)
    shards = shard_paths(directory / split)
    samples = [sample for shard in shards for sample in read_shard(shard, SUFFIXES[kind])]
    if not samples:
        raise ValueError(f"{directory / split}: the {len(shards)} shards hold no samples such as s0.webp with s0.cls")
    targets, captions, metadata = None, (), None
    if kind == "retrieval":
        captions = [_captions(sample) for sample in samples]
    elif kind == "multilabel":
        targets = _stacked(samples, [_truths(sample, len(names)) for sample in samples])
    else:
        targets = np.array([_class_id(sample, len(names)) for sample in samples], np.int64)
        metadata = _metadata(samples)
    described = [kind, *names, *templates, *(f"{shard.name} {shard.stat().st_size}" for shard in shards)]
    described += [f"{s.key} {s.picture()} {sorted(s.small.items())}" for s in samples]
    return DatasetSplit(
        images=_pictures(shards, samples),
        targets=targets,
        captions=captions,
        class_names=names,
        templates=templates,
        metadata=metadata,
        fingerprint=fingerprint(described),
    )


def fingerprint(described: Iterable[str]) -> str:
    """Hash what describes a dataset to 16 letters."""
    digest = hashlib.sha256()
    for text in described:
        digest.update(f"{len(text)} {text}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _pictures(shards: Sequence[Path], samples: Sequence[Sample]) -> FileRanges:
    place = {shard: number for number, shard in enumerate(shards)}
    offsets, sizes = zip(*(sample.picture() for sample in samples), strict=True)
    return FileRanges([str(shard) for shard in shards], [place[sample.shard] for sample in samples], offsets, sizes)


# --------------------------------------------------------------------------------------- the text files beside shards


def dataset_type(directory: Path) -> str:
    """Return what dataset_type.txt says: 'classification' (also without it), 'multilabel' or 'retrieval'."""
    path = directory / "dataset_type.txt"
    kind = path.read_text("utf-8").strip().lower() if path.is_file() else "classification"
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: got {kind!r}, expected {', '.join(SUFFIXES)}; without the file it is classification")
    return kind


def class_names(directory: Path) -> tuple[str, ...]:
    """Return the lines of classnames.txt, none without it. Raises ValueError for an empty line."""
    return _lines(directory / "classnames.txt")


def zero_shot_templates(directory: Path) -> tuple[str, ...]:
    """Return the templates with `{}` for the class, none without the file. Raises ValueError for one without a slot."""
    path = directory / "zeroshot_classification_templates.txt"
    templates = tuple(line.replace("{c}", "{}") for line in _lines(path))
    for number, template in enumerate(templates, start=1):
        if "{}" not in template:
            raise ValueError(
                f"{path}, line {number}: {template!r} has no {{c}} for the class, as in 'a photo of a {{c}}.'"
            )
    return templates


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    lines = tuple(line.strip() for line in path.read_text("utf-8").splitlines())
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"{path}, line {number} is empty: a line for each, and none between them")
    return lines


# ----------------------------------------------------------------------------------------------------------- shards


def shard_paths(folder: Path) -> list[Path]:
    """Return 0.tar, 1.tar, … of a split's folder. Raises ValueError if one is missing."""
    if not folder.is_dir():
        splits = (
            sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        )
        raise ValueError(f"{folder} is no folder; {folder.parent} has the splits: {', '.join(splits) or 'none'}")
    found = {path.name for path in folder.glob("*.tar")}
    numbers = [int(name.removesuffix(".tar")) for name in found if re.fullmatch(r"(0|[1-9]\d*)\.tar", name)]
    announced = _announced(folder / "nshards.txt")
    count = max(numbers, default=0) + 1 if announced is None else announced
    missing = [f"{number}.tar" for number in range(count) if f"{number}.tar" not in found]
    if missing:
        reason = f"nshards.txt says {announced}" if announced is not None else "shards count from 0.tar without a gap"
        raise ValueError(
            f"{folder}: {', '.join(missing)} missing; {reason}, found {', '.join(sorted(found)) or 'no tar'}"
        )
    if len(found) != count:
        unexpected = sorted(found - {f"{number}.tar" for number in range(count)})
        raise ValueError(
            f"{folder}: {', '.join(unexpected)} unexpected beside {count} shards 0.tar … {count - 1}.tar; "
            "remove what isn't a shard of this split, or correct nshards.txt"
        )
    return [folder / f"{number}.tar" for number in range(count)]


def _announced(path: Path) -> int | None:
    if not path.is_file():
        return None
    text = path.read_text("utf-8").strip()
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f"{path}: got {text!r}, expected the number of shards, such as 4")
    return int(text)


def read_shard(path: Path, suffixes: Sequence[str]) -> list[Sample]:
    """Index a shard: its samples in order, the members with `suffixes` read.

    Raises ValueError if it is damaged or compressed, or a sample lacks its picture or its target, `suffixes[0]`.
    """
    samples: list[Sample] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = KEY_AND_SUFFIX.fullmatch(member.name)
                if not (match and member.isfile()):
                    continue
                if not samples or samples[-1].key != match[1]:
                    samples.append(Sample(path, match[1]))
                _add(samples[-1], match[2].lower(), tar, member, suffixes)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole tar archive: {_damage(path) or error}") from error
    with path.open("rb") as file:  # tarfile takes a damaged header for the end, which is a block of zeros
        file.seek(end)
        if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise ValueError(
                f"{path} is no whole tar archive: neither a member nor the end of the archive at byte {end}, "
                f"after {len(samples)} samples; copy the shard again"
            )
    for sample in samples:
        _check(sample, suffixes[0])
    return samples


def _add(sample: Sample, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo, suffixes: Sequence[str]) -> None:
    if suffix in sample.pictures or suffix in sample.small:
        raise ValueError(f"{sample} has .{suffix} twice: each sample needs a key of its own")
    if suffix in IMAGE_SUFFIXES:
        sample.pictures[suffix] = (member.offset_data, member.size)
    elif suffix in suffixes:
        sample.small[suffix] = tar.extractfile(member).read()


def _check(sample: Sample, target: str) -> None:
    has = ", ".join(f".{suffix}" for suffix in (*sample.pictures, *sample.small)) or "neither"
    if not sample.pictures:
        expected = " or ".join(f".{suffix}" for suffix in IMAGE_SUFFIXES)
        raise ValueError(f"{sample} has no picture: got {has}, expected {expected} beside .{target}")
    if target not in sample.small:
        raise ValueError(f"{sample} has no target: got {has}, expected .{target} right before or after the picture")


def _damage(path: Path) -> str | None:
    """Name the usual reasons why a file is no tar."""
    with path.open("rb") as file:
        start = file.read(BLOCK_BYTES)
    if start.startswith(b"version https://git-lfs"):
        return "it is Git LFS's pointer to one; `git lfs pull` brings the shards"
    if start.startswith(b"\x1f\x8b"):
        return f"it is compressed, and pictures are read in place; gunzip -S .tar {path.name} and name it .tar again"
    return None


# ---------------------------------------------------------------------------------------------------------- targets


def _class_id(sample: Sample, classes: int) -> int:
    text = sample.small["cls"]
    if not re.fullmatch(rb"\s*\d+\s*", text):
        raise ValueError(f"{sample}: .cls holds {text[:40]!r}, expected a class id such as 7")
    if classes and int(text) >= classes:
        raise ValueError(
            f"{sample}: class id {int(text)}, but classnames.txt has {classes}: ids are 0 to {classes - 1}"
        )
    return int(text)


def _captions(sample: Sample) -> tuple[str, ...]:
    try:
        lines = sample.small["txt"].decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{sample}: .txt is not UTF-8: {error}") from error
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise ValueError(f"{sample}: .txt is empty, expected captions, one a line")
    return captions


def _array(sample: Sample) -> np.ndarray:
    try:
        return np.load(io.BytesIO(sample.small["npy"]), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{sample}: .npy is no array that np.load reads without pickle: {error}") from error


def _truths(sample: Sample, classes: int) -> np.ndarray:
    array = _array(sample)
    if array.ndim != 1 or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        got = f"{array.dtype}{list(array.shape)}"
        raise ValueError(
            f"{sample}: .npy holds {got}, expected 0 or 1 for each class, as dataset_type.txt says multilabel"
        )
    if classes and len(array) != classes:
        raise ValueError(f"{sample}: .npy holds {len(array)} classes, but classnames.txt has {classes}")
    return array.astype(bool)


def _metadata(samples: Sequence[Sample]) -> np.ndarray | None:
    """Return int64[n F] of `.npy`, or None if there are none. Raises ValueError if some samples lack theirs."""
    having = [sample for sample in samples if "npy" in sample.small]
    if not having:
        return None
    if len(having) != len(samples):
        without = next(sample for sample in samples if "npy" not in sample.small)
        raise ValueError(f"{without} has no .npy, while {len(having)} of {len(samples)} samples have metadata")
    return _stacked(samples, [_whole_numbers(sample) for sample in samples])


def _whole_numbers(sample: Sample) -> np.ndarray:
    array = _array(sample)
    if array.dtype.kind not in "biuf" or not (array == np.trunc(array.astype(float))).all():
        raise ValueError(f"{sample}: .npy holds {array.dtype}{list(array.shape)}, expected whole numbers as metadata")
    return array.astype(np.int64).reshape(-1)


def _stacked(samples: Sequence[Sample], rows: Sequence[np.ndarray]) -> np.ndarray:
    for sample, row in zip(samples, rows, strict=True):
        if len(row) != len(rows[0]):
            raise ValueError(f"{sample}: .npy holds {len(row)} numbers, but {len(rows[0])} in {samples[0]}")
    return np.stack(rows)
