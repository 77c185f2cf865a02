"""Every key of a config has an effect: another value changes a number, a file, a log line, a program, or is refused.

An observation (observations.py) is a function of a prepared run that returns a small part of it: the traced programs
of model, step and optimizer, the first batches, tokens, metrics, the steps of checkpoints. `CHANGES` has another value
for every key, and a key without a row fails. That the config itself is stored and printed does not count.
"""

import copy
import dataclasses
import functools
import json
import tempfile

import pytest
from etils import epath

from clip_jax import config as configs
from clip_jax.config import TOWERS, Config, ImageTower
from clip_jax.training import loop
from tests import observations, tiny_tokenizers
from tests.observations import (
    bad_records,
    batches,
    embedder,
    image_encoder,
    input_graph,
    optimizer,
    outage,
    patience,
    pretrained,
    schedule,
    shards,
    state,
    suite,
    text_encoder,
    tokens,
    train_step,
    validation,
)

TINY = observations.TINY
# Small towers of every kind, so that programs are traced in a second.
TOWER_FIELDS = {kind: dataclasses.asdict(tower().tiny()) for kind, tower in TOWERS.items()}
TOWER_FIELDS["resnet"] |= {"layers": (2, 1)}
TOWER_FIELDS["transformer"] |= {"vocab_size": 800, "eos_id": 799, "context_length": 12}

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
    validation: {
        "data.validation_fraction": (0.5, {"eval.batch_size": 8}),
        "eval.validation_examples": (8, {"eval.batch_size": 8, "data.validation_fraction": 0.5}),
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
            value = value.replace("FOLDER", str(observations.folder()))
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
