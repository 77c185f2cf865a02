"""Every key of a config has an effect: another value changes a number, a file, a log line, a program, or is refused.

An observation is a function of a prepared run that returns a small part of it: the traced programs of model, step and
optimizer, the first batches, tokens, metrics, the steps of checkpoints. `CHANGES` has another value for every key, and
a key without a row fails. That the config itself is stored and printed does not count.
"""

import copy
import dataclasses
import functools
import hashlib
import io
import json
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
from clip_jax.config import TOWERS, Config, ImageTower
from clip_jax.data import pipeline, storage
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.evals.suite import Suite, load_suite
from clip_jax.interop import msgpack
from clip_jax.training import initialization, loop, metrics, step
from clip_jax.typing import BadRecord, Batch
from tests import runs, tiny_models, tiny_tokenizers

TINY = runs.tiny_model()[0]
# Small towers of every kind, so that programs are traced in a second.
TOWER_FIELDS = {kind: dataclasses.asdict(tower().tiny()) for kind, tower in TOWERS.items()}
TOWER_FIELDS["resnet"] |= {"layers": (2, 1)}
TOWER_FIELDS["transformer"] |= {"vocab_size": 800, "eos_id": 799, "context_length": 12}

# ---------------------------------------------------------------------------------------------------- observations


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
    stream = loop._batches(run, 0, lambda seconds: None, data.Activity())
    found = [next(stream).batch for _ in range(2)]
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
    caches = [_folder() / name for name in ("cache", "other")]
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


# ------------------------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Refused:
    """A value that is refused with the key's name or that of another key that it contradicts."""

    value: object


_SHARDS = {"data.source": "tfrecord", "data.options": {}}
_SHARDS |= {"data.files": "FOLDER/0000[01].tfrecord", "data.cache_dir": "FOLDER/cache"}
_TWO_TEXTS = _SHARDS | {"data.files": "FOLDER/two.tfrecord"}
_DATASETS = {name: {"source": "synthetic", "options": {"examples": 50}} for name in ("one", "two")}
_MIXTURE = {"data.source": "", "data.options": {}, "data.mixture": _DATASETS}
_TOKENIZER = {"tokenizer.name": "huggingface", "tokenizer.path": "FOLDER/tokenizers/tokenizer.json"}
_TOKENIZER |= {"model.text.vocab_size": "VOCABULARY", "model.text.eos_id": 3}
_HALF, _BIAS = {"optim.moment_dtype": "bfloat16"}, {"model.logit_bias": True}
_RETRIEVAL = {"evaluator": "retrieval", "dataset": "synthetic", "options": {}}
_BLOCKS = {"mlp_ratio": 2.0, "activation": "gelu", "norm_epsilon": 1e-6, "layer_scale": 0.5, "width": 64, "layers": 3}
_BLOCKS |= {"heads": 4}
_VIT = _BLOCKS | {"image_size": 48, "patch_size": 8, "pool": "mean", "norm_pre": False, "patch_bias": True}
_VIT |= {"projection": (False, {"model.embed_dim": 32})}
_TEXT = _BLOCKS | {"context_length": 13, "causal": False, "pool": "last", "projection": "bias"}
_TEXT |= {"vocab_size": Refused(900), "eos_id": Refused(5), "kind": Refused("other")}
_RESNET = {"image_size": 96, "width": 16, "layers": (2, 2), "heads": 8, "kind": Refused("other")}
_EDGENET = {"image_size": 96, "orientations": 4, "cell": 2, "channels": (16, 16), "width": 48, "layers": 2}
_AUGMENT = {"rotate_degrees": 30.0, "hue_degrees": 30.0, "min_crop_area": 0.9}
_AUGMENT |= dict.fromkeys(("zoom", "shift", "brightness", "contrast", "saturation", "cutout"), 0.5)
_AUGMENT |= dict.fromkeys(("grayscale_probability", "flip_probability"), 0.5)


def _weights(section, activation):
    """Return the rows of `init` or `teacher`; a teacher may have another activation."""
    file = {f"{section}.weights": "FOLDER/w.msgpack"}
    described = {"model": Refused("vit_b16"), "activation": activation, "preprocess": Refused("siglip")}
    return file | {f"{section}.{key}": (value, file) for key, value in described.items()}


# observation -> {key: another value, or (another value, changes of both configs)}; '<kind>:<key>' has that tower.
CHANGES = {
    image_encoder: {
        **{f"vit:model.image.{key}": value for key, value in _VIT.items()},
        **{f"resnet:model.image.{key}": value for key, value in _RESNET.items()},
        **{f"edgenet:model.image.{key}": value for key, value in _EDGENET.items()},
        "vit:model.image.kind": Refused("resnet"),
        "edgenet:model.image.kind": Refused("vit"),
        "model.embed_dim": 32,
        "model.logit_bias": True,
        "loss.logit_scale_init": 10.0,
        "loss.logit_bias_init": (-5.0, _BIAS),
        "train.dtype": "bfloat16",
        "train.patch_dropout": 0.5,
        "train.unroll_layers": True,
        "preprocess.mean": (0.5, 0.5, 0.5),
        "preprocess.std": (0.5, 0.5, 0.5),
    },
    text_encoder: {f"transformer:model.text.{key}": value for key, value in _TEXT.items()}
    | {"train.text_capacity": 1.0},
    train_step: {
        "loss.name": ("sigmoid", _BIAS),
        "loss.logit_scale_max": 50.0,
        "loss.equal_captions": "positives",
        "train.remat": "full",
        "train.micro_batches": 2,
        "optim.ema_decay": 0.5,
        "optim.freeze": "^image/",
        "optim.half_precision_params": "^text/",
        "teacher.weight": (0.5, {"teacher.weights": "FOLDER/w.msgpack"}),
        **_weights("teacher", "gelu"),
    },
    optimizer: {
        "optim.name": "lion",
        "optim.learning_rate": 1e-4,
        "optim.warmup_steps": 2,
        "optim.b1": 0.5,
        "optim.b2": 0.5,
        "optim.eps": 1e-3,
        "optim.moment_dtype": "bfloat16",
        "optim.stochastic_rounding": (False, _HALF),
        "optim.weight_decay": 0.1,
        "optim.no_weight_decay": "open_clip",
        "optim.layer_decay": 0.5,
        "optim.max_grad_norm": 1.0,
        "train.total_epochs": (9.0, {"train.total_steps": 0, "train.total_epochs": 5.0}),
        "train.total_examples": (800, {"train.total_steps": 0, "train.total_examples": 640}),
        "train.total_steps": 30,
    },
    state: {"optim.shard_moments": True, "mesh.fsdp": 2, "mesh.tensor": 2},
    pretrained: _weights("init", Refused("gelu")),
    tokens: {
        "tokenizer.name": Refused("sentencepiece"),
        "tokenizer.path": ("FOLDER/tokenizers/other.json", _TOKENIZER),
        "tokenizer.clean": ("canonicalize", _TOKENIZER),
        "tokenizer.pad_id": (1, _TOKENIZER),
        "tokenizer.keep_end": (False, _TOKENIZER),
    },
    batches: {
        **{f"data.augment.{key}": value for key, value in _AUGMENT.items()},
        **{"data.source": Refused("tfrecord"), "data.options": {"examples": 50}},
        **{"data.captions": ({"txt": 1.0}, _TWO_TEXTS), "data.texts_per_caption": (2, _TWO_TEXTS)},
        **{f"data.filters.{key}_caption_characters": 36 for key in ("min", "max")},
        **{"data.filters.min_image_size": Refused(65), "data.filters.max_aspect_ratio": Refused(0.5)},
        "data.filters.caption_scripts": Refused(("Thai",)),
        **{"train.seed": 1, "train.batch_size": 8},
        "data.mixture": Refused({"one": {"source": "synthetic"}}),  # data.source is given, too
        "data.mixture.one.source": (Refused("emoji"), _MIXTURE),  # which has no such option
        "data.mixture.one.files": (Refused("FOLDER/00000.tfrecord"), _MIXTURE),
        **{"data.mixture.one.options": ({"examples": 20}, _MIXTURE), "data.mixture.one.weight": (3.0, _MIXTURE)},
    },
    bad_records: {"data.max_bad_fraction": (Refused(0.001), {"data.max_bad_fraction": 0.5})},
    input_graph: {"data.decode": "exact", "data.decode_threads": 3, "data.prefetch_batches": 1},
    shards: {"data.files": ("FOLDER/0000[12].tfrecord", _SHARDS), "data.cache_dir": ("FOLDER/other", _SHARDS)},
    outage: {"data.max_stall_seconds": (1.0, _SHARDS)},
    embedder: {
        "eval.batch_size": 64,
        **{"preprocess.interpolation": "bilinear", "preprocess.resize": "squash", "preprocess.resize_size": 40},
        "preprocess.implementation": "huggingface",
        "preprocess.fill_color": Refused(255),
    },
    schedule: {
        "checkpoint.every_steps": 10,
        "checkpoint.keep": 1,
        "checkpoint.keep_every_steps": 14,
        "eval.every_steps": 10,
        "train.log_every_steps": 10,
    },
    patience: {"train.max_nonfinite_steps": 3},
    suite: {
        "eval.data_dir": ("/elsewhere", {"eval.tasks": {"x": _RETRIEVAL | {"dataset": "cifar10"}}}),
        "eval.baselines_dataset": "synthetic",
        "eval.thresholds": {"retrieval/shapes/image_to_text/recall_at_1": 0.1},
        "eval.tasks": {},
        "eval.tasks.shapes.evaluator": "zeroshot",
        "eval.tasks.shapes.dataset": "digits",
        "eval.tasks.shapes.options": {"protocol": "published"},
    },
}
# More than 20 s together.
SLOW = {image_encoder, text_encoder, train_step, optimizer, batches, bad_records, input_graph, schedule}


def _rows():
    for observe, changes in CHANGES.items():
        for key, value in changes.items():
            marks = pytest.mark.slow if observe in SLOW else ()
            yield pytest.param(observe, key, value, id=key, marks=marks)


def _keys():
    """Yield every key of the config: '<kind>:<key>' for towers of each kind, and those of the tasks 'shapes'."""
    free = ("data.captions", "data.options", "data.mixture", "eval.thresholds", "eval.tasks")
    yield from free
    yield from (f"data.mixture.one.{field.name}" for field in dataclasses.fields(configs.DatasetConfig))
    yield from (f"eval.tasks.shapes.{field.name}" for field in dataclasses.fields(configs.EvalTask))
    for key in configs.flatten(dataclasses.asdict(Config())):
        if not key.startswith(("model.image.", "model.text.", *(f"{key}." for key in free))):
            yield key
    for kind, tower in TOWERS.items():
        section = "image" if issubclass(tower, ImageTower) else "text"
        yield from (f"{kind}:model.{section}.{field.name}" for field in dataclasses.fields(tower))


def test_every_key_has_one_row():
    assert sorted(_keys()) == sorted(key for changes in CHANGES.values() for key in changes)


# ------------------------------------------------------------------------------------------------------- the check


@functools.cache
def _folder():
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


def _config(changes):
    """Return the tiny config with values by key, and room for two captions."""
    tree = dataclasses.asdict(TINY)
    tree["model"]["text"]["context_length"] = 40
    for kind in (key.partition(":")[0] for key in changes if ":" in key):
        tree["model"]["image" if issubclass(TOWERS[kind], ImageTower) else "text"] = dict(TOWER_FIELDS[kind])
    for key, value in changes.items():
        if value == "VOCABULARY":
            value = len(json.loads(tiny_tokenizers.tokenizer_json())["model"]["vocab"])
        if isinstance(value, str) and "FOLDER" in value:
            value = value.replace("FOLDER", str(_folder()))
        *sections, name = key.rpartition(":")[2].split(".")
        functools.reduce(dict.__getitem__, sections, tree)[name] = copy.deepcopy(value)
    return configs.from_config_dict(tree)


def _observation(observe, changes):
    """Return the observation of the tiny config with changes, or the error that refuses them."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            return observe(loop.prepare(_config(changes), epath.Path(directory)))
        except ValueError as error:
            return Refused(str(error))


_BASES = {}


def _base(observe, changes):
    key = observe, repr(changes)
    if key not in _BASES:
        _BASES[key] = _observation(observe, changes)
    return _BASES[key]


@pytest.mark.parametrize(("observe", "key", "value"), list(_rows()))
def test_another_value_of_the_key_changes_the_observation(observe, key, value):
    value, both = value if isinstance(value, tuple) and isinstance(value[-1], dict) else (value, {})
    if ":" in key:
        both |= {f"{key.partition(':')[0]}:train.seed": 0}  # the base has the tower, too
    before = _base(observe, both)
    assert not isinstance(before, Refused), before
    after = _observation(observe, both | {key: getattr(value, "value", value)})
    assert before != after
    assert isinstance(after, Refused) == isinstance(value, Refused), after


@pytest.mark.parametrize("observe", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CHANGES])
def test_a_key_without_effect_is_found(observe):
    """A row without effect fails: observations are reproducible, and those of other keys do not change."""
    key, value = ("eval.batch_size", 64) if observe is schedule else ("checkpoint.keep", 1)
    assert _base(observe, {}) == _observation(observe, {key: value})
