"""CLIP's loss: the mean of two cross-entropies, image to text and text to image, over the global batch.

Source: Radford et al. 2021, figure 3; the sharding is that of openai/CLIP issue 132: embeddings are gathered, each
device computes the rows and columns of its own pairs. A device holds 2·b·B float32 similarities, never B·B.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.typing import ArrayLike, Metrics


def softmax(
    image_bE: Float[ArrayLike, "b E"],
    text_bE: Float[ArrayLike, "b E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss of the global batch, in nats, and its metrics; equal on every device.

    Args:
      image_bE: unit rows, this device's part of the batch; row i of the text belongs to row i of the image.
      logit_scale: multiplies the cosine similarities; already exponentiated.
      logit_bias: added to all logits: a softmax does not feel it.
      axis: mesh axes that the batch is sharded over; None outside `shard_map`.

    Returns:
      The loss, and as fractions of the batch how often the right partner alone is the most similar one; a tie counts
      as a miss. NaN embeddings give a NaN loss and accuracies of 0.
    """
    del logit_bias
    images_BE, texts_BE, first = image_bE, text_bE, 0
    if axis is not None:
        images_BE = jax.lax.all_gather(image_bE, axis, tiled=True)
        texts_BE = jax.lax.all_gather(text_bE, axis, tiled=True)
        first = jax.lax.axis_index(axis) * image_bE.shape[0]
    partner_b = first + jnp.arange(image_bE.shape[0])

    image_loss, image_accuracy = _cross_entropy(image_bE, texts_BE, partner_b, logit_scale)
    text_loss, text_accuracy = _cross_entropy(text_bE, images_BE, partner_b, logit_scale)
    loss = (image_loss + text_loss) / 2
    metrics = {"accuracy/image_to_text": image_accuracy, "accuracy/text_to_image": text_accuracy}
    if axis is not None:
        loss, metrics = jax.lax.pmean((loss, metrics), axis)
    return loss, metrics


def _cross_entropy(
    queries_bE: Float[ArrayLike, "b E"],
    candidates_BE: Float[ArrayLike, "B E"],
    partner_b: Array,
    logit_scale: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    # float32 out of bf16 embeddings costs nothing; bf16 logits would put 3 % of error on the gradient.
    similarity_bB = jnp.einsum("bE,BE->bB", queries_bE, candidates_BE, preferred_element_type=jnp.float32)
    right_b = jnp.take_along_axis(similarity_bB, partner_b[:, None], axis=1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logit_scale * similarity_bB, axis=1) - logit_scale * right_b)
    # Counting what is at least as similar, itself included, makes ties and NaN misses.
    alone_b = jnp.sum(similarity_bB >= right_b[:, None], axis=1) == 1
    return loss, jnp.mean(alone_b, dtype=jnp.float32)
