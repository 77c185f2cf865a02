"""Pictures that can be learned without any data: one coloured shape on a plain background, drawn when read.

6 shapes × 8 colours × 3 backgrounds, at any place and at any size between two bounds. Record `index` is a
function of `index` alone. The evaluation set draws from indices that no training set reaches.
"""

from __future__ import annotations

import hashlib
import io
import math

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.config import DataConfig
from clip_jax.data import order
from clip_jax.typing import EvalDataset, Record

VERSION = 1  # of the drawings: raise it when they change
SIDE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 0),
    "yellow": (240, 220, 20),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "brown": (120, 70, 30),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (150, 150, 150), "black": (0, 0, 0)}
TEST_START = 2**40  # above every index of a training set
TEST_PICTURES_PER_CLASS = 2
CLASSES = tuple((color, shape) for color in COLORS for shape in SHAPES)


class SyntheticSource:
    """`examples` drawings with their captions, under img2dataset's two caption features."""

    def __init__(self, examples: int):
        self._examples = examples

    def __len__(self) -> int:
        return self._examples

    def key(self, index: int) -> str:
        """Return 'synthetic/number'."""
        return f"synthetic/{index}"

    def read(self, index: int) -> Record:
        """Draw picture `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        color, shape = CLASSES[_choose(index, "class", len(CLASSES))]
        background = tuple(BACKGROUNDS)[_choose(index, "background", len(BACKGROUNDS))]
        text = (caption(color, shape, background),)
        return Record(self.key(index), _draw(index, color, shape, background), {"txt": text, "caption": text})

    def fingerprint(self) -> str:
        """Hash the drawings' version and their number."""
        return hashlib.sha256(f"synthetic {VERSION} {self._examples}".encode()).hexdigest()[:16]


def source(config: DataConfig) -> SyntheticSource:
    """Make the source of `data.synthetic_examples` drawings."""
    return SyntheticSource(config.synthetic_examples)


def eval_set(config: DataConfig, split: str) -> EvalDataset:
    """Return drawings of every colour and shape, for retrieval and zero-shot alike; `split` is 'test'.

    A class is a colour and a shape; its wordings name the backgrounds in turn.
    """
    del config  # the same pictures for every training set
    if split != "test":
        raise ValueError(f"the set 'synthetic' has no split {split!r}; it has 'test'")
    images, targets = [], []
    for number in range(len(CLASSES) * TEST_PICTURES_PER_CLASS):
        class_id = number % len(CLASSES)
        background = tuple(BACKGROUNDS)[_choose(TEST_START + number, "background", len(BACKGROUNDS))]
        images.append(_draw(TEST_START + number, *CLASSES[class_id], background))
        targets.append(class_id)
    texts = [tuple(caption(color, shape, background) for background in BACKGROUNDS) for color, shape in CLASSES]
    names = [f"{CLASSES[class_id][0]} {CLASSES[class_id][1]} {number}" for number, class_id in enumerate(targets)]
    return EvalDataset("synthetic_test", images, texts, np.array(targets, np.int64), names)


def caption(color: str, shape: str, background: str) -> str:
    """Say what is to be seen, e.g. 'a red circle on a white background'."""
    return f"{'an' if color == 'orange' else 'a'} {color} {shape} on a {background} background"


_USES = ("class", "background", "radius", "x", "y")


def _bits(index: int, use: str) -> np.ndarray:
    return order.draw(order.VALUE, index, _USES.index(use))


def _choose(index: int, use: str, choices: int) -> int:
    return int(_bits(index, use)[0] % np.uint64(choices))


def _draw(index: int, color: str, shape: str, background: str) -> bytes:
    """Return a PNG of SIDE × SIDE pixels with the shape somewhere in it, a quarter to a half of the side across."""
    radius = SIDE * (1 + order.fraction(_bits(index, "radius"))[0]) / 8
    x, y = (radius + (SIDE - 2 * radius) * order.fraction(_bits(index, use))[0] for use in ("x", "y"))
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background])
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[color])
    else:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[shape]], fill=COLORS[color])
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = [math.pi * k / points for k in range(2 * points)]
    return [((1, inner)[k % 2] * math.sin(a), -(1, inner)[k % 2] * math.cos(a)) for k, a in enumerate(angles)]


# Corners within [-1, 1]².
_OUTLINES = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "star": _star(5, 0.4),
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
}
