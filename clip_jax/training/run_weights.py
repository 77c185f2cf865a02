"""Weights of a run that may be unfinished, from its newest or a given checkpoint: the weight format "run".

For `clip_jax.load("runs/b32")` or `clip_jax.load("runs/b32/checkpoints/5000")`. Importing this module registers it.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from clip_jax.config import Config, WeightsConfig
from clip_jax.devices import sharding
from clip_jax.interop.formats import FORMATS, Format
from clip_jax.training import workdir
from clip_jax.typing import Params

CHECKPOINTS = "checkpoints"  # directory in the workdir, with one directory per step
_TOTAL_STEPS = 2**31  # the state has the same shapes for any number of steps


def weights_config(config: Config, source: str) -> WeightsConfig:
    """Return the part of a run's config that its weights need."""
    return WeightsConfig(config.model, config.tokenizer, config.preprocess, source=source)


def abstract_state(config: Config, mesh: Mesh) -> Any:
    """Return the shapes, dtypes and shardings of a run's training state on a mesh, which may differ from the run's."""
    from clip_jax.training import optim, step

    optimizer = optim.make_optimizer(config.optim, _TOTAL_STEPS, architecture=config.model)
    return step.abstract_state(step.model_from_config(config, mesh), optimizer, config, mesh)


def eval_params(state: Any, mesh: Mesh) -> Params:
    """Return the evaluation parameters of a state (the EMA, if there is one) as NumPy arrays. A collective."""
    return jax.tree.map(np.asarray, sharding.gather(state.eval_params, mesh))


def detect(path: pathlib.Path, head: bytes) -> bool:
    """Return whether a path is the workdir of a run, or one of its checkpoints."""
    return _split(path) is not None


def read(path: pathlib.Path) -> tuple[Params, WeightsConfig]:
    """Read the newest intact checkpoint of a workdir, or the checkpoint of one step; nothing is written.

    The whole state is read, as its fingerprint covers the optimizer too. A collective: call it on all processes.

    Raises:
      ValueError: if there is no intact checkpoint, or the config is damaged.
    """
    from clip_jax.training.checkpoint import Checkpoints  # imports Orbax

    if (place := _split(path)) is None:
        raise ValueError(f"{path}: expected the workdir of a run or one of its checkpoints, got another path")
    directory, step = place
    config = workdir.stored_config(epath.Path(directory))
    mesh = sharding.make_mesh()
    checkpoints = Checkpoints(directory / CHECKPOINTS, read_only=True)
    restored = checkpoints.restore(abstract_state(config, mesh), step)
    if restored is None:
        found = ", ".join(map(str, checkpoints.steps())) or "none"
        raise ValueError(f"{path}: expected an intact checkpoint in {directory / CHECKPOINTS}, got steps {found}")
    checkpoints.close()
    state, _ = restored
    source = f"clip_jax run {directory.name}, step {int(state.step)}"
    return eval_params(state, mesh), weights_config(config, source)


def _split(path: pathlib.Path) -> tuple[pathlib.Path, int | None] | None:
    """Return the workdir and the step of a path, or None if it is not of a run. The step is None for a workdir."""
    path = path.absolute()
    one_step = path.parent.name == CHECKPOINTS and path.name.isdecimal()
    directory = path.parents[1] if one_step else path
    if not (path.is_dir() and (directory / CHECKPOINTS).is_dir() and (directory / workdir.VERSIONS_FILE).is_file()):
        return None
    return directory, int(path.name) if one_step else None


FORMATS["run"] = Format(detect, read)
