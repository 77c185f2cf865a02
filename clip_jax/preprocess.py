"""Inference's pixels, by Pillow: bit-equal to OpenAI's, open_clip's or Hugging Face's pipeline, up to the uint8 array.

The shorter side is resized to `size`, the centre is cropped, and the result becomes RGB; division by 255, mean and
standard deviation follow on the device, in the model. Pillow rounds to uint8 between its two passes and antialiases: no
bicubic of TensorFlow, JAX or torch gives the same bytes. Pillow 13 resizes the height first where that shrinks more, so
pictures more than twice as high as wide differ by some levels from Pillow 12's.

`preprocess.implementation` says whose pipeline:
  * openai: resized in the picture's own mode (a palette to the nearest pixel), cropped at `round((side - size) / 2)`,
    half to even, and only then RGB. Alpha is dropped, whatever colour lies below it shows; 16-bit grey is clipped at
    255, which makes nearly every such picture white. Those are what OpenAI's and open_clip's weights were trained with.
  * huggingface: laid on white and RGB first, cropped at `(side - size) // 2`: other pixels wherever the margin is odd.
  * clip_jax: as openai, but transparency lies on white and 16-bit grey keeps its high byte, as our training sees them.

Nobody applies EXIF orientation: turn such pictures first if you want them upright (`PIL.ImageOps.exif_transpose`).

Source: openai/CLIP `clip/clip.py` (`_transform`) with torchvision's Resize and CenterCrop; transformers
`CLIPImageProcessor`.
"""

from __future__ import annotations

import concurrent.futures
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_jax.config import Preprocess

# An encoded picture, a path to one, or pixels: PIL's or uint8[H W], [H W 3] or [H W 4].
ImageLike = Image.Image | bytes | str | os.PathLike[str] | np.ndarray

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SIXTEEN_BIT = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}
# A 1 × 10,000 picture resized to 224 on its shorter side has 500 Mpx, 1.5 GB. Every real one stays far below this.
_MAX_RESIZED_PIXELS = 100_000_000


def preprocess(image: ImageLike, size: int, spec: Preprocess) -> UInt8[np.ndarray, "H W 3"]:
    """Return the `size` × `size` pixels of a picture that the image tower sees.

    Raises:
      ValueError: if the picture can't be decoded, or is so long and thin that its resized form would fill the memory.
      FileNotFoundError: if the path leads nowhere.
    """
    opened = _BEFORE_RESIZING[spec.implementation](_open(image))
    resampling = _RESAMPLING[spec.interpolation]
    if spec.resize == "squash":
        return np.array(opened.resize((size, size), resampling).convert("RGB"))
    width, height = _resized(opened.size, size)
    if spec.implementation == "huggingface":
        left, top = (width - size) // 2, (height - size) // 2
    else:
        left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))
    resized = opened.resize((width, height), resampling)
    return np.array(resized.crop((left, top, left + size, top + size)).convert("RGB"))


def preprocess_many(
    images: Sequence[ImageLike], size: int, spec: Preprocess, threads: int = 0, *, first: int = 0
) -> UInt8[np.ndarray, "n H W 3"]:
    """Return the pixels of several pictures.

    Args:
      threads: how many work at it; 0 for as many as there are cores.
      first: the number of the first picture, for errors, where these are a part of more.

    Raises:
      ValueError: as `preprocess`, saying which picture; numbers start at 0.
    """
    result = np.empty((len(images), size, size, 3), np.uint8)

    def work(row: int) -> None:
        try:
            result[row] = preprocess(images[row], size, spec)
        except ValueError as error:
            raise ValueError(f"picture {first + row}: {error}") from error

    with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for _ in pool.map(work, range(len(images))):  # reading the results raises their errors
            pass
    return result


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise ValueError(
                f"pixels are {image.dtype}{list(image.shape)}, expected uint8 of [H W], [H W 3] or [H W 4], 0 to 255;"
                " for floats in 0 to 1: (x * 255).round().astype('uint8')"
            )
        return Image.fromarray(image)
    source = io.BytesIO(image) if isinstance(image, bytes) else pathlib.Path(image).expanduser()
    name = f"{len(image):,} bytes" if isinstance(image, bytes) else os.fspath(image)
    try:
        opened = Image.open(source)
        opened.load()
    except FileNotFoundError:
        raise
    # What Pillow's decoders are known to raise for damaged files: its own errors are OSErrors.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: this can't be decoded as a picture ({error})") from error
    return opened


def _opaque(image: Image.Image) -> Image.Image:
    """Composite a picture that has transparency on white, and halve the bits of one that has 16."""
    if image.mode in _SIXTEEN_BIT:
        samples = np.frombuffer(image.tobytes(), _SIXTEEN_BIT[image.mode])
        return Image.fromarray((samples >> 8).astype(np.uint8).reshape(image.height, image.width))
    if not image.has_transparency_data:
        return image
    return _on_white(image.convert("RGBA"))


def _on_white(image: Image.Image) -> Image.Image:
    """Return RGB as transformers' `convert_to_rgb` does: everything by way of RGBA, laid on white."""
    if image.mode == "RGB":
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


_BEFORE_RESIZING = {"clip_jax": _opaque, "openai": lambda image: image, "huggingface": _on_white}


def _resized(original: tuple[int, int], size: int) -> tuple[int, int]:
    """Return width and height with the shorter side at `size` px, the longer rounded down as torchvision does."""
    width, height = original
    if not width or not height:
        raise ValueError(f"the picture is {width} × {height} px: it has no pixels")
    longer = int(size * max(width, height) / min(width, height))
    if size * longer > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"a picture of {width} × {height} px is too long and thin: with {size} px on its shorter side it would"
            f" have {size * longer:,} pixels; crop it first, or use preprocess.resize='squash'"
        )
    return (size, longer) if width <= height else (longer, size)
