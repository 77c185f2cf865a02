"""The floors, on pictures whose words are their shapes and colours."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clip_jax.evals.analysis.baselines import fit_ridge, floors, hashed_text, hog, pixels_and_hog
from clip_jax.typing import EvalDataset

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("square", "disc", "bar", "column", "frame")
# Equal pictures up to how PNG and Pillow's compositing round: a level of 255, by the contrast of a block.
ONE_LEVEL = 0.02


def png(colour, shape, shift, background="white"):
    picture = Image.new("RGBA", (40, 40), background)
    x, draw = 8 + shift, ImageDraw.Draw(picture)
    box = {"bar": (x, 16, x + 24, 24), "column": (x + 8, 8, x + 16, 32)}.get(shape, (x, 8, x + 24, 32))
    if shape == "disc":
        draw.ellipse(box, fill=colour)
    elif shape == "frame":
        draw.rectangle(box, outline=colour, width=3)
    else:
        draw.rectangle(box, fill=colour)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def shapes(name, kept, shifts):
    kinds = [(c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if kept((i + j) % 5)]
    images = [png(c, s, shift) for shift in shifts for c, s in kinds]
    return EvalDataset(name, images, [(f"{c} {s}",) for c, s in kinds], np.tile(np.arange(len(kinds)), len(shifts)))


SEEN = shapes("seen", lambda i: i != 0, (-3, -1, 1, 3))
UNSEEN = shapes("unseen", lambda i: i == 0, (-2, 0, 2))
SHIFTED = shapes("shifted", lambda i: i != 0, (0, 2))


def test_ridge_names_new_combinations_and_the_nearest_picture_known_ones():
    metrics = floors(SEEN, [UNSEEN, SHIFTED])
    assert set(metrics) == {
        "floor/ridge_pixels_hog/unseen/image_to_text/recall_at_1",
        "floor/ridge_pixels_hog/unseen/image_to_text/recall_at_5",
        "floor/ridge_pixels_hog/shifted/image_to_text/recall_at_1",
        "floor/ridge_pixels_hog/shifted/image_to_text/recall_at_5",
        "floor/nearest_neighbour/shifted/image_to_text/recall_at_1",
    }
    assert metrics["floor/ridge_pixels_hog/unseen/image_to_text/recall_at_1"] >= 3 / 6  # chance is 1 of 6
    assert metrics["floor/nearest_neighbour/shifted/image_to_text/recall_at_1"] >= 0.9  # chance is 1 of 24


def test_ridge_is_no_better_than_chance_where_texts_do_not_belong_to_pictures():
    wrong = EvalDataset(
        "unseen", UNSEEN.images, [(f"{chr(97 + i) * 7}",) for i in range(len(UNSEEN.texts))], UNSEEN.targets
    )
    recall = floors(SEEN, [wrong])["floor/ridge_pixels_hog/unseen/image_to_text/recall_at_1"]
    assert recall <= 1 / len(UNSEEN.texts)


def test_ridge_is_an_embedder_of_unit_rows():
    ridge = fit_ridge(pixels_and_hog(SEEN.images), SEEN)
    for rows in (ridge.image(UNSEEN.images), ridge.text(["red disc", "blue bar"])):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_transparent_pictures_stand_on_white():
    clear, white = png("red", "disc", 0, background=(0, 90, 0, 0)), png("red", "disc", 0)
    np.testing.assert_allclose(pixels_and_hog([clear]), pixels_and_hog([white]), atol=ONE_LEVEL)


@pytest.mark.parametrize("degrees, orientation", [(0, 0), (40, 2), (100, 5), (160, 8)])
def test_a_gradient_votes_for_its_orientation(degrees, orientation):
    y, x = np.mgrid[:48, :48] / 48
    ramp = x * np.cos(np.deg2rad(degrees)) + y * np.sin(np.deg2rad(degrees))
    votes = hog(np.repeat(ramp[None, ..., None], 3, -1).astype(np.float32)).reshape(-1, 9)
    assert (votes.argmax(1) == orientation).all()


def test_hog_does_not_see_brightness():
    x = np.random.default_rng(0).random((2, 48, 48, 3), np.float32)
    np.testing.assert_allclose(hog(x), hog(x + 0.3), atol=1e-4)


def test_texts_share_buckets_by_words_and_by_trigrams():
    dog, dogs, cat = hashed_text(["Dog", "dogs", "cat"])
    assert dog @ dogs > 0.4 and dog @ cat == 0
    np.testing.assert_array_equal(*hashed_text(["red fox", "fox RED"]))
