"""SigLIP's loss: every pair of the global batch is classified by itself as matching or not.

Source: Zhai et al. 2023 (arXiv:2303.15343), algorithm 1. Each device computes the rows of its own images against all
texts, b·B float32 similarities, and the columns of its own texts for the accuracy alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.typing import ArrayLike, Metrics


def sigmoid(
    image_bE: Float[ArrayLike, "b E"],
    text_bE: Float[ArrayLike, "b E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the sum over texts, mean over images, of -log σ(±logit), in nats, and its metrics; equal on every device.

    Args:
      image_bE: unit rows, this device's part of the batch; row i of the text belongs to row i of the image.
      logit_scale: multiplies the cosine similarities; already exponentiated.
      logit_bias: added to all logits; None is 0. It starts at -10, since nearly all pairs don't match.
      axis: mesh axes that the batch is sharded over; None outside `shard_map`.

    Returns:
      The loss, and as fractions of the batch how often the right partner alone is the most similar one; a tie counts
      as a miss. NaN embeddings give a NaN loss and accuracies of 0.
    """
    images_BE, texts_BE, first = image_bE, text_bE, 0
    if axis is not None:
        images_BE = jax.lax.all_gather(image_bE, axis, tiled=True)
        texts_BE = jax.lax.all_gather(text_bE, axis, tiled=True)
        first = jax.lax.axis_index(axis) * image_bE.shape[0]
    partner_b = first + jnp.arange(image_bE.shape[0])

    similarity_bB = _similarity(image_bE, texts_BE)
    logits_bB = logit_scale * similarity_bB + (0.0 if logit_bias is None else logit_bias)
    sign_bB = jnp.where(jnp.arange(logits_bB.shape[1])[None] == partner_b[:, None], 1.0, -1.0)
    loss = -jnp.mean(jnp.sum(jax.nn.log_sigmoid(sign_bB * logits_bB), axis=1))
    metrics = {
        "accuracy/image_to_text": _accuracy(similarity_bB, partner_b),
        "accuracy/text_to_image": _accuracy(jax.lax.stop_gradient(_similarity(text_bE, images_BE)), partner_b),
    }
    if axis is not None:
        loss, metrics = jax.lax.pmean((loss, metrics), axis)
    return loss, metrics


def _similarity(queries_bE: Float[ArrayLike, "b E"], candidates_BE: Float[ArrayLike, "B E"]) -> Float[Array, "b B"]:
    return jnp.einsum("bE,BE->bB", queries_bE, candidates_BE, preferred_element_type=jnp.float32)


def _accuracy(similarity_bB: Float[Array, "b B"], partner_b: Array) -> Float[Array, ""]:
    right_b1 = jnp.take_along_axis(similarity_bB, partner_b[:, None], axis=1)
    # Counting what is at least as similar, itself included, makes ties and NaN misses.
    return jnp.mean(jnp.sum(similarity_bB >= right_b1, axis=1) == 1, dtype=jnp.float32)
