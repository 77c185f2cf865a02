"""Claims of single losses, and a loss that is registered outside the package. Contract: contracts/test_losses.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.losses import LOSSES, ContrastiveLoss, SigmoidLoss, SoftmaxLoss, ring

SOFTMAX = SoftmaxLoss()


def _unit_rows(*shape: int) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("copies", [1, 3], ids=["distinct", "equal_captions"])
def test_dense_reference_equals_the_pseudocode_of_the_paper(name, copies):
    """In float64, by loops over pairs; of equal captions, each is a match."""
    image, text = _unit_rows(2, 16, 12)
    logits, ids = 14.3 * image @ text.T - 4, [i // copies for i in range(16)]
    expected = 0.0
    for i in range(16):
        for scores in (logits[i], logits[:, i]) if name == "softmax" else ():  # a row, a column
            matches = sum(np.exp(score) for score, j in zip(scores, ids, strict=True) if j == ids[i])
            expected -= np.log(matches / np.exp(scores).sum()) / 32
        for score, j in zip(logits[i], ids, strict=True) if name == "sigmoid" else ():
            expected += np.log1p(np.exp(-score if j == ids[i] else score)) / 16
    with jax.enable_x64(True):
        matches = np.equal.outer(ids, ids)
        value = LOSSES[name]().dense(*map(jnp.asarray, (image, text, 14.3, -4.0, matches)))
        np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize("loss", [SoftmaxLoss(), SigmoidLoss()], ids=lambda loss: loss.name)
def test_swapping_images_and_texts_swaps_their_gradients(loss):
    image, text = _unit_rows(2, 16, 12).astype(np.float32)
    gradient = jax.grad(lambda *sides: loss(*sides, jnp.float32(14.3), jnp.float32(-4))[0], argnums=(0, 1))
    expected, swapped = gradient(image, text), gradient(text, image)
    np.testing.assert_allclose(expected[0], swapped[1], rtol=5e-6, atol=1e-7)
    np.testing.assert_allclose(expected[1], swapped[0], rtol=5e-6, atol=1e-7)


def test_equal_embeddings_have_the_logarithm_of_the_batch_size_as_loss():
    rows = jnp.tile(jnp.eye(1, 4), (32, 1))
    loss, _ = SOFTMAX(rows, rows, jnp.float32(100))
    np.testing.assert_allclose(loss, np.log(32), rtol=1e-6)


def test_groups_are_the_largest_divisor_that_fits():
    fitting = [ring.group_size(8, ring.BLOCK_BYTES // parts) for parts in (8, 7, 4, 3, 2, 1)]
    assert fitting == [8, 4, 4, 2, 2, 1]
    assert ring.group_size(6, ring.BLOCK_BYTES // 5) == 3 and ring.group_size(8, 2 * ring.BLOCK_BYTES) == 1


def test_equal_embeddings_have_accuracy_0():
    rows = jnp.tile(jnp.eye(1, 4), (8, 1))
    _, metrics = SOFTMAX(rows, rows, jnp.float32(1))
    assert (metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]) == (0, 0)


def test_nan_embeddings_have_a_nan_loss_and_accuracy_0():
    image = jnp.full((8, 4), jnp.nan)
    loss, metrics = SOFTMAX(image, image, jnp.float32(1))
    assert jnp.isnan(loss)
    assert (metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]) == (0, 0)


def test_orthogonal_pairs_have_accuracy_1_and_no_loss():
    rows = jnp.eye(8)
    loss, metrics = SOFTMAX(rows, rows, jnp.float32(100))
    assert (metrics["accuracy/image_to_text"], metrics["accuracy/text_to_image"]) == (1, 1)
    assert loss < 1e-6


# ------------------------------------------------------------------------------------- losses and their configuration


@dataclasses.dataclass(frozen=True)
class SquaredLoss(ContrastiveLoss):
    """1/2B Σᵢⱼ (zᵢⱼ − target)² of the logits z = scale · x·y; the target is `margin` for positives, 0 for negatives."""

    name: str = "squared"
    margin: float = 1.0

    def tile_statistics(self, tile, selected, maximum, axis, positive, scale, bias):
        target = self.margin if positive else 0
        return {} if axis == 0 else {"loss": jnp.sum(jnp.where(selected, (scale * tile - target) ** 2 / 2, 0), axis)}

    def example_loss(self, negatives, positives, axis, scale):
        return (jnp.zeros_like(negatives["max"]) if axis == 0 else negatives["loss"] + positives["loss"]), {}

    def tile_gradient(self, tile, matches, residuals, axis, scale, bias):
        return {0: jnp.zeros_like(tile), 1: scale * tile - self.margin * matches}[axis]

    def dense(self, image_BE, text_CE, scale, bias, matches_BC):
        return jnp.mean(jnp.sum((scale * image_BE @ text_CE.T - self.margin * matches_BC) ** 2, axis=1)) / 2


def test_a_loss_registered_outside_the_package_is_configured_with_its_own_parameters(monkeypatch):
    monkeypatch.setitem(LOSSES, "squared", SquaredLoss)
    config_dict = configs.default_config()
    config_dict.loss = configs.to_config_dict(SquaredLoss(margin=0.5))
    config = configs.from_config_dict(config_dict)
    assert config.loss == SquaredLoss(margin=0.5)
    assert configs.from_json(configs.to_json(config)) == config
    image, text = _unit_rows(2, 6, 4).astype(np.float32)
    arguments = image, text, jnp.float32(3)
    matches = jnp.eye(6, dtype=bool)
    actual = jax.value_and_grad(lambda *args: config.loss(*args)[0], argnums=(0, 1, 2))(*arguments)
    expected = jax.value_and_grad(lambda *args: config.loss.dense(*args, 0.0, matches), argnums=(0, 1, 2))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_the_loss_of_a_config_is_changed_by_name():
    config_dict = configs.default_config()
    config_dict.loss.name = "sigmoid"
    assert configs.from_config_dict(config_dict).loss == SigmoidLoss()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "sofmax"}, "loss.name='sofmax' is none of softmax, sigmoid; did you mean 'softmax'"),
        ({"name": "sigmoid", "margin": 0.1}, r"config has no key 'loss\.margin'.*keys here: name, logit_scale_init"),
        ({"logit_scale_max": 0.5}, r"loss\.logit_scale_max=0\.5 is out of range"),
    ],
)
def test_an_invalid_loss_config_is_refused_by_key(loss, message):
    with pytest.raises(ValueError, match=message):
        configs.from_config_dict({"loss": loss})
