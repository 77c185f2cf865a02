"""Reads evaluation datasets of images in folders: one folder per class, or images listed in a .jsonl file.

<directory>/<split>/<class>/*.jpg              classification; class ids in the order of the sorted folder names
<directory>/classnames.txt                     optional: a name per class; default: folder names, `_` as a space
<directory>/<split>/captions.jsonl             retrieval: {"image": "a.jpg", "captions": ["a cat", "a sleeping cat"]}
<directory>/<split>/associations.jsonl         association: {"cue": "wing", "candidates": ["a.jpg", "b.jpg", "c.jpg"],
                                                             "associations": ["b.jpg"]}
"""  # noqa: E501 (the lines of the files as they are)

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from clip_jax.evals.datasets.files import IMAGE_SUFFIXES, FileRanges, fingerprint, read_lines
from clip_jax.typing import Cue, DatasetSplit

CAPTIONS = "captions.jsonl"
ASSOCIATIONS = "associations.jsonl"
CAPTIONS_LINE = '{"image": "a.jpg", "captions": ["a cat", "a sleeping cat"]}'
ASSOCIATIONS_LINE = '{"cue": "wing", "candidates": ["a.jpg", "b.jpg", "c.jpg"], "associations": ["b.jpg"]}'

T = TypeVar("T")


def read_folder(directory: str | os.PathLike, split: str) -> DatasetSplit:
    """Open a split of images in a local folder. The layout: this module's docstring.

    Raises ValueError without images, or if class names, captions or cues do not match the images.
    """
    directory = Path(directory).expanduser()
    folder = directory / split
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected images, in one folder per class or with {CAPTIONS}")
    targets, names, captions, cues = None, (), (), ()
    if (folder / ASSOCIATIONS).is_file():
        paths, cues = _read_associations(folder / ASSOCIATIONS)
        contents = [""] * len(paths)
    elif (folder / CAPTIONS).is_file():
        paths, captions = _read_captions(folder / CAPTIONS)
        contents = [json.dumps(texts) for texts in captions]
    else:
        paths, targets, names = _read_class_folders(directory, folder)
        contents = [str(target) for target in targets]
    sizes = [path.stat().st_size for path in paths]
    rows = [
        f"{path.relative_to(folder)} {size} {text}" for path, size, text in zip(paths, sizes, contents, strict=True)
    ]
    return DatasetSplit(
        images=FileRanges([str(path) for path in paths], range(len(paths)), [0] * len(paths), sizes),
        targets=targets,
        captions=captions,
        class_names=names,
        fingerprint=fingerprint([*names, *rows]),
        cues=cues,
    )


def _read_class_folders(directory: Path, folder: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Return the paths of the images, their class ids int64[n], and the class names."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = read_lines(directory / "classnames.txt") or tuple(path.name.replace("_", " ") for path in classes)
    paths, targets = [], []
    for class_id, class_folder in enumerate(classes):
        entries = sorted(class_folder.iterdir())
        images = [path for path in entries if path.suffix.lower()[1:] in IMAGE_SUFFIXES and path.is_file()]
        if entries and not images:
            raise ValueError(f"{class_folder}: expected images (.jpg, .jpeg, .png, .webp), got {entries[0].name}")
        paths += images
        targets += [class_id] * len(images)
    if not paths:
        raise ValueError(f"{folder} has no images: expected {folder}/<class>/*.jpg, or images with {CAPTIONS}")
    if len(names) != len(classes):
        raise ValueError(
            f"{directory / 'classnames.txt'}: expected one line per class folder of {folder}, {len(classes)} from "
            f"{classes[0].name} to {classes[-1].name} in sorted order, got {len(names)} lines"
        )
    return paths, np.array(targets, np.int64), names


def _read_captions(path: Path) -> tuple[list[Path], list[tuple[str, ...]]]:
    """Return the images of captions.jsonl in its order, and their captions."""
    found: dict[Path, tuple[str, ...]] = {}

    def parse(row: dict) -> tuple[object, object]:
        return row["image"], row["captions"]

    for where, (name, captions) in _json_lines(path, parse, CAPTIONS_LINE):
        usable = isinstance(captions, list) and all(isinstance(text, str) and text.strip() for text in captions)
        if not (isinstance(name, str) and name and captions and usable):
            raise ValueError(f"{where}: expected a file name and one or more captions, such as {CAPTIONS_LINE}")
        image = path.parent / name
        if image in found:
            raise ValueError(f"{where}: {name} is listed twice; put all captions of an image on one line")
        if not image.is_file():
            raise ValueError(f"{where}: {image} does not exist; names are relative to {path.parent}")
        found[image] = tuple(captions)
    return list(found), list(found.values())


def _read_associations(path: Path) -> tuple[list[Path], tuple[Cue, ...]]:
    """Return the images of associations.jsonl in the order of their first use, and the cues."""
    indices: dict[Path, int] = {}
    cues = []

    def parse(row: dict) -> tuple[object, list[str], set[str]]:
        return row["cue"], list(row["candidates"]), set(row["associations"])

    for where, (text, candidates, associated) in _json_lines(path, parse, ASSOCIATIONS_LINE):
        distinct = len(set(candidates)) == len(candidates)
        if not (isinstance(text, str) and text.strip() and distinct and set() < associated < set(candidates)):
            raise ValueError(
                f"{where}: expected a cue, distinct candidates, and associations that are some of them but not all,"
                f" such as {ASSOCIATIONS_LINE}"
            )
        images = [path.parent / name for name in candidates]
        for image in images:
            if image not in indices and not image.is_file():
                raise ValueError(f"{where}: {image} does not exist; names are relative to {path.parent}")
        rows = [indices.setdefault(image, len(indices)) for image in images]
        cues.append(Cue(text, np.array(rows, np.int64), np.array([name in associated for name in candidates], bool)))
    return list(indices), tuple(cues)


def _json_lines(path: Path, parse: Callable[[dict], T], example: str) -> Iterator[tuple[str, T]]:
    """Yield (file and line number, parsed line) of the lines that are not blank."""
    empty = True
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if line.strip():
            where, empty = f"{path}, line {number}", False
            try:
                parsed = parse(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where}: expected a line such as {example}, got {line[:80]!r}") from error
            yield where, parsed
    if empty:
        raise ValueError(f"{path} is empty: expected lines such as {example}")
