"""The softmax loss's own claims; what all losses share is in contracts/test_losses.py."""

import jax.numpy as jnp
import numpy as np

from clip_jax.losses.softmax import softmax


def test_chance_costs_the_logarithm_of_the_batch():
    rows = jnp.tile(jnp.eye(1, 4), (32, 1))
    loss, _ = softmax(rows, rows, jnp.float32(100))
    np.testing.assert_allclose(loss, np.log(32), rtol=1e-6)


def test_constant_embeddings_have_no_accuracy():
    rows = jnp.tile(jnp.eye(1, 4), (8, 1))
    _, metrics = softmax(rows, rows, jnp.float32(1))
    assert (metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]) == (0, 0)


def test_nan_embeddings_have_a_nan_loss_and_no_accuracy():
    image = jnp.full((8, 4), jnp.nan)
    loss, metrics = softmax(image, image, jnp.float32(1))
    assert jnp.isnan(loss)
    assert (metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]) == (0, 0)


def test_perfect_embeddings_have_every_partner_right():
    rows = jnp.eye(8)
    loss, metrics = softmax(rows, rows, jnp.float32(100))
    assert (metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]) == (1, 1)
    assert loss < 1e-6
