"""Batches are copied to the devices while these compute, and the stage for which steps wait is named."""

import collections
import dataclasses
import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from clip_jax import data
from clip_jax.data import pipeline
from clip_jax.evals.suite import load_suite
from clip_jax.tokenizers import ClipBPE
from clip_jax.training import loop, metrics, startup
from tests import runs


@pytest.fixture(scope="module")
def tiny():
    return runs.tiny_model()[0]


def _with(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _steps_without_a_model(config, directory, monkeypatch, events):
    """Run the loop with a step that computes nothing; append the order of copies, steps and reads of metrics."""
    to_global, device_get, counts = loop.sharding.to_global, jax.device_get, collections.Counter()

    def record(event, number):
        events.append((event, number))

    def put(batch, mesh):
        counts["put"] += 1
        record("put", counts["put"])
        return to_global(batch, mesh)

    def train_step(state, batch):
        at = int(state.step) + 1
        record("step", at)
        return dataclasses.replace(state, step=jnp.int32(at)), {"loss": jnp.float32(at)}

    def get(outputs):
        found = device_get(outputs)
        record("read", int(found["loss"]))
        return found

    monkeypatch.setattr(loop.sharding, "to_global", put)
    monkeypatch.setattr(loop.step, "make_train_step", lambda *arguments: train_step)
    monkeypatch.setattr(metrics.jax, "device_get", get)
    monkeypatch.setattr(loop.Checkpoints, "save", lambda *arguments: None)
    config = _with(_with(config, "eval", tasks={}), "train", total_steps=12, log_every_steps=6)
    config = _with(config, "checkpoint", every_steps=12)
    run = loop.prepare(config, epath.Path(directory))
    nothing = jnp.zeros([], jnp.int32)
    state = loop.TrainState(nothing, {}, (), None, None, nothing, nothing)
    with startup.StartUp(time.monotonic()) as start_up:
        checkpoints = loop.Checkpoints(run.workdir / "checkpoints", keep=1, keep_every_steps=0)
        loop._train_steps(run, state, {}, checkpoints, load_suite(config.eval, config.data), start_up)


def test_a_batch_is_copied_to_the_devices_before_the_step_before_has_ended(tiny, tmp_path, monkeypatch):
    """The loop waits for a step by reading its metrics, and has copied the next batch by then; except for a record."""
    events = []
    _steps_without_a_model(tiny, tmp_path, monkeypatch, events)
    for step in (1, 2, 3, 7, 8, 9):  # records are written after 6 and 12
        assert events.index(("put", step + 1)) < events.index(("step", step + 1)) < events.index(("read", step))
    for step in range(1, 10):  # at most three batches at a time
        assert events.index(("read", step)) < events.index(("put", step + 3))


@pytest.mark.parametrize("stage", ["storage", "tokenizer", "decode", "transfer"])
def test_a_slow_stage_is_named_where_steps_wait_for_data(tiny, tmp_path, monkeypatch, capsys, stage):
    def slow(function):
        return lambda *arguments: time.sleep(0.1) or function(*arguments)

    prepare = pipeline._prepare_function

    def slow_prepare(*arguments):
        def prepared(*chunk):
            image, *rest = prepare(*arguments)(*chunk)
            return tf.ensure_shape(tf.numpy_function(slow(np.asarray), [image], tf.uint8), image.shape), *rest

        return prepared

    if stage == "storage":
        monkeypatch.setattr(data.SyntheticSource, "read", slow(data.SyntheticSource.read))
    elif stage == "tokenizer":
        monkeypatch.setattr(ClipBPE, "__call__", slow(ClipBPE.__call__))
    elif stage == "decode":
        monkeypatch.setattr(pipeline, "_prepare_function", slow_prepare)
        tiny = _with(tiny, "data", decode_threads=1)
    else:
        monkeypatch.setattr(loop.sharding, "to_global", slow(loop.sharding.to_global))
    _steps_without_a_model(tiny, tmp_path, monkeypatch, [])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("step 12/12") and re.search(r"data wait \d+% \((\w+)\)", line)[1] == stage


@pytest.mark.parametrize("computing", [True, False])
def test_a_copy_that_a_running_step_hides_is_no_wait(tiny, tmp_path, computing):
    log = metrics.TrainingLog(epath.Path(tmp_path), tiny.train, float, first_step=0, total_steps=9, epoch_examples=1)
    log._pending.append({"loss": types.SimpleNamespace(is_ready=lambda: not computing)})
    log.transfer(60.0)
    log.close()
    record = log._meter.flush()
    assert record["data/transfer"] == record["data_wait"] == float(not computing)
