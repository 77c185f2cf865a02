"""What every evaluator in EVALUATORS owes: numbers that no broken model, padding or batch size makes better."""

import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.evals import EVALUATORS
from clip_jax.evals.embed import ModelEmbedder
from clip_jax.evals.report.results import REFERENCES
from clip_jax.typing import EvalDataset

CLASSES, PER_CLASS, WIDTH = 12, 5, 32
# 60 pictures a seed, 40 seeds: a standard error of 0.01 for a fraction of a half.
SAMPLING = 0.05
ROUNDING = 1e-9

SET = EvalDataset(
    "made",
    [f"picture {i}".encode() for i in range(CLASSES * PER_CLASS)],
    [(f"class {c}", f"a class {c}") for c in range(CLASSES)],
    np.arange(CLASSES * PER_CLASS, dtype=np.int64) % CLASSES,
)

every = pytest.mark.parametrize("evaluator", EVALUATORS.values(), ids=EVALUATORS)


class Fake:
    """An embedder of two functions, of a picture's and a text's class and number."""

    def __init__(self, image, text):
        self._image, self._text = image, text

    def image(self, images):
        numbers = [int(i.split()[1]) for i in images]
        return np.stack([self._image(n % CLASSES, n) for n in numbers]).astype(np.float32)

    def text(self, texts):
        return np.stack([self._text(int(t.split()[-1])) for t in texts]).astype(np.float32)


def one_hot(class_id, _=None):
    return np.eye(WIDTH)[class_id]


def noise(*name):
    x = np.random.default_rng(zlib.crc32(repr(name).encode())).normal(size=WIDTH)
    return x / np.linalg.norm(x)


def values(metrics):
    """Return the metrics themselves, without what stands below them."""
    return {k: v for k, v in metrics.items() if k.rpartition("/")[2] not in REFERENCES}


def better(metrics, key):
    """Return by how much a metric is better than chance."""
    gain = metrics[key] - metrics[f"{key}/chance"]
    return -gain if key.endswith("_rank") else gain


@every
def test_each_metric_carries_candidates_and_chance_and_is_named_after_evaluator_and_set(evaluator):
    metrics = evaluator(Fake(one_hot, one_hot), SET)
    name = next(name for name, function in EVALUATORS.items() if function is evaluator)
    assert values(metrics)
    for key in values(metrics):
        assert key.startswith(f"{name}/made/")
        assert metrics[f"{key}/candidates"] >= 2
        assert metrics[f"{key}/chance"] > 0
    assert all(type(value) is float for value in metrics.values())


@every
def test_a_perfect_embedder_gives_one(evaluator):
    assert set(values(evaluator(Fake(one_hot, one_hot), SET)).values()) == {1.0}


@every
def test_an_embedder_that_knows_nothing_gives_chance(evaluator):
    seeds = [
        evaluator(Fake(lambda _, n, s=s: noise("image", s, n), lambda c, s=s: noise("text", s, c)), SET)
        for s in range(40)
    ]
    for key in values(seeds[0]):
        mean, chance = np.mean([m[key] for m in seeds]), seeds[0][f"{key}/chance"]
        assert mean == pytest.approx(chance, rel=SAMPLING if key.endswith("_rank") else 0, abs=SAMPLING), key


BROKEN = {
    "nan": Fake(lambda c, n: np.full(WIDTH, np.nan), lambda c: np.full(WIDTH, np.nan)),
    "nan pictures": Fake(lambda c, n: np.full(WIDTH, np.nan), one_hot),
    "nan texts": Fake(one_hot, lambda c: np.full(WIDTH, np.nan)),
    "one nan": Fake(lambda c, n: np.where(np.arange(WIDTH) == 3, np.nan, one_hot(c)), one_hot),
    "infinite": Fake(lambda c, n: np.where(one_hot(c), np.inf, 0), lambda c: np.full(WIDTH, np.inf)),
    "zero": Fake(lambda c, n: np.zeros(WIDTH), lambda c: np.zeros(WIDTH)),
    "constant": Fake(lambda c, n: noise(0), lambda c: noise(0)),
    "constant, another for texts": Fake(lambda c, n: noise(0), lambda c: noise(1)),
    "constant pictures": Fake(lambda c, n: one_hot(0), one_hot),
    "constant but for rounding": Fake(lambda c, n: noise(0) * (1 + 1e-7 * n), lambda c: noise(0) * (1 + 1e-7 * c)),
    "texts in one point": Fake(one_hot, lambda c: np.ones(WIDTH)),
}


@every
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_embedder_is_never_better_than_chance(evaluator, broken):
    metrics = evaluator(broken, SET)
    for key in values(metrics):
        assert np.isfinite(metrics[key]) and better(metrics, key) <= ROUNDING, key


@every
def test_classes_that_share_an_embedding_cost_and_never_gain(evaluator):
    perfect = evaluator(Fake(one_hot, one_hot), SET)
    merged = Fake(lambda c, n: one_hot(c // 2), lambda c: one_hot(c // 2))
    paired = evaluator(merged, SET)
    first = next(iter(key for key in values(paired) if key.endswith(("recall_at_1", "top1"))))
    assert paired[first] == 0  # every picture has a twin class that is as near
    assert all(better(paired, key) <= better(perfect, key) for key in values(paired))


@every
def test_padding_and_batch_size_change_nothing(evaluator):
    params = jnp.asarray(np.random.default_rng(0).normal(size=(256, WIDTH)).astype(np.float32))

    def encode(params, tokens):
        return params[tokens.reshape(len(tokens), -1)].sum(1)

    class Bytes:
        vocab_size, length, pad_id, eos_id = 256, 12, 0, 0

        def __call__(self, texts):
            return np.array([list(text.ljust(12).encode()) for text in texts], np.int32)

    def preprocess(images):
        return np.array([list(image.ljust(12)) for image in images], np.uint8).reshape(-1, 2, 2, 3)

    def measured(batch_size):
        return evaluator(ModelEmbedder(encode, encode, params, Bytes(), preprocess, batch_size), SET)

    reference = measured(len(SET.images))
    assert min(values(reference).values()) > 0
    assert measured(7) == measured(64) == measured(1) == reference
