"""Synthetic shapes as an evaluation dataset: drawings that no training source reaches."""

from __future__ import annotations

import numpy as np

from clip_jax.data.sources.synthetic import BACKGROUNDS, CLASSES, TEST_START, background_of, caption, draw_png
from clip_jax.typing import EvalDataset

IMAGES_PER_CLASS = 2


def load() -> EvalDataset:
    """Return drawings of every color and shape, for retrieval and zero-shot classification.

    A class is a color and a shape; its prompts name one background each.
    """
    images, names = [], []
    targets = np.arange(len(CLASSES) * IMAGES_PER_CLASS, dtype=np.int64) % len(CLASSES)
    for number, class_id in enumerate(targets):
        color, shape = CLASSES[class_id]
        images.append(draw_png(TEST_START + number, color, shape, background_of(TEST_START + number)))
        names.append(f"{color} {shape} {number}")
    texts = [tuple(caption(color, shape, background) for background in BACKGROUNDS) for color, shape in CLASSES]
    return EvalDataset("synthetic_test", images, texts, targets, names)
