"""The dataset registry: consistency with code and packages, and published results."""

import collections

import pytest

from clip_jax.config import MODELS
from clip_jax.evals import prompts
from clip_jax.evals.datasets import emoji, registry
from clip_jax.evals.datasets.registry import DATASETS, SUITES, published_results
from clip_jax.evals.metrics import METRICS

ROWS = DATASETS.values()

# The column of means in docs/openclip_results.csv, which published.csv was not made from.
MEAN_OF_38 = {
    "rn50": 48.10,
    "rn101": 50.33,
    "rn50x4": 51.88,
    "rn50x16": 56.70,
    "rn50x64": 60.61,
    "vit_b32": 52.45,
    "vit_b16": 56.26,
    "vit_l14": 61.73,
    "vit_l14_336": 62.84,
}
# Results and their mean are rounded to 0.01.
ROUNDING = 0.01


# ------------------------------------------------------------------------------------------------------- the rows


def test_suites_list_known_rows_without_duplicates():
    for suite, names in SUITES.items():
        assert set(names) <= set(DATASETS), suite
        assert len(set(names)) == len(names), suite


def test_every_stored_dataset_is_in_a_suite_and_keyed_by_its_name():
    generated = {row.name for row in ROWS if row.generate}
    assert {name for names in SUITES.values() for name in names} | generated == set(DATASETS)
    assert all(row.name == name for name, row in DATASETS.items())


def test_suites_have_the_published_number_of_datasets():
    assert len(SUITES["paper"]) == 27 + 1  # SVHN
    assert len(SUITES["datacomp"]) == 38
    assert {row.dataset for row in published_results() if row.source == "paper"} == set(SUITES["paper"]) - {"svhn"}
    assert {row.dataset for row in published_results() if row.source == "open_clip"} == set(SUITES["datacomp"])
    assert set(SUITES["robustness"]) | set(SUITES["retrieval"]) < set(SUITES["datacomp"])


def test_datacomp_sizes_equal_its_task_list():
    some = {"caltech101": 6085, "eurosat_vtab": 5400, "sun397_all": 108_754, "camelyon17": 85_054, "geode": 12_488}
    assert {name: DATASETS[name].size for name in some} == some
    assert sum(DATASETS[name].size for name in SUITES["datacomp"]) == 697_369  # of all 38


def test_datacomp_folders_equal_its_download():
    """Prefixes: none for fairness datasets, `wilds-` and `vtab-` kept, three datasets are on Hugging Face instead."""
    assert DATASETS["geode"].folder == "wds_geode_test"
    assert DATASETS["fmow"].folder == "wds_wilds-fmow_test"
    assert DATASETS["clevr_counts_vtab"].folder == "wds_vtab-clevr_count_all_test"
    others = {"flickr30k", "mscoco", "winogavil"}
    folders = [DATASETS[name].folder for name in SUITES["datacomp"] if name not in others]
    assert all(folder.startswith("wds_") and folder.endswith("_test") and "/" not in folder for folder in folders)


@pytest.mark.parametrize("field", ["title", "folder"])
def test_folders_and_titles_are_unique(field):
    """Two splits of one dataset must not share a folder."""
    counts = collections.Counter(value for row in ROWS if (value := getattr(row, field)))
    assert [value for value, count in counts.items() if count > 1] == []


def test_task_metric_and_classes_are_consistent():
    for row in ROWS:
        assert row.task in ("zeroshot", "retrieval", "association"), row.name
        assert (row.metric == "recall") == (row.task == "retrieval"), row.name
        assert row.metric in {*METRICS, "recall"}, row.name
        assert row.generate or (row.classes >= 2) == (row.task == "zeroshot"), row.name
        assert (row.group_column >= 0) == row.metric.startswith("worst_group"), row.name
        assert row.group_column >= 0 or not row.excluded_groups, row.name


def test_metrics_of_the_paper_equal_table_9():
    by_metric = collections.defaultdict(set)
    for name in SUITES["paper"]:
        by_metric[DATASETS[name].metric].add(name)
    assert by_metric.pop("top1") >= {"food101", "imagenet", "stl10"}
    assert by_metric == {
        "mean_per_class": {"fgvc_aircraft", "pets", "caltech101", "flowers102"},
        "map_11_points": {"voc2007"},
        "mean_top1_top5": {"kinetics700"},
        "roc_auc": {"hateful_memes"},
    }


def test_every_row_has_a_storage_location_and_a_size():
    """Generated datasets have any size; datasets that are hard to get have a note."""
    assert [row.name for row in ROWS if bool(row.folder or row.tfds or row.builtin) == bool(row.generate)] == []
    assert [row.name for row in ROWS if bool(row.size) == bool(row.generate)] == []
    assert DATASETS["winogavil"].note and DATASETS["birdsnap"].note and DATASETS["hateful_memes"].note


def test_every_emoji_split_is_registered():
    names = {row.name.removeprefix("emoji_") for row in ROWS if row.name.startswith("emoji_")}
    assert names == set(emoji.EVAL_SPLITS)
    retrieval = {row.name.removeprefix("emoji_") for row in ROWS if row.generate and row.task == "retrieval"}
    assert retrieval == set(emoji.EVAL_SPLITS) - {"categories", "subcategories"}


def test_tfds_split_names_override_folder_split_names():
    row = DATASETS["eurosat_vtab"]
    assert [row.split(part) for part in ("train", "validation", "test")] == ["train", "validation", "test"]
    on_tfds = [row.split(part, tfds=True) for part in ("train", "validation", "test")]
    assert on_tfds == ["train[:60%]", "train[60%:80%]", "train[80%:]"]
    assert DATASETS["imagenet"].split("test") == "test"
    assert DATASETS["imagenet"].split("test", tfds=True) == "validation"
    assert DATASETS["imagenet_v2"].split("train", tfds=True) == ""


# ----------------------------------------------------------------------------------------------- prompts and TFDS


@pytest.mark.parametrize("row", [row for row in ROWS if row.class_names], ids=lambda row: row.name)
def test_number_of_published_class_names_equals_number_of_classes(row):
    assert len(prompts.class_names(row.class_names)) == row.classes


@pytest.mark.parametrize("name", sorted({row.templates for row in ROWS if row.templates}))
def test_templates_exist(name):
    assert prompts.templates(name)


def test_imagenet_prompts_are_equal_in_both_packages():
    row = DATASETS["imagenet"]
    names = prompts.class_names("open_clip:imagenet")
    assert prompts.class_names(row.class_names) == names
    assert prompts.templates(row.templates) == prompts.templates("open_clip:imagenet_80")


def test_tfds_names_exist_in_tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    known = set(tfds.list_builders(with_community_datasets=False))
    for row in ROWS:
        name, _, config = row.tfds.partition("/")
        assert not name or name in known, row.name
        if config:
            assert config in {known.name for known in tfds.builder_cls(name).BUILDER_CONFIGS}, row.name


# ----------------------------------------------------------------------------------------------- published results


def test_published_results_have_known_datasets_and_models_without_duplicates():
    keys = [(row.dataset, row.model, row.source) for row in published_results()]
    assert len(set(keys)) == len(keys) == 27 * 5 + 38 * 9
    for row in published_results():
        assert row.dataset in DATASETS and row.model in MODELS and row.source in ("paper", "open_clip"), row
        assert 0 <= row.value <= 100, row


@pytest.mark.parametrize("model", MEAN_OF_38)
def test_mean_of_the_38_datasets_equals_open_clip_s_table(model):
    values = [row.value for row in published_results(model=model) if row.source == "open_clip"]
    assert len(values) == 38
    assert sum(values) / 38 == pytest.approx(MEAN_OF_38[model], abs=ROUNDING)


def test_paper_and_open_clip_agree_on_equal_splits():
    """Detects swapped rows or columns. The sources differ more on some datasets: KITTI, MNIST, PCam."""
    for name in ("food101", "stanford_cars", "dtd", "pets", "caltech101", "flowers102", "stl10", "gtsrb", "country211"):
        for model in ("rn50", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336"):
            by_source = {row.source: row.value for row in published_results(name, model)}
            assert by_source["paper"] == pytest.approx(by_source["open_clip"], abs=1.5), (name, model)


def test_results_of_different_splits_are_in_different_rows():
    for paper, datacomp in {"eurosat": "eurosat_vtab", "sun397": "sun397_all", "voc2007": "voc2007_crops"}.items():
        assert {row.source for row in published_results(paper)} == {"paper"}
        assert {row.source for row in published_results(datacomp)} == {"open_clip"}


def test_published_results_are_filtered_by_dataset_and_model():
    (result,) = published_results("birdsnap", "vit_b16")
    assert result == registry.PublishedResult("birdsnap", "vit_b16", "paper", 39.1)
    assert {row.value for row in published_results("imagenet", "vit_b32")} == {63.2, 63.32}
    assert published_results("digits") == published_results("imagenet", "emoji") == ()
