"""Many sets asked of one model: what stands beside a number, what is left out and why."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from clip_jax.evals import benchmark, prompts
from clip_jax.evals.datasets import registry
from clip_jax.typing import Unavailable
from tests.tiny_benchmark import (
    CLASSES,
    NAMES,
    PARTS,
    PREPROCESSING,
    PROBES,
    RETRIEVAL,
    ROW,
    Constant,
    Duplicated,
    NotANumber,
    Perfect,
    WrongInThirds,
    captioned,
    evaluate,
    split,
    subject,
)

# ------------------------------------------------------------------------------------------- numbers and what they are


def test_every_number_says_what_it_is_of(monkeypatch):
    outcome = evaluate(monkeypatch, Perfect(), tasks=("zeroshot", "retrieval", *PROBES))
    assert outcome.skipped == {}
    assert set(outcome.described) == {"zeroshot/tiny", "linear_probe/tiny", "few_shot/tiny"}
    assert {tuple(key.split("/")[:2]) for key in outcome.metrics} == {
        tuple(key.split("/")) for key in outcome.described
    }
    for said in outcome.described.values():
        for part in ("20 pictures of the test split", "4 classes", "metric top1", PREPROCESSING):
            assert part in said
    digest = prompts.Prompts(tuple((name,) for name in NAMES), prompts.templates("photo")).digest
    assert digest in outcome.described["zeroshot/tiny"] and "4 wordings" in outcome.described["zeroshot/tiny"]
    assert "held out of train" in outcome.described["linear_probe/tiny"]
    assert "5 draws" in outcome.described["few_shot/tiny"]


def test_a_perfect_model_gets_1_in_every_task(monkeypatch):
    metrics = evaluate(monkeypatch, Perfect(), tasks=("zeroshot", *PROBES)).metrics
    for key in ("zeroshot/tiny/top1", "zeroshot/tiny/mean_per_class", "linear_probe/tiny/top1", "few_shot/tiny/4_shot"):
        assert metrics[key] == 1
        assert metrics[f"{key}/chance"] == 1 / CLASSES and metrics[f"{key}/candidates"] == CLASSES
        low, high = ("min", "max") if key.startswith("few_shot") else ("ci_low", "ci_high")
        assert metrics[f"{key}/{low}"] <= 1 <= metrics[f"{key}/{high}"]
    assert metrics["zeroshot/tiny/top1/majority_class"] == 1 / CLASSES


def test_few_shot_goes_as_far_as_the_smallest_class(monkeypatch):
    validation = split(first=500)
    train = split([0] * 16 + [1] * 16 + [2] * 9 + [3] * 4, first=100)
    row = dataclasses.replace(ROW, validation="validation")
    parts = PARTS | {"train": train, "validation": validation}
    metrics = evaluate(monkeypatch, Perfect(), row, ("few_shot",), parts).metrics
    assert [key for key in metrics if key.endswith("_shot")] == [f"few_shot/tiny/{n}_shot" for n in (1, 2, 4)]
    parts |= {"train": split([0, 1, 2] * 4, first=100)}
    outcome = evaluate(monkeypatch, Perfect(), row, ("few_shot",), parts)
    assert outcome.metrics == {} and "no picture to train on" in outcome.skipped["few_shot/tiny"]


@pytest.mark.parametrize("counts", [(1,) * 6, (1, 2, 3, 1, 2, 3), (5, 1, 1, 1, 1, 1)])
def test_retrieval_takes_any_number_of_captions_per_picture(monkeypatch, counts):
    outcome = evaluate(monkeypatch, Perfect(), RETRIEVAL, ("retrieval", *PROBES), {"test": captioned(counts)})
    metrics, prefix = outcome.metrics, "retrieval/tiny"
    assert metrics[f"{prefix}/image_to_text/recall_at_1"] == metrics[f"{prefix}/text_to_image/recall_at_1"] == 1
    assert metrics[f"{prefix}/image_to_text/recall_at_1/candidates"] == sum(counts)
    assert metrics[f"{prefix}/text_to_image/recall_at_1/candidates"] == 6
    # Drawing one of all captions: it is one of the picture's with a probability of its share.
    chance = np.mean(np.array(counts) / sum(counts))
    np.testing.assert_allclose(metrics[f"{prefix}/image_to_text/recall_at_1/chance"], chance)
    said = outcome.described["retrieval/tiny"]
    assert list(outcome.described) == ["retrieval/tiny"]
    for part in ("6 pictures of the test split", f"{sum(counts)} captions", "'{}'", "metric recall", PREPROCESSING):
        assert part in said


def test_retrieval_puts_captions_into_the_registrys_templates(monkeypatch):
    templates = dataclasses.replace(RETRIEVAL, templates="photo")
    embedder = Perfect()
    evaluate(monkeypatch, embedder, templates, ("retrieval",), {"test": captioned()})
    assert embedder.texts[:2] == ["a photo of a 0 from side a.", "a photo of a 1 from side a."]


@pytest.mark.parametrize("task", ["zeroshot", *PROBES])
def test_another_size_than_the_registrys_gives_no_number(monkeypatch, task):
    parts = PARTS | {"test": split([0, 1, 2, 3])}
    outcome = evaluate(monkeypatch, Perfect(), tasks=(task,), parts=parts)
    assert outcome.metrics == {} and outcome.described == {}
    assert "has 20 pictures, and 4 were found" in outcome.skipped[f"{task}/tiny"]
    unknown = dataclasses.replace(ROW, size=0)
    assert evaluate(monkeypatch, Perfect(), unknown, (task,), parts).skipped == {}


def test_what_is_not_there_is_left_out_with_its_reason_and_the_rest_goes_on(monkeypatch):
    outcome = evaluate(monkeypatch, Perfect(), tasks=("few_shot", "linear_probe", "zeroshot"), parts={"test": split()})
    assert outcome.skipped == {f"{task}/tiny": "no train split here" for task in ("few_shot", "linear_probe")}
    assert outcome.metrics["zeroshot/tiny/top1"] == 1
    assert evaluate(monkeypatch, Perfect(), parts={}).skipped == {"zeroshot/tiny": "no test split here"}


def _ask_three(monkeypatch, error, after_each=lambda outcome: None):
    """Ask three sets, of which the second raises an error when it is read."""
    rows = {name: dataclasses.replace(ROW, name=name) for name in ("one", "two", "three")}
    monkeypatch.setattr(benchmark, "DATASETS", rows)

    def load(row, part):
        if row.name == "two":
            raise error
        return PARTS[part]

    return benchmark.evaluate(subject(Perfect()), list(rows), ("zeroshot",), load, after_each=after_each)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("0.tar: sample 's7'\nhas no picture"), "0.tar: sample 's7' has no picture"),
        (OSError(5, "Input/output error", "0.tar"), "OSError: [Errno 5] Input/output error: '0.tar'"),
        (IndexError("index 3 is out of bounds"), "IndexError: index 3 is out of bounds"),
        (KeyError("cls"), "KeyError: 'cls'"),
        (ValueError(), "ValueError: "),
    ],
)
def test_what_cannot_be_read_of_one_set_is_recorded_and_the_rest_goes_on(monkeypatch, error, reason):
    known = []
    outcome = _ask_three(monkeypatch, error, lambda outcome: known.append((set(outcome.described), [*outcome.failed])))
    assert outcome.failed == {"zeroshot/two": reason} and outcome.skipped == {}
    assert outcome.metrics["zeroshot/one/top1"] == outcome.metrics["zeroshot/three/top1"] == 1
    one, three = "zeroshot/one", "zeroshot/three"
    assert known == [({one}, []), ({one}, ["zeroshot/two"]), ({one, three}, ["zeroshot/two"])]


@pytest.mark.parametrize("error", [TypeError("no"), AttributeError("no"), AssertionError("no"), RuntimeError("no")])
def test_mistakes_of_the_program_end_it(monkeypatch, error):
    with pytest.raises(type(error)):
        _ask_three(monkeypatch, error)


def test_names_and_suites_are_asked_once_and_unknown_ones_refused(monkeypatch):
    assert benchmark.expand(["smoke", "digits", "retrieval"]) == [*registry.SUITES["smoke"], "flickr30k", "mscoco"]
    with pytest.raises(ValueError, match=r"no set or suite 'cifar11': use paper, .*datacomp.*, cifar10, "):
        benchmark.expand(["digits", "cifar11"])
    embedder = Perfect()
    evaluate(monkeypatch, embedder, names=["all", "tiny", "all"])
    assert embedder.image_calls == 1
    with pytest.raises(ValueError, match="'cifar10': use all, tiny"):
        evaluate(monkeypatch, embedder, names=["cifar10"])


def test_tasks_are_asked_of_the_sets_that_they_are_meant_for():
    asked = {
        task: {name for name, row in registry.DATASETS.items() if benchmark.asks(task, row)} for task in benchmark.TASKS
    }
    assert asked["retrieval"] == {"flickr30k", "mscoco"}
    assert asked["linear_probe"] == asked["few_shot"] < asked["zeroshot"]
    assert not asked["zeroshot"] & asked["retrieval"] and "winogavil" in asked["zeroshot"]
    assert {"imagenet_v2", "emoji_categories", "winogavil"} <= asked["zeroshot"] - asked["linear_probe"]


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("names", "reason"), [((), "its classes have no names"), (NAMES[:3], r"3 class names (the data's) for 4 classes")]
)
def test_classes_without_the_right_number_of_names_are_left_out(monkeypatch, names, reason):
    parts = PARTS | {"test": split(class_names=names)}
    outcome = evaluate(monkeypatch, Perfect(), parts=parts, tasks=("zeroshot", "linear_probe"))
    assert list(outcome.skipped) == ["zeroshot/tiny"] and reason in outcome.skipped["zeroshot/tiny"]
    assert outcome.metrics["linear_probe/tiny/top1"] == 1  # which asks no names


def test_prompts_are_the_users_else_the_registrys_else_the_datas(monkeypatch, tmp_path):
    stored = PARTS | {"test": split(templates=("stored {}",))}
    registered = dataclasses.replace(ROW, class_names="clip_benchmark:tiny", templates="clip_benchmark:tiny")
    packages = {
        prompts.CLIP_BENCHMARK["class_names"]: {"tiny": [f"registered {n}" for n in range(CLASSES)]},
        prompts.CLIP_BENCHMARK["templates"]: {"tiny": ["one {c}", "two {c}"]},
    }
    monkeypatch.setattr(prompts, "_clip_benchmark", packages.__getitem__)
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"class_names": [f"own {n}" for n in range(CLASSES)], "templates": ["my {}"]}))

    def asked(row, **more):
        embedder = Perfect()
        outcome = evaluate(monkeypatch, embedder, row, parts=stored, **more)
        assert outcome.metrics["zeroshot/tiny/top1"] == 1
        return embedder.texts, outcome.described["zeroshot/tiny"]

    users, said_of_users = asked(registered, templates=str(file), class_names=str(file))
    assert users == [f"my own {n}" for n in range(CLASSES)] and said_of_users.count(str(file)) == 2
    texts, said = asked(registered)
    assert texts == [f"{which} registered {n}" for n in range(CLASSES) for which in ("one", "two")]
    assert "class names clip_benchmark:tiny, templates clip_benchmark:tiny, 8 wordings" in said
    texts, said_of_stored = asked(ROW)
    assert texts == [f"stored {name}" for name in NAMES]
    assert "class names the data's, templates the data's" in said_of_stored
    assert asked(registered, templates="name")[0] == [f"registered {n}" for n in range(CLASSES)]

    def missing(file):
        raise Unavailable("published prompts come with clip_benchmark, which is not installed")

    monkeypatch.setattr(prompts, "_clip_benchmark", missing)
    texts, said = asked(registered)
    assert texts == [f"stored {name}" for name in NAMES] and said == said_of_stored
    digests = [re.search(r"wordings, ([0-9a-f]{12});", one).group(1) for one in (said_of_users, said)]
    assert digests[0] != digests[1]
    outcome = evaluate(monkeypatch, Perfect(), registered, parts=PARTS | {"test": split(class_names=())})
    assert "which is not installed" in outcome.skipped["zeroshot/tiny"]


def test_a_users_prompts_that_are_wrong_end_it(monkeypatch, tmp_path):
    for more in ({"templates": str(tmp_path / "none.json")}, {"class_names": "nobody"}):
        with pytest.raises(ValueError, match=r"none\.json|nobody"):
            evaluate(monkeypatch, Perfect(), **more)


# ----------------------------------------------------------------------------------------------------- what is held out


@pytest.fixture
def seen(monkeypatch):
    """What probes were fitted to and chosen by: pairs of the pictures' serial numbers."""
    seen = []

    def spy_on(name, of):
        original = getattr(benchmark, name)

        def spied(*arguments, **more):
            train, validation = of(arguments, more)
            serials = [np.rint(1e3 * part.features_nD[:, -1]).astype(int).tolist() for part in (train, validation)]
            seen.append(serials)
            return original(*arguments, **more)

        monkeypatch.setattr(benchmark, name, spied)

    spy_on("search", lambda arguments, more: arguments[:2])
    spy_on("few_shot", lambda arguments, more: (arguments[0], more["validation"]))
    return seen


def test_where_there_is_no_validation_split_the_same_fifth_of_training_is_held_out(monkeypatch, seen):
    announced = dataclasses.replace(ROW, validation="validation")  # and isn't there
    for row in (ROW, ROW, announced):
        outcome = evaluate(monkeypatch, Perfect(), row, PROBES)
        assert "8 pictures held out of train" in outcome.described["linear_probe/tiny"]
    assert len(seen) == 6 and all(one == seen[0] for one in seen)
    kept, held = seen[0]
    assert len(held) == 8 and len(kept) == 32 and sorted(kept + held) == list(range(100, 140))


def test_a_validation_split_is_what_probes_are_chosen_by(monkeypatch, seen):
    parts = PARTS | {"validation": split(first=500)}
    for row in (dataclasses.replace(ROW, validation="v"), dataclasses.replace(ROW, tfds_validation="v")):
        outcome = evaluate(monkeypatch, Perfect(), row, PROBES, parts)
        assert all(
            "found on the validation split" in outcome.described[f"{t}/tiny"].replace("for each ", "") for t in PROBES
        )
    assert all(one == [list(range(100, 140)), list(range(500, 520))] for one in seen) and len(seen) == 4


# ------------------------------------------------------------------------------------------------------------- measures


def test_of_several_classes_per_picture_there_is_the_11_point_map_alone(monkeypatch):
    row = dataclasses.replace(ROW, metric="map_11_points")
    right_nQ = np.eye(CLASSES, dtype=bool)[np.arange(20) % CLASSES]
    parts = {"test": split(right_nQ), "train": split(right_nQ, first=100)}
    outcome = evaluate(monkeypatch, Perfect(), row, ("zeroshot", *PROBES), parts)
    measures = {key.split("/")[2] for key in outcome.metrics}
    assert measures == {"map_11_points"}
    assert outcome.metrics["zeroshot/tiny/map_11_points"] == outcome.metrics["linear_probe/tiny/map_11_points"] == 1
    assert list(outcome.skipped) == ["few_shot/tiny"] and "several classes" in outcome.skipped["few_shot/tiny"]
    assert "metric map_11_points" in outcome.described["zeroshot/tiny"]


GROUPED = dataclasses.replace(ROW, metric="worst_group_top1", group_column=1, excluded_groups=(5, 6))


def test_the_worst_group_is_looked_for_in_its_column_without_other_groups(monkeypatch):
    serial = np.arange(20)
    # Of five in a row the last two are wrong. All of those but one are in groups that don't count; it is in group 0.
    region = np.select([serial % 5 == 4, serial % 5 == 3, serial % 5 == 2], [5, np.where(serial < 5, 0, 6), 0], 1)
    metadata = np.stack([np.full(20, 7), region], axis=1)
    parts = {"test": split(metadata=metadata)}
    metrics = evaluate(monkeypatch, WrongInThirds(), GROUPED, parts=parts).metrics
    assert metrics["zeroshot/tiny/worst_group_top1"] == 4 / 5
    assert metrics["zeroshot/tiny/top1"] == 3 / 5
    everywhere = dataclasses.replace(GROUPED, excluded_groups=())
    assert (
        evaluate(monkeypatch, WrongInThirds(), everywhere, parts=parts).metrics["zeroshot/tiny/worst_group_top1"] == 0
    )
    outcome = evaluate(monkeypatch, Perfect(), GROUPED)
    assert "none were found" in outcome.skipped["zeroshot/tiny"]


@pytest.mark.parametrize("task", PROBES)
def test_probes_of_a_set_with_groups_end_well(monkeypatch, task):
    """FMoW: measured by its worst group, with a split to train on."""
    assert benchmark.asks(task, registry.DATASETS["fmow"]) and registry.DATASETS["fmow"].group_column >= 0
    groups = np.zeros((40, 2), np.int64)
    parts = {part: dataclasses.replace(found, metadata=groups[: len(found.images)]) for part, found in PARTS.items()}
    outcome = evaluate(monkeypatch, Perfect(), GROUPED, (task,), parts)
    if task == "linear_probe":
        assert outcome.metrics["linear_probe/tiny/worst_group_top1"] == 1
    else:
        assert outcome.metrics.get("few_shot/tiny/1_shot", 1) == 1


BINARY = dataclasses.replace(ROW, metric="roc_auc", classes=2, validation="validation")


@pytest.fixture
def binary(monkeypatch):
    """Of two classes, eight pictures to train on; but one number of shots, since every one compiles again."""
    monkeypatch.setattr(benchmark, "SHOTS", (4,))

    def parts(targets):
        training = {"train": split([0, 1, 1, 0] * 2, 100), "validation": split([0, 1, 1, 0] * 2, 500)}
        return training | {"test": split(targets, class_names=NAMES[:2])}

    return parts


def test_the_area_under_the_curve_is_measured_by_every_task(monkeypatch, binary):
    parts = binary([0, 1] * 10)
    for embedder, value in ((Perfect(), 1), (Constant(), 0.5)):
        metrics = evaluate(monkeypatch, embedder, BINARY, ("zeroshot", *PROBES), parts).metrics
        for key in ("zeroshot/tiny/roc_auc", "linear_probe/tiny/roc_auc", "few_shot/tiny/4_shot"):
            assert metrics[key] == value
        assert metrics["zeroshot/tiny/roc_auc/chance"] == 0.5


@pytest.mark.parametrize("task", ["zeroshot", *PROBES])
def test_a_single_class_has_no_area_under_the_curve(monkeypatch, caplog, binary, task):
    outcome = evaluate(monkeypatch, Perfect(), BINARY, (task,), binary([0] * 20))
    values = [v for k, v in outcome.metrics.items() if k.endswith(("roc_auc", "_shot"))]
    assert all(math.isnan(value) for value in values)
    assert "ROC AUC" in caplog.text and (values or f"{task}/tiny" in outcome.skipped)


# --------------------------------------------------------------------------------------------- models that are broken


def better_than_chance(metrics):
    """Return the keys of numbers that are better than chance; of ranks, less is better."""
    compared = {key: (metrics[key], metrics[f"{key}/chance"]) for key in metrics if f"{key}/chance" in metrics}
    return [
        key for key, (value, chance) in compared.items() if (chance - value if "rank" in key else value - chance) > 0
    ]


def test_a_perfect_model_is_better_than_chance(monkeypatch):
    for row, tasks, parts in ((ROW, ("zeroshot", *PROBES), PARTS), (RETRIEVAL, ("retrieval",), {"test": captioned()})):
        metrics = evaluate(monkeypatch, Perfect(), row, tasks, parts).metrics
        assert {key.split("/")[0] for key in better_than_chance(metrics)} == set(tasks)


@pytest.mark.parametrize("broken", [NotANumber, Constant])
def test_broken_models_never_beat_chance(monkeypatch, broken):
    metrics = evaluate(monkeypatch, broken(), RETRIEVAL, ("retrieval",), {"test": captioned()}).metrics
    assert metrics and better_than_chance(metrics) == []
    metrics = evaluate(monkeypatch, broken()).metrics
    assert metrics["zeroshot/tiny/top1"] == 0 and better_than_chance(metrics) == []


@pytest.mark.parametrize("task", PROBES)
def test_constant_features_teach_a_probe_no_more_than_chance(monkeypatch, task):
    metrics = evaluate(monkeypatch, Constant(), tasks=(task,)).metrics
    assert metrics and better_than_chance(metrics) == []


def test_classes_with_the_same_embedding_are_not_told_apart(monkeypatch):
    metrics = evaluate(monkeypatch, Duplicated()).metrics
    assert metrics["zeroshot/tiny/top1"] == metrics["zeroshot/tiny/mean_per_class"] == 0
    metrics = evaluate(monkeypatch, Duplicated(), RETRIEVAL, ("retrieval",), {"test": captioned((1,) * 6)}).metrics
    assert metrics["retrieval/tiny/image_to_text/recall_at_1"] == 0
    assert metrics["retrieval/tiny/text_to_image/recall_at_1"] == 0


@pytest.mark.parametrize("task", PROBES)
def test_features_that_are_not_finite_leave_a_probe_out_and_the_rest_goes_on(monkeypatch, task):
    outcome = evaluate(monkeypatch, NotANumber(), tasks=("zeroshot", task))
    assert outcome.metrics["zeroshot/tiny/top1"] == 0
    assert "finite" in outcome.skipped[f"{task}/tiny"]
    assert not [key for key in outcome.metrics if key.startswith(task)]


@pytest.mark.parametrize("task", ["zeroshot", *PROBES])
def test_captions_where_classes_are_asked_for_are_left_out(monkeypatch, task):
    said = [("a caption",)] * 20
    parts = {part: dataclasses.replace(found, targets=None, captions=said) for part, found in PARTS.items()}
    outcome = evaluate(monkeypatch, Perfect(), tasks=(task,), parts=parts)
    assert "captions, not classes" in outcome.skipped[f"{task}/tiny"]


def test_classes_where_captions_are_asked_for_are_left_out(monkeypatch):
    row = dataclasses.replace(RETRIEVAL, size=20)
    assert "not captions" in evaluate(monkeypatch, Perfect(), row, ("retrieval",)).skipped["retrieval/tiny"]


# ----------------------------------------------------------------------------------------------- what others measured


def test_published_numbers_stand_beside_zero_shot_numbers_of_the_same_architecture_alone(monkeypatch):
    row = dataclasses.replace(ROW, name="cifar10", metric="top1")
    for architecture, value in (("vit_b32", 0.8983), ("custom", None), ("emoji", None)):
        metrics = evaluate(
            monkeypatch, Perfect(), row, ("zeroshot", *PROBES), parts=PARTS, architecture=architecture
        ).metrics
        found = {key: value for key, value in metrics.items() if key.endswith("/published")}
        assert found == ({} if value is None else {"zeroshot/cifar10/top1/published": pytest.approx(value)})
    pets = dataclasses.replace(ROW, name="pets", metric="mean_per_class")
    metrics = evaluate(monkeypatch, Perfect(), pets, architecture="vit_b32").metrics
    assert [key for key in metrics if key.endswith("published")] == ["zeroshot/pets/mean_per_class/published"]
    nobody = evaluate(monkeypatch, Perfect(), architecture="vit_b32").metrics
    assert not [key for key in nobody if key.endswith("published")]
