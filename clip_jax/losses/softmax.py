"""CLIP's loss, symmetric InfoNCE: cross-entropy from images to texts and from texts to images over the global batch.

Source: Radford et al. 2021, figure 3. Of several positives, the probabilities are summed: any of them is a match, as in
MIL-NCE (Miech et al. 2020, arXiv:1912.06430) and neighborhood components analysis (Goldberger et al. 2004). Averaging
their log-probabilities, as UniCL does (Yang et al. 2022, arXiv:2204.03610), changes nothing for equal captions, whose
logits are equal: in sum over the rows and columns of a caption it is the loss with a single positive.
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

    loss = −1/2B Σᵢ (log Σⱼ softmaxⱼ(zᵢⱼ) + log Σⱼ softmaxⱼ(zⱼᵢ)), where the sums over j are over the positives of i:
    j = i, or all pairs of equal ids.

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
        """Return half of log-sum-exp of all logits minus log-sum-exp of the positives."""
        pairs = merge_statistics(scale, negatives, positives)
        # Where a positive is the most similar, the difference in parentheses is exactly 0.
        loss = scale * (pairs["max"] - positives["max"]) + jnp.log(pairs["sum_exp"] / positives["sum_exp"])
        residuals = {"max": pairs["max"], "1/sum_exp": 1 / pairs["sum_exp"]}
        residuals |= {"positive_max": positives["max"], "1/positive_sum_exp": 1 / positives["sum_exp"]}
        residuals |= {"count": positives["count"]}
        return loss / 2, residuals

    def tile_gradient(
        self, tile: Tile, matches: Mask, residuals: Statistics, axis: int, scale: Scalar, bias: Scalar
    ) -> Tile:
        """Return (softmax(logits) − target) / 2. The target is the softmax over the positives."""
        predicted = jnp.exp(scale * (tile - residuals["max"])) * residuals["1/sum_exp"]
        target = jnp.exp(scale * (tile - residuals["positive_max"])) * residuals["1/positive_sum_exp"]
        target = jnp.where(residuals["count"] == 1, 1, target)  # without the rounding error of the similarities
        return (predicted - jnp.where(matches, target, 0)) / 2

    def dense(self, image_BE: Array, text_CE: Array, scale: Scalar, bias: Scalar, matches_BC: Mask) -> Scalar:
        """Return the loss from the full logit matrix."""
        logits = scale * (image_BE @ text_CE.T) + bias
        positives = jnp.where(matches_BC, logits, -jnp.inf)
        logsumexp = jax.nn.logsumexp
        return sum(jnp.mean(logsumexp(logits, axis) - logsumexp(positives, axis)) for axis in (0, 1)) / 2
