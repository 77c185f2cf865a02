"""CLIP's loss: the mean of two cross-entropies, image to text and text to image, over the global batch.

Source: Radford et al. 2021, figure 3. With several matches for a row, their mean is asked for: UniCL (Yang et al. 2022,
arXiv:2204.03610). How all pairs are walked: `losses/pairs.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clip_jax.losses.ring import Axis
from clip_jax.losses.tiles import LOWEST, Ids, Statistics, loss_over_pairs
from clip_jax.typing import ArrayLike, Metrics


def softmax(
    image_bE: Float[ArrayLike, "b E"],
    text_bE: Float[ArrayLike, "c E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    axis: Axis = None,
    ids: Ids | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss of the global batch, in nats, and its metrics; equal on every device.

    Arguments, metrics and errors are those of `tiles.loss_over_pairs`. A softmax does not feel `logit_bias`.
    """
    return loss_over_pairs(_Softmax, image_bE, text_bE, logit_scale, logit_bias, axis, ids)


class _Softmax(NamedTuple):
    scale: Array
    bias: Array  # cancels

    def reduce(self, tile: Float[Array, "r c"], chosen: Bool[Array, "r c"], axis: int, positive: bool) -> Statistics:
        """`total`: the sum of exponentials, relative to that of `top`."""
        tile = jnp.where(chosen, tile, -jnp.inf)
        top = jnp.max(tile, axis, initial=LOWEST)
        return {"top": top, "total": jnp.sum(jnp.exp(self.scale * (tile - jnp.expand_dims(top, axis))), axis)}

    def merge(self, one: Statistics, other: Statistics) -> Statistics:
        top = jnp.maximum(one["top"], other["top"])
        return {"top": top, "total": sum(x["total"] * jnp.exp(self.scale * (x["top"] - top)) for x in (one, other))}

    def finish(self, negatives: Statistics, positives: Statistics, axis: int) -> tuple[Array, Statistics]:
        every = self.merge(negatives, positives)
        # Not log-sum-exp minus logit: where the match is the most similar, the first term is exactly 0.
        parts = self.scale * (every["top"] - positives["sum"] / positives["count"]) + jnp.log(every["total"])
        return parts / 2, {"top": every["top"], "share": 1 / every["total"], "target": 1 / positives["count"]}

    def weigh(self, tile: Array, matches: Array, facts: Statistics, axis: int) -> Float[Array, "r c"]:
        predicted = jnp.exp(self.scale * (tile - facts["top"])) * facts["share"]
        return (predicted - jnp.where(matches, facts["target"], 0)) / 2

    def bias_slope(self, negatives: Statistics, positives: Statistics) -> Float[Array, "b"]:
        return jnp.zeros_like(positives["sum"])
