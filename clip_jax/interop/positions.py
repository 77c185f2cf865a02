"""Position embeddings resized to another image size or context length, as open_clip does.

Source: open_clip `model.py` (`resize_pos_embed`, `resize_text_pos_embed`). Hugging Face's interpolation gives different
numbers (another cubic kernel, no antialiasing).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from clip_jax.config import Architecture, ImageTower
from clip_jax.interop import conversion
from clip_jax.typing import Params

_MIN_LENGTH = 3  # tokens: start, one of the text, end


def resize(
    model: Architecture, params: Params, image_size: int = 0, context_length: int = 0
) -> tuple[Architecture, Params]:
    """Return architecture and parameters with another image size (px) or context length (tokens); 0: unchanged.

    The patch grid is resized by antialiased bicubic interpolation and a class token's position is unchanged; text
    positions are interpolated linearly without antialiasing. Raises ValueError for an invalid size, or for a tower
    without positions.
    """
    leaves = conversion.flat(params)
    if image_size and image_size != model.image.image_size:
        path = "/".join(("image", *_positions_path(model.image, image_size)))
        model = dataclasses.replace(model, image=dataclasses.replace(model.image, image_size=image_size))
        resized = _resize_grid(np.asarray(leaves[path], np.float32), model.image)
        leaves[path] = resized.astype(leaves[path].dtype)
    if context_length and context_length != model.text.context_length:
        if context_length < _MIN_LENGTH:
            raise ValueError(f"context_length: expected at least {_MIN_LENGTH}, got {context_length}; use e.g. 77")
        path = "text/positional_embedding"
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, context_length=context_length))
        old = np.asarray(leaves[path], np.float32)
        resized = jax.image.resize(old, (context_length, old.shape[1]), "linear", antialias=False)
        leaves[path] = np.asarray(resized).astype(leaves[path].dtype)
    return model, conversion.nested(leaves)


def _positions_path(tower: ImageTower, size: int) -> tuple[str, ...]:
    """Return the path of the image tower's position embedding. Raises ValueError for an invalid size."""
    stride, path = tower.stride, tower.positions_path
    if path is None:
        raise ValueError(
            f"image_size: expected {tower.image_size}, as this tower has no position embeddings to resize, got {size}"
        )
    if size < stride or (size % stride and not tower.ignores_partial_patch):
        multiple = size // stride * stride or 8 * stride
        raise ValueError(f"image_size: expected a multiple of {stride}, got {size}; use {multiple}")
    return path


def _resize_grid(old: np.ndarray, tower: ImageTower) -> np.ndarray:
    prefix, side = tower.num_prefix_tokens, tower.image_size // tower.stride
    old_side = math.isqrt(len(old) - prefix)
    grid = old[prefix:].reshape(old_side, old_side, -1)
    resized = jax.image.resize(grid, (side, side, grid.shape[2]), "bicubic")
    return np.concatenate([old[:prefix], np.asarray(resized).reshape(side * side, -1)])
