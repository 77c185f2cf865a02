"""What every architecture in MODELS must keep; the large ones by shape, small copies of them by number."""

import dataclasses

import jax
import numpy as np
import pytest

from clip_jax.architectures import MODELS, Architecture, name_of
from clip_jax.models import count_parameters, make_model

# bfloat16 keeps 8 bits; unit embeddings of two-layer towers were seen to drift by up to 0.01.
BFLOAT16_DRIFT = 0.03


def _small(name: str) -> Architecture:
    """Return the same kind of towers, with fewer and narrower layers."""
    model = MODELS[name]
    image = (
        dataclasses.replace(model.image, image_size=2 * model.image.patch_size, width=32, layers=2, heads=2)
        if model.image.kind == "vit"
        else model.image
    )
    text = dataclasses.replace(model.text, vocab_size=64, length=8, eos_id=63, width=32, layers=2, heads=2)
    return dataclasses.replace(model, image=image, text=text, embed_dim=16)


def _inputs(architecture: Architecture, rows: int = 4):
    rng = np.random.default_rng(0)
    size = architecture.image.image_size
    text = rng.integers(0, 63, (rows, architecture.text.length)).astype(np.int32)
    text[:, -1] = architecture.text.eos_id
    return rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8), text


pytestmark = pytest.mark.parametrize("name", MODELS)


def test_every_row_is_found_by_its_content(name):
    assert name_of(MODELS[name]) == name


def test_both_towers_end_in_the_same_space(name):
    architecture = MODELS[name]
    model = make_model(architecture)
    params = jax.eval_shape(model.init, jax.random.key(0))
    image, text = _inputs(architecture)
    for encode, inputs in ((model.encode_image, image), (model.encode_text, text)):
        embedded = jax.eval_shape(encode, params, inputs)
        assert embedded.shape == (4, architecture.embed_dim) and embedded.dtype == np.float32
    assert count_parameters(params) > 0 and all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_rows_do_not_depend_on_their_neighbours(name):
    architecture = _small(name)
    model = make_model(architecture)
    params = model.init(jax.random.key(0))
    image, text = _inputs(architecture)
    # Products of another shape round otherwise.
    np.testing.assert_allclose(model.encode_image(params, image)[:1], model.encode_image(params, image[:1]), atol=1e-5)
    np.testing.assert_allclose(model.encode_text(params, text)[:1], model.encode_text(params, text[:1]), atol=1e-5)


def test_bfloat16_stays_close_to_float32(name):
    architecture = _small(name)
    params = make_model(architecture).init(jax.random.key(0))
    image, text = _inputs(architecture)
    half, full = (make_model(architecture, dtype=dtype) for dtype in ("bfloat16", "float32"))
    drifts = [
        np.abs(half.encode_image(params, image) - full.encode_image(params, image)).max(),
        np.abs(half.encode_text(params, text) - full.encode_text(params, text)).max(),
    ]
    assert 0 < max(drifts) < BFLOAT16_DRIFT
