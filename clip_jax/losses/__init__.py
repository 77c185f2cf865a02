"""Objectives over the global batch, each a function that runs on one device or inside `jax.shard_map`."""

from clip_jax.losses.distill import distillation
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from clip_jax.typing import Loss

LOSSES: dict[str, Loss] = {"softmax": softmax, "sigmoid": sigmoid}

__all__ = ["LOSSES", "distillation", "sigmoid", "softmax"]
