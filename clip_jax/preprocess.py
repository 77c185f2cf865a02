"""Inference preprocessing with Pillow: uint8 pixels equal to OpenAI's, open_clip's or Hugging Face's.

The shorter side is resized to `size`, the center is cropped, and the result becomes RGB; the model divides by 255 and
normalizes on the device. Pillow antialiases and rounds to uint8 between its two passes: bicubic resizing of TensorFlow,
JAX or torch gives other bytes. Pillow 13 resizes the height first if it shrinks more, so images more than twice as high
as wide differ by a few levels from Pillow 12's. `preprocess.implementation` selects the pipeline:
  * openai: resize in the image's own mode (palette: nearest pixel), crop at `round((side - size) / 2)`, half to even,
    then convert to RGB. Alpha is dropped, so the hidden color of transparent pixels shows; 16-bit gray is clipped at
    255, which makes nearly every such image white. OpenAI's and open_clip's weights were trained with this.
  * huggingface: composite on white and convert to RGB, then resize; crop at `(side - size) // 2`, which differs
    if the margin is odd.
  * clip_jax: as openai, but transparency is composited on white and 16-bit gray keeps its high byte, as in training.

None of them applies EXIF orientation; to apply it, call `PIL.ImageOps.exif_transpose` first. Sources: openai/CLIP
`clip/clip.py` (`_transform`) with torchvision's Resize and CenterCrop; transformers `CLIPImageProcessor`.
"""

from __future__ import annotations

import concurrent.futures
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_jax.config import Preprocess

# Encoded image, path, file opened for reading, PIL image, or uint8[H W], [H W 3] or [H W 4].
ImageLike = Image.Image | bytes | str | os.PathLike[str] | io.BufferedIOBase | np.ndarray | jax.Array

_SIXTEEN_BIT = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}
# A 1 × 10,000 image resized to 224 px on its shorter side would have 500 Mpx, 1.5 GB.
_MAX_RESIZED_PIXELS = 100_000_000


def preprocess(image: ImageLike, size: int, spec: Preprocess) -> UInt8[np.ndarray, "H W 3"]:
    """Return the input of the image tower.

    >>> from clip_jax.config import Preprocess
    >>> preprocess(Image.new("RGB", (640, 480), "red"), 224, Preprocess()).shape
    (224, 224, 3)

    Args:
      size: height and width of the result, in pixels.
      spec: interpolation, resize mode and implementation; `mean` and `std` are not applied here.

    Raises:
      ValueError: if the image can't be decoded, or if it would have more than 100 Mpx after resizing.
      TypeError: if it is no image.
      FileNotFoundError: if the path does not exist.
    """
    opened = _BEFORE_RESIZE[spec.implementation](open_image(image))
    resampling = Image.Resampling[spec.interpolation.upper()]
    if spec.resize == "squash":
        return np.array(opened.resize((size, size), resampling).convert("RGB"))
    width, height = _resized_shape(opened.size, size)
    if spec.implementation == "huggingface":
        left, top = (width - size) // 2, (height - size) // 2
    else:
        left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))
    resized = opened.resize((width, height), resampling)
    return np.array(resized.crop((left, top, left + size, top + size)).convert("RGB"))


def preprocess_many(
    images: Sequence[ImageLike], size: int, spec: Preprocess, threads: int = 0, *, first: int = 0
) -> UInt8[np.ndarray, "n H W 3"]:
    """Return `preprocess` of several images, computed in threads.

    Args:
      threads: number of threads; 0 for the number of cores.
      first: number of the first image in error messages, for chunks of a larger sequence.

    Raises:
      ValueError, TypeError: as `preprocess`, with the number of the image, from 0.
    """
    result = np.empty((len(images), size, size, 3), np.uint8)

    def fill_row(row: int) -> None:
        try:
            result[row] = preprocess(images[row], size, spec)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"image {first + row}: {error}") from error

    with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        list(pool.map(fill_row, range(len(images))))  # raises the threads' errors
    return result


def open_image(image: Any) -> Image.Image:
    """Return a decoded PIL image. Raises ValueError or TypeError as `preprocess`."""
    if hasattr(image, "__array__") and not isinstance(image, Image.Image):  # of NumPy, JAX or torch
        image = np.asarray(image)
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise ValueError(
                "pixels: expected uint8 of [H W], [H W 3] or [H W 4], 0 to 255, got"
                f" {image.dtype}{list(image.shape)}; for floats in 0 to 1: (x * 255).round().astype('uint8')"
            )
        return Image.fromarray(image)
    if not isinstance(image, (Image.Image, bytes, str, os.PathLike)) and not hasattr(image, "read"):
        raise TypeError(f"expected a PIL image, a path, bytes, a file or a uint8 array, got {type(image).__name__}")
    if isinstance(image, (str, os.PathLike)):
        source, name = pathlib.Path(image).expanduser(), os.fspath(image)
    else:
        source = io.BytesIO(image) if isinstance(image, bytes) else image
        name = f"{len(image):,} bytes" if isinstance(image, bytes) else type(image).__name__
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        opened.load()
    except FileNotFoundError:
        raise
    # Pillow's decoders raise all of these for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: expected an image, got {error}; convert it, e.g. to PNG") from error
    return opened


def _opaque(image: Image.Image) -> Image.Image:
    """Composite transparency on white; keep the high byte of 16-bit gray."""
    if image.mode in _SIXTEEN_BIT:
        samples = np.frombuffer(image.tobytes(), _SIXTEEN_BIT[image.mode])
        return Image.fromarray((samples >> 8).astype(np.uint8).reshape(image.height, image.width))
    if not image.has_transparency_data:
        return image
    return _on_white(image.convert("RGBA"))


def _on_white(image: Image.Image) -> Image.Image:
    """Convert to RGBA, composite on white, and convert to RGB, as transformers' `convert_to_rgb`."""
    if image.mode == "RGB":
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


_BEFORE_RESIZE = {"clip_jax": _opaque, "openai": lambda image: image, "huggingface": _on_white}


def _resized_shape(original: tuple[int, int], size: int) -> tuple[int, int]:
    """Return width and height with the shorter side at `size` px; the longer is rounded down, as in torchvision."""
    width, height = original
    if not width or not height:
        raise ValueError(f"expected an image with pixels, got {width} × {height} px; remove it")
    longer = int(size * max(width, height) / min(width, height))
    if size * longer > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"expected at most {_MAX_RESIZED_PIXELS:,} pixels with {size} px on the shorter side, got {size * longer:,}"
            f" from {width} × {height} px; crop it first, or use preprocess.resize='squash'"
        )
    return (size, longer) if width <= height else (longer, size)
