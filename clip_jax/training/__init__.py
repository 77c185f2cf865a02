"""Training: the loop, the step, optimizers, checkpoints, metrics and the workdir."""
