"""Baselines on images whose texts are their colors and shapes."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clip_jax.evals.analysis.baselines import baselines, fit_ridge, hashed_text, hog, pixels_and_hog
from clip_jax.typing import EvalDataset

COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("square", "disc", "bar", "column", "frame")
# Rounding of PNG and of compositing in Pillow: one of 255 levels, relative to the contrast of a HOG block.
ONE_LEVEL = 0.02


def png(color, shape, shift, background="white"):
    image = Image.new("RGBA", (40, 40), background)
    x, draw = 8 + shift, ImageDraw.Draw(image)
    box = {"bar": (x, 16, x + 24, 24), "column": (x + 8, 8, x + 16, 32)}.get(shape, (x, 8, x + 24, 32))
    if shape == "disc":
        draw.ellipse(box, fill=color)
    elif shape == "frame":
        draw.rectangle(box, outline=color, width=3)
    else:
        draw.rectangle(box, fill=color)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def shapes(name, kept, shifts):
    kinds = [(c, s) for i, c in enumerate(COLORS) for j, s in enumerate(SHAPES) if kept((i + j) % 5)]
    images = [png(c, s, shift) for shift in shifts for c, s in kinds]
    return EvalDataset(name, images, [(f"{c} {s}",) for c, s in kinds], np.tile(np.arange(len(kinds)), len(shifts)))


SEEN = shapes("seen", lambda i: i != 0, (-3, -1, 1, 3))
UNSEEN = shapes("unseen", lambda i: i == 0, (-2, 0, 2))
SHIFTED = shapes("shifted", lambda i: i != 0, (0, 2))


def test_ridge_generalizes_to_new_combinations_and_nearest_neighbor_to_shifted_images():
    metrics = baselines(SEEN, [UNSEEN, SHIFTED])
    assert set(metrics) == {
        "baseline/ridge_pixels_hog/unseen/image_to_text/recall_at_1",
        "baseline/ridge_pixels_hog/unseen/image_to_text/recall_at_5",
        "baseline/ridge_pixels_hog/shifted/image_to_text/recall_at_1",
        "baseline/ridge_pixels_hog/shifted/image_to_text/recall_at_5",
        "baseline/nearest_neighbor/shifted/image_to_text/recall_at_1",
    }
    assert metrics["baseline/ridge_pixels_hog/unseen/image_to_text/recall_at_1"] >= 3 / 6  # chance is 1 of 6
    assert metrics["baseline/nearest_neighbor/shifted/image_to_text/recall_at_1"] >= 0.9  # chance is 1 of 24


def test_ridge_is_not_above_chance_for_unrelated_texts():
    wrong = EvalDataset(
        "unseen", UNSEEN.images, [(f"{chr(97 + i) * 7}",) for i in range(len(UNSEEN.texts))], UNSEEN.targets
    )
    recall = baselines(SEEN, [wrong])["baseline/ridge_pixels_hog/unseen/image_to_text/recall_at_1"]
    assert recall <= 1 / len(UNSEEN.texts)


def test_ridge_returns_unit_rows():
    ridge = fit_ridge(pixels_and_hog(SEEN.images), SEEN)
    for rows in (ridge.image(UNSEEN.images), ridge.text(["red disc", "blue bar"])):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_transparent_images_are_composited_on_white():
    clear, white = png("red", "disc", 0, background=(0, 90, 0, 0)), png("red", "disc", 0)
    np.testing.assert_allclose(pixels_and_hog([clear]), pixels_and_hog([white]), atol=ONE_LEVEL)


@pytest.mark.parametrize("degrees, orientation", [(0, 0), (40, 2), (100, 5), (160, 8)])
def test_a_gradient_votes_for_its_orientation(degrees, orientation):
    y, x = np.mgrid[:48, :48] / 48
    ramp = x * np.cos(np.deg2rad(degrees)) + y * np.sin(np.deg2rad(degrees))
    votes = hog(np.repeat(ramp[None, ..., None], 3, -1).astype(np.float32)).reshape(-1, 9)
    assert (votes.argmax(1) == orientation).all()


def test_hog_is_invariant_to_brightness():
    x = np.random.default_rng(0).random((2, 48, 48, 3), np.float32)
    np.testing.assert_allclose(hog(x), hog(x + 0.3), atol=1e-4)


def test_hashed_texts_share_words_and_trigrams():
    dog, dogs, cat = hashed_text(["Dog", "dogs", "cat"])
    assert dog @ dogs > 0.4 and dog @ cat == 0
    np.testing.assert_array_equal(*hashed_text(["red fox", "fox RED"]))
