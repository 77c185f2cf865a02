"""SigLIP's loss: every pair of the global batch is classified by itself as matching or not.

Source: Zhai et al. 2023 (arXiv:2303.15343), algorithm 1. How all pairs are walked: `losses/pairs.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clip_jax.losses.ring import Axis
from clip_jax.losses.tiles import LOWEST, Ids, Statistics, loss_over_pairs
from clip_jax.typing import ArrayLike, Metrics


def sigmoid(
    image_bE: Float[ArrayLike, "b E"],
    text_bE: Float[ArrayLike, "c E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    axis: Axis = None,
    ids: Ids | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the sum over texts, mean over images, of -log σ(±logit), in nats, and its metrics; equal on every device.

    Arguments, metrics and errors are those of `tiles.loss_over_pairs`. `logit_bias` starts at -10, since nearly all
    pairs don't match.
    """
    return loss_over_pairs(_Sigmoid, image_bE, text_bE, logit_scale, logit_bias, axis, ids)


class _Sigmoid(NamedTuple):
    scale: Array
    bias: Array

    def reduce(self, tile: Float[Array, "r c"], chosen: Bool[Array, "r c"], axis: int, positive: bool) -> Statistics:
        """`total`: the pairs' losses; `slope`: their derivatives by the bias. A pair counts once, in its row."""
        top = {"top": jnp.max(jnp.where(chosen, tile, -jnp.inf), axis, initial=LOWEST)}
        if axis == 0:
            return top
        sign = -1 if positive else 1
        wrong = sign * (self.scale * tile + self.bias)
        total = jnp.sum(jnp.where(chosen, jax.nn.softplus(wrong), 0), axis)
        return top | {"total": total, "slope": jnp.sum(jnp.where(chosen, sign * jax.nn.sigmoid(wrong), 0), axis)}

    def merge(self, one: Statistics, other: Statistics) -> Statistics:
        return {name: jnp.maximum(x, other[name]) if name == "top" else x + other[name] for name, x in one.items()}

    def finish(self, negatives: Statistics, positives: Statistics, axis: int) -> tuple[Array, Statistics]:
        if axis == 0:
            return jnp.zeros_like(negatives["top"]), {}
        return negatives["total"] + positives["total"], {}

    def weigh(self, tile: Array, matches: Array, facts: Statistics, axis: int) -> Float[Array, "r c"]:
        if axis == 0:
            return jnp.zeros_like(tile)
        return jax.nn.sigmoid(self.scale * tile + self.bias) - matches

    def bias_slope(self, negatives: Statistics, positives: Statistics) -> Float[Array, "b"]:
        return negatives["slope"] + positives["slope"]
