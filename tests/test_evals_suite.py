"""Evaluation of several evaluators and datasets: metrics, descriptions, prompts, skipped and failed datasets."""

import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest

from clip_jax.config import DataConfig, EvalConfig, EvalTask
from clip_jax.evals import EVALUATORS, load, prompts, suite
from clip_jax.evals.datasets import registry
from clip_jax.typing import Unavailable
from tests.tiny_dataset import (
    CLASSES,
    NAMES,
    PREPROCESSING,
    PROBES,
    RETRIEVAL,
    ROW,
    SPLITS,
    Constant,
    Perfect,
    WrongInThirds,
    captioned,
    evaluate,
    make_model,
    register,
    split,
)


def test_every_result_has_a_description(monkeypatch):
    report = evaluate(monkeypatch, Perfect(), evaluators=("zeroshot", "retrieval", *PROBES))
    assert report.skipped == {}
    assert set(report.descriptions) == {"zeroshot/tiny", "linear_probe/tiny", "few_shot/tiny"}
    assert {tuple(key.split("/")[:2]) for key in report.metrics} == {
        tuple(key.split("/")) for key in report.descriptions
    }
    for description in report.descriptions.values():
        for part in ("20 images of the test split", "4 classes", "metric top1", PREPROCESSING):
            assert part in description
    digest = prompts.digest(tuple((name,) for name in NAMES), prompts.templates("photo"))
    assert digest in report.descriptions["zeroshot/tiny"] and "4 prompts" in report.descriptions["zeroshot/tiny"]
    assert "held out of the training split" in report.descriptions["linear_probe/tiny"]
    assert "5 draws" in report.descriptions["few_shot/tiny"]


def test_a_perfect_model_reaches_1_with_every_evaluator(monkeypatch):
    metrics = evaluate(monkeypatch, Perfect(), evaluators=("zeroshot", *PROBES)).metrics
    for key in ("zeroshot/tiny/top1", "zeroshot/tiny/mean_per_class", "linear_probe/tiny/top1", "few_shot/tiny/4_shot"):
        assert metrics[key] == 1
        assert metrics[f"{key}/chance"] == 1 / CLASSES and metrics[f"{key}/candidates"] == CLASSES
        low, high = ("min", "max") if key.startswith("few_shot") else ("ci_low", "ci_high")
        assert metrics[f"{key}/{low}"] <= 1 <= metrics[f"{key}/{high}"]
    assert metrics["zeroshot/tiny/top1/majority_class"] == 1 / CLASSES


def test_few_shot_is_limited_by_the_smallest_class(monkeypatch):
    validation = split(first=500)
    train = split([0] * 16 + [1] * 16 + [2] * 9 + [3] * 4, first=100)
    row = dataclasses.replace(ROW, validation="validation")
    splits = SPLITS | {"train": train, "validation": validation}
    metrics = evaluate(monkeypatch, Perfect(), row, ("few_shot",), splits).metrics
    assert [key for key in metrics if key.endswith("_shot")] == [f"few_shot/tiny/{n}_shot" for n in (1, 2, 4)]
    splits |= {"train": split([0, 1, 2] * 4, first=100)}
    report = evaluate(monkeypatch, Perfect(), row, ("few_shot",), splits)
    assert report.metrics == {} and "no training images" in report.skipped["few_shot/tiny"]


@pytest.mark.parametrize("counts", [(1,) * 6, (1, 2, 3, 1, 2, 3), (5, 1, 1, 1, 1, 1)])
def test_retrieval_supports_any_number_of_captions_per_image(monkeypatch, counts):
    report = evaluate(monkeypatch, Perfect(), RETRIEVAL, ("retrieval", *PROBES), {"test": captioned(counts)})
    metrics, prefix = report.metrics, "retrieval/tiny"
    assert metrics[f"{prefix}/image_to_text/recall_at_1"] == metrics[f"{prefix}/text_to_image/recall_at_1"] == 1
    assert metrics[f"{prefix}/image_to_text/recall_at_1/candidates"] == sum(counts)
    assert metrics[f"{prefix}/text_to_image/recall_at_1/candidates"] == 6
    # A random caption belongs to the image with a probability of its share of the captions.
    chance = np.mean(np.array(counts) / sum(counts))
    np.testing.assert_allclose(metrics[f"{prefix}/image_to_text/recall_at_1/chance"], chance)
    description = report.descriptions["retrieval/tiny"]
    assert list(report.descriptions) == ["retrieval/tiny"]
    for part in ("6 images of the test split", f"{sum(counts)} captions", "'{}'", "metric recall", PREPROCESSING):
        assert part in description


def test_retrieval_uses_the_templates_of_the_registry(monkeypatch):
    templates = dataclasses.replace(RETRIEVAL, templates="photo")
    embedder = Perfect()
    evaluate(monkeypatch, embedder, templates, ("retrieval",), {"test": captioned()})
    assert embedder.texts[:2] == ["a photo of a 0 from side a.", "a photo of a 1 from side a."]


@pytest.mark.parametrize("evaluator", ["zeroshot", *PROBES])
def test_a_split_of_another_size_than_in_the_registry_is_skipped(monkeypatch, evaluator):
    splits = SPLITS | {"test": split([0, 1, 2, 3])}
    report = evaluate(monkeypatch, Perfect(), evaluators=(evaluator,), splits=splits)
    assert report.metrics == {} and report.descriptions == {}
    assert "expected 20 images in the test split, found 4" in report.skipped[f"{evaluator}/tiny"]
    unknown = dataclasses.replace(ROW, size=0)
    assert evaluate(monkeypatch, Perfect(), unknown, (evaluator,), splits).skipped == {}


def test_missing_splits_are_skipped_with_a_reason(monkeypatch):
    report = evaluate(
        monkeypatch, Perfect(), evaluators=("few_shot", "linear_probe", "zeroshot"), splits={"test": split()}
    )
    assert report.skipped == {f"{name}/tiny": "no train split here" for name in ("few_shot", "linear_probe")}
    assert report.metrics["zeroshot/tiny/top1"] == 1
    assert evaluate(monkeypatch, Perfect(), splits={}).skipped == {"zeroshot/tiny": "no test split here"}


def _evaluate_three(monkeypatch, error, after_each=lambda report: None):
    """Evaluate three datasets, of which the second raises an error when it is loaded."""
    rows = {name: dataclasses.replace(ROW, name=name) for name in ("one", "two", "three")}
    register(monkeypatch, *rows.values())

    def load_split(row, part, data_dir):
        if row.name == "two":
            raise error
        return SPLITS[part]

    monkeypatch.setattr(load, "load_split", load_split)
    return suite.evaluate(make_model(Perfect()), list(rows), ("zeroshot",), after_each=after_each)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("0.tar: sample 's7'\nhas no image"), "0.tar: sample 's7' has no image"),
        (OSError(5, "Input/output error", "0.tar"), "OSError: [Errno 5] Input/output error: '0.tar'"),
        (IndexError("index 3 is out of bounds"), "IndexError: index 3 is out of bounds"),
        (KeyError("cls"), "KeyError: 'cls'"),
        (ValueError(), "ValueError: "),
    ],
)
def test_data_errors_of_one_dataset_are_recorded_and_the_others_evaluated(monkeypatch, error, reason):
    states = []
    report = _evaluate_three(
        monkeypatch, error, lambda report: states.append((set(report.descriptions), [*report.failed]))
    )
    assert report.failed == {"zeroshot/two": reason} and report.skipped == {}
    assert report.metrics["zeroshot/one/top1"] == report.metrics["zeroshot/three/top1"] == 1
    one, three = "zeroshot/one", "zeroshot/three"
    assert states == [({one}, []), ({one}, ["zeroshot/two"]), ({one, three}, ["zeroshot/two"])]


@pytest.mark.parametrize("error", [TypeError("no"), AttributeError("no"), AssertionError("no"), RuntimeError("no")])
def test_errors_of_the_program_are_raised(monkeypatch, error):
    with pytest.raises(type(error)):
        _evaluate_three(monkeypatch, error)


def test_datasets_and_suites_are_evaluated_once_and_unknown_names_refused(monkeypatch):
    assert load.expand(["smoke", "digits", "retrieval"]) == [*registry.SUITES["smoke"], "flickr30k", "mscoco"]
    with pytest.raises(ValueError, match="'cifar11' is none of paper, .*datacomp.*, cifar10, .* mean 'cifar10'"):
        load.expand(["digits", "cifar11"])
    embedder = Perfect()
    evaluate(monkeypatch, embedder, names=["all", "tiny", "all"])
    assert embedder.image_calls == 1
    with pytest.raises(ValueError, match="'cifar10' is none of all, tiny"):
        evaluate(monkeypatch, embedder, names=["cifar10"])


def test_evaluators_run_on_the_datasets_that_they_support():
    found = {
        name: {row.name for row in registry.DATASETS.values() if suite.supports(evaluator, row)}
        for name, evaluator in EVALUATORS.items()
    }
    assert {name for name in found["retrieval"] if not name.startswith("emoji_")} == {"flickr30k", "mscoco"}
    assert found["linear_probe"] == found["few_shot"] < found["zeroshot"]
    assert found["overlap"] == found["bias"] == found["zeroshot"] - {"winogavil"}
    assert not found["zeroshot"] & found["retrieval"] and "winogavil" in found["zeroshot"]
    assert {"imagenet_v2", "emoji_categories", "winogavil"} <= found["zeroshot"] - found["linear_probe"]


def test_an_evaluator_and_a_dataset_registered_elsewhere_work_by_name(monkeypatch):
    def mean_norm(embedder, dataset, scale=1.0):
        return {
            f"mean_norm/{dataset.name}/image": scale
            * float(np.linalg.norm(embedder.image(dataset.images), axis=1).mean())
        }

    monkeypatch.setitem(EVALUATORS, "mean_norm", mean_norm)
    row = dataclasses.replace(ROW, name="elsewhere", title="Elsewhere", templates="photo")
    options = {"mean_norm": {"scale": 2.0}}
    report = evaluate(monkeypatch, Perfect(), row, ("mean_norm", "zeroshot"), evaluator_options=options)
    assert report.metrics["mean_norm/elsewhere/image"] == 2 and report.metrics["zeroshot/elsewhere/top1"] == 1
    tasks = {
        "mine": EvalTask("mean_norm", "elsewhere", {"scale": 3.0}),
        "theirs": EvalTask("linear_probe", "elsewhere"),
    }
    monkeypatch.setattr(load, "load_split", lambda *_: SPLITS["test"])
    loaded = suite.load_suite(EvalConfig(tasks=tasks), DataConfig())
    assert loaded.evaluate(Perfect())["mean_norm/mine/image"] == 3


def test_a_task_of_the_training_loop_that_the_model_does_not_support_is_skipped(monkeypatch):
    class WithoutFeatures:
        image, text = Perfect.image, Perfect.text
        vectors = Perfect.vectors

        def __init__(self):
            self.images, self.texts, self.image_calls = [], [], 0

    register(monkeypatch, ROW)
    monkeypatch.setattr(load, "load_split", lambda _, part, __: SPLITS[part])
    tasks = {"probe": EvalTask("linear_probe", "tiny"), "tiny": EvalTask("zeroshot", "tiny")}
    loaded = suite.load_suite(EvalConfig(tasks=tasks, thresholds={"linear_probe/probe/top1": 1.0}), DataConfig())
    assert loaded.evaluate(WithoutFeatures())["zeroshot/tiny/top1"] == 1
    assert "need an embedder with `features`" in loaded.skipped["probe"]
    assert loaded.thresholds(EvalConfig(thresholds={"linear_probe/probe/top1": 1.0, "zeroshot/tiny/top1": 0.5})) == {
        "zeroshot/tiny/top1/threshold": 0.5
    }


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("names", "reason"), [((), "no class names"), (NAMES[:3], r"expected 4 class names, got 3 (stored with the data)")]
)
def test_zeroshot_is_skipped_without_a_name_for_every_class(monkeypatch, names, reason):
    splits = SPLITS | {"test": split(class_names=names)}
    report = evaluate(monkeypatch, Perfect(), splits=splits, evaluators=("zeroshot", "linear_probe"))
    assert list(report.skipped) == ["zeroshot/tiny"] and reason in report.skipped["zeroshot/tiny"]
    assert report.metrics["linear_probe/tiny/top1"] == 1  # needs no names


def test_prompts_are_the_users_else_stored_with_the_data_else_the_registrys(monkeypatch, tmp_path):
    stored = SPLITS | {"test": split(templates=("stored {}",))}
    unnamed = SPLITS | {"test": split(class_names=(), class_keys=NAMES)}
    registered = dataclasses.replace(ROW, class_names="clip_benchmark:tiny", templates="clip_benchmark:tiny")
    packages = {
        prompts.CLIP_BENCHMARK["class_names"]: {"tiny": [f"registered {n}" for n in range(CLASSES)]},
        prompts.CLIP_BENCHMARK["templates"]: {"tiny": ["one {c}", "two {c}"]},
    }
    monkeypatch.setattr(prompts, "_clip_benchmark", packages.__getitem__)
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"class_names": [f"own {n}" for n in range(CLASSES)], "templates": ["my {}"]}))

    def prompts_of(row, splits, **options):
        embedder = Perfect()
        report = evaluate(monkeypatch, embedder, row, splits=splits, **options)
        assert report.metrics["zeroshot/tiny/top1"] == 1
        return embedder.texts, report.descriptions["zeroshot/tiny"]

    users, users_source = prompts_of(registered, stored, templates=str(file), class_names=str(file))
    assert users == [f"my own {n}" for n in range(CLASSES)] and users_source.count(str(file)) == 2
    texts, source = prompts_of(registered, unnamed)
    assert texts == [f"{which} registered {n}" for n in range(CLASSES) for which in ("one", "two")]
    assert "class names clip_benchmark:tiny, templates clip_benchmark:tiny, 8 prompts" in source
    texts, stored_source = prompts_of(ROW, stored)
    assert texts == [f"stored {name}" for name in NAMES]
    assert "class names stored with the data, templates stored with the data" in stored_source
    assert prompts_of(registered, unnamed, templates="name")[0] == [f"registered {n}" for n in range(CLASSES)]
    texts, source = prompts_of(ROW, unnamed)
    assert texts == [f"a photo of a {name}." for name in NAMES] and "class names of the stored classes" in source

    def missing(file):
        raise Unavailable("published prompts come with clip_benchmark, which is not installed")

    monkeypatch.setattr(prompts, "_clip_benchmark", missing)
    texts, source = prompts_of(registered, stored)
    assert texts == [f"stored {name}" for name in NAMES] and source == stored_source
    digests = [re.search(r"prompts, ([0-9a-f]{12});", one).group(1) for one in (users_source, source)]
    assert digests[0] != digests[1]
    for part in (split(class_names=()), split(class_names=(), class_keys=NAMES), split()):
        # Without the package the prompts would be others: the number does not depend on the packages.
        report = evaluate(monkeypatch, Perfect(), registered, splits=SPLITS | {"test": part})
        assert "which is not installed; or choose others, e.g. --templates=photo" in report.skipped["zeroshot/tiny"]


def test_registered_names_are_matched_with_the_stored_classes_or_refused(monkeypatch):
    row = dataclasses.replace(ROW, class_names="clip_benchmark:tiny", templates="photo")

    def evaluate_with(registered):
        packages = {prompts.CLIP_BENCHMARK["class_names"]: {"tiny": registered}}
        monkeypatch.setattr(prompts, "_clip_benchmark", packages.__getitem__)
        return evaluate(monkeypatch, Perfect(), row, splits={"test": split(class_names=(), class_keys=NAMES)})

    assert evaluate_with(["thing 3", "Thing_2", "thing 1", "thing 0"]).metrics["zeroshot/tiny/top1"] == 1
    assert evaluate_with(["object 0", "object 1", "object 2", "thing 3"]).metrics["zeroshot/tiny/top1"] == 1
    skipped = evaluate_with(["thing 3", "object 1", "object 2", "object 0"]).skipped["zeroshot/tiny"]
    assert "class 3 is named 'object 0', but stored as 'thing 3', which is the name of class 0" in skipped


def test_splits_of_other_classes_are_refused(monkeypatch):
    train = split(np.arange(40) % CLASSES, first=100, class_names=(), class_keys=("thing 0", "thing 1", "thing 3"))
    splits = {"test": split(class_names=(), class_keys=NAMES), "train": train}
    report = evaluate(monkeypatch, Perfect(), splits=splits, evaluators=("linear_probe",))
    assert "only in train: none; only in test: thing 2" in report.failed["linear_probe/tiny"]


def test_prompts_of_the_user_that_do_not_exist_are_an_error(monkeypatch, tmp_path):
    for options in ({"templates": str(tmp_path / "none.json")}, {"class_names": "nobody"}):
        with pytest.raises(ValueError, match=r"none\.json|nobody"):
            evaluate(monkeypatch, Perfect(), **options)


# --------------------------------------------------------------------------------------------- selection of l2


@pytest.fixture
def seen(monkeypatch):
    """Serial numbers of the images that probes were fitted to and l2 was selected on."""
    seen = []

    def record(module, name, examples_of):
        original = getattr(sys.modules[f"clip_jax.evals.{module}"], name)

        def recorded(*arguments, **options):
            examples = examples_of(arguments, options)
            seen.append([np.rint(1e3 * part.features_nD[:, -1]).astype(int).tolist() for part in examples])
            return original(*arguments, **options)

        monkeypatch.setattr(sys.modules[f"clip_jax.evals.{module}"], name, recorded)

    record("linear_probe", "search", lambda arguments, options: arguments[:2])
    record("few_shot", "few_shot_curve", lambda arguments, options: arguments[:2])
    return seen


def test_without_a_validation_split_the_same_fifth_of_training_is_held_out(monkeypatch, seen):
    announced = dataclasses.replace(ROW, validation="validation")  # not on this machine
    for row in (ROW, ROW, announced):
        report = evaluate(monkeypatch, Perfect(), row, PROBES)
        assert "8 images held out of the training split" in report.descriptions["linear_probe/tiny"]
    assert len(seen) == 6 and all(one == seen[0] for one in seen)
    kept, held = seen[0]
    assert len(held) == 8 and len(kept) == 32 and sorted(kept + held) == list(range(100, 140))


def test_l2_is_selected_on_the_validation_split(monkeypatch, seen):
    splits = SPLITS | {"validation": split(first=500)}
    for row in (dataclasses.replace(ROW, validation="v"), dataclasses.replace(ROW, tfds_validation="v")):
        report = evaluate(monkeypatch, Perfect(), row, PROBES, splits)
        assert all("selected on the validation split" in report.descriptions[f"{name}/tiny"] for name in PROBES)
    assert all(one == [list(range(100, 140)), list(range(500, 520))] for one in seen) and len(seen) == 4


# -------------------------------------------------------------------------------------------------------- metrics


def test_multilabel_datasets_have_only_the_11_point_map(monkeypatch):
    row = dataclasses.replace(ROW, metric="map_11_points")
    correct_nQ = np.eye(CLASSES, dtype=bool)[np.arange(20) % CLASSES]
    splits = {"test": split(correct_nQ), "train": split(correct_nQ, first=100)}
    report = evaluate(monkeypatch, Perfect(), row, ("zeroshot", *PROBES), splits)
    names = {key.split("/")[2] for key in report.metrics}
    assert names == {"map_11_points"}
    assert report.metrics["zeroshot/tiny/map_11_points"] == report.metrics["linear_probe/tiny/map_11_points"] == 1
    assert list(report.skipped) == ["few_shot/tiny"] and "several classes" in report.skipped["few_shot/tiny"]
    assert "metric map_11_points" in report.descriptions["zeroshot/tiny"]


GROUPED = dataclasses.replace(ROW, metric="worst_group_top1", group_column=1, excluded_groups=(5, 6))


def test_worst_group_ignores_excluded_groups(monkeypatch):
    serial = np.arange(20)
    # Of five in a row the last two are wrong. One wrong image is in group 0, the others are in excluded groups.
    region = np.select([serial % 5 == 4, serial % 5 == 3, serial % 5 == 2], [5, np.where(serial < 5, 0, 6), 0], 1)
    metadata = np.stack([np.full(20, 7), region], axis=1)
    splits = {"test": split(metadata=metadata)}
    metrics = evaluate(monkeypatch, WrongInThirds(), GROUPED, splits=splits).metrics
    assert metrics["zeroshot/tiny/worst_group_top1"] == 4 / 5
    assert metrics["zeroshot/tiny/top1"] == 3 / 5
    everywhere = dataclasses.replace(GROUPED, excluded_groups=())
    assert (
        evaluate(monkeypatch, WrongInThirds(), everywhere, splits=splits).metrics["zeroshot/tiny/worst_group_top1"] == 0
    )
    report = evaluate(monkeypatch, Perfect(), GROUPED)
    assert "no metadata" in report.skipped["zeroshot/tiny"]


@pytest.mark.parametrize("evaluator", PROBES)
def test_probes_support_datasets_with_groups(monkeypatch, evaluator):
    """FMoW: worst-group accuracy, with a training split."""
    assert (
        suite.supports(EVALUATORS[evaluator], registry.DATASETS["fmow"]) and registry.DATASETS["fmow"].group_column >= 0
    )
    groups = np.zeros((40, 2), np.int64)
    splits = {name: dataclasses.replace(part, metadata=groups[: len(part.images)]) for name, part in SPLITS.items()}
    report = evaluate(monkeypatch, Perfect(), GROUPED, (evaluator,), splits)
    if evaluator == "linear_probe":
        assert report.metrics["linear_probe/tiny/worst_group_top1"] == 1
    else:
        assert "by class, not by group" in report.skipped["few_shot/tiny"]


BINARY = dataclasses.replace(ROW, metric="roc_auc", classes=2, validation="validation")


@pytest.fixture
def binary(monkeypatch):
    """Splits with two classes and eight training images."""

    def splits(targets):
        training = {"train": split([0, 1, 1, 0] * 2, 100), "validation": split([0, 1, 1, 0] * 2, 500)}
        return training | {"test": split(targets, class_names=NAMES[:2])}

    return splits


FOUR_SHOTS = {"few_shot": {"shots": (4,)}}  # every number of shots compiles again


def test_roc_auc_is_supported_by_every_evaluator(monkeypatch, binary):
    splits, evaluators = binary([0, 1] * 10), ("zeroshot", *PROBES)
    for embedder, value in ((Perfect(), 1), (Constant(), 0.5)):
        metrics = evaluate(monkeypatch, embedder, BINARY, evaluators, splits, evaluator_options=FOUR_SHOTS).metrics
        for key in ("zeroshot/tiny/roc_auc", "linear_probe/tiny/roc_auc", "few_shot/tiny/4_shot"):
            assert metrics[key] == value
        assert metrics["zeroshot/tiny/roc_auc/chance"] == 0.5


@pytest.mark.parametrize("evaluator", ["zeroshot", *PROBES])
def test_roc_auc_of_a_single_class_is_undefined(monkeypatch, caplog, binary, evaluator):
    report = evaluate(monkeypatch, Perfect(), BINARY, (evaluator,), binary([0] * 20), evaluator_options=FOUR_SHOTS)
    values = [v for k, v in report.metrics.items() if k.endswith(("roc_auc", "_shot"))]
    assert all(math.isnan(value) for value in values)
    assert "ROC AUC" in caplog.text and (values or f"{evaluator}/tiny" in report.skipped)


# --------------------------------------------------------------------------------------------- published results


def test_published_results_accompany_zeroshot_metrics_of_the_same_architecture_only(monkeypatch):
    row = dataclasses.replace(ROW, name="cifar10", metric="top1")
    for architecture, value in (("vit_b32", 0.8983), ("custom", None), ("emoji", None)):
        metrics = evaluate(
            monkeypatch, Perfect(), row, ("zeroshot", *PROBES), SPLITS, architecture=architecture
        ).metrics
        found = {key: value for key, value in metrics.items() if key.endswith("/published")}
        assert found == ({} if value is None else {"zeroshot/cifar10/top1/published": pytest.approx(value)})
    pets = dataclasses.replace(ROW, name="pets", metric="mean_per_class")
    metrics = evaluate(monkeypatch, Perfect(), pets, architecture="vit_b32").metrics
    assert [key for key in metrics if key.endswith("published")] == ["zeroshot/pets/mean_per_class/published"]
    nobody = evaluate(monkeypatch, Perfect(), architecture="vit_b32").metrics
    assert not [key for key in nobody if key.endswith("published")]
