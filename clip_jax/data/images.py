"""Decoding and augmentation of training images, as TensorFlow graphs, so that threads run them in parallel.

Decoding agrees with Pillow's, except where noted:

* JPEG uses libjpeg's accurate integer transform (TensorFlow's default is the fast one, off by up to 4 of 255). CMYK
  becomes RGB. EXIF orientation is not applied, as in CLIP's own preprocessing.
* Alpha is composited on white. Decoding three channels instead would show the hidden color of transparent pixels.
* 16-bit PNG and TIFF keep their high byte; Pillow clips gray ones at 255. 32-bit TIFF, of unknown range, is refused.
* GIF, BMP, TIFF, AVIF, animated WebP (first frame) and PNG of fewer than 8 bits per channel, which TensorFlow 2.21
  decodes with an alpha of 1 of 255, are decoded by Pillow inside the graph.

The default augmentation is the paper's (section 2.5): a random square crop. All draws are arguments.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re

import numpy as np
import tensorflow as tf
from PIL import Image

from clip_jax.config import AugmentConfig
from clip_jax.data import scaled_jpeg

# A 1.2 MB PNG can hold 20,000² pixels: 1.2 GB in each decoding thread. 100 Mpx are 300 MB.
MAX_PIXELS = 100_000_000
PILLOW_FORMATS = ("JPEG", "GIF", "BMP", "WEBP", "PNG", "TIFF", "AVIF")  # AVIF: Pillow 11.3
HEADER_BYTES = 32  # contains width and height in all formats except JPEG

# Indices of the uniform draws of an image: switching one augmentation off does not change the others.
CROP_AREA, CROP_X, CROP_Y, ROTATE, ZOOM, SHIFT_X, SHIFT_Y, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(11)
GRAYSCALE, FLIP, CUTOUT_SIDE, CUTOUT_X, CUTOUT_Y = range(11, 16)
DRAWS = 16

# NTSC luma and chroma: hue rotates the chroma plane, saturation scales it.
RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32)
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, detected by their first bytes, to uint8[H W 3].

    Raises tf.errors.OpError if the format is another, or the image is damaged or larger than MAX_PIXELS.
    """
    header = tf.strings.substr(tf.strings.join([encoded, "\0" * HEADER_BYTES]), 0, HEADER_BYTES)
    byte = tf.cast(tf.io.decode_raw(header, tf.uint8), tf.int32)
    is_jpeg = tf.reduce_all(byte[:3] == [0xFF, 0xD8, 0xFF])
    is_png = _starts_with(header, b"\x89PNG\r\n\x1a\n")
    is_webp = _starts_with(header, b"RIFF") & (tf.strings.substr(header, 8, 4) == b"WEBP")
    is_animated = (tf.strings.substr(header, 12, 4) == b"VP8X") & (byte[20] // 2 % 2 == 1)
    decoders = [
        (is_jpeg, lambda: _decode_jpeg(encoded)),
        (is_png & (byte[24] >= 8), lambda: _decode_png(encoded, byte)),
        (is_webp & ~is_animated, lambda: _decode_webp(encoded, header, byte)),
    ]
    rgb = tf.case(decoders, default=lambda: _decode_with_pillow(encoded, header, byte))
    return tf.ensure_shape(rgb, [None, None, 3])


def decoding_error(encoded: bytes) -> str | None:
    """Return the reason why `decode` fails, with Pillow's message if Pillow fails too; None if the image is good."""
    try:
        _decode_function(tf.constant(encoded))
    except tf.errors.OpError as error:
        if too_large := re.search(r"width and height:\] \[(\d+)\] \[(\d+)\]", error.message):
            return f"{too_large[1]} × {too_large[2]} pixels, more than {MAX_PIXELS:,}"
        return _pillow_error(encoded) or f"undecodable image: {(error.message or type(error).__name__).splitlines()[0]}"
    return None


_decode_function = tf.function(decode, [tf.TensorSpec([], tf.string)], autograph=False)


def _pillow_error(encoded: bytes) -> str | None:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            _check_bits(image)
    except Image.UnidentifiedImageError:
        return f"not an image; it begins with {encoded[:12]!r}"
    except Exception as error:  # noqa: BLE001 (of Pillow's decoders, also struct.error and IndexError)
        return f"undecodable image: {str(error) or type(error).__name__}"
    return None


def _starts_with(header: tf.Tensor, magic: bytes) -> tf.Tensor:
    return tf.strings.substr(header, 0, len(magic)) == magic


def _check_size(width: tf.Tensor, height: tf.Tensor) -> tf.Operation | None:
    """Assert that the image has 1 to MAX_PIXELS pixels."""
    pixels = tf.cast(width, tf.int64) * tf.cast(height, tf.int64)
    return tf.debugging.Assert((pixels > 0) & (pixels <= MAX_PIXELS), ["width and height:", width, height])


def _decode_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    return tf.numpy_function(_jpeg_rgb, [encoded], tf.uint8, stateful=False)


def _jpeg_rgb(encoded: bytes) -> np.ndarray:
    """Decode by libjpeg-turbo with errors as exceptions; TensorFlow's decoder prints them to stderr, without a name."""
    height, width, colorspace = scaled_jpeg.header(encoded)
    _check_pixels(width, height)
    if colorspace in scaled_jpeg.FOUR_CHANNELS:
        return _pillow_rgb(encoded)
    return scaled_jpeg.decode(encoded, height, width, 1)


def _decode_png(encoded: tf.Tensor, byte: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([_check_size(_big_endian(byte[16:20]), _big_endian(byte[20:24]))]):
        return _on_white(tf.io.decode_png(encoded, channels=4))


def _decode_webp(encoded: tf.Tensor, header: tf.Tensor, byte: tf.Tensor) -> tf.Tensor:
    """Decode one frame; TensorFlow returns (1, H, W, 3), or 4 channels if the file has alpha."""
    chunk = tf.strings.substr(header, 12, 4)
    # Width and height. Extended: 24 bits each, minus one. Lossless: 14 bits each, minus one. Lossy: 14 bits each.
    extended = tf.stack([_little_endian(byte[24:27]) + 1, _little_endian(byte[27:30]) + 1])
    bits = _little_endian(byte[21:25])
    lossless = tf.stack([bits % 2**14 + 1, bits // 2**14 % 2**14 + 1])
    lossy = tf.stack([_little_endian(byte[26:28]) % 2**14, _little_endian(byte[28:30]) % 2**14])
    size = tf.where(chunk == b"VP8X", extended, tf.where(chunk == b"VP8L", lossless, lossy))
    with tf.control_dependencies([_check_size(size[0], size[1])]):
        pixels = tf.io.decode_webp(encoded)[0]
    return tf.cond(tf.shape(pixels)[-1] == 4, lambda: _on_white(pixels), lambda: pixels)


def _big_endian(digits: tf.Tensor) -> tf.Tensor:
    return _little_endian(digits[::-1])


def _little_endian(digits: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(digits, tf.int64) * 256 ** tf.range(tf.size(digits, tf.int64)))


def _on_white(rgba: tf.Tensor) -> tf.Tensor:
    """Composite uint8 RGBA on white, rounding to nearest, in integers: the same result on every machine."""
    color, alpha = tf.cast(rgba[..., :3], tf.int32), tf.cast(rgba[..., 3:4], tf.int32)
    return tf.cast((color * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)


def _decode_with_pillow(encoded: tf.Tensor, header: tf.Tensor, byte: tf.Tensor) -> tf.Tensor:
    gif = tf.stack([_little_endian(byte[6:8]), _little_endian(byte[8:10])])
    bmp = tf.stack([_little_endian(byte[18:22]), _little_endian(byte[22:26])])
    bmp = tf.where(bmp < 2**31, bmp, 2**32 - bmp)  # a negative height means rows from the top
    png = tf.stack([_big_endian(byte[16:20]), _big_endian(byte[20:24])])
    webp = tf.stack([_little_endian(byte[24:27]) + 1, _little_endian(byte[27:30]) + 1])
    size = tf.ones(2, tf.int64)  # of other formats, which `_pillow_rgb` checks
    for magic, declared in ((b"GIF8", gif), (b"BM", bmp), (b"\x89PNG", png), (b"RIFF", webp)):
        size = tf.where(_starts_with(header, magic), declared, size)
    with tf.control_dependencies([_check_size(size[0], size[1])]):
        return tf.numpy_function(_pillow_rgb, [encoded], tf.uint8, stateful=False)


def _pillow_rgb(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
        _check_pixels(image.width, image.height)
        _check_bits(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return np.asarray(white.convert("RGB"))


def _check_pixels(width: int, height: int) -> None:
    """As `_check_size`, outside the graph."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"[width and height:] [{width}] [{height}]")


def _check_bits(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.format} of mode {image.mode!r}: expected 8 or 16 bits per channel, got 32")


def augment(image: tf.Tensor, size: int, draws: tf.Tensor, config: AugmentConfig) -> tf.Tensor:
    """Return a random square crop of uint8[H W 3], resized and augmented, uint8[size size 3].

    Args:
      draws: uniform in [0, 1), float32[DRAWS], of which the result is a function.
    """
    return _adjust(_resize(_random_square(image, draws, config.min_crop_area, size), size), size, draws, config)


def adjust_crops(crops: tf.Tensor, draws: tf.Tensor, config: AugmentConfig) -> tf.Tensor:
    """Apply all augmentations but the crop to uint8[n size size 3]; `draws` are float32[n DRAWS]."""
    if dataclasses.replace(config, min_crop_area=1.0) == AugmentConfig(min_crop_area=1.0):
        return crops

    def adjust(row: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        return _adjust(tf.cast(row[0], tf.float32), crops.shape[1], row[1], config)

    return tf.map_fn(adjust, (crops, draws), fn_output_signature=tf.uint8)


def _adjust(pixels: tf.Tensor, size: int, uniform: tf.Tensor, config: AugmentConfig) -> tf.Tensor:
    """Apply all augmentations but the crop to float32[size size 3]; return uint8."""
    if config.rotate_degrees or config.zoom or config.shift:
        pixels = _affine(pixels, size, uniform, config)
    if config.brightness or config.contrast:
        pixels = _tone(pixels, uniform, config)
    if config.saturation or config.hue_degrees or config.grayscale_probability:
        pixels = _color(pixels, size, uniform, config)
    if config.flip_probability:
        flip = uniform[FLIP] < config.flip_probability
        pixels = tf.cond(flip, lambda: tf.reverse(pixels, [1]), lambda: pixels)
    if config.cutout:
        pixels = _cutout(pixels, size, uniform, config.cutout)
    return tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)


def _random_square(image: tf.Tensor, uniform: tf.Tensor, min_area: float, size: int) -> tf.Tensor:
    """Crop a square with an area of `min_area` to 1 times the largest square, at a random position.

    The position is a multiple of the factor at which `scaled_jpeg` decodes it for a result of `size` pixels.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    largest = tf.cast(tf.minimum(height, width), tf.float32)
    area = 1.0 - (1.0 - min_area) * uniform[CROP_AREA]
    side = tf.maximum(1, tf.cast(tf.round(largest * tf.sqrt(area)), tf.int32))
    factor = 1 + sum(tf.cast(side >= 2 * step * size, tf.int32) * step for step in (1, 2, 4))
    top = _position(uniform[CROP_Y], height - side) // factor * factor
    left = _position(uniform[CROP_X], width - side) // factor * factor
    return tf.slice(image, [top, left, 0], [side, side, 3])


def _position(uniform: tf.Tensor, room: tf.Tensor) -> tf.Tensor:
    """Map [0, 1) to the integers 0 … room, clipped: a float32 just below 1 may round up to room + 1."""
    return tf.minimum(room, tf.cast(uniform * tf.cast(room + 1, tf.float32), tf.int32))


def _resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resize bicubically in float32; Pillow, which evaluation uses, rounds to uint8 between its two passes.

    Measured difference at 224 px, in levels of 255: photographs 0.1 to 0.2 on average and at most 4 (downsampling) or 7
    (upsampling); white noise 0.1 to 0.3, at most 10 or 23.
    """
    pixels = tf.image.resize(image, [size, size], method="bicubic", antialias=True)
    return tf.clip_by_value(tf.ensure_shape(pixels, [size, size, 3]), 0.0, 255.0)


def _affine(pixels: tf.Tensor, size: int, uniform: tf.Tensor, config: AugmentConfig) -> tf.Tensor:
    """Rotate, zoom and shift about the center in one transform; the outside is white."""
    angle = _signed(uniform[ROTATE]) * math.radians(config.rotate_degrees)
    scale = 1.0 / (1.0 + _signed(uniform[ZOOM]) * config.zoom)  # from output to input coordinates
    cos, sin = scale * tf.cos(angle), scale * tf.sin(angle)
    center = (size - 1) / 2
    to_x = center + _signed(uniform[SHIFT_X]) * config.shift * size
    to_y = center + _signed(uniform[SHIFT_Y]) * config.shift * size
    # input = R (output − to) + center
    row_x = [cos, -sin, center - cos * to_x + sin * to_y]
    row_y = [sin, cos, center - sin * to_x - cos * to_y]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=pixels[None],
        transforms=tf.stack([*row_x, *row_y, 0.0, 0.0])[None],
        output_shape=[size, size],
        fill_value=255.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]


def _tone(pixels: tf.Tensor, uniform: tf.Tensor, config: AugmentConfig) -> tf.Tensor:
    """Change contrast about the image's mean, then brightness."""
    contrast = 1.0 + _signed(uniform[CONTRAST]) * config.contrast
    mean = tf.reduce_mean(pixels)
    return (pixels - mean) * contrast + mean + _signed(uniform[BRIGHTNESS]) * config.brightness * 255.0


def _color(pixels: tf.Tensor, size: int, uniform: tf.Tensor, config: AugmentConfig) -> tf.Tensor:
    """Change hue and saturation, or convert to gray, by one 3 × 3 matrix on the chroma plane."""
    saturation = 1.0 + _signed(uniform[SATURATION]) * config.saturation
    saturation = tf.where(uniform[GRAYSCALE] < config.grayscale_probability, 0.0, saturation)
    angle = _signed(uniform[HUE]) * math.radians(config.hue_degrees)
    cos, sin = saturation * tf.cos(angle), saturation * tf.sin(angle)
    rotation = tf.reshape(tf.stack([1.0, 0.0, 0.0, 0.0, cos, -sin, 0.0, sin, cos]), [3, 3])
    matrix = tf.constant(YIQ_TO_RGB) @ rotation @ tf.constant(RGB_TO_YIQ)
    pixels = tf.reshape(tf.clip_by_value(pixels, 0.0, 255.0), [-1, 3])
    return tf.reshape(tf.matmul(pixels, matrix, transpose_b=True), [size, size, 3])


def _cutout(pixels: tf.Tensor, size: int, uniform: tf.Tensor, fraction: float) -> tf.Tensor:
    """Fill a square with white: side up to `fraction` of the image's, center anywhere."""
    half = uniform[CUTOUT_SIDE] * fraction * size / 2
    at = tf.range(size, dtype=tf.float32) + 0.5
    in_x = tf.abs(at - uniform[CUTOUT_X] * size) < half
    in_y = tf.abs(at - uniform[CUTOUT_Y] * size) < half
    return tf.where((in_y[:, None] & in_x[None, :])[..., None], 255.0, pixels)


def _signed(uniform: tf.Tensor) -> tf.Tensor:
    return 2.0 * uniform - 1.0
