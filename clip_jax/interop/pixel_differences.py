"""Effect of another library's preprocessing on the embeddings of a model, measured on synthetic images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image, ImageDraw

from clip_jax.config import Architecture, Preprocess, WeightsConfig
from clip_jax.models import make_model
from clip_jax.preprocess import preprocess_many
from clip_jax.typing import Params

IMAGES = 2  # of each of the two kinds


def lowest_cosines(params: Params, config: WeightsConfig) -> dict[str, tuple[float, float]]:
    """Return the lowest cosines between the embeddings by the preprocessing of `config` and by other implementations.

    Returns:
      By implementation, 'huggingface' and 'openai': the cosine over opaque images, and that over transparent ones.
    """
    spec, size = config.preprocess, config.model.image.image_size
    images, encode = synthetic_images(size, spec), _encoder(config.model, spec)

    def embed(implementation: str) -> np.ndarray:
        pixels = preprocess_many(images, size, dataclasses.replace(spec, implementation=implementation))
        return np.asarray(encode(params, pixels))

    own_nE, found = embed(spec.implementation), {}
    for implementation in ("huggingface", "openai"):
        cosines = np.sum(own_nE * embed(implementation), axis=1)
        found[implementation] = float(cosines[:IMAGES].min()), float(cosines[IMAGES:].min())
    return found


@functools.lru_cache(maxsize=1)
def _encoder(model: Architecture, spec: Preprocess) -> Callable[..., jax.Array]:
    return jax.jit(make_model(model, spec).encode_image)


def synthetic_images(size: int, spec: Preprocess) -> list[Image.Image]:
    """Return opaque images, and the same as discs on a transparent background whose hidden color is black.

    They are larger than their crop by 3 px more than a multiple of 4, where the offsets of the libraries differ.
    """
    shorter = spec.resize_size or size
    rng, opaque, transparent = np.random.default_rng(0), [], []
    for number in range(IMAGES):
        longer = max(shorter, size) + 4 * (1 + number * size // 16) + 3
        colors = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        image = colors.resize((2 * longer, 2 * shorter), Image.Resampling.BICUBIC)
        mask = Image.new("L", image.size, 0)
        ImageDraw.Draw(mask).ellipse((longer // 2, 0, 3 * longer // 2, 2 * shorter), fill=255)
        disc = Image.new("RGBA", image.size, (0, 0, 0, 0))
        disc.paste(image, mask=mask)
        opaque.append(image)
        transparent.append(disc)
    return [*opaque, *transparent]
