"""`python -m clip_jax.evaluate`, as a user types it."""

import csv
import html
import json
import os
import pathlib
import shutil
import time

import pytest

from clip_jax.config import MODELS, WeightsConfig
from clip_jax.evals.datasets.registry import DATASETS
from clip_jax.evals.report.writing import check_same_weights, weights_name
from clip_jax.interop import msgpack
from tests import tiny_models
from tests.evaluations import damage, picture, report, run, start, write_classes

ALONE = ("--suite=digits", "--tasks=zeroshot,linear_probe", "--cache_dir=")  # nothing is shared between runs


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.msgpack"
    msgpack.write(path, tiny_models.params(MODELS["emoji"]), WeightsConfig(MODELS["emoji"]))
    return path


def numbers(directory):
    """Return the metrics, and of each set what they are of: with it l2, so that probes are the same."""
    return {
        key: value
        for key, value in report(directory).items()
        if key.startswith(("zeroshot/", "linear_probe/", "run/measured"))
    }


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory):
    """What one process wrote with the default batch, and printed."""
    out = tmp_path_factory.mktemp("alone")
    ((printed, _),) = run(f"--weights={weights}", f"--out={out}", *ALONE)
    return out, printed


def test_a_set_is_measured_and_written_down(alone, weights):
    out, printed = alone
    found = report(out)
    # Edges of random sizes see digits, and words mean nothing.
    assert found["linear_probe/digits/top1"] > 0.9 and 0 < found["zeroshot/digits/top1"] < 0.3
    assert found["run/architecture"] == "emoji" and found["run/weights"] == str(weights)
    assert found["run/name"] == "small" and found["run/parameters"] == 3_497_567
    for task in ("zeroshot", "linear_probe"):
        said = found[f"run/measured.{task}/digits"]
        assert "450 pictures of the test split" in said and "48 px" in said and f"{task}/digits: {said}" in printed
        value = f"{found[f'{task}/digits/top1']:.3f}"
        card = (out / "MODEL_CARD.md").read_text()
        assert f"| {task}/digits/top1 | {value} |" in card and f"- {task}/digits: {said}." in card
        assert value in next(line for line in printed.splitlines() if line.startswith(f"{task}/digits/top1 "))
    (row,) = csv.DictReader((out / "open_clip.csv").open())
    assert row[DATASETS["digits"].title] == f"{found['zeroshot/digits/top1']:.4f}"
    assert "<html" in (out / "report.html").read_text()


@pytest.mark.parametrize("processes", [2, 3])
def test_numbers_do_not_depend_on_the_number_of_processes(alone, weights, tmp_path, processes):
    expected = numbers(alone[0])
    assert len(expected) > 20
    said = run(f"--weights={weights}", f"--out={tmp_path}", *ALONE, processes=processes)
    assert numbers(tmp_path) == expected
    assert all("digits" not in printed for printed, _ in said[1:])  # one process prints results


def test_numbers_do_not_depend_on_batches_nor_on_features_on_disk(alone, weights, tmp_path):
    features = tmp_path / "features"
    flags = (f"--weights={weights}", *ALONE[:2], f"--cache_dir={features}")
    run(*flags, f"--out={tmp_path / 'first'}", "--batch_size=7")
    written = {path: path.stat().st_mtime_ns for path in features.iterdir()}
    assert len(written) == 3  # embeddings of the test split, features of both
    run(*flags, f"--out={tmp_path / 'second'}")
    assert {path: path.stat().st_mtime_ns for path in features.iterdir()} == written
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second") == numbers(alone[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either --weights=FILE"),
        (("--weights=/nowhere.msgpack",), "/nowhere.msgpack: there is no such file"),
        (("--weights=WEIGHTS", "--suite=cifar11"), "there is no set or suite 'cifar11': use paper, robustness"),
        (("--weights=WEIGHTS", "--tasks=zeroshots"), "--tasks: there is no 'zeroshots'; use zeroshot, retrieval"),
        (("--weights=WEIGHTS", "digits"), "unexpected argument 'digits'; flags begin with --"),
        (("--weights=WEIGHTS", "--dtype=float16"), "float16"),
        (("--weights=WEIGHTS", "--wieghts=x"), "wieghts"),
        (("--weights=WEIGHTS", "--suite="), "--suite"),
    ],
)
def test_wrong_input_ends_with_2_and_one_sentence(weights, tmp_path, arguments, message):
    arguments = [argument.replace("WEIGHTS", str(weights)) for argument in arguments]
    ((printed, said),) = run(*arguments, "--cache_dir=", f"--out={tmp_path / 'out'}", code=2)
    assert printed == "" and message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sets_that_are_not_here_are_listed_with_what_brings_them(weights, tmp_path):
    sets = "--suite=birdsnap,flickr30k,winogavil", "--tasks=zeroshot,retrieval,linear_probe"
    out, data = tmp_path / "out", tmp_path / "data"
    ((printed, _),) = run(f"--weights={weights}", f"--out={out}", f"--data_dir={data}", "--cache_dir=", *sets)
    skipped = {key: value for key, value in report(out).items() if key.startswith("run/skipped")}
    reasons = {
        "zeroshot/birdsnap": f"{data}/wds_birdsnap_test/test is not a folder",
        "linear_probe/birdsnap": f"{data}/wds_birdsnap_test/test is not a folder",
        "retrieval/flickr30k": f"{data}/wds_flickr30k/test is not a folder",
        "zeroshot/winogavil": "as lines of associations.jsonl in the same folder",  # the registry's note
    }
    assert set(skipped) == {f"run/skipped.{key}" for key in reasons}
    assert not [key for key in report(out) if not key.startswith("run/")]
    card = (out / "MODEL_CARD.md").read_text()
    for key, reason in reasons.items():
        assert reason in skipped[f"run/skipped.{key}"]
        assert f"{key} is left out: " in printed and f"- {key}: " in card


# ------------------------------------------------------------------------------------------------ what is damaged

TEN = tuple(f"thing {class_id}" for class_id in range(10))


@pytest.fixture
def data(tmp_path):
    """Twelve pictures each of MNIST, CIFAR-10 and SVHN, as CLIP_benchmark stores them."""
    for first, name in enumerate(("mnist", "cifar10", "svhn")):
        pictures = [picture(100 * first + row) for row in range(12)]
        write_classes(tmp_path / "data" / DATASETS[name].folder, pictures, [row % 10 for row in range(12)], TEN)
    return tmp_path / "data"


def test_a_damaged_set_is_listed_as_failed_and_the_others_are_measured(weights, data, tmp_path):
    folder = data / DATASETS["mnist"].folder
    shutil.rmtree(folder)
    write_classes(folder, [picture(row) for row in range(4)], [0, 1, 2, 10], TEN)
    damage(data, "cifar10")
    flags = (f"--weights={weights}", f"--data_dir={data}", "--suite=mnist,cifar10,svhn,dtd", "--cache_dir=")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text('{"run/weights": "others"}')  # named by --out, so overwritten
    ((printed, said),) = run(*flags, f"--out={out}", code=3, tiny=True)
    found = report(out)
    assert {key.split("/")[1] for key in found if not key.startswith("run/")} == {"svhn"}
    failed = {key.removeprefix("run/failed."): value for key, value in found.items() if key.startswith("run/failed.")}
    assert set(failed) == {"zeroshot/mnist", "zeroshot/cifar10"}
    assert [key for key in found if key.startswith("run/skipped")] == ["run/skipped.zeroshot/dtd"]
    assert "10" in failed["zeroshot/mnist"] and "picture 1: " in failed["zeroshot/cifar10"]
    card, page = (out / "MODEL_CARD.md").read_text(), html.unescape((out / "report.html").read_text())
    for key, reason in failed.items():
        assert len(reason.splitlines()) == 1 and f"{key} failed: {reason}" in printed
        assert f"- {key}: failed: {reason}" in card and f"failed: {reason}</p>" in page
    assert said.splitlines()[-1] == "clip_jax.evaluate: failed, and not measured: zeroshot/mnist, zeroshot/cifar10"


def test_what_one_process_cannot_read_has_failed_on_all_and_the_others_are_measured(weights, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    damage(other, "cifar10")  # in a batch of two the second row is the second process's
    shutil.rmtree(other / DATASETS["svhn"].folder)
    flags = (f"--weights={weights}", "--suite=cifar10,svhn,mnist", "--cache_dir=", "--batch_size=2")
    out = tmp_path / "out"
    second = (f"--data_dir={other}",)
    said = run(*flags, f"--data_dir={data}", f"--out={out}", processes=2, second=second, code=3, tiny=True)
    found = report(out)
    assert found["run/failed.zeroshot/cifar10"].startswith("process 1: picture ")
    assert found["run/skipped.zeroshot/svhn"].startswith("process 1: ")
    assert "not measured: zeroshot/cifar10" in said[0][1] and "not measured" not in said[1][1]
    run(*flags[:1], "--suite=mnist", f"--data_dir={data}", f"--out={tmp_path / 'alone'}", "--cache_dir=", tiny=True)
    expected = {key: value for key, value in report(tmp_path / "alone").items() if key.startswith("zeroshot/")}
    assert expected and {key: found[key] for key in found if key.startswith("zeroshot/")} == expected


def test_a_killed_command_keeps_what_it_measured(weights, data, tmp_path):
    shard = data / DATASETS["cifar10"].folder / "test" / "0.tar"
    shard.unlink()
    os.mkfifo(shard)  # whoever reads it waits
    out = tmp_path / "out"
    flags = (f"--weights={weights}", f"--data_dir={data}", "--suite=mnist,cifar10", "--cache_dir=", f"--out={out}")
    process = start(*flags, tiny=True)
    deadline = time.monotonic() + 120
    try:
        while not (out / "MODEL_CARD.md").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()
    assert "zeroshot/mnist/top1" in report(out)
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "open_clip.csv", "MODEL_CARD.md"}


# ------------------------------------------------------------------------------------------- where reports go


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/emoji/params.msgpack", "emoji"),
        ("small.msgpack", "small"),
        ("/models/ViT-B-32.pt", "ViT-B-32"),
        ("/models/b32/open_clip_model.safetensors", "b32"),
        ("/models/vit.b32", "vit.b32"),
        ("vit_l14", "vit_l14"),
        ("hf-hub:openai/clip-vit-base-patch32", "clip-vit-base-patch32"),
    ],
)
def test_reports_are_named_after_what_tells_weights_apart(path, name):
    assert weights_name(path) == name


def test_a_report_of_other_weights_is_not_overwritten(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    directory = pathlib.Path("evaluations/x")
    check_same_weights(directory, "a/x/params.msgpack", "f" * 12)
    directory.mkdir(parents=True)
    there = {"run/weights": "b/x/params.msgpack", "run/fingerprint": "0" * 12}
    (directory / "report.json").write_text(json.dumps(there))
    check_same_weights(directory, "a/x/params.msgpack", "0" * 12)  # the same, elsewhere
    with pytest.raises(ValueError, match=r"report of other weights, b/x/params\.msgpack: .*--out=evaluations/x-2"):
        check_same_weights(directory, "a/x/params.msgpack", "f" * 12)
    check_same_weights(directory, "b/x/params.msgpack", "f" * 12)  # trained on
