"""`python -m clip_jax.evaluate` in processes: numbers, errors, damaged data, reports."""

import csv
import html
import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest

from clip_jax import load
from clip_jax.config import MODELS, WeightsConfig
from clip_jax.evals import run as evals_run
from clip_jax.evals.datasets.registry import DATASETS
from clip_jax.evals.report.writing import check_same_weights, weights_name
from clip_jax.interop import msgpack
from tests import tiny_models
from tests.evaluations import damage, png_image, report, run, start, write_classes, write_shards

ALONE = ("--datasets=digits", "--evaluators=zeroshot,linear_probe", "--cache_dir=")  # without a shared cache


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.msgpack"
    msgpack.write(path, tiny_models.params(MODELS["emoji"]), WeightsConfig(MODELS["emoji"]))
    return path


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Weights of a narrow tower: a probe of its features errs, so that l2 is not chosen by rounding errors."""
    path, architecture = tmp_path_factory.mktemp("narrow") / "narrow.msgpack", tiny_models.ARCHITECTURES["vit"]
    msgpack.write(path, tiny_models.params(architecture), WeightsConfig(architecture))
    return path


def numbers(directory):
    """Return the metrics and their descriptions, which contain the probe's l2."""
    return {
        key: value
        for key, value in report(directory).items()
        if key.startswith(("zeroshot/", "linear_probe/", "run/descriptions"))
    }


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory):
    """The report directory and the output of one process with the default batch size."""
    out = tmp_path_factory.mktemp("alone")
    ((printed, _),) = run(f"--weights={weights}", f"--out={out}", *ALONE)
    return out, printed


def test_a_dataset_is_evaluated_and_reported(alone, weights):
    out, printed = alone
    found = report(out)
    # Random weights: features are informative, texts are not.
    assert found["linear_probe/digits/top1"] > 0.9 and 0 < found["zeroshot/digits/top1"] < 0.3
    assert found["run/architecture"] == "emoji" and found["run/weights"] == str(weights)
    assert found["run/name"] == "small" and found["run/parameters"] == 3_497_567
    assert found["run/protocol"] == "expected"
    for name in ("zeroshot", "linear_probe"):
        setup = found[f"run/descriptions.{name}/digits"]
        assert "450 images of the test split" in setup and "48 px" in setup and f"{name}/digits: {setup}" in printed
        value = f"{found[f'{name}/digits/top1']:.3f}"
        card = (out / "MODEL_CARD.md").read_text()
        assert f"| {name}/digits/top1 | {value} |" in card and f"- {name}/digits: {setup}." in card
        assert value in next(line for line in printed.splitlines() if line.startswith(f"{name}/digits/top1 "))
    (row,) = csv.DictReader((out / "open_clip.csv").open())
    assert row[DATASETS["digits"].title] == f"{found['zeroshot/digits/top1']:.4f}"
    assert "<html" in (out / "report.html").read_text()


@pytest.fixture(scope="module")
def narrow_numbers(narrow, tmp_path_factory):
    out = tmp_path_factory.mktemp("narrow_alone")
    run(f"--weights={narrow}", f"--out={out}", *ALONE)
    found = numbers(out)
    assert len(found) > 20 and found["linear_probe/digits/top1"] < 0.9
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_numbers_do_not_depend_on_the_number_of_processes(narrow, narrow_numbers, tmp_path, processes):
    output = run(f"--weights={narrow}", f"--out={tmp_path}", *ALONE, processes=processes)
    assert numbers(tmp_path) == narrow_numbers
    assert all("digits" not in printed for printed, _ in output[1:])  # one process prints results


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_batch_size_or_cached_features(narrow, narrow_numbers, tmp_path):
    features = tmp_path / "features"
    flags = (f"--weights={narrow}", *ALONE[:2], f"--cache_dir={features}")
    run(*flags, f"--out={tmp_path / 'first'}", "--batch_size=7")
    written = {path: path.stat().st_mtime_ns for path in features.iterdir()}
    assert len(written) == 3  # embeddings of the test split, features of both splits
    run(*flags, f"--out={tmp_path / 'second'}")
    assert {path: path.stat().st_mtime_ns for path in features.iterdir()} == written
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second") == narrow_numbers


@pytest.mark.slow  # a process that compiles both towers
def test_dtype_bfloat16_gives_the_recall_of_encoders_in_bfloat16(narrow, tmp_path, optimized):
    images, texts = [png_image(row) for row in range(64)], [f"a picture of {row} dogs" for row in range(64)]
    samples = [{"png": image, "txt": text.encode()} for image, text in zip(images, texts, strict=True)]
    write_shards(tmp_path / "data" / DATASETS["flickr30k"].folder, samples, kind="retrieval")
    flags = f"--data_dir={tmp_path / 'data'}", "--datasets=flickr30k", "--dtype=bfloat16", "--cache_dir="
    flags += ("--batch_size=64",)  # that of `encode_image`: bfloat16 rounds differently in another batch
    run(f"--weights={narrow}", f"--out={tmp_path / 'out'}", *flags, tiny=True)
    found = report(tmp_path / "out")
    assert "bfloat16" in found["run/descriptions.retrieval/flickr30k"]

    def recalls(dtype):
        model = load(narrow, dtype=dtype)
        cosines = np.float64(model.encode_image(images)) @ np.float64(model.encode_text(texts)).T
        ways = {"image_to_text": cosines, "text_to_image": cosines.T}
        ranks = {way: (x > np.diag(cosines)[:, None]).sum(axis=1) for way, x in ways.items()}
        return {f"retrieval/flickr30k/{way}/recall_at_{k}": (ranks[way] < k).mean() for way in ways for k in (1, 5, 10)}

    half, full = recalls("bfloat16"), recalls("float32")
    assert {name: found[name] for name in half} == pytest.approx(half)
    assert half != pytest.approx(full)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either --weights=FILE"),
        (("--weights=/nowhere.msgpack",), "/nowhere.msgpack: expected a file or directory"),
        (("--weights=WEIGHTS", "--datasets=cifar11"), "dataset or suite='cifar11' is none of paper, robustness"),
        (("--weights=WEIGHTS", "--evaluators=zeroshots"), "--evaluators='zeroshots'"),
        (("--weights=WEIGHTS", "digits"), "unexpected argument 'digits'; flags begin with --"),
        (("--weights=WEIGHTS", "--dtype=float16"), "float16"),
        (("--weights=WEIGHTS", "--preprocess=clip"), "preprocess='clip': expected one of openai"),
        (("--weights=WEIGHTS", "--wieghts=x"), "wieghts"),
        (("--weights=WEIGHTS", "--datasets="), "--datasets"),
        (("--weights=WEIGHTS", "--modules=no_such_module"), "no_such_module"),
    ],
)
def test_invalid_input_exits_with_2_and_one_sentence(weights, tmp_path, arguments, message):
    arguments = [argument.replace("WEIGHTS", str(weights)) for argument in arguments]
    ((printed, errors),) = run(*arguments, "--cache_dir=", f"--out={tmp_path / 'out'}", code=2)
    assert printed == "" and message in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["data_dir", "out", "standard_models", "groups", "categories", "cache_dir"])
def test_url_for_a_local_path_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--{name}=gs://bucket/x: expected a local path, got a URL"):
        evals_run.prepare(evals_run.Options("small.msgpack", **{name: "gs://bucket/x"}))
    assert not list(tmp_path.iterdir())


def test_missing_datasets_are_listed_with_instructions(weights, tmp_path):
    flags = "--datasets=birdsnap,flickr30k,winogavil", "--evaluators=zeroshot,retrieval,linear_probe"
    out, data = tmp_path / "out", tmp_path / "data"
    places = f"--weights={weights}", f"--out={out}", f"--data_dir={data}", "--cache_dir="
    ((printed, errors),) = run(*places, *flags, code=3)
    assert errors.splitlines()[-1] == "clip_jax.evaluate: no dataset was evaluated"
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
        assert f"{key} is skipped: " in printed and f"- {key}: " in card


# ---------------------------------------------------------------------------------------------------- damaged data

TEN = tuple(f"thing {class_id}" for class_id in range(10))


@pytest.fixture
def data(tmp_path):
    """Twelve images each for MNIST, CIFAR-10 and SVHN, in CLIP_benchmark's layout."""
    for first, name in enumerate(("mnist", "cifar10", "svhn")):
        images = [png_image(100 * first + row) for row in range(12)]
        write_classes(tmp_path / "data" / DATASETS[name].folder, images, [row % 10 for row in range(12)], TEN)
    return tmp_path / "data"


def test_a_damaged_dataset_is_listed_as_failed_and_the_others_evaluated(weights, data, tmp_path):
    folder = data / DATASETS["mnist"].folder
    shutil.rmtree(folder)
    write_classes(folder, [png_image(row) for row in range(4)], [0, 1, 2, 10], TEN)
    damage(data, "cifar10")
    flags = (f"--weights={weights}", f"--data_dir={data}", "--datasets=mnist,cifar10,svhn,dtd", "--cache_dir=")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text('{"run/weights": "others"}')  # overwritten, since --out names the directory
    ((printed, errors),) = run(*flags, f"--out={out}", code=3, tiny=True)
    found = report(out)
    assert {key.split("/")[1] for key in found if not key.startswith("run/")} == {"svhn"}
    failed = {key.removeprefix("run/failed."): value for key, value in found.items() if key.startswith("run/failed.")}
    assert set(failed) == {"zeroshot/mnist", "zeroshot/cifar10"}
    assert [key for key in found if key.startswith("run/skipped")] == ["run/skipped.zeroshot/dtd"]
    assert "10" in failed["zeroshot/mnist"] and "image 1 (" in failed["zeroshot/cifar10"]
    card, page = (out / "MODEL_CARD.md").read_text(), html.unescape((out / "report.html").read_text())
    for key, reason in failed.items():
        assert len(reason.splitlines()) == 1 and f"{key} failed: {reason}" in printed
        assert f"- {key}: failed: {reason}" in card and f"failed: {reason}</p>" in page
    assert errors.splitlines()[-1] == "clip_jax.evaluate: failed, without metrics: zeroshot/mnist, zeroshot/cifar10"


@pytest.mark.slow
def test_data_that_one_process_cannot_read_has_failed_on_all(weights, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    damage(other, "cifar10")  # in a batch of two the second row is the second process's
    shutil.rmtree(other / DATASETS["svhn"].folder)
    flags = (f"--weights={weights}", "--datasets=cifar10,svhn,mnist", "--cache_dir=", "--batch_size=2")
    out = tmp_path / "out"
    second = (f"--data_dir={other}",)
    output = run(*flags, f"--data_dir={data}", f"--out={out}", processes=2, second=second, code=3, tiny=True)
    found = report(out)
    assert "in: images (processes 1)" in found["run/failed.zeroshot/cifar10"]  # the bytes of one image differ
    assert found["run/skipped.zeroshot/svhn"].startswith("process 1: ")
    assert "without metrics: zeroshot/cifar10" in output[0][1] and "without metrics" not in output[1][1]
    run(*flags[:1], "--datasets=mnist", f"--data_dir={data}", f"--out={tmp_path / 'alone'}", "--cache_dir=", tiny=True)
    expected = {key: value for key, value in report(tmp_path / "alone").items() if key.startswith("zeroshot/")}
    assert expected and {key: found[key] for key in found if key.startswith("zeroshot/")} == expected


def test_a_killed_command_keeps_its_results(weights, data, tmp_path):
    shard = data / DATASETS["cifar10"].folder / "test" / "0.tar"
    shard.unlink()
    os.mkfifo(shard)  # reading blocks
    out = tmp_path / "out"
    flags = (f"--weights={weights}", f"--data_dir={data}", "--datasets=mnist,cifar10", "--cache_dir=", f"--out={out}")
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


# ------------------------------------------------------------------------------------------- report directories


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/emoji/params.msgpack", "emoji"),
        ("small.msgpack", "small"),
        ("/models/ViT-B-32.pt", "ViT-B-32"),
        ("/models/b32/open_clip_model.safetensors", "b32"),
        ("/models/vit.b32", "vit.b32"),
        ("vit_l14", "vit_l14"),
        ("runs/b32", "b32"),
        ("runs/b32/checkpoints/5000", "b32-5000"),
        ("hf-hub:openai/clip-vit-base-patch32", "clip-vit-base-patch32"),
    ],
)
def test_reports_are_named_after_the_weights(path, name):
    assert weights_name(path) == name


def test_a_report_of_other_weights_is_not_overwritten(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    directory = pathlib.Path("evaluations/x")
    check_same_weights(directory, "a/x/params.msgpack", "f" * 12)
    directory.mkdir(parents=True)
    other = {"run/weights": "b/x/params.msgpack", "run/fingerprint": "0" * 12}
    (directory / "report.json").write_text(json.dumps(other))
    check_same_weights(directory, "a/x/params.msgpack", "0" * 12)  # the same weights in another place
    with pytest.raises(ValueError, match=r"report of other weights, b/x/params\.msgpack: .*--out=evaluations/x-2"):
        check_same_weights(directory, "a/x/params.msgpack", "f" * 12)
    check_same_weights(directory, "b/x/params.msgpack", "f" * 12)  # the same path
