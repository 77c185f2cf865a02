"""Contract of every loss in LOSSES: equal to its own dense reference in value and gradient, however it is sharded."""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices import sharding
from clip_jax.losses import LOSSES, ring, tiles

BATCH, WIDTH, SCALE, BIAS = 16, 12, 14.3, -4.0
# Rounding of a float32 sum of 16 exponentials, relative to float64.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6

pytestmark = pytest.mark.parametrize("name", LOSSES)


def _embeddings(seed: int = 0, rows: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(2, rows, WIDTH))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return tuple(x.astype(np.float32))


def _loss(name: str, axis=None):
    def value(image, text, scale, bias=BIAS):
        return LOSSES[name]()(image, text, scale, jnp.asarray(bias), axis)[0]

    return value


def _dense(name: str, image_ids: np.ndarray | None = None, text_ids: np.ndarray | None = None):
    """Return the dense reference of a loss, as a function with the arguments of the loss."""

    def value(image, text, scale, bias=BIAS):
        matches = np.eye(len(image), dtype=bool) if image_ids is None else image_ids[:, None] == text_ids[None]
        return LOSSES[name]().dense(*map(jnp.asarray, (image, text, scale, bias, matches)))

    return value


def _float64(name: str, *inputs) -> float:
    """Return the dense reference in float64."""
    with jax.enable_x64(True):
        return float(_dense(name)(*(np.float64(x) for x in inputs)))


def _sharded(name: str, mesh: jax.sharding.Mesh | int):
    mesh = sharding.make_mesh(jax.devices()[:mesh]) if isinstance(mesh, int) else mesh
    specs = (sharding.BATCH, sharding.BATCH, sharding.REPLICATED, sharding.REPLICATED)
    return jax.shard_map(_loss(name, sharding.BATCH_AXES), mesh=mesh, in_specs=specs, out_specs=sharding.REPLICATED)


def _value_and_gradient(loss, inputs):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*inputs)


def _assert_close(actual, expected, value_tolerance=VALUE_TOLERANCE, gradient_tolerance=GRADIENT_TOLERANCE):
    np.testing.assert_allclose(actual[0], expected[0], rtol=value_tolerance)
    for x, y in zip(actual[1], expected[1], strict=True):
        assert np.linalg.norm(x - y) <= gradient_tolerance * max(np.linalg.norm(y), 0.1)


def test_the_registered_name_is_the_name_field_of_the_class(name):
    assert LOSSES[name]().name == name


def test_value_equals_the_dense_reference_in_float64(name):
    image, text = _embeddings()
    value = _loss(name)(image, text, jnp.float32(SCALE))
    np.testing.assert_allclose(value, _float64(name, image, text, SCALE, BIAS), rtol=VALUE_TOLERANCE)


def test_gradient_equals_central_differences_of_the_dense_reference(name):
    image, text = _embeddings()
    gradients = jax.grad(_loss(name), argnums=(0, 1, 2, 3))(image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=image.shape), rng.normal(size=text.shape), np.float64(1), np.float64(1)]
    for position, direction in enumerate(directions):
        # The error of a central difference in float64 is the third derivative times step², about 1e-8 here.
        step = 1e-4
        inputs = [image.astype(np.float64), text.astype(np.float64), np.float64(SCALE), np.float64(BIAS)]
        up, down = list(inputs), list(inputs)
        up[position] = inputs[position] + step * direction
        down[position] = inputs[position] - step * direction
        expected = (_float64(name, *up) - _float64(name, *down)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradients[position] * direction), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_sharded_value_and_gradient_equal_the_dense_reference(name, devices, group, monkeypatch):
    """On a ring, in groups and gathered at once; in float32, and in float64, where rounding conceals no error."""
    image, text = _embeddings()
    monkeypatch.setattr(ring, "BLOCK_BYTES", group * image.nbytes // devices)
    inputs = (image, text, np.float32(SCALE), np.float32(BIAS))
    _assert_close(_value_and_gradient(_sharded(name, devices), inputs), _value_and_gradient(_dense(name), inputs))
    with jax.enable_x64(True):
        monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * group * image.nbytes // devices)
        inputs = tuple(np.float64(x) for x in inputs)
        exact = _value_and_gradient(_sharded(name, devices), inputs), _value_and_gradient(_dense(name), inputs)
        assert exact[0][0].dtype == np.float64
        _assert_close(*exact, 1e-12, 1e-12)


@pytest.mark.parametrize("rows", [7, 12, 13])
def test_tiles_that_do_not_divide_the_batch_give_the_same_result(name, rows, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_SIZE", 4)
    image, text = _embeddings(rows=rows)
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    _assert_close(_value_and_gradient(_loss(name), inputs), _value_and_gradient(_dense(name), inputs))


def test_padding_rows_have_no_influence_at_scale_100(name, monkeypatch):
    """All pairs are opposites: padding, with similarity 0, would be e^100 times as likely."""
    monkeypatch.setattr(tiles, "TILE_SIZE", 4)
    image, _ = _embeddings(rows=5)
    image = np.tile(image[:1], (5, 1))
    inputs = (image, -image, jnp.float32(100), jnp.float32(BIAS))
    actual, expected = _value_and_gradient(_loss(name), inputs), _value_and_gradient(_dense(name), inputs)
    # The rounding error of a similarity times 100; the gradient is 0 and is compared with 0.1.
    _assert_close(actual, expected, value_tolerance=1e-5, gradient_tolerance=1e-3)


@pytest.mark.parametrize("axes", [("data", "fsdp"), ("fsdp", "data")])
def test_the_order_of_batch_axes_does_not_matter(name, axes, monkeypatch):
    image, text = _embeddings()
    monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * image.nbytes // 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    batch, replicated = jax.P(axes), jax.P()
    specs = (batch, batch, replicated, replicated)
    sharded = jax.shard_map(_loss(name, axes), mesh=mesh, in_specs=specs, out_specs=replicated)
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    _assert_close(_value_and_gradient(sharded, inputs), _value_and_gradient(_dense(name), inputs))


@pytest.mark.parametrize("slices", [2, 4, 8])
def test_groups_stay_within_a_slice_and_give_the_same_result(name, slices):
    """All texts would fit into one block, but groups never span slices."""
    image, text = _embeddings()
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(slices, -1, 1, 1), sharding.AXES)
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    sharded = _sharded(name, mesh)
    _assert_close(_value_and_gradient(sharded, inputs), _value_and_gradient(_dense(name), inputs))
    gathered = re.search(r"all_gather\[.*?axis_index_groups=\((\(.*?\))", str(jax.make_jaxpr(sharded)(*inputs)), re.S)
    assert (gathered is None) == (slices == 8)
    assert slices == 8 or len(ast.literal_eval(gathered[1])) == 8 // slices


@pytest.mark.parametrize("devices", [1, 8])
def test_equal_ids_are_positives(name, devices, monkeypatch):
    """Two captions per image and two images per concept: more texts than images, several positives for each."""
    monkeypatch.setattr(tiles, "TILE_SIZE", 3)
    image, _ = _embeddings()
    text = np.concatenate(_embeddings(1))
    image_ids = np.arange(BATCH, dtype=np.int32) // 2
    text_ids = np.repeat(image_ids, 2)
    monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * text.nbytes // devices)

    def loss(image, text, scale, bias, ids, axis=None):
        return LOSSES[name]()(image, text, scale, bias, axis, ids)[0]

    batch, replicated = sharding.BATCH, sharding.REPLICATED
    sharded = jax.shard_map(
        functools.partial(loss, axis=sharding.BATCH_AXES),
        mesh=sharding.make_mesh(jax.devices()[:devices]),
        in_specs=(batch, batch, replicated, replicated, (batch, batch)),
        out_specs=replicated,
    )
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    actual = _value_and_gradient(lambda *inputs: sharded(*inputs, (image_ids, text_ids)), inputs)
    _assert_close(actual, _value_and_gradient(_dense(name, image_ids, text_ids), inputs))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_equal_numpy_over_the_similarity_matrix(name, devices):
    """Of every second image the text is close to it, so that some are retrieved and some are not."""
    image, text = _embeddings()
    text[::2] = image[::2]
    specs = (sharding.BATCH, sharding.BATCH, sharding.REPLICATED, sharding.REPLICATED)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    loss = functools.partial(LOSSES[name](), axis=sharding.BATCH_AXES)
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=sharding.REPLICATED)
    _, metrics = sharded(image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    similarities = image.astype(np.float64) @ text.T.astype(np.float64)
    positive, negative = np.diag(similarities), np.where(np.eye(BATCH), -1, similarities)
    expected = {
        "accuracy/image_to_text": np.mean(positive > negative.max(1)),
        "accuracy/text_to_image": np.mean(positive > negative.max(0)),
        "similarity/positive": positive.mean(),
        "similarity/hardest_negative": (negative.max(0).mean() + negative.max(1).mean()) / 2,
    }
    assert 0 < expected["accuracy/image_to_text"] < 1
    assert {key: metrics[key].dtype for key in expected} == dict.fromkeys(expected, jnp.float32)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5)


def test_one_pair_has_a_finite_loss_and_unequal_numbers_need_ids(name):
    image, text = _embeddings(rows=1)
    assert np.isfinite(_loss(name)(image, text, jnp.float32(SCALE)))
    with pytest.raises(ValueError, match="as many texts as images, got 1 images and 2 texts; pass ids"):
        _loss(name)(image, np.concatenate([text, text]), jnp.float32(SCALE))


def test_a_loss_that_depends_on_the_bias_needs_one(name):
    inputs = (*_embeddings(), jnp.float32(SCALE))
    depends = float(_loss(name)(*inputs, 0.0)) != float(_loss(name)(*inputs, 1.0))
    assert LOSSES[name].needs_logit_bias == depends


def test_the_order_of_the_pairs_does_not_matter(name):
    image, text = _embeddings()
    order = np.random.default_rng(2).permutation(BATCH)
    value = _loss(name)(image, text, jnp.float32(SCALE))
    permuted = _loss(name)(image[order], text[order], jnp.float32(SCALE))
    np.testing.assert_allclose(value, permuted, rtol=VALUE_TOLERANCE)


def test_the_loss_is_traced_once_for_one_shape(name):
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
def test_value_and_gradient_are_finite_at_scale_100(name, opposite):
    image, _ = _embeddings()
    text = -image if opposite else image
    value, gradient = jax.value_and_grad(lambda image: _loss(name)(image, text, jnp.float32(100)))(image)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_embeddings_have_float32_logits(name):
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in _embeddings())
    value = _loss(name)(image, text, jnp.float32(100))
    expected = _float64(name, np.asarray(image, np.float32), np.asarray(text, np.float32), 100, BIAS)
    # Only the inputs are rounded: bfloat16 logits would have an error of 4e-3.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
