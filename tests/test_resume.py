"""Interrupted runs in one process: an interrupted and resumed run writes the records of an uninterrupted one."""

import dataclasses
import json
import shutil

import jax
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

import clip_jax
from clip_jax import paths
from clip_jax.devices.distributed import Preempted, PreemptionMonitor
from clip_jax.evals.suite import Suite
from clip_jax.training import loop, metrics
from clip_jax.training.checkpoint import Checkpoints
from tests import runs

pytestmark = pytest.mark.slow

TOTAL, EVERY = 12, 4  # steps of a run; steps between two checkpoints, and between two evaluations
STAGES = ("storage", "tokenizer", "transfer")
DATA = [f"data/{x}" for x in (*STAGES, "megabytes_per_second", "requests_per_second", "failed_requests")]
TIMES = ("images_per_second", "data_wait", "mfu", metrics.EVAL_SECONDS, *DATA)  # differ from run to run


class Killed(BaseException):
    """SIGKILL, simulated: nothing handles it."""


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Cache compiled programs on disk, as each run has its own jitted functions."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config():
    """Return a config whose logging interval divides neither the checkpoints' nor the evaluations'."""
    config, _ = runs.tiny_model()
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, total_steps=TOTAL, log_every_steps=3),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=EVERY),
        eval=dataclasses.replace(config.eval, every_steps=EVERY),
    )


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert loop.train(config, str(directory))
    return directory


def _records(directory):
    """Return the records of a run without times."""
    lines = metrics.read_lines(epath.Path(directory))
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def _assert_same_run(directory, uninterrupted):
    assert _records(directory) == _records(uninterrupted)
    assert runs.fingerprint(directory, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)
    reports = [json.loads((path / "report.json").read_text()) for path in (directory, uninterrupted)]
    measured = [{k: v for k, v in report.items() if not k.startswith("run/")} for report in reports]
    assert measured[0] == measured[1]


def test_records_have_training_and_evaluation_metrics(uninterrupted):
    lines = metrics.read_lines(epath.Path(uninterrupted))
    assert [(line["step"], metrics.EVAL_SECONDS in line) for line in lines] == [
        (3, False), (4, True), (6, False), (8, True), (9, False), (12, False)
    ]  # fmt: skip
    assert lines[0]["examples_seen"] == 3 * 16 and lines[0]["epoch"] == 3 * 16 / 100


def test_killed_during_evaluation_evaluates_that_step_when_resumed(config, uninterrupted, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_and_wait(self, *arguments):
        save(self, *arguments)
        self.wait()

    def killed(self, embedder):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", save_and_wait)
        patch.setattr(Suite, "evaluate", killed)
        loop.train(config, str(tmp_path))
    assert [line["step"] for line in _records(tmp_path)] == [3]
    assert loop.train(config, str(tmp_path))
    _assert_same_run(tmp_path, uninterrupted)


def _preempt(monkeypatch, checks):
    """Raise Preempted at a check: there is one per step, and one per batch of the evaluation."""
    count = 0

    def check(self):
        nonlocal count
        count += 1
        if count == checks:
            raise Preempted

    monkeypatch.setattr(PreemptionMonitor, "check", check)


def test_preempted_during_evaluation_evaluates_that_step_when_resumed(config, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _preempt(patch, checks=EVERY + 1)
        assert not loop.train(config, str(tmp_path))
    assert loop.train(config, str(tmp_path))
    _assert_same_run(tmp_path, uninterrupted)


def test_preempted_run_with_remote_workdir(config, uninterrupted, tmp_path, monkeypatch):
    """An object store cannot append: every flush is an object, and the export is written once."""
    for module in (metrics, paths):
        monkeypatch.setattr(module, "is_url", lambda path: str(path).startswith(str(tmp_path)))
    directory, export = tmp_path / "run", tmp_path / "export/params.msgpack"
    with monkeypatch.context() as patch:
        _preempt(patch, checks=EVERY + 3 + 1)  # three batches are evaluated at step 4
        assert not loop.train(config, str(directory), str(export))
    assert loop.train(config, str(directory), str(export))
    monkeypatch.undo()
    assert not (directory / metrics.METRICS_FILE).exists()
    assert len(list((directory / metrics.METRICS_FOLDER).iterdir())) > 2
    _assert_same_run(directory, uninterrupted)
    assert clip_jax.load(export).encode_text(["a red circle"]).shape == (1, 16)


def test_damaged_last_checkpoint_is_trained_again(config, uninterrupted, tmp_path, monkeypatch):
    close, damaged = metrics.TrainingLog.close, []

    def damage_once(self):
        close(self)
        if not damaged:
            damaged.append(runs.damage_checkpoint(tmp_path / f"checkpoints/{TOTAL}"))

    monkeypatch.setattr(metrics.TrainingLog, "close", damage_once)
    assert loop.train(config, str(tmp_path))
    assert (tmp_path / f"checkpoints/{TOTAL}.corrupt").exists()
    _assert_same_run(tmp_path, uninterrupted)


def test_repeatedly_damaged_last_checkpoint_is_an_error(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_train_steps", lambda *arguments: None)  # as if each checkpoint had been damaged
    with pytest.raises(RuntimeError, match=f"the checkpoint of step {TOTAL} was damaged 3 times"):
        loop.train(config, str(tmp_path))
    assert not (tmp_path / "report.json").exists()


def test_added_data_is_refused_without_extend_and_continues_in_the_new_order(config, uninterrupted, tmp_path, caplog):
    directory = shutil.copytree(uninterrupted, tmp_path / "run")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, options={"examples": 150}),
        train=dataclasses.replace(config.train, total_steps=TOTAL + EVERY),
    )
    with pytest.raises(ValueError, match="not the data of the run .* add --extend if data was added"):
        loop.train(config, str(directory))
    assert loop.train(config, str(directory), extend=True)
    assert "from 100 to 150 pairs, in a new order: step 13 is at pair 42 of epoch 1 of the new data" in caplog.text
    assert _records(directory)[-1]["epoch"] == (TOTAL + EVERY) * 16 / 150
    with pytest.raises(ValueError, match="has a run of 150 examples: --extend expected at least as many, got 100"):
        fewer = dataclasses.replace(config.data, options={"examples": 100})
        loop.train(dataclasses.replace(config, data=fewer), str(directory), extend=True)
