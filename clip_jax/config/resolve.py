"""Checks of a config against the devices and the data, before any work on a device."""

from __future__ import annotations

import dataclasses
import math
import re

from clip_jax.config.build import check_name, differences
from clip_jax.config.models import MODELS
from clip_jax.config.schema import CheckpointConfig, Config, OptimConfig, TrainConfig
from clip_jax.models.architecture import Preprocess, check
from clip_jax.paths import check_local


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config with the quantities that depend on devices and data."""

    config: Config
    total_steps: int
    batch_per_device: int  # rows; devices along `mesh.tensor` have the same rows


LOCAL_PATHS = ("data.cache_dir", "eval.data_dir", "init.weights", "teacher.weights", "tokenizer.path")


def check_local_paths(config: Config) -> None:
    """Raise ValueError if a key of LOCAL_PATHS is a URL. --workdir, --export and data.files may be URLs."""
    for key in LOCAL_PATHS:
        section, name = key.split(".")
        check_local(key, getattr(getattr(config, section), name))


def _check_thresholds(config: Config) -> None:
    for key in config.eval.thresholds:
        tasks = [f"{task.evaluator}/{name}/" for name, task in config.eval.tasks.items()]
        if not key.startswith(tuple(tasks)):
            raise ValueError(
                "eval.thresholds: expected <evaluator>/<task>/<metric> with a task of eval.tasks"
                f" ({', '.join(tasks) or 'none'}), got {key!r}"
            )


def _check_validation(config: Config) -> None:
    batch, examples = config.eval.batch_size, config.eval.validation_examples
    if config.data.validation_fraction and not 2 <= batch <= examples:
        raise ValueError(
            f"eval.batch_size={batch} and eval.validation_examples={examples}: the validation loss is that of whole"
            " batches of 2 pairs or more; use e.g. eval.batch_size=512 and eval.validation_examples=4096"
        )


def _check_checkpoints(checkpoint: CheckpointConfig) -> None:
    every, kept = checkpoint.every_steps, checkpoint.keep_every_steps
    if kept % every:
        multiples = [str(step) for step in (kept // every * every, (kept // every + 1) * every) if step]
        raise ValueError(
            f"checkpoint.keep_every_steps={kept} is no multiple of checkpoint.every_steps={every}, and only steps"
            f" with a checkpoint can be kept; use {' or '.join(multiples)}"
        )


def resolve(config: Config, *, devices: int, processes: int = 1, examples: int | None = None) -> Resolved:
    """Check a config against devices and data, and compute the number of steps.

    Args:
      devices: number of devices in all processes.
      examples: number of examples in the training source; None if unknown, which `total_epochs` does not allow.

    Raises:
      ValueError: with the config key, its value and a value that works.

    >>> from clip_jax.config import from_config_dict
    >>> config = from_config_dict({"train": {"batch_size": 512, "total_examples": 5_120_000}})
    >>> resolve(config, devices=8).total_steps
    10000
    """
    check_local_paths(config)
    _check_thresholds(config)
    _check_validation(config)
    _check_checkpoints(config.checkpoint)
    if config.train.batch_size == 1:
        raise ValueError("train.batch_size=1 has no negatives, so there is nothing to contrast; use at least 2")
    batch_per_device = _batch_per_device(config, devices, processes)
    steps = _total_steps(config.train, examples)
    if steps <= config.optim.warmup_steps:
        raise ValueError(
            f"optim.warmup_steps={config.optim.warmup_steps} does not end before the run's {steps} steps;"
            f" use at most {max(0, steps // 10)}"
        )
    check(config.model)
    _check_preprocess(config.preprocess, config.model.image.image_size)
    _check_optimizer(config.optim)
    if config.loss.needs_logit_bias and not config.model.logit_bias:
        raise ValueError(f"loss.name={config.loss.name!r} has a bias that the model lacks: set model.logit_bias=True")
    _check_weights(config)
    _check_unused(config)
    if config.train.patch_dropout and not config.model.image.supports_patch_dropout:
        raise ValueError(
            f"train.patch_dropout={config.train.patch_dropout} needs patches; set it to 0, or use a ViT or a"
            " tower with `supports_patch_dropout`"
        )
    return Resolved(config, steps, batch_per_device)


def data_notes(config: Config, total_steps: int, examples: int) -> list[str]:
    """Return sentences about batches that repeat examples, epochs that end within a batch, and unused examples.

    >>> from clip_jax.config import from_config_dict
    >>> config = from_config_dict({"train": {"batch_size": 16, "total_epochs": 2.5}})
    >>> for note in data_notes(config, total_steps=15, examples=100):
    ...     print(note)
    100 examples are 6.25 batches of 16: an epoch ends within a batch, and no example is dropped
    train.total_epochs=2.5 is rounded down to 15 steps: its last 10 examples are not used
    """
    notes, batch, train = [], config.train.batch_size, config.train
    if examples < batch:
        notes.append(
            f"{examples} examples are fewer than train.batch_size={batch}: a batch repeats examples, and an image is a"
            " negative of its own caption; give more data or a smaller batch"
        )
    elif examples % batch and total_steps * batch > examples - examples % batch:
        notes.append(
            f"{examples} examples are {examples / batch:g} batches of {batch}: an epoch ends within a batch, and no"
            " example is dropped"
        )
    key = "total_epochs" if train.total_epochs else "total_examples"
    wanted = round(train.total_epochs * examples) or train.total_examples
    if 0 < wanted < batch:
        notes.append(f"train.{key}={getattr(train, key)} is less than a batch and is rounded up to 1 step")
    elif wanted % batch:
        unused = wanted - total_steps * batch
        notes.append(
            f"train.{key}={getattr(train, key)} is rounded down to {total_steps} steps: its last {unused} examples are"
            " not used"
        )
    return notes


def _batch_per_device(config: Config, devices: int, processes: int) -> int:
    batch, mesh, micro_batches = config.train.batch_size, config.mesh, config.train.micro_batches
    if devices % (mesh.fsdp * mesh.tensor):
        raise ValueError(
            f"mesh.fsdp={mesh.fsdp} times mesh.tensor={mesh.tensor} does not divide {devices} devices;"
            f" use mesh.fsdp={math.gcd(mesh.fsdp, devices)} and mesh.tensor=1"
        )
    shards = devices // mesh.tensor
    for count, suffix in ((1, ""), (micro_batches, f" in {micro_batches} micro-batches")):
        unit = shards * count
        if batch % unit:
            below, above = batch // unit * unit, -(-batch // unit) * unit
            choices = f"{below} or {above}" if below else f"{above}"
            raise ValueError(f"train.batch_size={batch} does not divide over {shards} devices{suffix}; use {choices}")
    if devices % processes:
        raise ValueError(f"{devices} devices do not divide over {processes} processes; every host needs as many")
    return batch // shards


def _total_steps(train: TrainConfig, examples: int | None) -> int:
    lengths = {key: getattr(train, key) for key in ("total_steps", "total_epochs", "total_examples")}
    given = [f"train.{key}={value}" for key, value in lengths.items() if value]
    if len(given) != 1:
        raise ValueError(
            "give one of train.total_steps, train.total_epochs, train.total_examples;"
            f" got {' and '.join(given) or 'none of them'}."
            " To replace a config's value, e.g. --config.train.total_epochs=0 --config.train.total_steps=1000"
        )
    if train.total_epochs and examples is None:
        raise ValueError(f"train.total_epochs={train.total_epochs} needs the data at hand; give train.total_examples")
    total_examples = round(train.total_epochs * examples) if train.total_epochs else train.total_examples
    return train.total_steps or max(1, total_examples // train.batch_size)


def _check_preprocess(preprocess: Preprocess, image_size: int) -> None:
    """Raise ValueError if a channel is missing, or if inference pads: training crops squares without padding."""
    for key in ("mean", "std"):
        if len(value := getattr(preprocess, key)) != 3:
            raise ValueError(
                f"preprocess.{key}={value}: expected 3 numbers, for red, green and blue, e.g. '(0.5, 0.5, 0.5)'"
            )
    if preprocess.pads(image_size) or preprocess.fill_color:
        raise ValueError(
            f"preprocess.resize={preprocess.resize!r} with resize_size={preprocess.resize_size} and"
            f" fill_color={preprocess.fill_color} is for inference alone: training images have no padding. Use"
            f" 'shortest' or 'squash', a resize_size of 0 or at least {image_size} px, and fill_color=0"
        )


def _check_optimizer(optim: OptimConfig) -> None:
    if optim.name == "adafactor" and not optim.b1 and optim.moment_dtype != "float32":
        raise ValueError(f"optim.moment_dtype={optim.moment_dtype!r}, but adafactor with optim.b1=0 has no moments")
    for key in ("freeze", "no_weight_decay", "half_precision_params"):
        pattern = getattr(optim, key)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"optim.{key}={pattern!r} is no regular expression ({error}); e.g. '^image/'") from error


def _check_weights(config: Config) -> None:
    """Raise ValueError for an unknown `init.model` or `teacher.model`."""
    for section in ("init", "teacher"):
        if model := getattr(config, section).model:
            check_name(f"{section}.model", model, MODELS)


def _check_unused(config: Config) -> None:
    """Raise ValueError for a value that is not the default and has no effect, because of the values of other keys."""
    optim, text = config.optim, config.model.text
    needs = {
        "loss.logit_bias_init": ("model.logit_bias=True", config.model.logit_bias),
        "optim.eps": ("optim.name='adamw'", optim.name == "adamw"),
        "optim.stochastic_rounding": ("a half-precision optim.moment_dtype", optim.moment_dtype != "float32"),
        "optim.no_weight_decay": ("optim.weight_decay", optim.weight_decay > 0),
        "train.text_capacity": ("a causal text tower, whose captions are packed", text.supports_packing),
        "eval.validation_examples": ("data.validation_fraction", config.data.validation_fraction > 0),
        "eval.baselines_dataset": (
            "a task of eval.tasks with the evaluator 'retrieval'",
            any(task.evaluator == "retrieval" for task in config.eval.tasks.values()),
        ),
    }
    for section in ("init", "teacher"):
        value = getattr(config, section)
        for field in dataclasses.fields(value):
            needs[f"{section}.{field.name}"] = (f"{section}.weights", bool(value.weights))
    defaults = Config(model=config.model, loss=type(config.loss)())
    for key, (default, found) in differences(defaults, config).items():
        needed, satisfied = needs.get(key, ("", True))
        if not satisfied:
            raise ValueError(f"{key}={found!r} has no effect without {needed}: set it, or {key}={default!r}")
