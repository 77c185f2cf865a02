"""Inference preprocessing against a NumPy reference of Pillow's published algorithm and against recorded pixels."""

import io
import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image

from clip_jax.config import Preprocess
from clip_jax.preprocess import preprocess, preprocess_many

OPENAI = Preprocess()
# Wide, high, square, odd margins on either side, upscaled, one pixel, already of the right size.
SIZES = [(640, 427), (427, 640), (499, 400), (300, 300), (225, 224), (224, 225), (227, 224), (224, 227), (224, 224)]
SIZES += [(50, 31), (31, 50), (17, 17), (1, 1), (1, 9), (1000, 40), (40, 1000), (231, 448), (300, 900), (900, 300)]
ROUNDING_BITS = 22  # Pillow's fixed point: 32 bits less 8 of the sample and 2 of headroom


# Images of golden/pixels.npz, recorded by golden/make_pixels.py.
GOLDEN_SIZE, GOLDEN_MODES = 20, ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK")
GOLDEN_SIZES = [(50, 31), (31, 50), (17, 17), (20, 23), (41, 40), (90, 20), (12, 9)]


def make_image(width, height, mode="RGB", seed=0):
    """Return noise on a gradient, clipped at both ends."""
    rng = np.random.default_rng([seed, width, height])
    if mode in ("P", "1"):
        return make_image(width, height, "RGB", seed).convert(mode)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4}[mode]
    ramp = np.linspace(-60, 315, width)[None, :, None]
    pixels = np.clip(ramp + rng.normal(0, 60, (height, width, channels)), 0, 255).astype(np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def triangle(x):
    return np.maximum(0.0, 1 - np.abs(x))


def resize_axis0(pixels, size, kernel, support):
    """Compute one pass of Pillow's resize in its fixed-point arithmetic, rounded and clipped to uint8."""
    length = pixels.shape[0]
    scale = max(length / size, 1.0)
    output = np.empty((size, *pixels.shape[1:]), np.uint8)
    for i in range(size):
        center = (i + 0.5) * length / size
        first = max(int(center - support * scale + 0.5), 0)
        last = min(int(center + support * scale + 0.5), length)
        weights = kernel((np.arange(first, last) - center + 0.5) / scale)
        weights = weights / weights.sum()
        fixed = np.where(weights < 0, weights * 2**ROUNDING_BITS - 0.5, weights * 2**ROUNDING_BITS + 0.5).astype(
            np.int64
        )
        total = np.tensordot(fixed, pixels[first:last].astype(np.int64), 1) + 2 ** (ROUNDING_BITS - 1)
        output[i] = np.clip(total >> ROUNDING_BITS, 0, 255)
    return output


def resize(pixels, width, height, kernel=cubic, support=2.0):
    """Compute both passes, rounded to uint8 between them, width first: the order of Pillow before version 13."""
    for axis in (1, 0):
        size = (height, width)[axis]
        if pixels.shape[axis] != size:
            pixels = resize_axis0(pixels.swapaxes(0, axis), size, kernel, support).swapaxes(0, axis)
    return pixels


def reference(pixels, size, kernel=cubic, support=2.0):
    """Return OpenAI's Resize and CenterCrop of uint8[H W C]."""
    height, width = pixels.shape[:2]
    longer = int(size * max(height, width) / min(height, width))
    new_height, new_width = (size, longer) if height <= width else (longer, size)
    pixels = resize(pixels, new_width, new_height, kernel, support)
    top, left = (np.rint((side - size) / 2).astype(int) for side in (new_height, new_width))  # half to even
    return pixels[top : top + size, left : left + size]


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- equal to OpenAI's


@pytest.mark.parametrize("implementation", ["openai", "huggingface"])
def test_against_open_clip_and_transformers(implementation):
    """Pixels recorded from the code of open_clip and transformers; the images are generated from seeds."""
    golden = np.load(pathlib.Path(__file__).parent / "golden/pixels.npz")
    for mode, (width, height) in itertools.product(GOLDEN_MODES, GOLDEN_SIZES):
        found = preprocess(make_image(width, height, mode), GOLDEN_SIZE, Preprocess(implementation=implementation))
        np.testing.assert_array_equal(
            found, golden[f"{implementation}/{mode}/{width}x{height}"], err_msg=f"{mode} {width}"
        )


@pytest.mark.parametrize(("size", "dimensions"), list(itertools.product([48, 224], SIZES)))
def test_rgb_equals_numpy_reference(size, dimensions):
    image = make_image(*dimensions)
    np.testing.assert_array_equal(preprocess(image, size, OPENAI), reference(np.array(image), size))


def test_random_sizes_equal_numpy_reference():
    rng = np.random.default_rng(0)
    for width, height, size in rng.integers([5, 5, 8], [300, 300, 80], (40, 3)).tolist():
        image = make_image(width, height)
        np.testing.assert_array_equal(preprocess(image, size, OPENAI), reference(np.array(image), size))


def test_bilinear_equals_numpy_reference():
    image = make_image(161, 90)
    got = preprocess(image, 48, Preprocess(interpolation="bilinear"))
    np.testing.assert_array_equal(got, reference(np.array(image), 48, triangle, 1.0))


def test_grey_is_resized_before_its_channel_is_repeated():
    image = make_image(161, 90, "L")
    expected = np.repeat(reference(np.array(image)[..., None], 48), 3, axis=2)
    np.testing.assert_array_equal(preprocess(image, 48, OPENAI), expected)


def test_cmyk_is_resized_before_conversion_to_rgb():
    image = make_image(161, 90, "CMYK")
    resized = Image.frombytes("CMYK", (48, 48), reference(np.array(image), 48).tobytes())
    np.testing.assert_array_equal(preprocess(image, 48, OPENAI), np.array(resized.convert("RGB")))
    assert (preprocess(image, 48, OPENAI) != preprocess(image.convert("RGB"), 48, OPENAI)).any()


@pytest.mark.parametrize("mode", ["P", "1"])
def test_palette_and_one_bit_images_are_resized_to_the_nearest_pixel(mode):
    image = make_image(161, 90).convert(mode)
    pixels = np.array(image.convert("RGB"))
    rows = ((np.arange(48) + 0.5) * 90 / 48).astype(int)
    columns = ((np.arange(85) + 0.5) * 161 / 85).astype(int)  # 48 · 161 / 90 = 85.9
    left = 18  # (85 - 48) / 2 = 18.5, to even
    np.testing.assert_array_equal(preprocess(image, 48, OPENAI), pixels[rows][:, columns[left : left + 48]])


def test_crop_margin_is_rounded_half_to_even():
    """640 × 427 at 224 becomes 335 × 224: the margin is 55.5; Hugging Face's 111 // 2 = 55 differs."""
    ramp = np.repeat(np.arange(335, dtype=np.uint8)[None, :, None] % 251, 224, axis=0).repeat(3, axis=2)
    assert preprocess(ramp, 224, OPENAI)[0, 0, 0] == 56


@pytest.mark.parametrize(("mode", "premultiplied"), [("RGB", "RGB"), ("RGBA", "RGBa"), ("LA", "La")])
def test_high_images_are_resized_width_first_with_every_pillow(mode, premultiplied):
    """Pillow 13 resizes the height first. Pillow multiplies colors by their opacity before resizing."""
    image = make_image(20, 70, mode)
    colors = image.convert(premultiplied)
    pixels = np.frombuffer(colors.tobytes(), np.uint8).reshape(70, 20, -1)
    expected = Image.frombytes(premultiplied, (32, 32), resize(pixels, 32, 32).tobytes()).convert(mode).convert("RGB")
    found = preprocess(image, 32, Preprocess(resize="squash", implementation="openai"))
    np.testing.assert_array_equal(found, np.array(expected))
    with pytest.raises(
        ValueError, match="at most 100,000,000 pixels with a width of 48 px, got 144,000,000 .* crop it"
    ):
        preprocess(Image.new(mode, (1, 3_000_000)), 48, Preprocess(resize="squash", implementation="openai"))


def test_exif_orientation_is_not_applied():
    image = make_image(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encoded(image, "JPEG", exif=exif, quality=95)
    plain = encoded(image, "JPEG", quality=95)
    np.testing.assert_array_equal(preprocess(rotated, 32, OPENAI), preprocess(plain, 32, OPENAI))


# ----------------------------------------------------------------------------------------- deviations from OpenAI


def test_transparent_images_are_composited_on_white():
    hidden = np.zeros((40, 60, 4), np.uint8)
    hidden[:, :, 0] = 200  # red below full transparency
    assert (preprocess(hidden, 32, OPENAI) == 255).all()
    hidden[..., 3] = 128
    assert np.unique(preprocess(hidden, 32, OPENAI).reshape(-1, 3), axis=0).tolist() == [[227, 127, 127]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_opaque_alpha_channel_changes_nothing(mode):
    opaque = make_image(161, 90, "L" if mode == "LA" else "RGB")
    if mode == "PA":
        opaque = opaque.convert("P")
    with_alpha = opaque.convert(mode)
    np.testing.assert_array_equal(preprocess(with_alpha, 48, OPENAI), preprocess(opaque.convert("RGB"), 48, OPENAI))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_of_a_png_becomes_white(mode):
    image = Image.new("RGB", (40, 40), (10, 10, 10))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    color = {"P": image.getpixel((0, 0)), "L": 10, "RGB": (10, 10, 10)}[mode]
    assert (preprocess(encoded(image, transparency=color), 32, OPENAI) == 255).all()
    assert (preprocess(encoded(image), 32, OPENAI) == 10).all()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_grey_keeps_its_high_byte(order):
    samples = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    name = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(name, (60, 40), samples.astype(order).tobytes())
    expected = preprocess((samples >> 8).astype(np.uint8), 32, OPENAI)
    np.testing.assert_array_equal(preprocess(image, 32, OPENAI), expected)
    np.testing.assert_array_equal(preprocess(encoded(Image.fromarray(samples)), 32, OPENAI), expected)
    assert len(np.unique(expected)) > 100


# ---------------------------------------------------------------------------------------------- inputs and errors


def test_squash_resizes_both_sides_and_crops_nothing():
    image = make_image(161, 90)
    expected = resize(np.array(image), 48, 48)
    np.testing.assert_array_equal(preprocess(image, 48, Preprocess(resize="squash")), expected)


def test_a_larger_resized_side_is_cropped():
    image = make_image(161, 90)
    larger = reference(np.array(image), 60)
    found = preprocess(image, 48, Preprocess(resize_size=60))
    np.testing.assert_array_equal(found, larger[6:54, 6:54])
    squashed = preprocess(image, 48, Preprocess(resize="squash", resize_size=60))
    np.testing.assert_array_equal(squashed, resize(np.array(image), 60, 60)[6:54, 6:54])


@pytest.mark.parametrize(("implementation", "top"), [("openai", 10), ("clip_jax", 10), ("huggingface", 11)])
def test_longest_side_is_resized_and_the_rest_padded_with_the_fill_color(implementation, top):
    image = make_image(160, 90)
    spec = Preprocess(resize="longest", fill_color=77, implementation=implementation)
    found = preprocess(image, 48, spec)
    height = 27  # 90 · 48 / 160; 10.5 px above and below
    np.testing.assert_array_equal(found[top : top + height], resize(np.array(image), 48, height))
    assert (np.delete(found, range(top, top + height), axis=0) == 77).all()
    with pytest.raises(ValueError, match="shorter side of at least one pixel with 48 px .* 9999 × 1 px; crop"):
        preprocess(Image.new("RGB", (9999, 1)), 48, spec)


def test_without_resizing_the_center_is_cropped_or_padded():
    image = make_image(60, 41)
    found = preprocess(image, 48, Preprocess(resize="none"))
    np.testing.assert_array_equal(found[3:44], np.array(image)[:, 6:54])
    assert not found[:3].any() and not found[44:].any()


def test_transparent_color_of_rgb_is_white_for_hugging_face():
    """transformers composites every image that has an alpha channel or a transparent color."""
    data = encoded(Image.new("RGB", (40, 40), (10, 10, 10)), transparency=(10, 10, 10))
    assert (preprocess(data, 32, Preprocess(implementation="huggingface")) == 255).all()


def test_image_array_bytes_and_path_give_the_same_pixels(tmp_path):
    image = make_image(61, 40)
    (tmp_path / "image.png").write_bytes(encoded(image))
    expected = preprocess(image, 32, OPENAI)
    for same in (np.array(image), encoded(image), tmp_path / "image.png", str(tmp_path / "image.png")):
        np.testing.assert_array_equal(preprocess(same, 32, OPENAI), expected)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_decoded_by_pillow(format):
    data = encoded(make_image(61, 40), format)
    expected = preprocess(Image.open(io.BytesIO(data)), 32, OPENAI)
    np.testing.assert_array_equal(preprocess(data, 32, OPENAI), expected)


def test_input_image_is_not_modified():
    image = make_image(61, 40, "RGBA")
    before = image.tobytes()
    preprocess(image, 32, OPENAI)
    assert image.tobytes() == before and image.mode == "RGBA"


def test_preprocess_many_equals_preprocess_of_each_image():
    images = [make_image(60 + i, 40, seed=i) for i in range(9)]
    expected = np.stack([preprocess(image, 32, OPENAI) for image in images])
    for threads in (0, 1, 4):
        np.testing.assert_array_equal(preprocess_many(images, 32, OPENAI, threads), expected)
    assert preprocess_many([], 32, OPENAI).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("kept", [0, 3, 40, 900])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_raise(format, kept):
    with pytest.raises(ValueError, match=f"^{kept} bytes: expected an image, got "):
        preprocess(encoded(make_image(100, 100), format)[:kept], 32, OPENAI)


def test_errors_contain_the_number_of_the_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"image 1: .*broken\.png: expected an image"):
        preprocess_many([make_image(9, 9), str(tmp_path / "broken.png")], 32, OPENAI)
    with pytest.raises(ValueError, match="image 65: .*: expected an image"):
        preprocess_many([make_image(9, 9), b"nonsense"], 32, OPENAI, first=64)
    with pytest.raises(FileNotFoundError):
        preprocess("/nowhere.png", 32, OPENAI)


@pytest.mark.parametrize("array", [np.zeros((9, 9, 3)), np.zeros((3, 9, 9), np.uint8), np.zeros((9, 9), bool)])
def test_arrays_of_other_shapes_and_dtypes_raise_with_a_remedy(array):
    with pytest.raises(ValueError, match=r"expected uint8 of \[H W\].*astype\('uint8'\)"):
        preprocess(array, 32, OPENAI)


def test_extreme_aspect_ratio_raises_before_memory_is_allocated():
    with pytest.raises(ValueError, match="expected at most 100,000,000 pixels .* from 10000 × 1 px; .*squash"):
        preprocess(Image.new("RGB", (10_000, 1)), 224, OPENAI)
    assert preprocess(Image.new("RGB", (10_000, 1)), 224, Preprocess(resize="squash")).shape == (224, 224, 3)
