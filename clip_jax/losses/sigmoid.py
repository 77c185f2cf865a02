"""SigLIP's loss: binary cross-entropy of every pair of the global batch as positive or negative.

Source: Zhai et al. 2023 (arXiv:2303.15343), algorithm 1.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.losses.contrastive import ContrastiveLoss
from clip_jax.losses.tiles import Mask, Scalar, Statistics, Tile


@dataclasses.dataclass(frozen=True)
class SigmoidLoss(ContrastiveLoss):
    """Pairwise sigmoid loss, in nats, with logits zᵢⱼ = scale · xᵢ·yⱼ + bias.

    loss = −1/B Σᵢⱼ log σ(±zᵢⱼ), + for positives, − for negatives. `logit_bias_init` is −10 because nearly all pairs are
    negatives.
    """

    needs_logit_bias: ClassVar[bool] = True

    name: str = "sigmoid"

    def tile_statistics(
        self, tile: Tile, selected: Mask, maximum: Array, axis: int, positive: bool, scale: Scalar, bias: Scalar
    ) -> Statistics:
        """Return `loss` = Σ −log σ(±z) and its derivative `bias_gradient`. Every pair counts once, in its row."""
        if axis == 0:
            return {}
        sign = -1 if positive else 1
        logits = sign * (scale * tile + bias)
        loss = jnp.sum(jnp.where(selected, jax.nn.softplus(logits), 0), axis)
        return {"loss": loss, "bias_gradient": jnp.sum(jnp.where(selected, sign * jax.nn.sigmoid(logits), 0), axis)}

    def example_loss(
        self, negatives: Statistics, positives: Statistics, axis: int, scale: Scalar
    ) -> tuple[Float[Array, "n"], Statistics]:
        """Return the summed loss of an image's pairs; 0 for texts."""
        if axis == 0:
            return jnp.zeros_like(negatives["max"]), {}
        return negatives["loss"] + positives["loss"], {}

    def tile_gradient(
        self, tile: Tile, matches: Mask, residuals: Statistics, axis: int, scale: Scalar, bias: Scalar
    ) -> Tile:
        """Return σ(z) − target for rows, 0 for columns."""
        if axis == 0:
            return jnp.zeros_like(tile)
        return jax.nn.sigmoid(scale * tile + bias) - matches

    def dense(self, image_BE: Array, text_CE: Array, scale: Scalar, bias: Scalar, matches_BC: Mask) -> Scalar:
        """Return the loss from the full logit matrix."""
        logits = scale * (image_BE @ text_CE.T) + bias
        return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(jnp.where(matches_BC, logits, -logits)), axis=1))
