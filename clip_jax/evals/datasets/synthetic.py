"""Synthetic shapes as an evaluation dataset: drawings that no training source reaches."""

from __future__ import annotations

import numpy as np

from clip_jax.config import DataConfig
from clip_jax.data.sources.synthetic import BACKGROUNDS, CLASSES, TEST_START, background_of, caption, draw_png
from clip_jax.typing import EvalDataset

IMAGES_PER_CLASS = 2


def load(config: DataConfig, split: str) -> EvalDataset:
    """Return drawings of every color and shape, for retrieval and zero-shot classification; `split` is 'test'.

    A class is a color and a shape; its prompts name one background each.
    """
    del config  # independent of the training data
    if split != "test":
        raise ValueError(f"the dataset 'synthetic' has no split {split!r}; it has 'test'")
    images, targets, names = [], [], []
    for number in range(len(CLASSES) * IMAGES_PER_CLASS):
        class_id = number % len(CLASSES)
        color, shape = CLASSES[class_id]
        index = TEST_START + number
        images.append(draw_png(index, color, shape, background_of(index)))
        targets.append(class_id)
        names.append(f"{color} {shape} {number}")
    texts = [tuple(caption(color, shape, background) for background in BACKGROUNDS) for color, shape in CLASSES]
    return EvalDataset("synthetic_test", images, texts, np.array(targets, np.int64), names)
