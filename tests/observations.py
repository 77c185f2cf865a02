"""Observations of a prepared run, for test_config_effects.py: each returns a small part of it."""

import dataclasses
import functools
import hashlib
import io
import pathlib
import re
import shutil
import tempfile
import types

import jax
import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from PIL import Image

from clip_jax import config as configs
from clip_jax import data
from clip_jax.data import pipeline, storage
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.evals.suite import Suite, load_suite
from clip_jax.interop import msgpack
from clip_jax.training import initialization, loop, metrics, step
from clip_jax.typing import BadRecord, Batch
from tests import runs, tiny_models, tiny_tokenizers

TINY = runs.tiny_model()[0]


@functools.cache
def folder():
    """Return a directory with weights of the tiny model, shards and tokenizers."""
    folder = pathlib.Path(tempfile.mkdtemp())
    msgpack.write(folder / "w.msgpack", tiny_models.params(TINY.model), configs.WeightsConfig(TINY.model))
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers/tokenizer.json").write_bytes(tiny_tokenizers.tokenizer_json())
    (folder / "tokenizers/other.json").write_bytes(tiny_tokenizers.tokenizer_json("$A [SEP]"))
    data.SOURCES["tfrecord"].tiny_config(folder)
    texts = {"txt": "a dog", "caption": "ein Hund"}
    data.write_tfrecord(folder / "two.tfrecord", [{"png": SyntheticSource(1).read(0).image} | texts] * 40)
    return folder


def _trace(function, *arguments):
    """Return the program, hashes of its constants, and the shapes of its results."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    constants = [(x.shape, hashlib.sha256(np.asarray(x).tobytes()).hexdigest()) for x in jaxpr.consts]
    return (re.sub(r" at 0x\w+", "", str(jaxpr)), constants), shapes


def _batch(run, rows=16):
    size, length = run.config.model.image.image_size, run.config.model.text.context_length
    shape = jax.ShapeDtypeStruct
    return Batch(shape((rows, size, size, 3), np.uint8), shape((rows, length), np.int32), shape((rows,), bool))


def _shapes(run):
    return jax.eval_shape(run.model.init, jax.random.key(0))


def image_encoder(run):
    init, shapes = _trace(run.model.init, jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
    return init, _trace(run.model.encode_image_train, shapes, _batch(run).image, keys)[0]


def text_encoder(run):
    init, shapes = _trace(run.model.init, jax.random.key(0))
    return init, _trace(run.model.encode_text_train, shapes, _batch(run, 256).text)[0]


def optimizer(run):
    shapes = {name: value for name, value in _shapes(run).items() if name != "batch_stats"}
    return _trace(run.optimizer.update, shapes, jax.eval_shape(run.optimizer.init, shapes), shapes)[0]


def train_step(run):
    teacher = initialization.make_teacher(run.config, run.tokenizer, run.mesh)
    compiled = step.make_train_step(run.model, run.optimizer, run.config, run.mesh, teacher)
    return _trace(compiled, step.abstract_state(run.model, run.optimizer, run.config, run.mesh), _batch(run))[0]


def state(run):
    """Shapes, dtypes and shardings."""
    return str(step.abstract_state(run.model, run.optimizer, run.config, run.mesh))


def pretrained(run):
    return str(jax.tree.map(np.sum, initialization.initial_params(run.config) if run.config.init.weights else {}))


def batches(run):
    log = metrics.TrainingLog(
        run.workdir, run.config.train, lambda at: 0.1, first_step=0, total_steps=2, epoch_examples=16, active=False
    )
    stream = loop._batches(run, 0, log, data.Activity())
    found = [next(stream)[0].batch for _ in range(2)]
    return [(x.image.tobytes(), x.text.tobytes()) for x in found]


def bad_records(run):
    """The first batches of data with a fifth of bad records."""
    read = SyntheticSource.read

    def read_some(self, index):
        if index % 5 == 3:
            raise BadRecord("bad")
        return read(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticSource, "read", read_some)
        patch.setattr(pipeline, "MIN_READS", 10)
        return batches(run)


def input_graph(run):
    """Threads, prefetched batches and decoder of the input pipeline."""
    found, decoders, graph = [], set(), tf.data.Dataset
    with pytest.MonkeyPatch.context() as patch:
        prefetch, with_options = graph.prefetch, graph.with_options
        patch.setattr(graph, "prefetch", lambda self, size: found.append(size) or prefetch(self, size))
        threads = lambda options: found.append(options.threading.private_threadpool_size)  # noqa: E731
        patch.setattr(graph, "with_options", lambda self, options: threads(options) or with_options(self, options))
        fast = pipeline.scaled_jpeg.random_crops
        patch.setattr(pipeline.scaled_jpeg, "random_crops", lambda *a: decoders.add("fast") or fast(*a))
        batches(run)
    return found, decoders


def shards(run):
    """Fingerprint of the training data, and the number of cached indices of shards."""
    caches = [folder() / name for name in ("cache", "other")]
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)
    fingerprint = data.make_source(run.config.data).fingerprint()
    return fingerprint, [len(list(cache.rglob("*.arrow"))) for cache in caches]


def outage(run):
    """How long requests to the storage are tried again."""
    limits = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_persistently", lambda request, path, limit: limits.add(limit) or request())
        data.make_source(run.config.data).read(0)
    return limits


def tokens(run):
    return run.tokenizer(["A red dog!"]).tolist()


def embedder(run):
    """Size of the batches and pixels of evaluation."""
    file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (60, 104, 4), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    found = loop._embedder(run, {})
    return found.batch_size, found.preprocess([file.getvalue()]).tobytes()


def suite(run):
    """Evaluation: metrics, skipped datasets, thresholds, baselines."""
    loaded, rng = load_suite(run.config.eval, run.config.data), np.random.default_rng(0)
    with_ties = lambda x: rng.integers(1, 3, (len(x), 4)).astype(np.float32)  # noqa: E731
    random = types.SimpleNamespace(image=with_ties, text=with_ties)
    results, baselines = loaded.evaluate(random), loop._load_baselines_dataset(run.config)
    return results, loaded.skipped, loaded.thresholds(run.config.eval, results), baselines and len(baselines.images)


def validation(run):
    """Captions of the held-out pairs."""
    return [pairs.captions for pairs in run.validation.pairs.values()]


def schedule(run):
    """Options and steps of checkpoints, evaluations and records of a run whose step only counts."""
    saved, directory = [], epath.Path(tempfile.mkdtemp())

    class Checkpoints(loop.Checkpoints):
        last = None

        def __init__(self, _, **options):
            saved.append(options)

        def restore(self, _):
            return self.last

        def save(self, at, state, info):
            saved.append(at)
            self.last = state, info

        poll = wait = close = lambda self: None

    def count(state, _):
        return dataclasses.replace(state, step=state.step + 1), {"loss": jax.numpy.float32(1)}

    start = step.TrainState(0, {"kernel": np.zeros((2, 2), np.float32)}, None, None, None, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Checkpoints", Checkpoints)
        patch.setattr(Suite, "evaluate", lambda *_: {"x": 1.0})
        patch.setattr(loop, "_finish", lambda *_: None)
        patch.setattr(loop.step, "make_train_step", lambda *_: count)
        patch.setattr(loop.initialization, "initial_state", lambda *_: start)
        loop.train(run.config, str(directory))
    return saved, [(line["step"], "loss" in line) for line in metrics.read_lines(directory)]


def patience(run):
    """Number of consecutive steps that are not finite after which a run ends."""
    options = {"first_step": 0, "total_steps": 40, "epoch_examples": 100, "active": False}
    log = metrics.TrainingLog(run.workdir, run.config.train, lambda at: 0.1, **options)
    for skipped in range(1, 100):
        try:
            log.add(40, {"consecutive_skipped_steps": jax.numpy.float32(skipped)}, 0)
        except metrics.NonFiniteError:
            return skipped
    raise AssertionError
