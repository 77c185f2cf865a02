"""Losses over the global batch, each callable on one device or inside `jax.shard_map`.

A loss is one file with a subclass of `ContrastiveLoss`, and one line in `LOSSES`: `config.loss.name` is its key, and
the fields of the class are the keys of `config.loss`.
"""

from clip_jax.losses.contrastive import ContrastiveLoss
from clip_jax.losses.distill import distillation_loss, distilled
from clip_jax.losses.sigmoid import SigmoidLoss
from clip_jax.losses.softmax import SoftmaxLoss

LOSSES: dict[str, type[ContrastiveLoss]] = {"softmax": SoftmaxLoss, "sigmoid": SigmoidLoss}
