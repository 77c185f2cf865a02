"""Inference preprocessing with Pillow: uint8 pixels equal to OpenAI's, open_clip's or Hugging Face's.

The shorter side is resized to `size`, the center is cropped, and the result becomes RGB; the model divides by 255 and
normalizes on the device. `preprocess.resize` and `preprocess.resize_size` select other sides and sizes; an image that
is then smaller than `size` is padded. Pillow antialiases and rounds to uint8 between its two passes: bicubic resizing
of TensorFlow, JAX or torch gives other bytes. The width is resized first, as in the code that published models were
trained with, whatever Pillow is installed: Pillow 13 resizes the height of images more than twice as high as wide
first, which changes a few levels. `preprocess.implementation` selects the pipeline:

* openai: resize in the image's own mode (palette: nearest pixel), crop at `round((side - size) / 2)`, half to even,
  then convert to RGB. Alpha is dropped, so the hidden color of transparent pixels shows; 16-bit gray is clipped at
  255, which makes nearly every such image white. An odd padding has its larger half on the right and at the bottom.
  OpenAI's and open_clip's weights were trained with this.
* huggingface: composite on white and convert to RGB, then resize; crop at `(side - size) // 2`, which differs
  if the margin is odd; an odd padding has its larger half on the left and at the top. This is the processor on PIL.
  The one on torchvision is at most 2 of 255 apart and pads as openai; with resample 0 (nearest) it has the other
  neighbor where a pixel's center is exactly between two.
* clip_jax: as openai, but transparency is composited on white and 16-bit gray keeps its high byte, as in training.

None of them applies EXIF orientation; to apply it, call `PIL.ImageOps.exif_transpose` first. Sources: openai/CLIP
`clip/clip.py` (`_transform`) with torchvision's Resize and CenterCrop; open_clip `transform.py` (`ResizeKeepRatio`,
`center_crop_or_pad`); transformers `CLIPImageProcessorPil`.
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
from PIL import Image, ImageOps

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
      spec: resizing, crop and implementation; `mean` and `std` are not applied here.

    Raises:
      ValueError: if the image can't be decoded, or if it would have no or more than 100 Mpx after resizing.
      TypeError: if it is no image.
      FileNotFoundError: if the path does not exist.
    """
    opened = _BEFORE_RESIZE[spec.implementation](open_image(image))
    shape = _resized_shape(opened.size, spec.resize_size or size, spec.resize)
    resized = _resized(opened, shape, Image.Resampling[spec.interpolation.upper()])
    if spec.implementation == "clip_jax":  # so that the color of the padding is one of RGB
        resized = resized.convert("RGB")
    return np.array(_center(resized, size, spec).convert("RGB"))


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
    """Convert to RGB, transparency composited on white, as transformers' `convert_to_rgb`."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


_PREMULTIPLIED = {"RGBA": "RGBa", "LA": "La"}
_BEFORE_RESIZE = {"clip_jax": _opaque, "openai": lambda image: image, "huggingface": _on_white}


def _resized(image: Image.Image, shape: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resize the width first, in colors multiplied by their opacity, as Pillow before version 13."""
    if shape == image.size:
        return image
    if shape[0] * image.height > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"expected at most {_MAX_RESIZED_PIXELS:,} pixels with a width of {shape[0]} px, got"
            f" {shape[0] * image.height:,} from {image.width} × {image.height} px; crop it first"
        )
    mode = image.mode if resample == Image.Resampling.NEAREST else _PREMULTIPLIED.get(image.mode, image.mode)
    source = image if mode == image.mode else image.convert(mode)
    resized = source.resize((shape[0], image.height), resample).resize(shape, resample)
    return resized if mode == image.mode else resized.convert(image.mode)


def _resized_shape(original: tuple[int, int], size: int, resize: str) -> tuple[int, int]:
    """Return width and height with the side(s) `resize` at `size` px.

    The longer side is rounded down, as in torchvision; the shorter side to the nearest, as in open_clip.
    """
    width, height = original
    if not width or not height:
        raise ValueError(f"expected an image with pixels, got {width} × {height} px; remove it")
    if resize == "none":
        return original
    if resize == "squash":
        return size, size
    if resize == "longest":
        ratio = max(width, height) / size
        shape = round(width / ratio), round(height / ratio)
        if not min(shape):
            raise ValueError(
                f"expected a shorter side of at least one pixel with {size} px on the longer side, got"
                f" {width} × {height} px; crop it first"
            )
        return shape
    longer = int(size * max(width, height) / min(width, height))
    if size * longer > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"expected at most {_MAX_RESIZED_PIXELS:,} pixels with {size} px on the shorter side, got {size * longer:,}"
            f" from {width} × {height} px; crop it first, or use preprocess.resize='squash'"
        )
    return (size, longer) if width <= height else (longer, size)


def _center(image: Image.Image, size: int, spec: Preprocess) -> Image.Image:
    """Return the center, size × size px; the padding of a smaller image has the fill color in all channels."""
    left, top = (_offset(side - size, spec.implementation) for side in image.size)
    right, bottom = left + size, top + size
    if spec.fill_color and min(image.size) < size:  # Pillow's crop fills with zeros
        border = (max(-left, 0), max(-top, 0), max(right - image.width, 0), max(bottom - image.height, 0))
        bands = len(image.getbands())
        image = ImageOps.expand(image, border, spec.fill_color if bands == 1 else (spec.fill_color,) * bands)
        left, top = max(left, 0), max(top, 0)
    return image.crop((left, top, left + size, top + size))


def _offset(margin: int, implementation: str) -> int:
    """Return the first row or column of the crop, for a margin of both sides in px, negative for padding."""
    if implementation == "huggingface":
        return margin // 2
    return round(margin / 2) if margin >= 0 else -(-margin // 2)
