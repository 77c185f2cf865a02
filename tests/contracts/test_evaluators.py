"""Contract of every evaluator in EVALUATORS: invariance to batches, a perfect, a random and broken embedders.

Only metrics with `/chance` are compared; an evaluator has at least one.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from clip_jax.evals import EVALUATORS, logistic
from clip_jax.evals.embed import ModelEmbedder
from clip_jax.typing import DatasetSplit, EvalDataset, Unavailable

CLASSES, PER_CLASS, WIDTH = 12, 5, 32
# 60 images per seed, 40 seeds: a standard error of 0.01 for a fraction of a half.
SAMPLING = 0.05
ROUNDING = 1e-9


def stored_split(first):
    images = [f"image {first + i}".encode() for i in range(CLASSES * PER_CLASS)]
    return DatasetSplit(images, np.arange(CLASSES * PER_CLASS, dtype=np.int64) % CLASSES)


TEST = stored_split(0)
DATASET = EvalDataset(
    "made",
    TEST.images,
    [(f"class {c}", f"a class {c}") for c in range(CLASSES)],
    TEST.targets,
    class_names=[(f"class {c}",) for c in range(CLASSES)],
    load_split={"train": stored_split(600), "validation": stored_split(1200)}.__getitem__,
)
# Keyword arguments of evaluators that need data in addition, or would take long.
OPTIONS = {
    "few_shot": {"shots": (2,), "seeds": (0,)},
    "overlap": {"train_hashes": [np.array([1], np.uint64)]},
    "bias": {"groups": np.arange(len(TEST.images)) // CLASSES % 2, "group_names": ("even", "odd")},
}

every = pytest.mark.parametrize("name", EVALUATORS)


def evaluate(name, embedder):
    return EVALUATORS[name](embedder, DATASET, **OPTIONS.get(name, {}))


class Fake:
    """Embedder given by two functions: of an image's class and number, and of a text's class."""

    def __init__(self, image, text):
        self._image, self._text, self.uses_texts = image, text, False

    def image(self, images):
        numbers = [int(i.split()[1]) for i in images]
        return np.stack([self._image(n % CLASSES, n) for n in numbers]).astype(np.float32)

    features = image

    def text(self, texts):
        self.uses_texts = True
        return np.stack([self._text(int(t.split()[-1])) for t in texts]).astype(np.float32)


def one_hot(class_id, _=None):
    return np.eye(WIDTH)[class_id]


def noise(*name):
    x = np.random.default_rng(zlib.crc32(repr(name).encode())).normal(size=WIDTH)
    return x / np.linalg.norm(x)


def compared(metrics):
    """Return the metrics that have a chance level."""
    return {key: value for key, value in metrics.items() if f"{key}/chance" in metrics}


def gain(metrics, key):
    """Return by how much a metric is better than chance."""
    difference = metrics[key] - metrics[f"{key}/chance"]
    return -difference if key.endswith("_rank") else difference


@every
def test_keys_begin_with_evaluator_and_dataset_and_values_are_floats(name):
    metrics = evaluate(name, Fake(one_hot, one_hot))
    assert compared(metrics)
    assert all(key.startswith(f"{name}/made/") for key in metrics)
    assert all(type(value) is float for value in metrics.values())
    for key in compared(metrics):
        assert metrics[f"{key}/candidates"] >= 2 and metrics[f"{key}/chance"] > 0


@every
def test_a_perfect_embedder_gives_one(name):
    assert set(compared(evaluate(name, Fake(one_hot, one_hot))).values()) == {1.0}


@every
def test_a_random_embedder_gives_chance(name):
    seeds = [
        evaluate(name, Fake(lambda _, n, s=s: noise("image", s, n), lambda c, s=s: noise("text", s, c)))
        for s in range(40)
    ]
    for key in compared(seeds[0]):
        mean, chance = np.mean([m[key] for m in seeds]), seeds[0][f"{key}/chance"]
        assert mean == pytest.approx(chance, rel=SAMPLING if key.endswith("_rank") else 0, abs=SAMPLING), key


BROKEN = {
    "nan": Fake(lambda c, n: np.full(WIDTH, np.nan), lambda c: np.full(WIDTH, np.nan)),
    "nan images": Fake(lambda c, n: np.full(WIDTH, np.nan), one_hot),
    "nan texts": Fake(one_hot, lambda c: np.full(WIDTH, np.nan)),
    "one nan": Fake(lambda c, n: np.where(np.arange(WIDTH) == 3, np.nan, one_hot(c)), one_hot),
    "infinite": Fake(lambda c, n: np.where(one_hot(c), np.inf, 0), lambda c: np.full(WIDTH, np.inf)),
    "zero": Fake(lambda c, n: np.zeros(WIDTH), lambda c: np.zeros(WIDTH)),
    "constant": Fake(lambda c, n: noise(0), lambda c: noise(0)),
    "constant, another for texts": Fake(lambda c, n: noise(0), lambda c: noise(1)),
    "constant images": Fake(lambda c, n: one_hot(0), one_hot),
    "constant up to rounding": Fake(lambda c, n: noise(0) * (1 + 1e-7 * n), lambda c: noise(0) * (1 + 1e-7 * c)),
    "equal texts": Fake(one_hot, lambda c: np.ones(WIDTH)),
}
INTACT_IMAGES = ("nan texts", "equal texts")


@every
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_embedder_is_not_better_than_chance(name, broken):
    embedder = BROKEN[broken]
    embedder.uses_texts = False
    try:
        metrics = evaluate(name, embedder)
    except Unavailable:  # refused, e.g. features that are not finite
        return
    if broken in INTACT_IMAGES and not embedder.uses_texts:
        return  # a probe: nothing that it uses is broken
    for key in compared(metrics):
        # One order of candidates for all images: the ranks are 1 to 12, and the rounded-down median is 6.
        assert np.isfinite(metrics[key]) and gain(metrics, key) <= (0.5 if key.endswith("_rank") else ROUNDING), key


@every
def test_classes_that_share_an_embedding_are_never_an_advantage(name):
    perfect = evaluate(name, Fake(one_hot, one_hot))
    merged = Fake(lambda c, n: one_hot(c // 2), lambda c: one_hot(c // 2))
    paired = evaluate(name, merged)
    assert all(gain(paired, key) <= gain(perfect, key) for key in compared(paired))
    at_one = [key for key in compared(paired) if key.endswith(("recall_at_1", "top1", "accuracy"))]
    assert at_one or name not in ("zeroshot", "retrieval", "overlap", "bias")
    if merged.uses_texts and at_one:
        assert paired[at_one[0]] == 0.5  # every image is as near to another class


@every
def test_padding_and_batch_size_do_not_change_the_metrics(name):
    params = jnp.asarray(np.random.default_rng(0).normal(size=(256, WIDTH)).astype(np.float32))

    def encode(params, tokens):
        return params[tokens.reshape(len(tokens), -1)].sum(1)

    class Bytes:
        vocab_size, length, pad_id, eos_id = 256, 12, 0, 0

        def __call__(self, texts):
            return np.array([list(text.ljust(12).encode()) for text in texts], np.int32)

    def preprocess(images):
        return np.array([list(image.ljust(12)) for image in images], np.uint8).reshape(-1, 2, 2, 3)

    def metrics(batch_size):
        embedder = ModelEmbedder(encode, encode, params, Bytes(), preprocess, batch_size, image_features=encode)
        found = evaluate(name, embedder)
        return {key: value for key, value in found.items() if not np.isnan(value)}

    reference = metrics(len(DATASET.images))
    assert min(compared(reference).values()) > 0
    assert metrics(7) == metrics(64) == metrics(1) == reference


@pytest.mark.slow
@pytest.mark.parametrize("held_logits", [logistic.HELD_LOGITS, 0])
def test_matmuls_of_evaluators_are_float32_on_any_chip(monkeypatch, held_logits):
    """By default they would be bfloat16 on a TPU, and TensorFloat-32 on a GPU."""
    precisions, bind = [], lax.dot_general_p.bind

    def recorded(*arrays, **parameters):
        precisions.append(parameters["precision"])
        return bind(*arrays, **parameters)

    monkeypatch.setattr(logistic, "HELD_LOGITS", held_logits)
    monkeypatch.setattr(lax.dot_general_p, "bind", recorded)
    jax.clear_caches()  # all functions are traced again
    for name in EVALUATORS:
        evaluate(name, Fake(one_hot, one_hot))
    assert len(precisions) > 10
    assert set(precisions) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
