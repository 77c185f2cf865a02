"""A run's checkpoints measured as they appear, by other processes than its own, which it does not wait for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clip_jax.config import WeightsConfig
from clip_jax.devices import sharding
from clip_jax.training import optim, step
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.workdir import stored_config
from clip_jax.typing import Params

log = logging.getLogger(__name__)

REPORT = "report.json"  # a run writes it when it is finished
NONE = -1
_MANY_STEPS = 2**31  # the state is the same for any number of steps, and no warm-up is longer


def follow(
    workdir: epath.Path,
    mesh: Mesh,
    measure: Callable[[int, WeightsConfig, Params], None],
    measured: Container[int],
    every_seconds: float = 30,
) -> None:
    """Call `measure` with each checkpoint that isn't measured yet, the oldest first, until the run has finished.

    Nothing in `workdir` is touched. What the run removed before it was read is passed over. To be called on all hosts.

    Args:
      measure: gets the step, what the weights mean, and the parameters that evaluation takes (averaged ones, if any).
      measured: steps to leave out.

    Raises:
      ValueError: if no run has begun there.
    """
    config = stored_config(workdir)
    if config is None:
        raise ValueError(f"{workdir} holds no run: its --workdir has a config.json as soon as it begins")
    model = step.model_from_config(config, mesh)
    like = step.abstract_state(
        model, optim.make_optimizer(config.optim, _MANY_STEPS, architecture=config.model), config, mesh
    )
    weights = WeightsConfig(config.model, config.tokenizer, config.preprocess, source=f"clip_jax run {workdir.name}")
    newest = NONE
    while True:
        finished = (workdir / REPORT).exists()  # asked first: what it saved before is there already
        checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
        new = [at for at in checkpoints.steps() if at > newest and at not in measured]
        at, finished = (int(x) for x in _of_main(min(new, default=NONE), finished))
        if at != NONE:
            newest = at
            if (restored := checkpoints.restore(like, at)) is not None:
                log.info("measuring step %d", at)
                params = sharding.gather(restored[0].eval_params, mesh)
                measure(at, weights, jax.tree.map(np.asarray, params))
        elif finished:
            return
        else:
            time.sleep(every_seconds)


def _of_main(at: int, finished: bool) -> np.ndarray:
    """Return what the first host sees, so that all take the same way: a directory isn't the same everywhere at once."""
    return multihost_utils.broadcast_one_to_all(np.array([at, finished], np.int32))
