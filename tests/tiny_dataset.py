"""A registry with one small dataset, and perfect and broken models to evaluate on it."""

import dataclasses
import re

import numpy as np

from clip_jax.evals import load, suite
from clip_jax.evals.datasets import registry
from clip_jax.evals.embed import DiskCachedEmbedder, FeatureCache
from clip_jax.evals.suite import EvaluatedModel
from clip_jax.typing import DatasetSplit, Unavailable

CLASSES, PER_CLASS, WIDTH = 4, 5, 24
NAMES = tuple(f"thing {class_id}" for class_id in range(CLASSES))
PREPROCESSING = "48 px, shortest, bicubic"
PROBES = ("linear_probe", "few_shot")
# Without published prompts and without a validation split.
ROW = registry.Dataset(name="tiny", title="Tiny", folder="wds_tiny", size=CLASSES * PER_CLASS, classes=CLASSES)
RETRIEVAL = dataclasses.replace(ROW, task="retrieval", train="", size=6, classes=0, metric="recall")


def _number(text):
    return int(re.search(r"\d+", text).group())


class Perfect:
    """Embeds each number as its own direction: images and texts whose first number is equal match."""

    def __init__(self):
        self.images, self.texts, self.image_calls = [], [], 0

    def image(self, images):
        self.image_calls += 1
        self.images.append(list(images))
        return self.vectors([_number(image.decode()) for image in images])

    def text(self, texts):
        self.texts += texts
        return self.vectors([_number(text) for text in texts])

    def vectors(self, numbers):
        return np.eye(WIDTH, dtype=np.float32)[numbers]

    def features(self, images):
        """Return features that are not normalized; the last column identifies the image by its serial number."""
        serials = np.float32([int(image.split()[1]) for image in images])
        return np.column_stack([3 * self.image(images), 1e-3 * serials])


class Constant(Perfect):
    def vectors(self, numbers):
        return np.full((len(numbers), WIDTH), WIDTH**-0.5, np.float32)

    def features(self, images):
        return 3 * np.pad(self.image(images), [(0, 0), (0, 1)])


class Duplicated(Constant):
    """Pairs of classes share an embedding."""

    def vectors(self, numbers):
        return np.eye(WIDTH, dtype=np.float32)[np.array(numbers) // 2]


class NotANumber(Constant):
    def vectors(self, numbers):
        return np.full((len(numbers), WIDTH), np.nan, np.float32)


class WrongInThirds(Perfect):
    """Perfect, but for images whose serial number ends with 3 or 4, 8 or 9."""

    def image(self, images):
        numbers = [_number(image.decode()) + (int(image.split()[1]) % 5 > 2) for image in images]
        return self.vectors([number % CLASSES for number in numbers])


def make_model(embedder, *, architecture="custom", directory="", model="model"):
    return EvaluatedModel(
        DiskCachedEmbedder(embedder, FeatureCache(str(directory), model)), architecture, PREPROCESSING
    )


def split(targets=None, first=0, **fields):
    """Return a split whose images are '<class id> <serial number>', with class names."""
    targets = np.repeat(np.arange(CLASSES), PER_CLASS) if targets is None else np.array(targets)
    numbers = targets if targets.ndim == 1 else targets.argmax(1)
    images = [f"{number} {first + row}".encode() for row, number in enumerate(numbers)]
    return DatasetSplit(images, targets, **{"class_names": NAMES} | fields)


def captioned(counts=(1, 2, 3, 1, 2, 3)):
    captions = [tuple(f"{image} from side {chr(97 + i)}" for i in range(n)) for image, n in enumerate(counts)]
    images = [f"{image} 0".encode() for image in range(len(counts))]
    return DatasetSplit(images, None, captions)


SPLITS = {"test": split(), "train": split(np.arange(40) % CLASSES, first=100)}


def register(monkeypatch, *rows):
    """Replace the registry's datasets by these, and its suites by one with all of them."""
    datasets = {row.name: row for row in rows}
    monkeypatch.setattr(load, "DATASETS", datasets)
    monkeypatch.setattr(load, "SUITES", {"all": tuple(datasets)})


def evaluate(monkeypatch, embedder, row=ROW, evaluators=("zeroshot",), splits=SPLITS, names=None, **options):
    """Evaluate a model on one registered dataset; splits that are not given are unavailable."""
    prompts = {key: options.pop(key) for key in ("templates", "class_names") if key in options}
    evaluator_options = options.pop("evaluator_options", {})
    register(monkeypatch, row)

    def load_split(dataset, part, data_dir):
        assert dataset == row
        if part not in splits:
            raise Unavailable(f"no {part} split here")
        return splits[part]

    monkeypatch.setattr(load, "load_split", load_split)
    return suite.evaluate(
        make_model(embedder, **options),
        names or [row.name],
        evaluators,
        load.LoadOptions(**prompts),
        evaluator_options,
    )
