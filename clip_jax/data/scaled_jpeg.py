"""`data.decode = "fast"`: the random crop of a JPEG, decoded at a fraction of its size and resized in uint8.

libjpeg-turbo decodes at 1/2, 1/4 or 1/8 by a smaller inverse DCT, so large images are not decoded in full. The rest,
a factor of less than 2, is done by OpenCV: a symmetric filter of 5 taps against aliasing, then bicubic interpolation.
Both libraries release the GIL. The taps are fitted to Pillow's antialiased bicubic resize;
tests/test_data_scaled_jpeg.py bounds the difference, `benchmarks/input.py --quality` prints it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np

MAX_FACTOR = 8
FOUR_CHANNELS = ("CMYK", "YCCK")
# Of damage that leaves an image, in libjpeg's jerror.h; "Premature end of JPEG file" is the only other warning.
WARNINGS = ("Corrupt JPEG data", "Warning:", "Invalid SOS parameters", "Inconsistent progression", "Unknown Adobe")
# Taps 1 and 2 pixels from the center, by input pixels per output pixel; maximum PSNR on scikit-learn's photographs,
# decoded at 1, 1/2 and 1/4, together with INTER_CUBIC.
RATIOS = (1.0, 1.06, 1.12, 1.25, 1.39, 1.65, 1.92)
TAP_1 = (0.0, 0.041, 0.063, 0.104, 0.152, 0.231, 0.300)
TAP_2 = (0.0, -0.012, -0.018, -0.029, -0.040, -0.051, -0.052)


def crop_box(height: int, width: int, draws: np.ndarray, min_area: float, size: int) -> tuple[int, int, int, int]:
    """Return top, left and side of the square that `images.augment` crops, in the same float32 arithmetic.

    The fourth number is the factor of decoding, 1 to 8, at which the square still has `size` pixels; top and left are
    multiples of it, so that the square begins at a decoded pixel.

    Args:
      draws: of area, x and y, uniform in [0, 1), float32[3].
      min_area: smallest area of the crop relative to the largest square's.
      size: height and width of the resized crop in pixels.
    """
    one, (area, x, y) = np.float32(1), draws
    fraction = one - (one - np.float32(min_area)) * area
    side = max(1, round(float(np.float32(min(height, width)) * np.sqrt(fraction))))
    factor = max(factor for factor in (1, 2, 4, MAX_FACTOR) if factor == 1 or side >= factor * size)
    top, left = (min(room, int(draw * np.float32(room + 1))) for draw, room in ((y, height - side), (x, width - side)))
    return top // factor * factor, left // factor * factor, side, factor


def random_crops(
    encoded: Sequence[bytes] | np.ndarray, draws: np.ndarray, size: int, min_area: float, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return crops of JPEGs, uint8[n size size 3], and which of the images were decoded, bool[n].

    Not decoded are other formats, CMYK, images of more than `max_pixels` and damaged ones: they need `images.decode`.

    Args:
      draws: area, x and y of `crop_box`, float32[n 3].
      size: height and width of the crops in pixels.
    """
    crops = _aligned_zeros(len(encoded), size, size, 3)
    done = np.zeros(len(encoded), bool)
    for row, image in enumerate(encoded):
        if image[:3] == b"\xff\xd8\xff":
            done[row] = _crop_into(crops[row], image, draws[row], min_area, max_pixels)
    return crops, done


def _aligned_zeros(*shape: int) -> np.ndarray:
    """Return zeros, uint8, that begin at a multiple of 64 bytes: TensorFlow copies other arrays."""
    size = math.prod(shape)
    content = np.zeros(size + 64, np.uint8)
    start = -content.ctypes.data % 64
    return content[start : start + size].reshape(shape)


@functools.cache
def _libraries() -> tuple[ModuleType, ModuleType]:
    import cv2  # 0.1 s
    import simplejpeg

    cv2.setNumThreads(1)  # images are processed in parallel, one thread each
    return cv2, simplejpeg


def _crop_into(result: np.ndarray, encoded: bytes, draws: np.ndarray, min_area: float, max_pixels: int) -> bool:
    size = len(result)
    try:
        height, width, colorspace = header(encoded)
        if colorspace in FOUR_CHANNELS or height * width > max_pixels:
            return False
        top, left, side, factor = crop_box(height, width, draws, min_area, size)
        pixels = decode(encoded, height, width, factor)
    except ValueError:
        return False
    row, column, length = top // factor, left // factor, max(1, int(side / factor + 0.5))
    _resize_into(result, pixels[row : row + length, column : column + length], side / factor)
    return True


def header(encoded: bytes) -> tuple[int, int, str]:
    """Return height, width and color space of a JPEG. Raises ValueError."""
    return _libraries()[1].decode_jpeg_header(encoded)[:3]


def decode(encoded: bytes, height: int, width: int, factor: int) -> np.ndarray:
    """Decode at 1/factor, uint8[h w 3].

    Raises ValueError for libjpeg's errors and if data are missing; its other warnings are accepted, as by Pillow.
    """
    decode_jpeg = _libraries()[1].decode_jpeg
    scaled = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
    try:
        return decode_jpeg(encoded, **scaled)
    except ValueError as error:
        if not str(error).startswith(WARNINGS):
            raise
        return decode_jpeg(encoded, strict=False, **scaled)


@functools.lru_cache(maxsize=4096)
def _taps(ratio: float) -> np.ndarray:
    near, far = np.interp(ratio, RATIOS, TAP_1), np.interp(ratio, RATIOS, TAP_2)
    return np.array([far, near, 1 - 2 * (near + far), near, far], np.float32)


def _resize_into(result: np.ndarray, pixels: np.ndarray, side: float) -> None:
    """Resize a square, uint8[n n 3] with n = side, rounded, to uint8[size size 3] by the factor size / side."""
    cv2, _ = _libraries()
    size = len(result)
    ratio = side / size
    if ratio >= 2:  # after 1/8
        cv2.resize(pixels, (size, size), dst=result, interpolation=cv2.INTER_AREA)
        return
    if ratio > 1:
        taps = _taps(ratio)
        pixels = cv2.sepFilter2D(pixels, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    # A given size would replace the factor by size / n.
    cv2.resize(pixels, None, dst=result, fx=1 / ratio, fy=1 / ratio, interpolation=cv2.INTER_CUBIC)
