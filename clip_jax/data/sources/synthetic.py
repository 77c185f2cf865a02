"""A training source without data: images of one colored shape on a plain background, drawn when they are read.

6 shapes × 8 colors × 3 backgrounds at a random place and size. Record `index` is a function of `index` alone.
"""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.config import DataConfig
from clip_jax.data import order
from clip_jax.typing import Record

VERSION = 1  # of the drawings; increment when they change
SIDE = 64  # pixels
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
TEST_START = 2**40  # first index of the evaluation dataset, above every training index
CLASSES = tuple((color, shape) for color in COLORS for shape in SHAPES)

_PURPOSES = ("class", "background", "radius", "x", "y")


class SyntheticSource:
    """Images with captions under img2dataset's two caption features, 'txt' and 'caption'."""

    def __init__(self, examples: int):
        if examples < 1:
            raise ValueError(f"data.options.examples={examples}: expected at least 1, e.g. 4096")
        self._examples = examples

    @classmethod
    def from_config(cls, config: DataConfig, examples: int = 4096) -> SyntheticSource:
        return cls(examples)

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        return DataConfig(source="synthetic", options={"examples": 60})

    def __len__(self) -> int:
        return self._examples

    def key(self, index: int) -> str:
        return f"synthetic/{index}"

    def read(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        color, shape = CLASSES[_choose(index, "class", len(CLASSES))]
        background = background_of(index)
        text = (caption(color, shape, background),)
        return Record(self.key(index), draw_png(index, color, shape, background), {"txt": text, "caption": text})

    def fingerprint(self) -> str:
        return hashlib.sha256(f"synthetic {VERSION} {self._examples}".encode()).hexdigest()[:16]


def caption(color: str, shape: str, background: str) -> str:
    return f"{'an' if color == 'orange' else 'a'} {color} {shape} on a {background} background"


def background_of(index: int) -> str:
    return tuple(BACKGROUNDS)[_choose(index, "background", len(BACKGROUNDS))]


def draw_png(index: int, color: str, shape: str, background: str) -> bytes:
    """Return a PNG, SIDE × SIDE pixels; position and size (1/4 to 1/2 of the side) of the shape follow from `index`."""
    radius = SIDE * (1 + order.fraction(_bits(index, "radius"))[0]) / 8
    x, y = (radius + (SIDE - 2 * radius) * order.fraction(_bits(index, axis))[0] for axis in ("x", "y"))
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background])
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[color])
    else:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[shape]], fill=COLORS[color])
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _bits(index: int, purpose: str) -> np.ndarray:
    return order.draw(order.VALUE, index, _PURPOSES.index(purpose))


def _choose(index: int, purpose: str, choices: int) -> int:
    return int(_bits(index, purpose)[0] % np.uint64(choices))


# Corners within [-1, 1]².
_OUTLINES = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "star": [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate((1, 0.4) * 5)],
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
}
