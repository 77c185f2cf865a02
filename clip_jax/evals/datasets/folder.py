"""Reads evaluation datasets of images in folders: one folder per class, or images listed in a .jsonl file.

<directory>/<split>/<class>/**/*.jpg           classification; class ids in the order of the sorted folder names, by
                                               number if all are integers
<directory>/classnames.txt                     optional: a name per class, in the order of the folders
<directory>/zeroshot_classification_templates.txt        optional: one template per line, `{c}` for the class
<directory>/<split>/captions.jsonl             retrieval: {"image": "a.jpg", "captions": ["a cat", "a sleeping cat"]}
<directory>/<split>/associations.jsonl         association: {"cue": "wing", "candidates": ["a.jpg", "b.jpg", "c.jpg"],
                                                             "associations": ["b.jpg"]}
"""  # noqa: E501 (the lines of the files as they are)

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from clip_jax.evals.datasets.files import (
    IMAGE_SUFFIXES,
    FileRanges,
    in_class_order,
    read_lines,
    read_templates,
    read_text,
)
from clip_jax.typing import Cue, DatasetSplit

CAPTIONS = "captions.jsonl"
ASSOCIATIONS = "associations.jsonl"
CAPTIONS_LINE = '{"image": "a.jpg", "captions": ["a cat", "a sleeping cat"]}'
ASSOCIATIONS_LINE = '{"cue": "wing", "candidates": ["a.jpg", "b.jpg", "c.jpg"], "associations": ["b.jpg"]}'

FOLDER_SUFFIXES = (*IMAGE_SUFFIXES, "gif", "bmp", "tif", "tiff", "ppm", "pgm")  # formats that Pillow reads

log = logging.getLogger(__name__)

T = TypeVar("T")


def read_folder(directory: str | os.PathLike, split: str) -> DatasetSplit:
    """Open a split of images in a local folder. The layout: this module's docstring.

    Raises ValueError without images, or if class names, captions or cues do not match the images.
    """
    directory = Path(directory).expanduser()
    folder = directory / split
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected images, in one folder per class or with {CAPTIONS}")
    targets, keys, captions, cues = None, (), (), ()
    if (folder / ASSOCIATIONS).is_file():
        paths, cues = _read_associations(folder / ASSOCIATIONS)
    elif (folder / CAPTIONS).is_file():
        paths, captions = _read_captions(folder / CAPTIONS)
    else:
        paths, targets, keys = _read_class_folders(folder)
    sizes = [path.stat().st_size for path in paths]
    return DatasetSplit(
        images=FileRanges([str(path) for path in paths], range(len(paths)), [0] * len(paths), sizes),
        targets=targets,
        captions=captions,
        class_names=_class_names(directory, keys),
        class_keys=keys,
        templates=read_templates(directory) if keys else (),
        cues=cues,
    )


def _class_names(directory: Path, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classnames.txt by class id, () without the file. Raises ValueError if they do not match."""
    path = directory / "classnames.txt"
    names = [(name,) for name in read_lines(path)] if keys else []
    return tuple(name for (name,) in in_class_order(names, keys, str(path))) if names else ()


def _sorted_classes(folder: Path) -> list[Path]:
    """Return the class folders: by number if all names are integers, else as strings."""
    classes = [path for path in folder.iterdir() if path.is_dir() and not _is_leftover(path.name)]
    if not all(re.fullmatch(r"[0-9]+", path.name) for path in classes):
        return sorted(classes)
    classes.sort(key=lambda path: int(path.name))
    for left, right in itertools.pairwise(classes):
        if int(left.name) == int(right.name):
            raise ValueError(f"{folder}: expected distinct class numbers, got folders {left.name} and {right.name}")
    return classes


def _is_leftover(name: str) -> bool:
    """Return whether a file or folder is hidden, or of macOS's archives: `._a.jpg`, `.DS_Store`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def _read_class_folders(folder: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Return the paths of the images, their class ids int64[n], and the folder names with spaces."""
    classes = _sorted_classes(folder)
    paths, targets, ignored = [], [], []
    for class_id, class_folder in enumerate(classes):
        found = [path for path in sorted(class_folder.rglob("*")) if path.is_file()]
        found = [path for path in found if not any(map(_is_leftover, path.relative_to(class_folder).parts))]
        images = [path for path in found if path.suffix.lower()[1:] in FOLDER_SUFFIXES]
        ignored += [path for path in found if path.suffix.lower()[1:] not in FOLDER_SUFFIXES]
        if found and not images:
            expected = ", ".join(f".{suffix}" for suffix in FOLDER_SUFFIXES)
            raise ValueError(f"{class_folder}: expected images ({expected}), got {found[0].relative_to(class_folder)}")
        paths += images
        targets += [class_id] * len(images)
    if not paths:
        raise ValueError(f"{folder} has no images: expected {folder}/<class>/*.jpg, or images with {CAPTIONS}")
    if ignored:
        log.warning("%s: %d files are no images and ignored, e.g. %s", folder, len(ignored), ignored[0])
    return paths, np.array(targets, np.int64), tuple(path.name.replace("_", " ") for path in classes)


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
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where, empty = f"{path}, line {number}", False
            try:
                parsed = parse(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where}: expected a line such as {example}, got {line[:80]!r}") from error
            yield where, parsed
    if empty:
        raise ValueError(f"{path} is empty: expected lines such as {example}")
