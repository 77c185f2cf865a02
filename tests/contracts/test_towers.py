"""What every architecture in MODELS must keep; the large ones by shape, small copies of them by number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import MODELS, Architecture, name_of
from clip_jax.models import count_parameters, make_model

# bfloat16 keeps 8 bits; unit embeddings of two-layer towers were seen to drift by up to 0.01.
BFLOAT16_DRIFT = 0.03


def _small(model: Architecture) -> Architecture:
    """Return the same kind of towers, with fewer and narrower layers."""
    image = model.image
    if image.kind == "vit":
        narrow = {"width": 32, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
        image = dataclasses.replace(image, image_size=32, patch_size=16, **narrow)
    elif image.kind == "resnet":
        image = dataclasses.replace(image, image_size=64, width=8, layers=(2, 1, 1, 1), heads=4)
    text = dataclasses.replace(model.text, vocab_size=64, length=8, eos_id=63, width=32, layers=2, heads=2)
    projected = getattr(image, "projection", True)
    text = dataclasses.replace(text, mlp_ratio=4.0)
    return dataclasses.replace(model, image=image, text=text, embed_dim=16 if projected else image.width)


# Many presets differ in size alone, so their small copies are one.
SMALL = {small: name for name, small in reversed([(name, _small(model)) for name, model in MODELS.items()])}
every_model = pytest.mark.parametrize("name", MODELS)
every_kind = pytest.mark.parametrize("architecture", SMALL, ids=list(SMALL.values()))


@functools.cache
def _initialised(architecture: Architecture):
    # 'rbg' is one instruction; the default's rounds, compiled for each parameter of a ResNet, take 13 seconds.
    return jax.jit(make_model(architecture).init)(jax.random.key(0, impl="rbg"))


def _inputs(architecture: Architecture, rows: int = 4):
    rng = np.random.default_rng(0)
    size = architecture.image.image_size
    text = rng.integers(0, 63, (rows, architecture.text.length)).astype(np.int32)
    text[:, -1] = architecture.text.eos_id
    return rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8), text


@every_model
def test_every_row_is_found_by_its_content(name):
    assert name_of(MODELS[name]) == name


@every_model
def test_both_towers_end_in_the_same_space(name):
    architecture = MODELS[name]
    model = make_model(architecture)
    params = jax.eval_shape(model.init, jax.random.key(0))
    image, text = _inputs(architecture)
    for encode, inputs in ((model.encode_image, image), (model.encode_text, text)):
        embedded = jax.eval_shape(encode, params, inputs)
        assert embedded.shape == (4, architecture.embed_dim) and embedded.dtype == np.float32
    assert count_parameters(params) > 0 and all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@every_kind
def test_rows_do_not_depend_on_their_neighbours(architecture):
    model, params = make_model(architecture), _initialised(architecture)
    image, text = _inputs(architecture)
    # Products of another shape round otherwise.
    for encode, inputs in ((jax.jit(model.encode_image), image), (jax.jit(model.encode_text), text)):
        np.testing.assert_allclose(encode(params, inputs)[:1], encode(params, inputs[:1]), atol=1e-5)


@every_kind
def test_bfloat16_stays_close_to_float32(architecture):
    params = _initialised(architecture)
    image, text = _inputs(architecture)
    half, full = (make_model(architecture, dtype=dtype) for dtype in ("bfloat16", "float32"))

    @jax.jit
    def drifts(params):
        images = half.encode_image(params, image) - full.encode_image(params, image)
        texts = half.encode_text(params, text) - full.encode_text(params, text)
        return jnp.abs(images).max(), jnp.abs(texts).max()

    assert 0 < max(drifts(params)) < BFLOAT16_DRIFT


@every_kind
def test_every_parameter_is_felt(architecture):
    """A parameter without a gradient is one that the forward pass forgot."""
    model = make_model(architecture)
    image, text = _inputs(architecture)
    # A residual branch that starts as nothing hides what is in it.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), _initialised(architecture))
    weights = np.random.default_rng(1).normal(size=(2, 4, architecture.embed_dim)).astype(np.float32)

    def objective(params):
        images = model.encode_image_train(params, image, jax.random.split(jax.random.key(2), 4))[0]
        return jnp.sum(weights[0] * images) + jnp.sum(weights[1] * model.encode_text(params, text))

    gradients = jax.jit(jax.grad(objective))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path({tower: gradients[tower] for tower in ("image", "text")}):
        assert np.isfinite(gradient).all()
        assert np.any(gradient), jax.tree_util.keystr(path)


@every_kind
def test_features_are_what_the_projection_is_applied_to(architecture):
    model, params = make_model(architecture), _initialised(architecture)
    image, _ = _inputs(architecture)
    features = model.image_features(params, image)
    tower = params["image"]
    projection = tower["pool"]["projection"] if architecture.image.kind == "resnet" else tower.get("projection", {})
    projection = projection if isinstance(projection, dict) else {"kernel": projection}
    projected = np.asarray(features)
    if projection:
        projected = projected @ np.asarray(projection["kernel"]) + np.asarray(projection.get("bias", 0.0))
    unit = projected / np.linalg.norm(projected, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit, model.encode_image(params, image), atol=1e-6)
    assert features.dtype == jnp.float32
