"""Evaluation on registry datasets: by the training loop, and by a process that follows its checkpoints."""

import contextlib
import json
import os
import pathlib
import shutil
import threading

import jax
import numpy as np
import pytest
from etils import epath

import clip_jax
from clip_jax.devices import sharding
from clip_jax.evals.datasets.registry import DATASETS
from clip_jax.interop import convert, reading
from clip_jax.training import metrics
from clip_jax.training.follow import follow
from tests import runs
from tests.evaluations import damage, png_image, report, run, write_classes

STEPS = [7, 14, 20]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the workdir of a finished run with checkpoints of all STEPS."""
    directory = tmp_path_factory.mktemp("finished")
    runs.finish(runs.start(directory, config="tests/configs/tiny_registry.py"))
    return epath.Path(directory)


@pytest.fixture
def copy(finished, tmp_path):
    return epath.Path(shutil.copytree(finished, tmp_path / "run"))


def _stored(directory):
    """Return every file and folder below a directory with size and modification time."""
    paths = sorted(os.path.join(at, name) for at, folders, files in os.walk(directory) for name in (*folders, *files))
    return [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]


def _follow(directory, evaluated=(), mesh=None):
    found = {}
    follow(directory, mesh or sharding.make_mesh(), lambda at, *model: found.update({at: model}), evaluated, 0.05)
    return found


def test_loop_evaluates_registry_datasets_and_lists_skipped_ones(finished):
    report = json.loads((finished / "report.json").read_text())
    key = "zeroshot/digits/top1"
    assert 0 <= report[f"{key}/ci_low"] <= report[key] <= report[f"{key}/ci_high"] <= 1
    assert (
        "wds_cifar10_test" in report["run/skipped.little_images"] or "data_dir" in report["run/skipped.little_images"]
    )
    assert [line["step"] for line in metrics.read_lines(finished) if key in line] == [10]


def test_every_checkpoint_is_evaluated_once_and_the_workdir_is_unchanged(finished):
    before = _stored(finished)
    found = _follow(finished)
    assert list(found) == STEPS
    assert _stored(finished) == before
    config, params = found[20]
    assert config.model.embed_dim == 16 and set(params) == {"image", "text", "logit_scale"}
    assert not np.allclose(params["image"]["projection"], found[7][1]["image"]["projection"])
    assert not _follow(finished, evaluated=STEPS)


def test_damaged_checkpoint_is_skipped_and_not_renamed(copy):
    for path in pathlib.Path(copy, "checkpoints/14").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    before = _stored(copy)
    assert list(_follow(copy)) == [7, 20]
    assert _stored(copy) == before


def test_command_evaluates_every_checkpoint_and_reports_failed_datasets(finished, tmp_path):
    classes = tuple(f"thing {class_id}" for class_id in range(10))
    folder = tmp_path / "data" / DATASETS["cifar10"].folder
    write_classes(folder, [png_image(row) for row in range(10)], list(range(10)), classes)
    damage(tmp_path / "data", "cifar10")
    flags = (
        f"--follow={finished}",
        "--datasets=digits,cifar10",
        f"--data_dir={tmp_path}/data",
        f"--out={tmp_path}/out",
    )
    run(*flags, code=3, tiny=True)
    lines = [json.loads(line) for line in (tmp_path / "out/evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == STEPS and all("zeroshot/digits/top1" in line for line in lines)
    assert "image 1 (" in report(tmp_path / "out")["run/failed.zeroshot/cifar10"]
    run(*flags, tiny=True)  # all are evaluated
    assert len((tmp_path / "out/evaluations.jsonl").read_text().splitlines()) == len(lines)


def test_a_truncated_last_line_is_evaluated_again_and_damages_no_other(finished, tmp_path):
    flags = (f"--follow={finished}", "--datasets=digits", f"--out={tmp_path}", "--cache_dir=")
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"step": 7, "zeroshot/digits/top1": 0.5}\n{"step": 14, "zeroshot/dig')  # killed while writing
    run(*flags, tiny=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == STEPS and lines[0]["zeroshot/digits/top1"] == 0.5
    assert all("zeroshot/digits/top1" in line for line in lines)


def test_follow_waits_for_an_unfinished_run(copy):
    report, last = copy / "report.json", copy / "checkpoints/20"
    report.rename(copy / "report.later")
    last.rename(copy / "20")
    found = []

    def end():
        while 14 not in found:
            pass
        (copy / "20").rename(last)
        (copy / "report.later").rename(report)

    thread = threading.Thread(target=end)
    thread.start()
    follow(copy, sharding.make_mesh(), lambda at, *_: found.append(at), (), 0.05)
    thread.join()
    assert found == STEPS


def test_parameters_are_equal_on_any_mesh(finished):
    single, sharded = (_follow(finished, mesh=mesh)[20][1] for mesh in (None, sharding.make_mesh(fsdp=4)))
    jax.tree.map(np.testing.assert_array_equal, single, sharded)


def test_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected the --workdir of a run"):
        _follow(epath.Path(tmp_path))


def test_weights_of_an_unfinished_run_are_those_of_its_newest_checkpoint_or_of_a_given_one(copy):
    (copy / "report.json").unlink()
    before, followed = _stored(copy), {}
    mesh = sharding.make_mesh()
    with contextlib.suppress(StopIteration):
        follow(copy, mesh, lambda at, *model: _record(followed, at, model), ())
    for path, step in ((copy, 20), (copy / "checkpoints/7", 7), (copy / "checkpoints/14", 14)):
        weights = reading.read(str(path))
        config, params = followed[step]
        assert (weights.config.model, weights.config.tokenizer) == (config.model, config.tokenizer)
        assert weights.config.source == f"clip_jax run run, step {step}" and weights.format == "clip_jax run"
        jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    assert _stored(copy) == before


def _record(followed, at, model):
    followed[at] = model
    if at == STEPS[-1]:
        raise StopIteration


def test_a_damaged_newest_checkpoint_is_passed_over_and_a_damaged_or_absent_one_is_an_error(copy):
    runs.damage_checkpoint(copy / "checkpoints/20")
    before = _stored(copy)
    assert reading.read(str(copy)).config.source.endswith("step 14")
    for step in (20, 21):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{step}: expected"):
            reading.read(str(copy / f"checkpoints/{step}"))
    assert _stored(copy) == before


def test_commands_take_the_workdir_of_an_unfinished_run(copy, tmp_path):
    (copy / "report.json").unlink()
    model = clip_jax.load(copy)
    run(f"--weights={copy}", "--datasets=digits", "--cache_dir=", f"--out={tmp_path / 'out'}")
    assert report(tmp_path / "out")["run/weights"] == str(copy)
    convert.convert(copy / "checkpoints/7", tmp_path / "seven.msgpack")
    seven = clip_jax.load(tmp_path / "seven.msgpack")
    image = np.zeros((1, model.config.model.image.image_size, model.config.model.image.image_size, 3), np.uint8)
    assert np.abs(model.encode_image(image) - seven.encode_image(image)).max() > 1e-6
