"""What a run refuses before it begins, what it writes, and when it gives up."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import clip_jax
from clip_jax import config as configs
from clip_jax.config import MODELS
from clip_jax.devices import distributed
from clip_jax.training import loop as train
from clip_jax.training import metrics, workdir
from tests import runs


@pytest.fixture(scope="module")
def tiny():
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny", runs.ROOT / runs.TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.from_config_dict(module.get_config())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from the command line to its end, exported."""
    directory = tmp_path_factory.mktemp("finished")
    process = runs.start(directory, f"--export={directory / 'params.msgpack'}", "--config.train.total_steps=20")
    table = process.communicate(timeout=240)
    assert process.returncode == 0, table[1]
    return directory, *table


def test_a_run_writes_config_versions_metrics_and_report(finished):
    directory, table, said = finished
    stored = configs.from_json((directory / "config.json").read_text())
    assert stored.train.total_steps == 20
    versions = json.loads((directory / "versions.json").read_text())
    assert versions["jax"] == jax.__version__ and versions["git_commit"]
    report = json.loads((directory / "report.json").read_text())
    key = "retrieval/shapes/image_to_text/recall_at_1"
    assert 0 <= report[key] <= 1 and report[f"{key}/candidates"] > 1 and 0 < report[f"{key}/chance"] < 1
    assert key in table
    assert "<html" in (directory / "report.html").read_text()
    assert list((directory / "tensorboard").glob("events*"))
    assert said.splitlines()[-1] == "finished"


def test_every_step_is_on_the_console_and_in_the_file(finished):
    directory, _, said = finished
    lines = [line for line in metrics.read_lines(epath.Path(directory)) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    for word in ("loss", "accuracy", "scale", "images/s", "data wait", "left"):
        assert word in next(line for line in said.splitlines() if line.startswith("step 20/20"))


def test_the_export_is_the_saved_state_and_loads_without_tensorflow(finished):
    directory, _, _ = finished
    model = clip_jax.load(directory / "params.msgpack")
    assert model.encode_text(["a red circle"]).shape == (1, 16)


def test_a_finished_run_started_again_only_measures(finished):
    directory, _, _ = finished
    before = (directory / "metrics.jsonl").read_text()
    words = runs.finish(runs.start(directory, "--config.train.total_steps=20"))[0]
    assert "step 20/" not in words and words.splitlines()[-1] == "finished"
    assert (directory / "metrics.jsonl").read_text() == before


def test_a_workdir_of_another_config_is_refused(finished):
    directory, _, _ = finished
    words = runs.finish(runs.start(directory, "--config.train.seed=5"), code=2)[0]
    assert "train.total_steps is 20 there, 40 here" in words and "train.seed is 0 there, 5 here" in words


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"source": "tfrecord"}, "data.files"),
        ("data", {"source": "tfrecord", "files": "/nowhere/*.tfrecord"}, "/nowhere/"),
        ("train", {"batch_size": 12}, "train.batch_size=12 does not divide over 8 devices; use 8 or 16"),
        ("train", {"total_steps": 0}, "give one of train.total_steps"),
        ("optim", {"warmup_steps": 40}, "optim.warmup_steps=40"),
        ("tokenizer", {"path": "/nowhere/merges.txt"}, "/nowhere/merges.txt"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(tiny, tmp_path, section, changes, message):
    config = dataclasses.replace(tiny, **{section: dataclasses.replace(getattr(tiny, section), **changes)})
    with pytest.raises(ValueError, match=message):
        train.prepare(config, epath.Path(tmp_path))
    assert not list(Path(tmp_path).iterdir())


def test_a_vocabulary_that_does_not_fit_is_refused(tiny, tmp_path):
    text = dataclasses.replace(tiny.model.text, vocab_size=100, eos_id=99)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, text=text))
    with pytest.raises(ValueError, match="vocab_size"):
        train.prepare(config, epath.Path(tmp_path))


def test_an_end_token_that_the_tokenizer_does_not_have_is_refused(tiny, tmp_path):
    text = dataclasses.replace(tiny.model.text, eos_id=5)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, text=text))
    with pytest.raises(ValueError, match="model.text.eos_id=5.*799"):
        train.prepare(config, epath.Path(tmp_path))


def test_so_many_steps_in_a_row_that_are_not_finite_end_the_run(tiny):
    meter = metrics.Meter(16)
    outputs = {"loss": jnp.nan, "grad_norm": jnp.nan, "skipped_steps": 3.0, "consecutive_skipped_steps": 9.0}
    outputs = {name: jnp.float32(value) for name, value in outputs.items()}
    train._count(meter, outputs, tiny)
    with pytest.raises(train.NonFiniteError, match="10 steps in a row were not finite"):
        train._count(meter, outputs | {"consecutive_skipped_steps": jnp.float32(10)}, tiny)


def test_hosts_that_agree_go_on():
    distributed.check_equal_on_all_processes({"config": "a", "training data": "b"})


def test_a_config_that_differs_is_named_key_by_key(tiny):
    other = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, seed=3))
    workdir.check_same_run(tiny, tiny, epath.Path("runs/a"))
    with pytest.raises(ValueError, match="runs/a belongs to a run with another config: train.seed is 0 there, 3 here"):
        workdir.check_same_run(tiny, other, epath.Path("runs/a"))


def test_metrics_that_a_kill_cut_short_or_that_come_again_are_dropped(tmp_path):
    path = epath.Path(tmp_path)
    (path / metrics.METRICS_FILE).write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    writer = metrics.Writer(path, first_step=1, active=True)
    writer.write(2, {"loss": float("nan")})
    writer.close()
    assert metrics.read_lines(path) == [{"step": 1, "loss": 2}, {"step": 2, "loss": None}]


def test_utilisation_is_the_models_flops_over_the_peak_of_all_devices():
    """ViT-L/14 needs 526 GFLOP a pair; four v7x devices are two chips of 2,307 TFLOP/s."""
    config = configs.Config(model=MODELS["vit_l14"])
    seconds = train._pair_seconds(config, [types.SimpleNamespace(device_kind="TPU7x")] * 4)
    np.testing.assert_allclose(seconds, 526.0e9 / (2 * 2307e12), rtol=1e-3)
    assert train._pair_seconds(config, jax.devices("cpu")) == 0
    meter = metrics.Meter(10, pair_seconds=0.5)
    meter.add({"loss": 1.0})
    record = meter.flush()
    assert record["mfu"] == 0.5 * record["images_per_second"]


def test_the_meter_gives_means_and_rates():
    meter = metrics.Meter(batch_size=10)
    meter.add({"loss": 1.0})
    meter.add({"loss": 3.0})
    record = meter.flush()
    assert record["loss"] == 2.0 and record["images_per_second"] > 0 and 0 <= record["data_wait"] <= 1
