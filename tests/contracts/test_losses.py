"""What every loss in LOSSES must keep, whatever its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.losses import LOSSES

BATCH, WIDTH, SCALE, BIAS = 16, 12, 14.3, -4.0
# float32 rounding of a sum of 16 exponentials, against float64.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6

pytestmark = pytest.mark.parametrize("name", LOSSES)


def _embeddings(seed: int = 0, rows: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(2, rows, WIDTH))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return tuple(x.astype(np.float32))


def _loss(name: str, axis=None):
    def value(image, text, scale, bias=BIAS):
        return LOSSES[name](image, text, scale, jnp.float32(bias), axis)[0]

    return value


def _reference(name: str, image: np.ndarray, text: np.ndarray, scale: float, bias: float = BIAS) -> float:
    """Return the loss in float64 by loops over pairs, from the paper's pseudocode."""
    logits = scale * image.astype(np.float64) @ text.astype(np.float64).T + bias
    if name == "softmax":
        rows = [np.log(np.exp(row - row[i]).sum()) for i, row in enumerate(logits)]
        columns = [np.log(np.exp(column - column[i]).sum()) for i, column in enumerate(logits.T)]
        return (np.mean(rows) + np.mean(columns)) / 2
    if name == "sigmoid":
        pairs = [(1 if i == j else -1) * logits[i, j] for i in range(len(logits)) for j in range(len(logits))]
        return sum(np.log1p(np.exp(-pair)) for pair in pairs) / len(logits)
    raise AssertionError(f"write the reference of {name}: a loss without one is not tested")


def _sharded(name: str, devices: int):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    specs = (sharding.BATCH, sharding.BATCH, sharding.REPLICATED, sharding.REPLICATED)
    return jax.shard_map(_loss(name, sharding.BATCH_AXIS), mesh=mesh, in_specs=specs, out_specs=sharding.REPLICATED)


def test_the_value_is_that_of_the_reference_in_float64(name):
    image, text = _embeddings()
    value = _loss(name)(image, text, jnp.float32(SCALE))
    np.testing.assert_allclose(value, _reference(name, image, text, SCALE), rtol=VALUE_TOLERANCE)


def test_the_gradient_is_the_slope_of_the_reference(name):
    image, text = _embeddings()
    gradients = jax.grad(_loss(name), argnums=(0, 1, 2, 3))(image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=image.shape), rng.normal(size=text.shape), np.float64(1), np.float64(1)]
    for position, direction in enumerate(directions):
        # Central difference in float64: its error is the third derivative times step², about 1e-8 here.
        step = 1e-4
        inputs = [image.astype(np.float64), text.astype(np.float64), np.float64(SCALE), np.float64(BIAS)]
        up, down = list(inputs), list(inputs)
        up[position] = inputs[position] + step * direction
        down[position] = inputs[position] - step * direction
        slope = (_reference(name, *up) - _reference(name, *down)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradients[position] * direction), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_sharded_loss_and_gradient_are_the_dense_ones(name, devices):
    image, text = _embeddings()
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    dense = jax.value_and_grad(_loss(name), argnums=(0, 1, 2, 3))(*inputs)
    sharded = jax.jit(jax.value_and_grad(_sharded(name, devices), argnums=(0, 1, 2, 3)))(*inputs)
    np.testing.assert_allclose(sharded[0], dense[0], rtol=VALUE_TOLERANCE)
    for got, expected in zip(sharded[1], dense[1], strict=True):
        assert np.linalg.norm(got - expected) <= GRADIENT_TOLERANCE * np.linalg.norm(expected)


def test_swapping_the_towers_swaps_the_gradients(name):
    image, text = _embeddings()
    gradient = jax.grad(_loss(name), argnums=(0, 1))
    ours, swapped = gradient(image, text, jnp.float32(SCALE)), gradient(text, image, jnp.float32(SCALE))
    np.testing.assert_allclose(ours[0], swapped[1], rtol=GRADIENT_TOLERANCE, atol=1e-7)
    np.testing.assert_allclose(ours[1], swapped[0], rtol=GRADIENT_TOLERANCE, atol=1e-7)


def test_the_order_of_the_pairs_does_not_matter(name):
    image, text = _embeddings()
    order = np.random.default_rng(2).permutation(BATCH)
    value = _loss(name)(image, text, jnp.float32(SCALE))
    permuted = _loss(name)(image[order], text[order], jnp.float32(SCALE))
    np.testing.assert_allclose(value, permuted, rtol=VALUE_TOLERANCE)


def test_it_is_traced_once_for_one_shape(name):
    traces = 0

    def counted(*inputs):
        nonlocal traces
        traces += 1
        return _loss(name)(*inputs)

    jitted = jax.jit(counted)
    for seed in range(3):
        jitted(*_embeddings(seed), jnp.float32(SCALE + seed))
    assert traces == 1


@pytest.mark.parametrize("opposite", [False, True])
def test_it_is_finite_at_the_largest_scale(name, opposite):
    image, _ = _embeddings()
    text = -image if opposite else image
    value, gradient = jax.value_and_grad(lambda image: _loss(name)(image, text, jnp.float32(100)))(image)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_embeddings_give_float32_logits(name):
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in _embeddings())
    value = _loss(name)(image, text, jnp.float32(100))
    exact = _reference(name, np.asarray(image, np.float32), np.asarray(text, np.float32), 100)
    # The inputs are rounded, nothing after them: bfloat16 logits would be off by 4e-3.
    np.testing.assert_allclose(value, exact, rtol=1e-5)
