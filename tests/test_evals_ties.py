"""Metrics with ties: the mean over random orders, the values of `argmax` and a stable sort, and broken models."""

import numpy as np
import pytest

from clip_jax.evals import ranking
from clip_jax.evals.metrics import DRAWS, METRICS, Predictions, by_index
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zeroshot import zeroshot
from clip_jax.typing import Cue, EvalDataset

N, Q, ORDERS = 40, 8, 10_000
SCALE = 1e-7  # of the noise that orders ties; scores are multiples of 0.25


class Lookup:
    """Embeds images and texts, which are decimal row numbers, by looking up the row."""

    def __init__(self, images, texts):
        self.images, self.texts = (np.asarray(x, np.float32) for x in (images, texts))

    def image(self, images):
        return self.images[[int(i) for i in images]]

    def text(self, texts):
        return self.texts[[int(t) for t in texts]]


def dataset(targets, texts, **fields):
    images = [str(i).encode() for i in range(len(targets))]
    return EvalDataset("toy", images, [(str(i),) for i in range(texts)], np.asarray(targets), **fields)


def example():
    rng = np.random.default_rng(3)
    targets = rng.integers(0, Q - 1, N)
    scores = rng.integers(0, 4, (N, Q)) / 4 + 0.25 * (targets[:, None] == np.arange(Q))
    scores[:3], scores[3, targets[3]], scores[4, 0] = np.nan, np.nan, np.inf
    return scores, targets, targets % 3


def random_orders(scores, seed=0):
    """Return scores[ORDERS n Q] with ties in random order, by the documented rule for values that are not finite."""
    return scores[None] + SCALE * np.random.default_rng(seed).random((ORDERS, *scores.shape), dtype=np.float32)


def assert_mean(value, samples, exact):
    """Five standard errors of ORDERS orders, and of DRAWS where the metric is itself a mean of random orders."""
    error = samples.std() / ORDERS**0.5 + (0 if exact else samples.std() / DRAWS**0.5)
    assert samples.std() > 1e-4  # otherwise the test could not fail
    assert value == pytest.approx(samples.mean(), abs=5 * error)


def test_class_metrics_are_the_means_over_random_orders():
    scores, targets, groups = example()
    correct = targets[:, None] == np.arange(Q)
    finite = np.where(np.isfinite(scores), scores, np.where(correct, -9, 9))
    finite[:3] = 0  # no finite score: all are tied
    orders = random_orders(finite)
    ranks = (orders > np.take_along_axis(orders, targets[None, :, None], 2)).sum(2)
    predicted = orders.argmax(2)
    hits, five = ranks < 1, ranks < 5
    f1 = []
    for class_id in np.unique(targets):
        true_positives = (hits & (targets == class_id)).sum(1)
        f1.append(2 * true_positives / ((targets == class_id).sum() + (predicted == class_id).sum(1)))
    by_group = [hits[:, groups == group].mean(1) for group in range(3)]
    five_by_group = [five[:, groups == group].mean(1) for group in range(3)]
    expected = {
        "top1": hits.mean(1),
        "top5": five.mean(1),
        "mean_top1_top5": (hits.mean(1) + five.mean(1)) / 2,
        "mean_per_class": np.mean([hits[:, targets == class_id].mean(1) for class_id in np.unique(targets)], 0),
        "macro_f1": np.mean(f1, 0),
        "worst_group_top1": np.min(by_group, 0),
        "worst_group_top5": np.min(five_by_group, 0),
    }
    assert set(METRICS) == {*expected, "map", "map_11_points", "roc_auc", "jaccard"}  # the last four: below
    predictions = Predictions(scores, targets, groups=groups)
    for name, samples in expected.items():
        assert_mean(
            METRICS[name](predictions), samples, exact=name in ("top1", "top5", "mean_top1_top5", "mean_per_class")
        )


def sorted_targets(orders, positive):
    """Return bool[ORDERS n Q]: the targets of each column by descending score."""
    return np.take_along_axis(np.broadcast_to(positive, orders.shape), np.argsort(-orders, 1), 1)


def test_average_precisions_and_auc_are_the_means_over_random_orders():
    rng = np.random.default_rng(5)
    positive = rng.random((N, 3)) < [0.2, 0.4, 0.6]
    scores = rng.integers(0, 4, (N, 3)) / 4 + 0.25 * positive
    orders = random_orders(scores)
    found = sorted_targets(orders, positive)
    precision = found.cumsum(1) / np.arange(1, N + 1)[:, None]
    average = ((precision * found).sum(1) / positive.sum(0)).mean(1)
    predictions = Predictions(scores, positive)
    assert_mean(METRICS["map"](predictions), average, exact=True)
    points = []
    for tenths in range(11):
        reached = 10 * found.cumsum(1) >= tenths * positive.sum(0)
        points.append(np.where(reached & found, precision, 0).max(1))
    assert_mean(METRICS["map_11_points"](predictions), np.mean(points, 0).mean(1), exact=False)
    one = orders[:, :, 0]
    above = (one[:, positive[:, 0], None] > one[:, None, ~positive[:, 0]]).mean((1, 2))
    assert_mean(METRICS["roc_auc"](Predictions(scores[:, 0], positive[:, 0].astype(int))), above, exact=True)


def test_associations_are_the_means_over_random_orders():
    rng = np.random.default_rng(7)
    angles = rng.integers(0, 4, (6, 12)) / 4  # twelve images of six cues, with equal embeddings
    associated = np.stack([rng.permutation(12) < 1 + row % 3 for row in range(6)])
    embedder = Lookup(np.stack([np.cos(angles.ravel()), np.sin(angles.ravel())], 1), [[1, 0]])
    cues = tuple(Cue("0", np.arange(12) + 12 * row, associated[row]) for row in range(6))
    metrics = zeroshot(
        embedder, EvalDataset("toy", [str(i).encode() for i in range(72)], [("0",)] * 6, None, cues=cues)
    )
    orders = random_orders(-angles)
    selected = np.argsort(np.argsort(-orders, 2), 2) < associated.sum(1)[:, None]
    jaccard = ((selected & associated).sum(2) / (selected | associated).sum(2)).mean(1)
    assert_mean(metrics["zeroshot/toy/jaccard"], jaccard, exact=True)
    assert metrics["zeroshot/toy/jaccard/ties"] > 0


def captions_with_copies(queries, captions, width=4):
    """Return embeddings of images and texts with copies, and the targets bool[n M]: several captions per image."""
    rng = np.random.default_rng(9)
    images = np.eye(width)[rng.integers(0, width, queries)]
    texts = np.eye(width)[rng.integers(0, width, captions)]
    return images, texts, np.arange(captions)[None] % queries == np.arange(queries)[:, None]


@pytest.mark.parametrize("queries", [9, 12])
def test_recalls_and_the_median_rank_are_the_means_over_random_orders(queries):
    images, texts, positive = captions_with_copies(queries, 25)
    metrics = retrieval(Lookup(images, texts), dataset(positive, 25))
    cosines = images @ texts.T
    ways = {"image_to_text": (cosines, positive), "text_to_image": (cosines.T, positive.T)}
    for way, (scores, matches) in ways.items():
        orders = random_orders(scores)
        best = np.where(matches, orders, -np.inf).max(2, keepdims=True)
        ranks = (orders > best).sum(2)
        for k in (1, 5):
            samples = (ranks < k).mean(1)
            key = f"retrieval/toy/{way}/recall_at_{k}"
            assert_mean(metrics[key], samples, exact=True)
            assert 0 < metrics[f"{key}/ties"] <= len(scores)
        if way == "image_to_text":
            medians = np.floor(np.median(ranks, axis=1)) + 1
            assert_mean(metrics["retrieval/toy/image_to_text/median_rank"], medians, exact=False)


def test_retrieval_by_index_equals_a_stable_sort():
    images, texts, positive = captions_with_copies(12, 25)
    metrics = retrieval(Lookup(images, texts), dataset(positive, 25))
    published = retrieval(Lookup(images, texts), dataset(positive, 25), protocol="published")
    order = np.argsort(-(images @ texts.T), 1, kind="stable")
    for k in (1, 5, 10):
        expected = np.take_along_axis(positive, order, 1)[:, :k].any(1).mean()
        key = f"retrieval/toy/image_to_text/recall_at_{k}"
        assert metrics[f"{key}/by_index"] == published[key] == pytest.approx(expected)
        assert metrics[key] != published[key]


def test_zeroshot_by_index_equals_argmax():
    rng = np.random.default_rng(11)
    images, texts = rng.normal(size=(60, 5)), ranking.unit(rng.normal(size=(7, 5)))
    texts[6], texts[5] = texts[1], texts[0]  # equal names
    targets = rng.integers(0, 7, 60)
    metrics, published = (
        zeroshot(Lookup(images, texts), dataset(targets, 7), protocol=protocol)
        for protocol in ("expected", "published")
    )
    predicted = (images @ texts.T).argmax(1)
    recalls = [np.mean(predicted[targets == class_id] == class_id) for class_id in np.unique(targets)]
    assert published["zeroshot/toy/top1"] == metrics["zeroshot/toy/top1/by_index"] == np.mean(predicted == targets)
    assert published["zeroshot/toy/mean_per_class"] == pytest.approx(np.mean(recalls))
    tied = np.isin(targets, [0, 1, 5, 6])
    share = np.where(tied, 0.5, 1) * (np.isin(predicted, [0, 5]) == np.isin(targets, [0, 5]))
    assert metrics["zeroshot/toy/top1/ties"] == np.sum(tied & (predicted % 5 == targets % 5))
    right = (predicted == targets) | (np.isin(predicted, [0, 1]) & (predicted + 5 == targets))
    assert metrics["zeroshot/toy/top1"] == pytest.approx(np.mean(right * share))


def test_duplicates_are_right_as_often_as_argmax_on_average_over_the_orders_of_classes():
    rng = np.random.default_rng(13)
    scores, targets = rng.integers(0, 4, (N, Q)) / 4, rng.integers(0, Q, N)
    orders = (rng.permutation(Q) for _ in range(ORDERS))
    samples = np.array([np.mean(order[scores[:, order].argmax(1)] == targets) for order in orders])
    assert_mean(METRICS["top1"](Predictions(scores, targets)), samples, exact=True)


def test_random_orders_predict_each_of_the_tied_classes_equally_often():
    scores = np.array([[1.0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]])
    predictions, rng = Predictions(scores, np.array([1, 0, 2, 0])), np.random.default_rng(0)
    predicted = np.stack([predictions.break_ties(rng).predicted for _ in range(2000)])
    frequencies = np.mean(predicted[:, :, None] == np.arange(4), 0)
    expected = np.array([[1 / 3, 1 / 3, 1 / 3, 0], [0, 1 / 2, 0, 1 / 2], [0, 0, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(frequencies > 0, expected > 0)
    np.testing.assert_allclose(frequencies, expected, atol=5 * (0.25 / 2000) ** 0.5)


def test_two_pairs_of_equal_names_cost_a_perfect_model_half_of_their_images():
    """ImageNet's: missile and sunglasses occur twice. 998 classes are certain, four are right in half of the cases."""
    width = 1000
    names = np.eye(width)
    names[10], names[20] = names[11], names[21]
    images = names[np.arange(width)]
    assert zeroshot(Lookup(images, names), dataset(np.arange(width), width))["zeroshot/toy/top1"] == pytest.approx(
        0.998
    )


def test_map_by_index_equals_clip_benchmarks():
    """A class without positives counts as 0, one without negatives as 1; equal scores in the order of examples."""
    scores = np.array([[1.0, 1, 1], [1, 1, 1], [0, 0, 0]])
    targets = np.array([[False, False, True], [True, False, True], [True, False, True]])
    assert by_index("map", Predictions(scores, targets)) == pytest.approx(((1 / 2 + 2 / 3) / 2 + 0 + 1) / 3)
    assert METRICS["map"](Predictions(scores, targets)) == pytest.approx(((1 + 1 / 2) / 2 + 2 / 3) / 2)


def test_tied_positives_alone_have_an_average_precision_of_1():
    scores, targets = np.array([[1.0], [1], [0]]), np.array([[True], [True], [False]])
    assert METRICS["map"](Predictions(scores, targets)) == 1


def test_rows_without_a_length_are_nan():
    assert np.isnan(ranking.unit(np.array([[0.0, 0], [1e-200, 0], [np.inf, 1]]))).all()  # the second underflows
    np.testing.assert_array_equal(ranking.unit(np.array([[3.0, 4]])), np.float32([[0.6, 0.8]]))


def test_a_positive_without_a_finite_score_is_last_also_by_index():
    candidates = np.array([[1.0, 0], [0, 1], [np.nan, 0]], np.float32)
    found = ranking.ranks(candidates[:1], candidates, (np.array([0]), np.array([2])))
    assert [x.tolist() for x in found] == [[2], [0], [0], [1]]


@pytest.mark.parametrize("difference, rank", [(0, None), (1e-9, 0), (-1e-9, 1)])
def test_float64_decides_who_is_first(difference, rank):
    """Cosines that differ by 1e-9 are no tie, and no float32 distinguishes them."""
    query = np.array([[1.0, 0]], np.float32)
    angle = 0.5
    other = angle + difference / np.sin(angle) * 1e2  # float32 embeddings: about 5e-8 apart
    candidates = np.array([[np.cos(a), np.sin(a)] for a in (angle, other)], np.float32)
    found = ranking.ranks(query, candidates, (np.array([0]), np.array([0])))
    cosines = ranking.scores(query, candidates)[0]
    assert found.tied.tolist() == [int(cosines[0] == cosines[1])]
    assert found.above.tolist() == [int(cosines[1] > cosines[0])]
    assert found.tied[0] == (rank is None) and (rank is None or found.above[0] == rank)


@pytest.mark.parametrize("value", [0.3, np.nan])
def test_constant_and_nan_embeddings_are_at_chance(value):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 7, 30)
    embedder = Lookup(np.full((30, 5), value), np.full((30, 5), value))
    found = zeroshot(embedder, dataset(targets, 7))
    for name in ("top1", "top5", "mean_per_class"):
        assert found[f"zeroshot/toy/{name}"] == pytest.approx(found[f"zeroshot/toy/{name}/chance"])
    found = retrieval(embedder, dataset(targets, 7))
    for way in ("image_to_text", "text_to_image"):
        key = f"retrieval/toy/{way}/recall_at_5"
        assert found[key] == pytest.approx(found[f"{key}/chance"])
        assert found[f"{key}/ties"] == (30 if way == "image_to_text" else 7)
    key = "retrieval/toy/image_to_text/median_rank"
    assert found[key] == found[f"{key}/chance"]
