"""Zero-shot classification against sorted lists in float64."""

import numpy as np
import pytest

from clip_jax.evals.metrics import Undefined
from clip_jax.evals.ranking import unit
from clip_jax.evals.zeroshot import zeroshot
from clip_jax.typing import EvalDataset


class Lookup:
    """Embeds images and texts, which are decimal row numbers, by looking up the row."""

    def __init__(self, images, texts):
        self.images, self.texts = images, texts

    def image(self, images):
        return self.images[[int(i) for i in images]]

    def text(self, texts):
        return self.texts[[int(t) for t in texts]]


def metrics_of(images, texts, targets):
    classes = EvalDataset(
        "classes",
        [str(i).encode() for i in range(len(images))],
        [(str(i),) for i in range(len(texts))],
        np.array(targets),
    )
    metrics = zeroshot(Lookup(images.astype(np.float32), texts.astype(np.float32)), classes)
    return {key.removeprefix("zeroshot/classes/"): value for key, value in metrics.items()}


def test_accuracies_equal_those_of_sorted_lists():
    rng = np.random.default_rng(0)
    images, texts = unit(rng.normal(size=(120, 12))), unit(rng.normal(size=(9, 12)))
    targets = rng.choice(8, 120, p=np.array([30, 20, 10, 10, 10, 10, 5, 5]) / 100)  # class 8 has no image
    orders = [
        sorted(range(9), key=lambda j, x=x: -float(x @ texts[j].astype(np.float64))) for x in images.astype(np.float64)
    ]
    first = [order[0] == target for order, target in zip(orders, targets, strict=True)]
    five = [target in order[:5] for order, target in zip(orders, targets, strict=True)]
    by_class = [np.mean([hit for hit, t in zip(first, targets, strict=True) if t == c]) for c in np.unique(targets)]
    metrics = metrics_of(images, texts, targets)
    assert metrics["top1"] == pytest.approx(np.mean(first))
    assert metrics["top5"] == pytest.approx(np.mean(five))
    assert metrics["mean_per_class"] == pytest.approx(np.mean(by_class))
    # Otherwise the test could not distinguish the two.
    assert metrics["top1"] != pytest.approx(metrics["mean_per_class"], abs=1e-3)


def test_majority_class_and_chance():
    metrics = metrics_of(np.eye(8)[:6], np.eye(8), [0, 0, 0, 3, 4, 5])
    assert metrics["top1/majority_class"] == 0.5
    assert metrics["top1/chance"] == metrics["mean_per_class/chance"] == 1 / 8
    assert metrics["top5/chance"] == 5 / 8
    assert {metrics[f"{name}/candidates"] for name in ("top1", "top5", "mean_per_class")} == {8}


@pytest.mark.parametrize("classes, has_top5", [(5, False), (6, True)])
def test_top5_needs_more_than_five_classes(classes, has_top5):
    assert ("top5" in metrics_of(np.eye(classes), np.eye(classes), range(classes))) == has_top5


def test_classes_of_the_same_name_are_right_in_half_of_the_cases():
    texts = np.eye(4)[[0, 1, 2, 2]]
    assert metrics_of(np.eye(4)[[0, 1, 2, 2]], texts, [0, 1, 2, 3])["top1"] == 0.75


def test_a_class_without_a_finite_embedding_makes_all_images_wrong():
    texts = np.eye(4)
    texts[3] = np.nan
    assert metrics_of(np.eye(4), texts, range(4))["top1"] == 0  # NaN ranks before every other class


def test_top1_equals_that_of_float64():
    rng = np.random.default_rng(0)
    x = unit(rng.normal(size=1024) + 3e-3 * rng.normal(size=(4010, 1024)))  # in a narrow cone
    images, classes = x[:4000], x[4000:]
    cosines = images.astype(np.float64) @ classes.T.astype(np.float64)
    targets = cosines.argsort(1)[np.arange(4000), -1 - np.arange(4000) % 2]
    lead = np.diff(np.sort(cosines, 1), axis=1)[:, -1]
    nearest = np.argsort(lead)[:40]  # leads below the rounding of float32
    assert lead[nearest].max() < 1e-7
    found = metrics_of(images[nearest], classes, targets[nearest])
    assert found["top1"] == np.mean(nearest % 2 == 0) not in (0, 1)
    assert "top1/ties" not in found


def test_a_dataset_for_which_no_metric_is_defined_is_not_measured():
    every = EvalDataset("x", [b"0", b"1"], [("0",), ("1",)], np.ones((2, 2), bool), metric="map")
    with pytest.raises(Undefined, match="no class .* has both a positive and a negative"):
        zeroshot(Lookup(np.eye(2), np.eye(2)), every)
