"""Evaluation of a run's checkpoints as they appear, in separate processes, parallel to training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container

from etils import epath
from jax.sharding import Mesh

from clip_jax.config import WeightsConfig
from clip_jax.devices import distributed
from clip_jax.training import run_weights
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.workdir import stored_config
from clip_jax.typing import Params

log = logging.getLogger(__name__)

REPORT = "report.json"  # a run writes it when it has finished
NONE = -1


def follow(
    workdir: epath.Path,
    mesh: Mesh,
    evaluate: Callable[[int, WeightsConfig, Params], None],
    evaluated: Container[int],
    every_seconds: float = 30,
) -> None:
    """Call `evaluate` on every new checkpoint, oldest first, until the run has finished.

    `workdir` is only read. A checkpoint that the run removes before it is read is skipped. Call it on all hosts.

    Args:
      mesh: mesh of the evaluation, which may differ from the run's.
      evaluate: function of step, config of the weights, and evaluation parameters (the EMA, if there is one).
      evaluated: steps to skip.
    """
    config = stored_config(workdir)
    if config is None:
        raise ValueError(f"{workdir}: expected the --workdir of a run, which has a config.json, and found none")
    abstract_state = run_weights.abstract_state(config, mesh)
    weights = run_weights.weights_config(config, f"clip_jax run {workdir.name}")
    newest = NONE
    while True:
        finished = (workdir / REPORT).exists()  # read before the steps: then all checkpoints of the run are listed
        checkpoints = Checkpoints(workdir / run_weights.CHECKPOINTS, read_only=True)
        new = [at for at in checkpoints.steps() if at > newest and at not in evaluated]
        # Hosts may see different states of a network file system, and must take the same branch.
        at, finished = distributed.from_main_process(min(new, default=NONE), finished)
        if at != NONE:
            newest = at
            if (restored := checkpoints.restore(abstract_state, at)) is not None:
                log.info("evaluating step %d", at)
                evaluate(at, weights, run_weights.eval_params(restored[0], mesh))
        elif finished:
            return
        else:
            time.sleep(every_seconds)
