"""Training: checks before the first step, files of a run, metrics."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import clip_jax
from clip_jax import config as configs
from clip_jax import paths
from clip_jax.config import MODELS
from clip_jax.config.resolve import LOCAL_PATHS
from clip_jax.devices import distributed
from clip_jax.evals.suite import load_suite
from clip_jax.training import loop, metrics, workdir
from tests import commands, runs

FLAGS = ["--config.data.validation_fraction=0.2", "--config.eval.batch_size=8", "--config.eval.every_steps=10"]


@pytest.fixture(scope="module")
def tiny():
    return runs.tiny_model()[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the command to its end; return the workdir, stdout and stderr."""
    directory = tmp_path_factory.mktemp("finished")
    process = runs.start(directory, f"--export={directory / 'params.msgpack'}", "--config.train.total_steps=20", *FLAGS)
    table, messages = process.communicate(timeout=240)
    assert process.returncode == 0, messages
    return directory, table, messages


def _changed(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


# ----------------------------------------------------------------------------------------------------- finished runs


def test_run_writes_config_versions_metrics_and_report(finished):
    directory, table, messages = finished
    stored = configs.from_json((directory / "config.json").read_text())
    assert stored.train.total_steps == 20
    versions = json.loads((directory / "versions.json").read_text())
    assert versions["jax"] == jax.__version__ and versions["git_commit"]
    report = json.loads((directory / "report.json").read_text())
    key = "retrieval/shapes/image_to_text/recall_at_1"
    assert 0 <= report[key] <= 1 and report[f"{key}/candidates"] > 1 and 0 < report[f"{key}/chance"] < 1
    assert key in table and "validation/loss" in table
    (evaluated,) = (line for line in metrics.read_lines(epath.Path(directory)) if line["step"] == 10 and key in line)
    assert 0 < report["validation/loss"] != evaluated["validation/loss"] > 0
    assert "<html" in (directory / "report.html").read_text()
    assert "Loss, held out" in (directory / "report.html").read_text()
    (events,) = (directory / "tensorboard").glob("events*")
    assert b"validation/loss" in events.read_bytes()
    assert messages.splitlines()[-1] == "finished"
    for tower in ("image", "text"):
        assert messages.count(f"attention of the {tower} tower: XLA: the kernel needs a TPU") == 1


def test_every_record_is_on_the_console_and_in_the_file(finished):
    directory, _, messages = finished
    lines = [line for line in metrics.read_lines(epath.Path(directory)) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    for word in ("loss", "accuracy", "scale", "lr", "images/s", "data wait", "left"):
        assert word in next(line for line in messages.splitlines() if line.startswith("step 20/20"))


def test_log_states_that_an_epoch_ends_within_a_batch(finished):
    assert "87 examples are 5.4375 batches of 16: an epoch ends within a batch" in finished[2]


def test_export_loads_for_inference(finished):
    directory, _, _ = finished
    model = clip_jax.load(directory / "params.msgpack")
    assert model.encode_text(["a red circle"]).shape == (1, 16)


@pytest.mark.slow
def test_restarted_finished_run_only_evaluates(finished):
    directory, _, _ = finished
    before = (directory / "metrics.jsonl").read_text()
    messages = runs.finish(runs.start(directory, "--config.train.total_steps=20", *FLAGS))[0]
    assert "step 20/" not in messages and messages.splitlines()[-1] == "finished"
    assert (directory / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_workdir_alone_resumes_with_the_stored_config(finished, tmp_path):
    for directory, code, message in (
        (finished[0], 0, "finished"),
        (tmp_path, 2, "has no run to resume; give --config"),
    ):
        process = commands.run(["-m", "clip_jax.main", f"--workdir={directory}"], timeout=240)
        assert process.returncode == code and message in process.stderr.splitlines()[-1]


def test_workdir_of_another_config_is_refused(finished):
    directory, _, _ = finished
    messages = runs.finish(runs.start(directory, "--config.train.seed=5", *FLAGS), code=2)[0]
    assert "train.total_steps: expected 20, got 40" in messages and "train.seed: expected 0, got 5" in messages
    assert "--extend" not in messages  # would not help


def test_longer_run_is_refused_without_extend_and_other_changes_with_it(tiny):
    longer = _changed(tiny, "train", total_steps=80)
    with pytest.raises(ValueError, match="train.total_steps: expected 40, got 80. .* add --extend to extend that run"):
        workdir.check_same_config(tiny, longer, epath.Path("run"))
    workdir.check_same_config(tiny, longer, epath.Path("run"), extend=True)
    with pytest.raises(ValueError, match="another config: train.seed: expected 0, got 5. Use another --workdir, or"):
        workdir.check_same_config(tiny, _changed(longer, "train", seed=5), epath.Path("run"), extend=True)


@pytest.mark.slow
def test_extended_run_trains_on_and_prints_the_new_schedule(finished, tmp_path):
    directory = shutil.copytree(finished[0], tmp_path / "run")
    messages = runs.finish(runs.start(directory, "--config.train.total_steps=24", "--extend", *FLAGS))[0]
    assert (
        "extended from 20 to 24 steps: the cosine ends at step 24; learning rate of step 21: 0.000105, was 0"
        in messages
    )
    assert "step 21/24" in messages and "step 20/24" not in messages
    assert configs.from_json((directory / "config.json").read_text()).train.total_steps == 24
    assert (directory / "report_step_20.json").exists() and (directory / "report.json").exists()
    refused = runs.finish(runs.start(tmp_path / "new", "--extend"), code=2)[0]
    assert "has no run to extend" in refused
    refused = runs.finish(runs.start(directory, "--config.train.total_steps=22", "--extend", *FLAGS), code=2)[0]
    assert "has a run of 24 steps: --extend expected at least as many, got 22" in refused
    assert configs.from_json((directory / "config.json").read_text()).train.total_steps == 24


# ------------------------------------------------------------------------------------- checks before the first step


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"source": "tfrecord", "options": {}}, "data.files"),
        ("data", {"source": "tfrecord", "options": {}, "files": "/nowhere/*.tfrecord"}, "/nowhere/"),
        ("data", {"files": "a.tfrecord"}, "data.files='a.tfrecord': data.source='synthetic' reads no files; set data"),
        ("data", {"source": "emoji", "options": {}, "files": "a"}, "data.source='emoji' reads no files; .*'tfrecord'"),
        ("train", {"batch_size": 12}, "train.batch_size=12 does not divide over 8 devices; use 8 or 16"),
        ("train", {"total_steps": 0}, "give one of train.total_steps"),
        ("optim", {"warmup_steps": 40}, "optim.warmup_steps=40"),
        ("tokenizer", {"path": "/nowhere/merges.txt"}, "/nowhere/merges.txt"),
    ],
)
def test_unusable_config_is_refused_before_the_first_step(tiny, tmp_path, section, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.prepare(_changed(tiny, section, **changes), epath.Path(tmp_path))
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("key", LOCAL_PATHS)
def test_url_for_a_local_path_is_refused_before_the_first_step(tiny, tmp_path, monkeypatch, key):
    """A URL became a local folder called `gs:`."""
    monkeypatch.chdir(tmp_path)
    section, name = key.split(".")
    with pytest.raises(ValueError, match=rf"{key}=gs://bucket/x: expected a local path, got a URL; copy it"):
        loop.prepare(_changed(tiny, section, **{name: "gs://bucket/x"}), epath.Path(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_all_path_keys_of_the_config_are_checked():
    """Every key of the schema that is called like a path is checked, or supports URLs."""
    keys = {key for key in configs.flatten(dataclasses.asdict(configs.Config())) if key.count(".") == 1}
    paths = {key for key in keys if key.endswith(("_dir", "path", "files", "weights"))}
    assert paths == {*LOCAL_PATHS, "data.files"}


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ("{}/folder", "--export={}/folder: expected a file, got a directory; give e.g. {}/folder/params.msgpack"),
        ("{}/file/params.msgpack", "--export={}/file/params.msgpack: expected a directory {}/file, got a file"),
        ("https://host/params.msgpack", "--export=https://host/params.msgpack: expected a local path, gs:// or s3://"),
    ],
)
def test_unwritable_export_is_refused_before_the_first_step(tiny, tmp_path, export, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ValueError, match=message.format(*[tmp_path] * 2)):
        loop.prepare(tiny, epath.Path(tmp_path / "run"), export.format(tmp_path))
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("directory", "message"),
    [("https://host/run", "--workdir=https://host/run: expected a local path, gs:// or s3://"),
     ("{}/file/run", "--workdir={}/file/run: cannot write to")],
)  # fmt: skip
def test_unwritable_workdir_is_refused_before_the_first_step(tiny, tmp_path, directory, message):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ValueError, match=message.format(tmp_path)):
        loop.train(tiny, directory.format(tmp_path))


def test_missing_baselines_dataset_is_refused_before_the_first_step(tiny):
    for name, message in (("train", "is none of"), ("cifar10", "expected the directory of the evaluation data")):
        with pytest.raises(ValueError, match=message):
            loop._load_baselines_dataset(_changed(tiny, "eval", baselines_dataset=name))


def test_unknown_option_of_an_evaluator_is_refused_before_the_first_step(tiny):
    task = configs.EvalTask("few_shot", "synthetic", {"shot": [1]})
    message = (
        r"eval\.tasks\.x\.options: evaluator 'few_shot' has no option 'shot'; did you mean 'shots'\? Its options: "
    )
    message += "shots, seeds"
    with pytest.raises(ValueError, match=message):
        load_suite(configs.EvalConfig(tasks={"x": task}), tiny.data)


def test_threshold_without_a_task_is_refused(tiny):
    for key in ("retrieval/shape/image_to_text/recall_at_1", "zeroshot/shapes/top1", "retrieval/shapes"):
        config = _changed(tiny, "eval", thresholds={key: 0.5})
        with pytest.raises(ValueError, match=rf"eval.thresholds: expected .* \(retrieval/shapes/\), got '{key}'"):
            configs.resolve(config, devices=8)
    valid = _changed(tiny, "eval", thresholds={"retrieval/shapes/image_to_text/recall_at_1": 0.5})
    assert configs.resolve(valid, devices=8).total_steps == 40


def test_threshold_without_a_metric_is_logged(tiny, caplog):
    """It was stored in the report and neither passed nor missed."""
    keys = [f"retrieval/shapes/image_to_text/{name}" for name in ("recall_at_1", "recal_at_5")]
    config = dataclasses.replace(tiny.eval, thresholds=dict.fromkeys(keys, 0.5))
    results = {f"retrieval/shapes/image_to_text/recall_at_{k}": 0.3 for k in (1, 5)}
    assert load_suite(tiny.eval, tiny.data).thresholds(config, results) == {f"{keys[0]}/threshold": 0.5}
    assert f"no metric '{keys[1]}'; did you mean 'retrieval/shapes/image_to_text/recall_at_5'?" in caplog.text


def test_wrong_vocabulary_size_is_refused(tiny, tmp_path):
    text = dataclasses.replace(tiny.model.text, vocab_size=100, eos_id=99)
    with pytest.raises(ValueError, match="vocab_size"):
        loop.prepare(_changed(tiny, "model", text=text), epath.Path(tmp_path))


def test_wrong_end_token_is_refused(tiny, tmp_path):
    text = dataclasses.replace(tiny.model.text, eos_id=5)
    with pytest.raises(ValueError, match="model.text.eos_id: expected 799 .* got 5"):
        loop.prepare(_changed(tiny, "model", text=text), epath.Path(tmp_path))


def test_equal_values_on_all_processes_pass():
    distributed.check_equal_on_all_processes({"config": "a", "training data": "b"})


def test_message_about_another_config_has_the_differing_keys(tiny):
    other = _changed(tiny, "train", seed=3)
    workdir.check_same_config(tiny, tiny, epath.Path("runs/a"))
    with pytest.raises(ValueError, match="runs/a belongs to a run with another config: train.seed: expected 0, got 3"):
        workdir.check_same_config(tiny, other, epath.Path("runs/a"))


# ----------------------------------------------------------------------------------------------------------- metrics


def _log(directory, config, **changes):
    options = {"first_step": 0, "total_steps": 40, "epoch_examples": 100} | changes
    return metrics.TrainingLog(epath.Path(directory), config.train, lambda step: 0.1, **options)


def test_consecutive_steps_that_are_not_finite_end_the_run(tiny, tmp_path):
    log = _log(tmp_path, tiny)
    outputs = {"loss": jnp.nan, "grad_norm": jnp.nan, "skipped_steps": 3.0, "consecutive_skipped_steps": 9.0}
    outputs = {name: jnp.float32(value) for name, value in outputs.items()}
    log.add(1, outputs, 0)
    with pytest.raises(metrics.NonFiniteError, match="10 consecutive steps were not finite .loss nan"):
        log.add(2, outputs | {"consecutive_skipped_steps": jnp.float32(10)}, 0)
    log.close()


@pytest.mark.parametrize("outputs", [{}, {"loss": jnp.float32(2)}, {"my_metric": jnp.float32(1)}])
def test_missing_metrics_are_not_an_error(tiny, tmp_path, capsys, outputs):
    """A registered loss returns metrics of its own."""
    log = _log(tmp_path, tiny)
    log.add(1, outputs, 0)
    log.close()
    (line,) = metrics.read_lines(epath.Path(tmp_path))
    assert line["examples_seen"] == 16 and outputs.keys() <= line.keys()
    assert ("loss 2.0000" in capsys.readouterr().err) == ("loss" in outputs)


def test_counts_of_replaced_and_filtered_records_go_on_after_a_resume(tiny, tmp_path):
    saved = None
    for step in (1, 2):
        log = _log(tmp_path, tiny, first_step=step - 1, saved=saved)
        log.add(step, {}, 2, {"min_image_size": 3})
        saved = json.loads(json.dumps(log.state()))
        log.close()
    counts = [
        (line["replaced_records"], line["filtered_records/min_image_size"])
        for line in metrics.read_lines(epath.Path(tmp_path))
    ]
    assert counts == [(2, 3), (4, 6)]


def test_remaining_time_is_that_of_the_steps_after_the_first_record(capsys, monkeypatch):
    """The first record's time is mostly compilation."""
    clock = iter([1000.0, 1002.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    progress = metrics.Progress(100, active=True)
    for step in (1, 11):
        progress.show(step, {"loss": 2.0})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 1/100  loss 2.0000"
    assert second == "step 11/100  loss 2.0000  left 0:00:18"


def test_records_after_the_restored_step_and_a_truncated_line_are_dropped(tmp_path):
    path = epath.Path(tmp_path)
    (path / metrics.METRICS_FILE).write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    writer = metrics.Writer(path, first_step=1, active=True)
    writer.write(2, {"loss": float("nan")})
    writer.close()
    assert metrics.read_lines(path) == [{"step": 1, "loss": 2}, {"step": 2, "loss": None}]


def test_records_are_dropped_atomically(tmp_path, monkeypatch):
    """A kill while the file is rewritten leaves the old file."""
    path = epath.Path(tmp_path)
    content = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'
    (path / metrics.METRICS_FILE).write_text(content)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(paths.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.Writer(path, first_step=1, active=True)
    assert (path / metrics.METRICS_FILE).read_text() == content


def test_metrics_of_a_remote_workdir_are_never_appended(tmp_path, monkeypatch):
    path = epath.Path(tmp_path)
    monkeypatch.setattr(metrics, "is_url", lambda path: True)
    for first_step in (0, 2):  # the second writer drops step 3
        writer = metrics.Writer(path, first_step=first_step, active=True)
        for step in range(first_step + 1, 4):
            writer.write(step, {"loss": float(10 * first_step + step)})
            writer.flush()
        writer.close()
    parts = sorted(file.name for file in (path / metrics.METRICS_FOLDER).iterdir())
    assert parts == [f"part-0000{part}.jsonl" for part in range(4)]
    assert [(line["step"], line["loss"]) for line in metrics.read_lines(path)] == [(1, 1), (2, 2), (3, 23)]


def test_mfu_is_model_flops_over_the_peak_of_all_devices():
    """ViT-L/14 needs 526 GFLOP a pair; four v7x devices are two chips of 2,307 TFLOP/s."""
    config = configs.Config(model=MODELS["vit_l14"])
    seconds = loop._pair_seconds(config, [types.SimpleNamespace(device_kind="TPU7x")] * 4)
    np.testing.assert_allclose(seconds, 526.0e9 / (2 * 2307e12), rtol=1e-3)
    assert loop._pair_seconds(config, jax.devices("cpu")) == 0
    meter = metrics.Meter(10, pair_seconds=0.5)
    meter.add({"loss": 1.0})
    record = meter.flush()
    assert record["mfu"] == 0.5 * record["images_per_second"]


def test_meter_returns_means_and_rates():
    meter = metrics.Meter(batch_size=10)
    meter.add({"loss": 1.0})
    meter.add({"loss": 3.0, "sometimes": 5.0})
    record = meter.flush()
    assert record["loss"] == 2.0 and record["images_per_second"] > 0 and 0 <= record["data_wait"] <= 1
    assert record["sometimes"] == 5.0


def test_rates_are_those_of_the_time_without_pauses(monkeypatch):
    """20 steps of 10 pairs in 8 seconds, of which 2 were waited for batches, after a pause of 5."""
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    meter = metrics.Meter(batch_size=10, pair_seconds=0.01)
    for _ in range(20):
        meter.wait(0.1)
        meter.add({"loss": 1.0})
    meter.pause(5.0)
    clock[0] += 13.0
    record = meter.flush()
    rates = {name: record[name] for name in ("data_wait", "images_per_second", "mfu")}
    assert rates == pytest.approx({"data_wait": 0.25, "images_per_second": 25.0, "mfu": 0.25})
    clock[0] += 1.0
    assert meter.flush()["data_wait"] == 0


def test_a_long_wait_for_data_names_the_stage(tiny, tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    rates = {"data/storage": 0.2, "data/tokenizer": 0.1}
    log = _log(tmp_path, tiny, data_rates=lambda: rates)
    found = []
    for step, waited, storage, tokenizer in (
        (10, 9.0, 0.9, 0.0),
        (20, 9.0, 0.1, 0.8),
        (30, 9.0, 0.2, 0.2),
        (40, 0.1, 1, 0),
    ):
        rates |= {"data/storage": storage, "data/tokenizer": tokenizer}
        log.wait(waited)
        clock[0] += 10.0
        log.add(step, {"loss": jnp.float32(1)}, 0)
        found.append(capsys.readouterr().err.split("data wait ")[1].split("  ")[0].strip())
    log.close()
    assert found == ["90% (storage)", "90% (tokenizer)", "90% (decode)", "1%"]
    assert metrics.read_lines(epath.Path(tmp_path))[0]["data/storage"] == 0.9


def test_meter_continues_a_restored_window():
    whole, first = metrics.Meter(10), metrics.Meter(10)
    for loss in (1.0, 0.1, 0.7):
        whole.add({"loss": loss})
    for loss in (1.0, 0.1):
        first.add({"loss": loss})
    second = metrics.Meter(10, window=json.loads(json.dumps(first.window())))
    second.add({"loss": 0.7})
    assert second.flush()["loss"] == whole.flush()["loss"]
