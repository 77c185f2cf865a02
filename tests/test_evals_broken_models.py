"""Evaluation of broken models, and of datasets whose stored data does not fit their registered task."""

import dataclasses

import pytest

from tests.tiny_dataset import (
    PROBES,
    RETRIEVAL,
    ROW,
    SPLITS,
    Constant,
    Duplicated,
    NotANumber,
    Perfect,
    captioned,
    evaluate,
)


def better_than_chance(metrics):
    """Return the keys of metrics that are better than chance; lower ranks are better."""
    compared = {key: (metrics[key], metrics[f"{key}/chance"]) for key in metrics if f"{key}/chance" in metrics}
    return [
        key for key, (value, chance) in compared.items() if (chance - value if "rank" in key else value - chance) > 1e-9
    ]


def test_a_perfect_model_is_better_than_chance(monkeypatch):
    for row, evaluators, splits in (
        (ROW, ("zeroshot", *PROBES), SPLITS),
        (RETRIEVAL, ("retrieval",), {"test": captioned()}),
    ):
        metrics = evaluate(monkeypatch, Perfect(), row, evaluators, splits).metrics
        assert {key.split("/")[0] for key in better_than_chance(metrics)} == set(evaluators)


@pytest.mark.parametrize("broken", [NotANumber, Constant])
def test_broken_models_are_at_chance(monkeypatch, broken):
    metrics = evaluate(monkeypatch, broken(), RETRIEVAL, ("retrieval",), {"test": captioned()}).metrics
    assert metrics and better_than_chance(metrics) == []
    metrics = evaluate(monkeypatch, broken()).metrics
    assert metrics["zeroshot/tiny/top1"] == 1 / 4 and better_than_chance(metrics) == []


@pytest.mark.parametrize("evaluator", PROBES)
def test_probes_of_constant_features_are_not_better_than_chance(monkeypatch, evaluator):
    metrics = evaluate(monkeypatch, Constant(), evaluators=(evaluator,)).metrics
    assert metrics and better_than_chance(metrics) == []


def test_of_classes_with_the_same_embedding_half_are_right(monkeypatch):
    metrics = evaluate(monkeypatch, Duplicated()).metrics
    assert metrics["zeroshot/tiny/top1"] == metrics["zeroshot/tiny/mean_per_class"] == 0.5
    assert metrics["zeroshot/tiny/top1/ties"] == 20
    metrics = evaluate(monkeypatch, Duplicated(), RETRIEVAL, ("retrieval",), {"test": captioned((1,) * 6)}).metrics
    assert metrics["retrieval/tiny/image_to_text/recall_at_1"] == 0.5
    assert metrics["retrieval/tiny/text_to_image/recall_at_1"] == 0.5


@pytest.mark.parametrize("evaluator", PROBES)
def test_probes_are_skipped_if_features_are_not_finite(monkeypatch, evaluator):
    report = evaluate(monkeypatch, NotANumber(), evaluators=("zeroshot", evaluator))
    assert report.metrics["zeroshot/tiny/top1"] == 1 / 4
    assert "finite" in report.skipped[f"{evaluator}/tiny"]
    assert not [key for key in report.metrics if key.startswith(evaluator)]


@pytest.mark.parametrize("evaluator", ["zeroshot", *PROBES])
def test_captions_instead_of_classes_are_skipped(monkeypatch, evaluator):
    captions = [("a caption",)] * 20
    splits = {name: dataclasses.replace(part, targets=None, captions=captions) for name, part in SPLITS.items()}
    report = evaluate(monkeypatch, Perfect(), evaluators=(evaluator,), splits=splits)
    assert "expected classes, found captions" in report.skipped[f"{evaluator}/tiny"]


def test_classes_instead_of_captions_are_skipped(monkeypatch):
    row = dataclasses.replace(RETRIEVAL, size=20)
    assert (
        "expected captions, found classes"
        in evaluate(monkeypatch, Perfect(), row, ("retrieval",)).skipped["retrieval/tiny"]
    )
