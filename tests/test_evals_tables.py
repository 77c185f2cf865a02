"""A row of open_clip's results table, and the model card: complete, in order, empty cells for missing results."""

import csv
import dataclasses
import io
import itertools
import math

import numpy as np
import pytest

from clip_jax.config import MODELS, WeightsConfig
from clip_jax.evals.datasets import registry
from clip_jax.evals.report.tables import model_card, open_clip_csv
from clip_jax.evals.suite import EvalReport
from clip_jax.models.flops import forward_flops
from tests.tiny_dataset import PROBES, ROW, WrongInThirds, evaluate

# The header of https://github.com/mlfoundations/open_clip/blob/89fb801/docs/openclip_results.csv.
FIRST = ["name", "pretrained", "params (M)", "FLOPs (B)"]
AVERAGE = "Average perf. on 38 datasets"
# fmt: off
OPEN_CLIP = [
    "ImageNet 1k", "Caltech-101", "CIFAR-10", "CIFAR-100", "CLEVR Counts", "CLEVR Distance", "Country211",
    "Describable Textures", "EuroSAT", "FGVC Aircraft", "Food-101", "GTSRB", "ImageNet Sketch", "ImageNet v2",
    "ImageNet-A", "ImageNet-O", "ImageNet-R", "KITTI Vehicle Distance", "MNIST", "ObjectNet", "Oxford Flowers-102",
    "Oxford-IIIT Pet", "Pascal VOC 2007", "PatchCamelyon", "Rendered SST2", "RESISC45", "Stanford Cars", "STL-10",
    "SUN397", "SVHN", "Flickr", "MSCOCO", "WinoGAViL", "iWildCam", "Camelyon17", "FMoW", "Dollar Street", "GeoDE",
]
# fmt: on


def _all_measured():
    """Return distinct metrics of every datacomp dataset, and the expected value of each column."""
    metrics, columns = {}, {}
    for index, name in enumerate(registry.SUITES["datacomp"]):
        row, value = registry.DATASETS[name], (1 + index) / 39
        if row.task == "retrieval":
            metrics |= {
                f"retrieval/{name}/image_to_text/recall_at_1": value + 0.01,
                f"retrieval/{name}/text_to_image/recall_at_1": value - 0.01,
            }
        else:
            metrics[f"zeroshot/{name}/{row.metric}"] = value
        columns[row.title] = value
    return metrics, columns


def _read(text):
    (row,) = csv.DictReader(io.StringIO(text))
    return row


def test_columns_and_their_order_equal_open_clip_s_table():
    assert len(OPEN_CLIP) == len(registry.SUITES["datacomp"]) == 38
    metrics, columns = _all_measured()
    text = open_clip_csv("vit_b32", "weights.pt", 151_277_313, sum(forward_flops(MODELS["vit_b32"])), metrics)
    assert text.splitlines()[0].split(",") == [*FIRST, AVERAGE, *OPEN_CLIP]
    row = _read(text)
    assert (row["name"], row["pretrained"]) == ("vit_b32", "weights.pt")
    assert (row["params (M)"], row["FLOPs (B)"]) == ("151.28", "14.78")  # as for ViT-B-32 in open_clip's table
    assert {title: row[title] for title in OPEN_CLIP} == {title: f"{columns[title]:.4f}" for title in OPEN_CLIP}


def test_the_average_has_four_digits():
    metrics, columns = _all_measured()
    assert _read(open_clip_csv("a", "b", 1, 1e7, metrics))[AVERAGE] == f"{sum(columns.values()) / 38:.4f}"


@pytest.mark.parametrize("missing", ["zeroshot/geode/worst_group_top1", "retrieval/mscoco/text_to_image/recall_at_1"])
def test_the_average_requires_all_38_results(missing):
    metrics, columns = _all_measured()
    np.testing.assert_allclose(
        float(_read(open_clip_csv("a", "b", 1, 1e7, metrics))[AVERAGE]), sum(columns.values()) / 38, atol=5e-5
    )
    title = registry.DATASETS[missing.split("/")[1]].title
    without = {key: value for key, value in metrics.items() if key != missing}
    for broken in (without, metrics | {missing: math.nan}, metrics | {missing: math.inf}):
        row = _read(open_clip_csv("a", "b", 1, 1e7, broken))
        assert row[AVERAGE] == row[title] == ""
        assert sum(row[title] != "" for title in OPEN_CLIP) == 37


def test_other_datasets_follow_with_their_main_metric_only():
    metrics = {
        "zeroshot/digits/top1": 0.5,
        "zeroshot/digits/top5": 0.75,
        "zeroshot/pets/top1": 0.25,  # its main metric is mean_per_class
        "linear_probe/cifar10/top1": 0.875,
    }
    row = _read(open_clip_csv("a", "b", 1, 1e7, metrics))
    assert list(row) == [*FIRST, AVERAGE, *OPEN_CLIP, "scikit-learn digits"]
    assert {key: value for key, value in row.items() if value} == {
        "name": "a",
        "pretrained": "b",
        "params (M)": "0.00",
        "FLOPs (B)": "0.01",
        "scikit-learn digits": "0.5000",
    }


def test_the_model_card_has_all_metrics_their_setup_and_missing_datasets(monkeypatch):
    architecture = MODELS["emoji"]
    row = dataclasses.replace(ROW, name="cifar10")
    report = evaluate(monkeypatch, WrongInThirds(), row, ("zeroshot", *PROBES), architecture="vit_b32")
    report = EvalReport(
        report.metrics,
        report.descriptions,
        {},
        {"zeroshot/pets": "not on this machine"},
        {"zeroshot/dtd": "0.tar ends"},
    )
    run = {"name": "mine", "architecture": "emoji", "parameters": 3_497_567, "protocol": "expected"}
    card = model_card(run, report, WeightsConfig(architecture))
    assert card.startswith("---\n") and "# mine\n" in card and "3,497,567 parameters" in card
    assert "Ties have their expected value." in card
    assert "Ties are ordered by index" in model_card(
        run | {"protocol": "published"}, report, WeightsConfig(architecture)
    )
    rows = {
        cells[0]: cells[1:]
        for line in card.splitlines()
        if (cells := line.strip("| ").split(" | "))[0] in report.metrics
    }
    attributes = ("candidates", "chance", "majority_class", "ci_low", "ci_high", "min", "max", "published")
    numbers = {key for key in report.metrics if key.rpartition("/")[2] not in attributes}
    assert set(rows) == numbers and {"zeroshot/cifar10/top1", "few_shot/cifar10/1_shot"} <= numbers
    for key, (value, interval, *_) in rows.items():
        assert value == f"{report.metrics[key]:.3f}"
        ends = ("min", "max") if key.startswith("few_shot") else ("ci_low", "ci_high")
        low, high = (report.metrics[f"{key}/{end}"] for end in ends)
        assert interval.rstrip(" |") == f"{low:.3f} to {high:.3f}"
    assert rows["zeroshot/cifar10/top1"][2].strip(" |") == f"{report.metrics['zeroshot/cifar10/top1/published']:.3f}"
    for key, setup in itertools.chain(report.descriptions.items(), report.skipped.items()):
        assert f"- {key}: {setup}" in card
    assert "- zeroshot/dtd: failed: 0.tar ends" in card
