"""Summary of a run for --dry_run: computed from shapes, without reading data and without a step."""

from __future__ import annotations

import jax
from etils import epath

from clip_jax.config import Config, name_of, resolve
from clip_jax.data import check_files, reads_files
from clip_jax.data.sources.mixture import rows_of_datasets
from clip_jax.devices import sharding
from clip_jax.interop import hub, reading
from clip_jax.models import count_parameters
from clip_jax.training import optim, step


def describe(config: Config, workdir: epath.Path) -> str:
    """Return the summary as aligned text.

    Raises:
      ValueError: if the config does not fit the devices, or a file or directory that it names does not exist. Weights
        on the hub are not looked up.
    """
    _check_files(config)
    resolved = resolve(config, devices=jax.device_count(), processes=jax.process_count())
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    optimizer = optim.make_optimizer(config.optim, resolved.total_steps, architecture=config.model)
    state = step.abstract_state(step.model_from_config(config, mesh), optimizer, config, mesh)
    batch, image, text = config.train.batch_size, config.model.image, config.model.text
    length = text.context_length
    bytes_per_pair = image.image_size**2 * 3 + length * 4 + 1
    teacher = config.teacher
    rows = {
        "model": name_of(config.model),
        "parameters": f"{count_parameters(state.params):,}",
        "  image tower": f"{count_parameters(state.params['image']):,} ({image.kind}, {image.image_size} px)",
        "  text tower": f"{count_parameters(state.params['text']):,} ({length} tokens of {text.vocab_size:,})",
        "initialization": config.init.weights or f"random, seed {config.train.seed}",
        "teacher": f"{teacher.weights}, weight {teacher.weight:g}" if teacher.weights else "",
        "steps": f"{resolved.total_steps:,}",
        "examples": f"{resolved.total_steps * batch:,}",
        "batch": f"{batch:,}",
        "batch per device": f"{resolved.batch_per_device:,}",
        "mesh": f"{dict(mesh.shape)} ({mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es))",
        "memory of the state": f"{_format_bytes(sharding.shard_bytes(state))} per device",
        "memory of a batch": f"{_format_bytes(resolved.batch_per_device * bytes_per_pair)} per device, as uint8",
        "data": _data(config),
        "compute": f"{config.train.dtype}, remat {config.train.remat}, {config.train.micro_batches} micro-batch(es)",
        "checkpoints": f"every {config.checkpoint.every_steps:,} steps, the newest {config.checkpoint.keep} are kept",
        "evaluation": ", ".join(config.eval.tasks) or "none",
        "workdir": str(workdir),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name + ':':<{width + 2}}{value}" for name, value in rows.items() if value)


def _check_files(config: Config) -> None:
    check_files(config.data)
    files = {"tokenizer.path": config.tokenizer.path, "eval.data_dir": config.eval.data_dir}
    files |= {f"{section}.weights": getattr(config, section).weights for section in ("init", "teacher")}
    for key, path in files.items():
        if not path or path.startswith(hub.HUB):
            continue
        try:
            found = hub.locate(reading.split_tower(path)[0]).exists()
        except FileNotFoundError as error:
            raise ValueError(f"{key}={path!r}: {error}") from error
        if not found:
            raise ValueError(f"{key}={path!r}: expected a file or directory, got none; give another path")


def _data(config: Config) -> str:
    data = config.data
    if data.mixture:
        rows = rows_of_datasets({name: one.weight for name, one in data.mixture.items()}, config.train.batch_size)
        return "; ".join(
            f"{name}: {rows[name]:,} rows of a batch of {one.source} {one.files}".rstrip()
            for name, one in data.mixture.items()
        )
    missing = "(give data.files for training)" if reads_files(data.source) else ""
    return f"{data.source} {data.files or missing}".strip()


def _format_bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
