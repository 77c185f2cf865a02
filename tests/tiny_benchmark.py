"""A registry of one made-up set, its splits, and models that are perfect or broken, to ask `benchmark` about."""

import dataclasses
import re

import numpy as np

from clip_jax.evals import benchmark
from clip_jax.evals.benchmark import Subject
from clip_jax.evals.datasets import registry
from clip_jax.evals.feature_cache import FeatureCache
from clip_jax.typing import DatasetSplit, Unavailable

CLASSES, PER_CLASS, WIDTH = 4, 5, 24
NAMES = tuple(f"thing {class_id}" for class_id in range(CLASSES))
PREPROCESSING = "48 px, shortest, bicubic"
PROBES = ("linear_probe", "few_shot")
# One set without anything that others bring: neither prompts nor a split to choose by.
ROW = registry.Dataset(name="tiny", title="Tiny", folder="wds_tiny", size=CLASSES * PER_CLASS, classes=CLASSES)
RETRIEVAL = dataclasses.replace(ROW, task="retrieval", train="", size=6, classes=0, metric="recall")


def _number(text):
    return int(re.search(r"\d+", text).group())


class Perfect:
    """A direction for each number: a picture or a text that begins with the same number is a match."""

    def __init__(self):
        self.pictures, self.texts, self.image_calls = [], [], 0

    def image(self, images):
        self.image_calls += 1
        self.pictures.append(list(images))
        return self.vectors([_number(image.decode()) for image in images])

    def text(self, texts):
        self.texts += texts
        return self.vectors([_number(text) for text in texts])

    def vectors(self, numbers):
        return np.eye(WIDTH, dtype=np.float32)[numbers]

    def features(self, images):
        """Not at length 1, and told apart by their last column: the picture's serial number."""
        serials = np.float32([int(image.split()[1]) for image in images])
        return np.column_stack([3 * self.image(images), 1e-3 * serials])


class Constant(Perfect):
    def vectors(self, numbers):
        return np.full((len(numbers), WIDTH), WIDTH**-0.5, np.float32)

    def features(self, images):
        return 3 * np.pad(self.image(images), [(0, 0), (0, 1)])


class Duplicated(Constant):
    """Two classes each share a vector, so which of the two it is can't be told."""

    def vectors(self, numbers):
        return np.eye(WIDTH, dtype=np.float32)[np.array(numbers) // 2]


class NotANumber(Constant):
    def vectors(self, numbers):
        return np.full((len(numbers), WIDTH), np.nan, np.float32)


def subject(embedder, *, architecture="custom", directory="", model="model"):
    return Subject(embedder, embedder.features, architecture, PREPROCESSING, FeatureCache(str(directory), model))


def split(targets=None, first=0, **more):
    """Return pictures that begin with their class and have a serial number, class names and a fingerprint."""
    targets = np.repeat(np.arange(CLASSES), PER_CLASS) if targets is None else np.array(targets)
    numbers = targets if targets.ndim == 1 else targets.argmax(1)
    images = [f"{number} {first + row}".encode() for row, number in enumerate(numbers)]
    found = {"class_names": NAMES, "fingerprint": f"{first} {len(images)}"} | more
    return DatasetSplit(images, targets, **found)


def captioned(counts=(1, 2, 3, 1, 2, 3)):
    captions = [tuple(f"{picture} from side {chr(97 + i)}" for i in range(n)) for picture, n in enumerate(counts)]
    return DatasetSplit(
        [f"{picture} 0".encode() for picture in range(len(counts))], None, captions, fingerprint="captions"
    )


PARTS = {"test": split(), "train": split(np.arange(40) % CLASSES, first=100)}


def evaluate(monkeypatch, embedder, row=ROW, tasks=("zeroshot",), parts=PARTS, names=None, **more):
    """Ask the rows of a registry that has no others, of splits that are given; a part that isn't is not there."""
    users = {key: more.pop(key) for key in ("templates", "class_names") if key in more}
    monkeypatch.setattr(benchmark, "DATASETS", {row.name: row})
    monkeypatch.setattr(benchmark, "SUITES", {"all": (row.name,)})

    def load(dataset, part):
        assert dataset == row
        if part not in parts:
            raise Unavailable(f"no {part} split here")
        return parts[part]

    return benchmark.evaluate(subject(embedder, **more), names or [row.name], tasks, load, benchmark.Options(**users))


class WrongInThirds(Perfect):
    """Right but for pictures whose serial number ends with 3 or 4."""

    def image(self, images):
        numbers = [_number(image.decode()) + (int(image.split()[1]) % 5 > 2) for image in images]
        return self.vectors([number % CLASSES for number in numbers])
