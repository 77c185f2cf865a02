"""What a run is made of: frozen dataclasses, their defaults, and the checks that need no device.

`configs/*.py` start from `default_config()`, a locked ConfigDict of these dataclasses, and change what differs.
Flags change it further (`--config.train.batch_size=512`); `from_config_dict` then returns the dataclasses or says
which key is wrong. Defaults are the paper's recipe for ViT (Radford et al. 2021, table 18 and section 2.5).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import ml_collections

from clip_jax import ranges
from clip_jax.architectures import MODELS, Architecture, Preprocess, TokenizerConfig, check, preprocess_of, tokenizer_of


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training picture. The defaults are the paper's: a random square crop, nothing else."""

    min_crop_area: float = 0.9  # of the largest square; 1 crops nothing away but the longer side
    rotate_degrees: float = 0.0  # up to, either way
    zoom: float = 0.0  # up to, as a fraction, in and out, after the crop
    shift: float = 0.0  # up to, as a fraction of the side
    brightness: float = 0.0  # up to, as a fraction of the range
    contrast: float = 0.0  # up to, as a fraction
    saturation: float = 0.0  # up to, as a fraction
    hue_degrees: float = 0.0  # up to, either way
    grayscale_probability: float = 0.0
    flip_probability: float = 0.0  # left to right; captions that say left or right become wrong
    cutout: float = 0.0  # side of a square that is erased, up to, as a fraction


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how they become arrays."""

    source: str = "tfrecord"  # a name in clip_jax.data.SOURCES
    # tfrecord: shards by glob, brace range or comma list, e.g. '/data/cc3m/{00000..00331}.tfrecord'.
    files: str = ""
    # Features that hold captions, each with its weight; weights of absent and empty ones fall away.
    captions: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"txt": 1.0, "caption": 1.0})
    # Up to so many texts of a record are drawn and joined by commas: for tags, and names that go with them.
    texts_per_caption: int = 1
    augment: AugmentConfig = AugmentConfig()
    synthetic_examples: int = 4096  # size of the `synthetic` source
    cache_dir: str = "~/.cache/clip_jax"  # rendered pictures and indices of shards
    max_bad_fraction: float = 0.01  # of the records read so far: above it, the run ends and names some
    decode_threads: int = 0  # 0: as many as cores
    prefetch_batches: int = 2


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective."""

    name: str = "softmax"  # a name in clip_jax.losses.LOSSES
    logit_scale_init: float = 1 / 0.07
    logit_scale_max: float = 100.0
    logit_bias_init: float = -10.0  # of models with a logit bias
    # What images of other pairs are to a caption of the same tokens: templates and classes as captions make many.
    equal_captions: Literal["negatives", "positives"] = "negatives"


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Weights to start from instead of random ones: anything that `clip_jax.load` takes, e.g. 'ViT-L-14.pt'.

    Picture size and context length may differ from `model`'s: position embeddings are resized. All else has to fit.
    """

    weights: str = ""  # empty: random
    model: str = ""  # a name in MODELS, for files that can't tell
    activation: str = ""  # likewise; the file's, not the run's


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A trained model whose softmax over the batch is learnt from: anything that `clip_jax.load` takes.

    It is frozen, and sees the run's pictures and texts. Picture size and context length may differ from `model`'s as in
    `init`; preprocessing and token ids have to be the same, all else is its own.
    """

    weights: str = ""  # empty: none
    model: str = ""  # a name in MODELS, for files that can't tell
    activation: str = ""  # likewise
    weight: float = 1.0  # of the cross-entropy with the teacher; the loss's own is 1


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer with warm-up and cosine decay to zero. The defaults are the paper's for ViT."""

    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = 5e-4  # lion: a third to a tenth, and as many times the weight decay
    warmup_steps: int = 2000
    b1: float = 0.9  # adafactor: 0 keeps no first moment
    b2: float = 0.98  # 0.999 for ResNets; adafactor: what 1 - t^-0.8 stops at
    eps: float = 1e-6  # 1e-8 for ResNets; of adamw alone, the others have none
    # What moments are stored in: the paper's half-precision Adam statistics. Stochastic rounding keeps them unbiased.
    moment_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    stochastic_rounding: bool = True  # of moments in half precision; False: to the nearest
    # Parameters that are stored in bfloat16 and rounded stochastically after every update; the paper's: '^text/'.
    half_precision_params: str = ""
    weight_decay: float = 0.2
    # Parameters whose path matches are not decayed; gains, biases and the logit scale never are.
    no_weight_decay: str = ""
    # Parameters whose path this regular expression finds are not trained: '^image/' is locked-image tuning.
    freeze: str = ""
    layer_decay: float = 1.0  # of the learning rate, for every layer further from a tower's end
    max_grad_norm: float = 0.0  # 0: no clipping
    ema_decay: float = 0.0  # 0: no average; evaluation and export use the average where there is one
    shard_moments: bool = False  # over all devices that share the batch, though parameters are not (ZeRO 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how many at a time, in which precision. Give one of steps, epochs, examples; 0 is none."""

    batch_size: int = 32_768  # pairs in the global batch
    total_steps: int = 0
    total_epochs: float = 0.0
    total_examples: int = 0
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation; parameters are float32
    micro_batches: int = 1  # parts that are embedded one after another; the loss is still the whole batch's
    # What the backward pass computes again: nothing; all but products; all but attention; all of a layer.
    remat: Literal["none", "dots", "names", "full"] = "names"
    unroll_layers: bool = False  # write the loop over layers out: the same numbers, minutes to compile
    # Causal towers: captions end to end, in room for this fraction of a batch's text positions. A batch that needs more
    # is encoded in rows (metric text/in_rows; text/filled is what was needed). 1: all in rows.
    text_capacity: float = 0.35
    log_every_steps: int = 50
    max_nonfinite_steps: int = 10  # in a row; then the run ends
    patch_dropout: float = 0.0  # the fraction of a picture's patches that a step leaves out (Li et al. 2023)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work: `data`, what remains of them, by the batch alone."""

    fsdp: int = 1  # so many neighbours share the batch too, and each holds its part of every large parameter
    tensor: int = 1  # so many neighbours share each layer's heads and perceptron, and have the same rows of the batch


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every_steps: int = 1000
    keep: int = 3  # the newest
    keep_every_steps: int = 0  # besides, every so many steps for good; 0: none


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """One evaluator on one set."""

    evaluator: str = "retrieval"  # a name in clip_jax.evals.EVALUATORS
    # A name in clip_jax.data.EVAL_SETS; or 'registry', and `split` is a set of clip_jax.evals.registry.
    source: str = "emoji"
    split: str = "unseen_concepts"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured during the run and at its end; a task's key is the set's name in the report."""

    every_steps: int = 0  # 0: at the end only
    batch_size: int = 512
    data_dir: str = ""  # where sets of the source 'registry' lie: webdataset folders, class folders, TFDS
    # A split of the training source: what is not learned, measured beside the model, is fitted on it. Empty: nothing.
    floors_split: str = ""
    gates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what the report asks of a metric, by its key
    tasks: Mapping[str, EvalTask] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    model: Architecture = Architecture()
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocess: Preprocess = Preprocess()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    init: InitConfig = InitConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()


# ------------------------------------------------------------------------------------- ConfigDict ⇄ dataclasses


def default_config(model: str = "vit_b32") -> ml_collections.ConfigDict:
    """Return the paper's recipe for a model of `architectures.MODELS`, every key there and locked."""
    if model not in MODELS:
        raise ValueError(f"no model is called {model!r}{_nearest(model, MODELS)}; there are {', '.join(MODELS)}")
    architecture = MODELS[model]
    return to_config_dict(
        Config(model=architecture, preprocess=preprocess_of(architecture), tokenizer=tokenizer_of(architecture))
    )


def to_config_dict(value: Any) -> ml_collections.ConfigDict:
    """Return a dataclass as a locked ConfigDict that flags can override."""
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = to_config_dict(item)
        elif isinstance(item, Mapping):
            item = {k: to_config_dict(v) if dataclasses.is_dataclass(v) else v for k, v in item.items()}
        result[field.name] = item
    return result.lock()


def from_config_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Return the checked Config. Raises ValueError for unknown keys, wrong types and values out of range."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    result = _build(Config, config, "")
    ranges.check(flatten(dataclasses.asdict(result)))
    return result


def build(cls: type, mapping: Mapping[str, Any], path: str = "") -> Any:
    """Return dataclass `cls` from nested mappings, as strictly as `from_config_dict`, without the checks of ranges.

    path: the dotted key of the mapping, for errors.
    """
    return _build(cls, mapping, path)


def from_json(text: str) -> Config:
    """Read back what `to_json` wrote, as strictly as `from_config_dict`."""
    return from_config_dict(json.loads(text))


def to_json(config: Any) -> str:
    """Write a config dataclass as JSON, keys in order of definition, for people and for `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two configs differ, each with both values."""
    old_flat, new_flat = (flatten(dataclasses.asdict(c)) for c in (old, new))
    keys = [*old_flat, *(k for k in new_flat if k not in old_flat)]
    return {k: (old_flat.get(k), new_flat.get(k)) for k in keys if old_flat.get(k) != new_flat.get(k)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{'a': {'b': 1}}` as `{'a.b': 1}`."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def check_name(key: str, name: str, names: Iterable[str]) -> None:
    """Raise ValueError if a registry does not list `name`."""
    if name not in (names := list(names)):
        raise ValueError(f"{key}={name!r} is none of {', '.join(names)}{_nearest(name, names)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _build(hint: Any, value: Any, path: str) -> Any:
    """Return `value` as type `hint`; `path` is its dotted key, for errors."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _build_union(options, value, path)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, path)
    if origin is Literal:
        if value not in options:
            raise ValueError(
                f"{path}={value!r} is none of {', '.join(map(repr, options))}{_nearest(str(value), options)}"
            )
        return value
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ValueError(f"{path}={value!r} should be a sequence, e.g. (1, 2)")
        return tuple(_build(options[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}={value!r} should be a mapping from names to values")
        return {str(k): _build(options[1], item, f"{path}.{k}") for k, item in value.items()}
    return _build_scalar(hint, value, path)


def _build_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    kinds = {option.kind: option for option in options}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in kinds:
        raise ValueError(f"{path}.kind={kind!r} is none of {', '.join(map(repr, kinds))}")
    return _build_dataclass(kinds[kind], value, path)


def _build_dataclass(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path or 'the config'}={value!r} should be a mapping with the keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in names:
            raise ValueError(f"config has no key '{prefix}{key}'{_nearest(key, names)} (keys here: {', '.join(names)})")
    return cls(**{key: _build(hints[key], item, prefix + key) for key, item in value.items()})


def _build_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path}={value!r} is a {type(value).__name__}, expected {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{path}={value} is not a finite number")
    return value


# ----------------------------------------------------------------------------------------------------- the checks


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What a config means on these devices with this data."""

    config: Config
    total_steps: int
    batch_per_device: int  # rows of the batch; `mesh.tensor` neighbours have the same


def resolve(config: Config, *, devices: int, processes: int = 1, examples: int | None = None) -> Resolved:
    """Check what needs the machine and the data's size, and return the run's length in steps.

    Args:
      devices: in all processes together.
      examples: in the training source; None where only `total_epochs` would need it and it is not known.

    Raises:
      ValueError: naming the key, what it is, what was expected and a value that works.
    """
    batch, total = config.train.batch_size, config.train
    mesh = config.mesh
    if devices % (mesh.fsdp * mesh.tensor):
        raise ValueError(
            f"mesh.fsdp={mesh.fsdp} times mesh.tensor={mesh.tensor} does not divide {devices} devices;"
            f" use mesh.fsdp={math.gcd(mesh.fsdp, devices)} and mesh.tensor=1"
        )
    shards, parts = devices // mesh.tensor, config.train.micro_batches
    for unit, into in ((shards, f"{shards} devices"), (shards * parts, f"{shards} devices in {parts} micro-batches")):
        if batch % unit:
            below, above = batch // unit * unit, -(-batch // unit) * unit
            choices = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"train.batch_size={batch} does not divide over {into}; use {choices}")
    if devices % processes:
        raise ValueError(f"{devices} devices do not divide over {processes} processes; every host needs as many")
    lengths = {
        "total_steps": total.total_steps,
        "total_epochs": total.total_epochs,
        "total_examples": total.total_examples,
    }
    given = {f"train.{name}": value for name, value in lengths.items() if value}
    if len(given) != 1:
        said = " and ".join(f"{k}={v}" for k, v in given.items()) or "none of them"
        raise ValueError(
            f"give one of train.total_steps, train.total_epochs, train.total_examples; got {said}."
            " To change a config's choice, e.g. --config.train.total_epochs=0 --config.train.total_steps=1000"
        )
    if total.total_epochs and examples is None:
        raise ValueError(f"train.total_epochs={total.total_epochs} needs the data at hand; give train.total_examples")
    wanted = round(total.total_epochs * examples) if total.total_epochs else total.total_examples
    steps = total.total_steps or max(1, wanted // batch)
    if steps <= config.optim.warmup_steps:
        raise ValueError(
            f"optim.warmup_steps={config.optim.warmup_steps} does not end before the run's {steps} steps;"
            f" use at most {max(0, steps // 10)}"
        )
    check(config.model)
    if config.optim.name == "adafactor" and not config.optim.b1 and config.optim.moment_dtype != "float32":
        raise ValueError(
            f"optim.moment_dtype={config.optim.moment_dtype!r}, but adafactor with optim.b1=0 has no moments"
        )
    for key in ("freeze", "no_weight_decay", "half_precision_params"):
        pattern = getattr(config.optim, key)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"optim.{key}={pattern!r} is no regular expression ({error}); e.g. '^image/'") from error
    if config.loss.name == "sigmoid" and not config.model.logit_bias:
        raise ValueError("loss.name='sigmoid' has a bias that the model lacks: set model.logit_bias=True")
    teacher = config.teacher
    if teacher.model:
        check_name("teacher.model", teacher.model, MODELS)
    if not teacher.weights and teacher != TeacherConfig():
        changed = differences(Config(teacher=TeacherConfig()), Config(teacher=teacher))
        key, (_, value) = next(iter(changed.items()))
        raise ValueError(f"{key}={value!r} is of a teacher, and there is none: set teacher.weights")
    if config.train.patch_dropout and config.model.image.kind != "vit":
        raise ValueError(f"train.patch_dropout={config.train.patch_dropout} needs patches; set it to 0, or use a ViT")
    return Resolved(config, steps, batch // shards)
