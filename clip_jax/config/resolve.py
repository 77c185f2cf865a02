"""Checks of a config against the devices and the data, before any device work."""

from __future__ import annotations

import dataclasses
import math
import re

from clip_jax.config.build import check_name, differences
from clip_jax.config.models import MODELS
from clip_jax.config.schema import Config, TeacherConfig
from clip_jax.models.architecture import check


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What a config means on these devices with this data."""

    config: Config
    total_steps: int
    batch_per_device: int  # rows of the batch; `mesh.tensor` neighbours have the same


LOCAL_PATHS = ("data.cache_dir", "eval.data_dir", "init.weights", "teacher.weights", "tokenizer.path")


def check_local_path(name: str, path: str) -> None:
    """Raise ValueError for a URL where only a local path is supported; `gs://…` would become a local folder `gs:`.

    >>> check_local_path("--data_dir", "/data")
    """
    if "://" in path:
        raise ValueError(
            f"{name}={path}: expected a local path, got a URL; copy it to a local disk, e.g. gcloud storage cp"
            f" -r {path} /data/, or mount the bucket with gcsfuse"
        )


def check_local_paths(config: Config) -> None:
    """Raise ValueError if a key of LOCAL_PATHS is a URL. --workdir, --export and data.files may be URLs."""
    for key in LOCAL_PATHS:
        section, name = key.split(".")
        check_local_path(key, getattr(getattr(config, section), name))


def _check_thresholds(config: Config) -> None:
    for key in config.eval.thresholds:
        parts = key.split("/")
        if len(parts) < 3 or parts[1] not in config.eval.tasks:
            tasks = ", ".join(config.eval.tasks) or "none"
            raise ValueError(
                f"eval.thresholds: expected <evaluator>/<task>/<measure> with a task of eval.tasks ({tasks}),"
                f" got {key!r}"
            )


def resolve(config: Config, *, devices: int, processes: int = 1, examples: int | None = None) -> Resolved:
    """Check what needs the machine and the data's size, and return the run's length in steps.

    Args:
      devices: in all processes together.
      examples: in the training source; None where only `total_epochs` would need it and it is not known.

    Raises:
      ValueError: naming the key, what it is, what was expected and a value that works.
    """
    check_local_paths(config)
    _check_thresholds(config)
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
    if config.loss.needs_logit_bias and not config.model.logit_bias:
        raise ValueError(f"loss.name={config.loss.name!r} has a bias that the model lacks: set model.logit_bias=True")
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
