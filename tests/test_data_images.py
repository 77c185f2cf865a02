"""Decoding against Pillow composited on white; augmentation against its configured strengths."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, features

from clip_jax.config import AugmentConfig
from clip_jax.data import images, philox

EXACT = 0  # the same library with the same settings
COMPOSITE_TOLERANCE = 1  # Pillow's blend does not round to nearest
ALL = AugmentConfig(0.5, 15.0, 0.2, 0.1, 0.2, 0.3, 0.5, 30.0, 0.1, 0.5, 0.3)
NONE = AugmentConfig(min_crop_area=1.0)
SEED = np.array([3, 4])


def _pixels(height=13, width=17, channels=4, seed=0):
    """Return an image that is smooth enough for JPEG, with alpha from 0 to 255."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, channels), np.uint8)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return Image.fromarray(small.squeeze()).convert(mode).resize((width, height), Image.Resampling.BICUBIC)


def _encode(image, format_, **options):
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def _on_white(encoded):
    rgba = Image.open(io.BytesIO(encoded)).convert("RGBA")
    page = Image.new("RGBA", rgba.size, "white")
    page.alpha_composite(rgba)
    return np.asarray(page.convert("RGB")).astype(int)


RGBA, RGB, GREY = _pixels(channels=4), _pixels(channels=3), _pixels(channels=1)
FILES = {
    "jpeg": (_encode(RGB, "JPEG"), EXACT),
    "jpeg progressive": (_encode(RGB, "JPEG", progressive=True), EXACT),
    "jpeg grey": (_encode(GREY, "JPEG"), EXACT),
    "jpeg cmyk": (_encode(RGB.convert("CMYK"), "JPEG"), EXACT),
    "png": (_encode(RGB, "PNG"), EXACT),
    "png alpha": (_encode(RGBA, "PNG"), COMPOSITE_TOLERANCE),
    "png grey": (_encode(GREY, "PNG"), EXACT),
    "png grey alpha": (_encode(RGBA.convert("LA"), "PNG"), COMPOSITE_TOLERANCE),
    "png palette": (_encode(RGB.convert("P"), "PNG"), EXACT),
    "png palette transparent": (_encode(RGB.convert("P"), "PNG", transparency=3), EXACT),
    "png palette of 4 bits": (_encode(RGB.quantize(16), "PNG", bits=4), EXACT),
    "png of 1 bit": (_encode(GREY.convert("1"), "PNG"), EXACT),
    "webp": (_encode(RGB, "WEBP"), EXACT),
    "webp lossless": (_encode(RGB, "WEBP", lossless=True), EXACT),
    "webp alpha": (_encode(RGBA, "WEBP", lossless=True), COMPOSITE_TOLERANCE),
    "webp lossy alpha": (_encode(RGBA, "WEBP"), COMPOSITE_TOLERANCE),
    "webp animated": (_encode(RGBA, "WEBP", save_all=True, append_images=[RGBA.rotate(90)]), EXACT),
    "gif": (_encode(RGB.convert("P"), "GIF"), EXACT),
    "gif transparent": (_encode(RGBA, "GIF"), EXACT),
    "gif animated": (_encode(RGB, "GIF", save_all=True, append_images=[RGB.rotate(180)]), EXACT),
    "bmp": (_encode(RGB, "BMP"), EXACT),
    "tiff": (_encode(RGB, "TIFF"), EXACT),
    "tiff alpha, compressed": (_encode(RGBA, "TIFF", compression="tiff_lzw"), EXACT),
    "tiff cmyk": (_encode(RGB.convert("CMYK"), "TIFF"), EXACT),
    "bmp palette": (_encode(RGB.convert("P"), "BMP"), EXACT),
    "one pixel": (_encode(RGB.resize((1, 1)), "PNG"), EXACT),
}
if features.check("avif"):
    FILES["avif"] = (_encode(RGB, "AVIF"), EXACT)
    FILES["avif alpha"] = (_encode(RGBA, "AVIF"), EXACT)


@pytest.fixture(scope="module")
def decode():
    graph = tf.function(images.decode, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    return lambda encoded: graph(tf.constant(encoded)).numpy()


@pytest.mark.parametrize("kind", FILES)
def test_decoded_pixels_equal_pillow_composited_on_white(decode, kind):
    encoded, tolerance = FILES[kind]
    expected = _on_white(encoded)
    found = decode(encoded)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


def test_hidden_colour_of_transparent_pixels_is_white(decode):
    hidden = Image.new("RGBA", (4, 4), (71, 112, 76, 0))
    for format_, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert (decode(_encode(hidden, format_, **options)) == 255).all()


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_16_bit_gray_keeps_its_high_byte(decode, kind, order):
    deep = np.arange(0, 65536, 321, dtype=np.uint16).reshape(5, 41)
    found = decode(_encode(Image.fromarray(deep.astype(order)), kind))
    np.testing.assert_array_equal(found, np.repeat((deep >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_tiff_is_bad_by_its_bits(dtype):
    reason = images.decoding_error(_encode(Image.fromarray(np.full((3, 4), 999, dtype)), "TIFF"))
    assert "expected 8 or 16 bits per channel, got 32" in reason


def _png_of_size(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = FILES["png"][0]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def _jpeg_of_size(width, height):
    jpeg = FILES["jpeg"][0]
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _webp_of_size(width, height):
    webp = FILES["webp lossy alpha"][0]
    assert webp[12:16] == b"VP8X"
    return webp[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + webp[30:]


def _lossy_webp_of_size(width, height):
    webp = FILES["webp"][0]
    assert webp[12:16] == b"VP8 "
    return webp[:26] + struct.pack("<HH", width, height) + webp[30:]


def _lossless_webp_of_size(width, height):
    webp = FILES["webp lossless"][0]
    assert webp[12:16] == b"VP8L"
    return webp[:21] + struct.pack("<I", (width - 1) | (height - 1) << 14) + webp[25:]


def _gif_of_size(width, height):
    gif = FILES["gif"][0]
    return gif[:6] + struct.pack("<HH", width, height) + gif[10:]


def _bmp_of_size(width, height):
    bmp = FILES["bmp"][0]
    return bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]


WITH_SIZE = {
    "png": _png_of_size,
    "jpeg": _jpeg_of_size,
    "webp": _webp_of_size,
    "webp lossy": _lossy_webp_of_size,
    "webp lossless": _lossless_webp_of_size,
    "gif": _gif_of_size,
    "bmp": _bmp_of_size,
    "tiff": lambda width, height: _encode(Image.new("1", (width, height)), "TIFF", compression="group4"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # an error in tests; Pillow goes on
@pytest.mark.parametrize("kind", WITH_SIZE)
def test_decompression_bomb_raises_for_its_size(decode, kind):
    """13,000 × 13,000 pixels in the header: the size check raises, not the decoder for missing data."""
    bomb = WITH_SIZE[kind](13_000, 13_000)
    with pytest.raises(tf.errors.OpError, match="width and height"):
        decode(bomb)
    assert images.decoding_error(bomb) == "13000 × 13000 pixels, more than 100,000,000"


@pytest.mark.parametrize("kind", WITH_SIZE)
def test_size_check_reads_the_size_of_the_decoder(decode, kind):
    """Patching the true size leaves an image that decodes, so the bomb test patches the right bytes."""
    encoded = WITH_SIZE[kind](*RGB.size)
    assert decode(encoded).shape == (*RGB.size[::-1], 3)


BAD = {
    "empty": b"",
    "html": b"<html><body>404</body></html>",
    "truncated jpeg": FILES["jpeg"][0][:-40],
    "truncated png": FILES["png"][0][:-40],
    "truncated webp": FILES["webp"][0][:-40],
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "truncated tiff": FILES["tiff"][0][:-400],
    "short": b"\xff\xd8\xff",
    "png signature": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_bytes_raise_and_have_a_reason(decode, kind):
    with pytest.raises(tf.errors.OpError):
        decode(BAD[kind])
    assert len(images.decoding_error(BAD[kind])) > 10


def test_good_image_has_no_decoding_error():
    assert images.decoding_error(FILES["png"][0]) is None


# --------------------------------------------------------------------------------------------------- augmentation


def _augment(config, image=None, size=16, seed=SEED):
    image = np.asarray(_pixels(40, 60, 3)) if image is None else image
    draws = philox.uniform(seed[None], images.DRAWS)[0]
    return images.augment(tf.constant(image), size, tf.constant(draws), config).numpy()


def test_draws_are_those_of_tensorflow():
    seeds = np.random.default_rng(0).integers(-(2**63), 2**63, (20, 2))
    expected = [tf.random.stateless_uniform([images.DRAWS], seed, alg="philox") for seed in seeds]
    np.testing.assert_array_equal(philox.uniform(seeds, images.DRAWS), expected)


def test_no_augmentation_is_resizing_only():
    image = np.asarray(_pixels(40, 40, 3))
    expected = tf.image.resize(image, [16, 16], "bicubic", antialias=True).numpy()
    np.testing.assert_array_equal(_augment(NONE, image), np.round(expected.clip(0, 255)).astype(np.uint8))


@pytest.mark.parametrize(("side", "mean", "most"), [(300, 0.25, 12), (512, 0.2, 5), (150, 0.3, 25), (224, 0.0, 0)])
def test_resize_differs_from_pillow_within_documented_bounds(side, mean, most):
    image = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    distance = np.abs(_augment(NONE, image, size=224).astype(int) - expected)
    assert distance.mean() <= mean and distance.max() <= most


def test_augmentation_is_a_function_of_the_seed():
    np.testing.assert_array_equal(_augment(ALL), _augment(ALL))
    assert (_augment(ALL) != _augment(ALL, seed=SEED + 1)).mean() > 0.5


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(AugmentConfig) if f.name != "min_crop_area"])
def test_every_config_key_changes_pixels(field):
    value = {"rotate_degrees": 90.0, "hue_degrees": 120.0}.get(field, 0.9)
    image = np.asarray(_pixels(40, 40, 3))
    config = dataclasses.replace(NONE, **{field: value})
    plain = _augment(NONE, image)
    changed = [(_augment(config, image, seed=np.array([0, s])) != plain).any() for s in range(5)]
    assert any(changed)


@pytest.mark.parametrize("field", ["zoom", "brightness", "hue_degrees", "cutout"])
def test_other_augmentations_do_not_change_the_crop(field):
    """Pixels encode their coordinates, so the corner of the crop can be read from the result."""
    crop = AugmentConfig(min_crop_area=0.3)
    with_tiny = dataclasses.replace(crop, **{field: 1e-6})
    y, x = np.mgrid[0:64, 0:64]
    coordinates = np.stack([x * 4, y * 4, 0 * x], -1).astype(np.uint8)
    difference = _augment(crop, coordinates).astype(int) - _augment(with_tiny, coordinates)
    # Rounding only, except zoom's last row and column, which blend with the white outside.
    assert np.abs(difference[1:-1, 1:-1]).max() <= 1


def test_crops_are_squares_of_the_configured_area_at_any_position():
    """Pixels encode their coordinates, so position and size of each crop can be read from the result."""
    y, x = np.mgrid[0:100, 0:200]
    coordinates = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    crops = np.stack([_augment(AugmentConfig(0.25), coordinates, 8, np.array([1, s])) for s in range(200)]).astype(int)
    widths, heights = crops[:, 4, -1, 0] - crops[:, 4, 0, 0], crops[:, -1, 4, 1] - crops[:, 0, 4, 1]
    np.testing.assert_allclose(widths, heights, atol=2)
    # The centers of the corner pixels are 7/8 of the side apart: sides of 50 to 100 pixels.
    assert 42 <= widths.min() < 50 and 80 < widths.max() <= 88
    assert crops[:, 0, 0, 0].min() < 15 and crops[:, 0, -1, 0].max() > 185


@pytest.mark.parametrize("degrees", [90.0, 180.0])
def test_rotation_is_about_the_centre(degrees):
    """A draw of 1 rotates by the full angle; a quarter turn maps pixels to pixels."""
    image = np.asarray(_pixels(16, 16, 3))
    uniform = tf.one_hot(images.ROTATE, images.DRAWS) * 0.5 + 0.5  # signed: 1 for rotation, 0 for the rest
    config = AugmentConfig(rotate_degrees=degrees)
    turned = images._affine(tf.constant(image, tf.float32), 16, uniform, config).numpy()
    expected = np.rot90(image, int(degrees) // 90).astype(np.float32)
    inner = np.s_[1:-1, 1:-1]  # the border blends with the white outside, by rounding of the sine
    np.testing.assert_allclose(turned[inner], expected[inner], atol=0.05)


def test_shift_moves_by_its_fraction_and_fills_with_white():
    image = np.asarray(_pixels(16, 16, 3))
    uniform = tf.one_hot(images.SHIFT_X, images.DRAWS) * 0.5 + 0.5
    shifted = images._affine(tf.constant(image, tf.float32), 16, uniform, AugmentConfig(shift=0.25)).numpy()
    np.testing.assert_allclose(shifted[:, 4:], image[:, :-4], atol=1e-3)
    assert (shifted[:, :4] == 255).all()


def test_grayscale_keeps_luma_and_removes_colour():
    image = np.asarray(_pixels(16, 16, 3))
    grey = _augment(dataclasses.replace(NONE, grayscale_probability=1.0), image)
    assert np.ptp(grey, axis=-1).max() <= 1
    luma = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[..., 0], luma, atol=1.5)  # rounding, and the matrix's four digits


def test_flip_of_probability_one_mirrors_left_and_right():
    image = np.asarray(_pixels(16, 16, 3))
    np.testing.assert_array_equal(
        _augment(dataclasses.replace(NONE, flip_probability=1.0), image), _augment(NONE, image)[:, ::-1]
    )


@pytest.mark.parametrize("kind", ["short", "truncated jpeg", "header only", "extraneous bytes"])
def test_damaged_jpegs_print_nothing(decode, kind, capfd):
    jpeg = FILES["jpeg"][0]
    damaged = BAD | {"header only": jpeg[:170], "extraneous bytes": jpeg[:-2] + bytes(50) + jpeg[-2:]}
    images.decoding_error(damaged[kind])
    assert "jpeg" not in capfd.readouterr().err.lower()
