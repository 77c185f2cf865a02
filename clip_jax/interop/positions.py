"""Another picture size or context length for trained weights: their position embeddings, resized as open_clip does.

Source: open_clip `model.py` (`resize_pos_embed`, `resize_text_pos_embed`). Hugging Face's own interpolation gives other
numbers (another cubic, no antialiasing).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from clip_jax.config import Architecture
from clip_jax.typing import Params


def resize(model: Architecture, params: Params, *, image_size: int = 0, length: int = 0) -> tuple[Architecture, Params]:
    """Return the model with other sizes, and its parameters.

    The grid of patches is resized by a bicubic with antialiasing, a class token's position stays; text positions are
    interpolated linearly, without antialiasing: what open_clip does.

    Args:
      image_size: px; 0 for the model's own.
      length: tokens; 0 for the model's own.

    Raises:
      ValueError: if the model has no positions to resize, or the size leaves no patch.
    """
    if image_size and image_size != model.image.image_size:
        model, params = _image(model, params, image_size)
    if length and length != model.text.length:
        if length < 3:
            raise ValueError(f"context_length={length} leaves no room for a text; use at least 3, e.g. 77")
        positions = np.asarray(params["text"]["positional_embedding"])
        resized = jax.image.resize(positions, (length, positions.shape[1]), "linear", antialias=False)
        params = params | {"text": params["text"] | {"positional_embedding": np.asarray(resized)}}
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, length=length))
    return model, params


def _image(model: Architecture, params: Params, size: int) -> tuple[Architecture, Params]:
    if model.image.kind == "edges":
        raise ValueError(
            f"image_size={size}: this tower has no positions to resize; it takes {model.image.image_size} px"
        )
    step = 2 << len(model.image.layers) if model.image.kind == "resnet" else model.image.patch_size
    side = size // step
    if not side:
        raise ValueError(f"image_size={size} is less than a patch; use a multiple of {step}, e.g. {8 * step}")
    if size % step and getattr(model.image, "pool", "") != "attention":
        raise ValueError(f"image_size={size} is not a multiple of {step}; use {side * step}")
    old = _positions(params["image"], model)
    first = int(model.image.kind == "resnet" or model.image.pool != "attention")  # a class token's, or the mean's
    old_side = math.isqrt(len(old) - first)
    grid = old[first:].reshape(old_side, old_side, -1)
    resized = jax.image.resize(grid, (side, side, grid.shape[2]), "bicubic")
    new = np.concatenate([old[:first], np.asarray(resized).reshape(side * side, -1)])
    model = dataclasses.replace(model, image=dataclasses.replace(model.image, image_size=size))
    return model, params | {"image": _with_positions(params["image"], model, new)}


def _positions(image: Params, model: Architecture) -> np.ndarray:
    return np.asarray((image["pool"] if model.image.kind == "resnet" else image)["positional_embedding"])


def _with_positions(image: Params, model: Architecture, positions: np.ndarray) -> Params:
    if model.image.kind == "resnet":
        return image | {"pool": image["pool"] | {"positional_embedding": positions}}
    return image | {"positional_embedding": positions}
