"""Training: the loop, the step, optimizers, checkpoints, metrics and the workdir."""

from clip_jax.training import run_weights  # registers the weight format "run"
