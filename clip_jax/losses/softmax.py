"""CLIP's loss, symmetric InfoNCE: cross-entropy from images to texts and from texts to images over the global batch.

Source: Radford et al. 2021, figure 3. Several positives share the target probability equally, as in UniCL (Yang et al.
2022, arXiv:2204.03610).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.losses.contrastive import ContrastiveLoss
from clip_jax.losses.tiles import Mask, Scalar, Statistics, Tile, merge_statistics


@dataclasses.dataclass(frozen=True)
class SoftmaxLoss(ContrastiveLoss):
    """Symmetric InfoNCE, in nats, with logits zᵢⱼ = scale · xᵢ·yⱼ of images i and texts j; the bias cancels.

    loss = −1/2B Σᵢ (log softmaxⱼ(zᵢⱼ)[j = i] + log softmaxⱼ(zⱼᵢ)[j = i])

    >>> embeddings = jax.numpy.eye(4)
    >>> value, metrics = SoftmaxLoss()(embeddings, embeddings, jax.numpy.float32(1))
    >>> f"{value:.4f}", float(metrics["accuracy/image_to_text"])
    ('0.7437', 1.0)
    """

    name: str = "softmax"

    def tile_statistics(
        self, tile: Tile, selected: Mask, maximum: Array, axis: int, positive: bool, scale: Scalar, bias: Scalar
    ) -> Statistics:
        """Return `sum_exp` = Σ exp(scale · (similarity − max))."""
        shifted = jnp.where(selected, tile, -jnp.inf) - jnp.expand_dims(maximum, axis)
        return {"sum_exp": jnp.sum(jnp.exp(scale * shifted), axis)}

    def example_loss(
        self, negatives: Statistics, positives: Statistics, axis: int, scale: Scalar
    ) -> tuple[Float[Array, "n"], Statistics]:
        """Return half the cross-entropy: log-sum-exp of all logits minus the mean logit of the positives."""
        pairs = merge_statistics(scale, negatives, positives)
        # Where the positive is the most similar, the difference in parentheses is exactly 0.
        cross_entropy = scale * (pairs["max"] - positives["similarity_sum"] / positives["count"])
        cross_entropy += jnp.log(pairs["sum_exp"])
        residuals = {"max": pairs["max"], "1/sum_exp": 1 / pairs["sum_exp"], "target": 1 / positives["count"]}
        return cross_entropy / 2, residuals

    def tile_gradient(
        self, tile: Tile, matches: Mask, residuals: Statistics, axis: int, scale: Scalar, bias: Scalar
    ) -> Tile:
        """Return (softmax(logits) − target) / 2."""
        predicted = jnp.exp(scale * (tile - residuals["max"])) * residuals["1/sum_exp"]
        return (predicted - jnp.where(matches, residuals["target"], 0)) / 2

    def dense(self, image_BE: Array, text_CE: Array, scale: Scalar, bias: Scalar, matches_BC: Mask) -> Scalar:
        """Return the loss from the full logit matrix."""
        logits = scale * (image_BE @ text_CE.T) + bias
        sides = [-jnp.mean(jnp.mean(jax.nn.log_softmax(logits, axis), axis, where=matches_BC)) for axis in (0, 1)]
        return sum(sides) / 2
