"""What a run would do, as a page: from shapes alone, without data or a step."""

from __future__ import annotations

import jax
import numpy as np
from etils import epath

from clip_jax import optim, sharding, step
from clip_jax.architectures import name_of
from clip_jax.config import Config, resolve
from clip_jax.models import count_parameters, make_model


def describe(config: Config, workdir: epath.Path) -> str:
    """Return the page. Raises ValueError where the config doesn't fit the devices that JAX sees here."""
    mesh = sharding.make_mesh()
    resolved = resolve(config, devices=mesh.size, processes=jax.process_count())
    model = make_model(config.model, config.preprocess)
    optimizer = optim.make_optimizer(config.optim, resolved.total_steps)
    ema, half = config.optim.ema_decay > 0, config.optim.half_precision_params
    state = jax.eval_shape(
        lambda key: step.init_state(model.init(key), optimizer, ema=ema, half_precision_params=half), jax.random.key(0)
    )
    batch, image, text = config.train.batch_size, config.model.image, config.model.text
    bytes_per_pair = image.image_size**2 * 3 + text.length * 4 + 1
    rows = {
        "model": name_of(config.model),
        "parameters": f"{count_parameters(state.params):,}",
        "  image tower": f"{count_parameters(state.params['image']):,} ({image.kind}, {image.image_size} px)",
        "  text tower": f"{count_parameters(state.params['text']):,} ({text.length} tokens of {text.vocab_size:,})",
        "starts from": config.init.weights or f"random weights, seed {config.train.seed}",
        "steps": f"{resolved.total_steps:,}",
        "examples": f"{resolved.total_steps * batch:,}",
        "batch": f"{batch:,}",
        "batch per device": f"{resolved.batch_per_device:,}",
        "mesh": f"{dict(mesh.shape)} ({mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es))",
        "memory of the state": f"{_size(_bytes(state))} on every device",
        "memory of a batch": f"{_size(resolved.batch_per_device * bytes_per_pair)} on every device, as uint8",
        "data": f"{config.data.source} {config.data.files}".rstrip(),
        "compute": f"{config.train.dtype}, remat {config.train.remat}",
        "checkpoints": f"every {config.checkpoint.every_steps:,} steps, the newest {config.checkpoint.keep} are kept",
        "evaluation": ", ".join(config.eval.tasks) or "none",
        "workdir": str(workdir),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name + ':':<{width + 2}}{value}" for name, value in rows.items())


def _bytes(tree: object) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
