"""data.decode='fast': the crops of the exact path, within stated distances of Pillow, and the same bad records."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clip_jax.config import AugmentConfig, DataConfig
from clip_jax.data import images, philox, pipeline, scaled_jpeg

SIZE = 64
CROP = AugmentConfig(min_crop_area=0.5)


def _photograph(height, width, seed=0):
    """Return smooth noise of three scales, as a photograph has."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize((width, height), 3), float)
        for n in (4, 16, 48)
    ]
    return Image.fromarray((layers[0] * 0.5 + layers[1] * 0.3 + layers[2] * 0.2).astype(np.uint8))


def _jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def _rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(_photograph(150, 211), exif=exif)


def _extraneous_bytes(encoded):
    """Return the JPEG with bytes before its end marker, of which libjpeg warns."""
    return encoded[:-2] + b"\x00\x11\x22\x33" + encoded[-2:]


IMAGE = _photograph(150, 211)
JPEGS = {
    "baseline": _jpeg(IMAGE),
    "progressive": _jpeg(IMAGE, progressive=True),
    "no chroma subsampling": _jpeg(IMAGE, subsampling=0),
    "grey": _jpeg(IMAGE.convert("L")),
    "EXIF orientation": _rotated(),
    "extraneous bytes": _extraneous_bytes(_jpeg(IMAGE)),
    "odd size, 1/2": _jpeg(_photograph(277, 331)),
    "odd size, 1/8": _jpeg(_photograph(1031, 1237)),
    "1/16": _jpeg(_photograph(2500, 2300)),
    "smaller than the result": _jpeg(_photograph(41, 37)),
    "one pixel": _jpeg(_photograph(1, 1)),
}


def _seeds(count, first=0):
    return np.stack([np.arange(count) + first, np.full(count, 9)], axis=1).astype(np.int64)


def _chunk(encoded, decode, config=CROP, size=SIZE):
    ids, filtered = np.arange(len(encoded)), np.zeros(0)
    tokens, ok = np.zeros((len(ids), 4), np.int32), np.ones(len(ids), bool)
    draws = philox.uniform(_seeds(len(ids)), images.DRAWS)
    fetched = ids, np.array(encoded, object), tokens, ok, draws, filtered
    data_config = DataConfig(decode=decode, augment=config)
    _, *fetched, _ = pipeline._fetch_crops(lambda *_: fetched, size, data_config, ids, ids)
    prepare = pipeline._prepare_function(size, 4, config, decode)
    image, _, ok, _, _ = prepare(*(tf.constant(a) for a in (ids, ids, *fetched)))
    return image.numpy(), ok.numpy()


def _psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean()))


@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 301), (224, 224), (1, 9), (1200, 1001)])
def test_crop_box_is_that_of_the_exact_path(height, width):
    rows, columns = tf.meshgrid(tf.range(height), tf.range(width), indexing="ij")
    coordinates = tf.stack([rows, columns, rows], -1)
    crop = tf.function(images._random_square, autograph=False)
    for seed, min_area, size in itertools.product(_seeds(12), (0.08, 0.9, 1.0), (100, 500)):
        draws = tf.random.stateless_uniform([images.DRAWS], seed, alg="philox")
        square = crop(coordinates, draws, min_area, size)
        used = draws.numpy()[[images.CROP_AREA, images.CROP_X, images.CROP_Y]]
        *box, factor = scaled_jpeg.crop_box(height, width, used, min_area, size)
        assert box == [*square[0, 0, :2].numpy().tolist(), len(square)]
        assert box[0] % factor == box[1] % factor == 0 and (factor == 1 or len(square) >= factor * size)


@pytest.mark.parametrize("kind", JPEGS)
def test_fast_differs_from_exact_by_resampling_only(kind):
    """A crop that is shifted by one pixel has less than 27 dB."""
    fast, ok = _chunk([JPEGS[kind]] * 4, "fast")
    exact, also_ok = _chunk([JPEGS[kind]] * 4, "exact")
    assert ok.all() and also_ok.all() and (fast[0] != fast[1]).any() == (kind != "one pixel")
    assert _psnr(fast, exact) > 41


def test_every_jpeg_but_cmyk_is_decoded_fast():
    draws = np.full((len(JPEGS), 3), 0.5, np.float32)
    assert scaled_jpeg.random_crops(list(JPEGS.values()), draws, SIZE, 0.5, images.MAX_PIXELS)[1].all()


def test_damage_that_libjpeg_only_warns_of_is_decoded_as_by_pillow_without_output(capfd):
    encoded = JPEGS["extraneous bytes"]
    draws = np.full((1, 3), 0.5, np.float32)
    found, done = scaled_jpeg.random_crops([encoded], draws, SIZE, 1.0, images.MAX_PIXELS)
    intact, _ = scaled_jpeg.random_crops([JPEGS["baseline"]], draws, SIZE, 1.0, images.MAX_PIXELS)
    assert done.all() and (found == intact).all() and capfd.readouterr() == ("", "")


def test_large_crops_are_decoded_at_a_fraction(monkeypatch):
    factors = []
    decode = scaled_jpeg.decode
    monkeypatch.setattr(scaled_jpeg, "decode", lambda *a: factors.append(a[-1]) or decode(*a))
    for side in (127, 128, 256, 512, 1024):
        _, done = scaled_jpeg.random_crops(
            [_jpeg(_photograph(side, side))], np.zeros((1, 3), np.float32), 64, 1.0, 10**8
        )
        assert done.all()
    assert factors == [1, 2, 4, 8, 8]


def test_other_formats_and_damaged_images_go_the_exact_path():
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    bad = [JPEGS["baseline"][:-400], b"", b"<html>", b"\xff\xd8\xff"]
    encoded = [file.getvalue(), _jpeg(IMAGE.convert("CMYK")), *bad, JPEGS["baseline"]]
    fast, ok = _chunk(encoded, "fast")
    exact, also_ok = _chunk(encoded, "exact")
    assert ok.tolist() == also_ok.tolist() == [True, True, False, False, False, False, True]
    np.testing.assert_array_equal(fast[:-1], exact[:-1])
    assert _psnr(fast[-1], exact[-1]) > 34


def test_other_augmentations_follow_the_fast_crop():
    config = dataclasses.replace(CROP, flip_probability=1.0, brightness=0.2, cutout=0.3)
    fast, exact = (_chunk([JPEGS["baseline"]] * 4, decode, config)[0] for decode in ("fast", "exact"))
    assert _psnr(fast, exact) > 34 and _psnr(_chunk([JPEGS["baseline"]] * 4, "fast")[0], exact) < 20


@pytest.mark.parametrize("side", [512, 440, 300, 224, 120])
def test_distance_from_pillow_is_within_the_documented_bounds(side):
    encoded = _jpeg(_photograph(side, side))
    expected = np.asarray(Image.open(io.BytesIO(encoded)).resize((224, 224), Image.Resampling.BICUBIC))
    found, _ = scaled_jpeg.random_crops([encoded], np.zeros((1, 3), np.float32), 224, 1.0, images.MAX_PIXELS)
    assert _psnr(found[0], expected) > 48
