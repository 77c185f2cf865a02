"""Packed captions: the embeddings and gradients of padded captions, at a fraction of the positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import Architecture, TextTransformer, ViT
from clip_jax.models import make_model, packing

LENGTH, END = 11, 63
ARCHITECTURE = Architecture(ViT(16, 8, 32, 1, 2), TextTransformer(64, LENGTH, END, width=32, layers=2, heads=2), 16)
# float32 sums in another order; unit vectors.
TOLERANCE = 1e-6


def _text(lengths):
    """Return token ids with these numbers of tokens before the end token, and noise after it."""
    text = np.random.default_rng(0).integers(0, END, (len(lengths), LENGTH)).astype(np.int32)
    text[np.arange(len(lengths)), lengths] = END
    return jnp.asarray(text)


@functools.cache
def _functions(capacity: float, groups: int):
    """Return parameters, and a compiled function of them, texts and weights: objective, outputs and gradient."""
    model = make_model(ARCHITECTURE, text_capacity=capacity, text_groups=groups)

    def objective(params, text, weights):
        embeddings, metrics = model.encode_text_train(params, text)
        return jnp.sum(weights * embeddings), (embeddings, metrics)

    return jax.jit(model.init)(jax.random.key(0)), jax.jit(jax.value_and_grad(objective, has_aux=True))


def _encode(text, capacity: float, groups: int = 1):
    params, function = _functions(capacity, groups)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(len(text), 16)), jnp.float32)
    (_, (embeddings, metrics)), gradient = function(params, text, weights)
    return embeddings, metrics, gradient["text"]


LENGTHS = {
    "short": [1, 2, 3, 2, 1, 4, 2, 3],
    "empty and full": [0, 10, 0, 0, 10, 1, 0, 2],
    "one of every length": [0, 1, 2, 3, 4, 5, 6, 7],
}


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_captions_have_the_embeddings_and_gradients_of_padded_ones(lengths, groups):
    text = _text(LENGTHS[lengths])
    expected, padded_metrics, expected_gradient = _encode(text, 1.0)
    got, metrics, gradient = _encode(text, 0.7, groups)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected_gradient)
    assert padded_metrics == {} and metrics["text/padded"] == 0


@pytest.mark.usefixtures("optimized")
@pytest.mark.slow
def test_captions_that_exceed_the_capacity_are_encoded_padded():
    text = _text([10, 9, 10, 8, 10, 10, 7, 9])
    expected, _, expected_gradient = _encode(text, 1.0)
    got, metrics, gradient = _encode(text, 0.5)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected_gradient)
    assert metrics["text/padded"] == 1
    np.testing.assert_allclose(metrics["text/filled"], (73 + 8) / 88, rtol=1e-6)


@pytest.mark.slow
def test_one_token_more_than_the_capacity_is_detected():
    # 8 texts of 11 tokens at 0.5 are 3 chunks of 16 tokens.
    for last, padded in ((5, 0), (6, 1)):
        text = _text([5, 5, 5, 5, 5, 5, 5, last])
        assert _encode(text, 0.5)[1]["text/padded"] == padded
        np.testing.assert_allclose(_encode(text, 0.5)[0], _encode(text, 1.0)[0], atol=TOLERANCE)


@pytest.mark.slow
def test_caption_without_end_token_is_pooled_at_the_same_position():
    text = _text([2, 3, 2, 1]).at[1].set(5)
    np.testing.assert_allclose(_encode(text, 0.7)[0], _encode(text, 1.0)[0], atol=TOLERANCE)


@pytest.mark.slow
def test_towers_that_attend_to_padding_are_not_packed():
    tower = TextTransformer(64, LENGTH, END, width=32, layers=1, heads=2, causal=False, pool="last")
    model = make_model(Architecture(ViT(16, 8, 32, 1, 2), tower, 16), text_capacity=0.5)
    params, text = model.init(jax.random.key(0)), _text([1] * 8)
    embeddings, metrics = model.encode_text_train(params, text)
    assert metrics == {}
    np.testing.assert_array_equal(embeddings, model.encode_text(params, text))


@pytest.mark.slow
def test_half_the_capacity_takes_about_half_the_flops():
    """FLOPs of a gradient, counted by the compiler, for 77 positions per caption."""
    tower = TextTransformer(512, 77, 511, width=128, layers=3, heads=2)

    def flops(capacity: float) -> float:
        model = make_model(Architecture(ViT(16, 8, 32, 1, 2), tower, 16), text_capacity=capacity)
        params = jax.eval_shape(model.init, jax.random.key(0))
        # Without `cond`, whose cost is the sum of its branches.
        encode = (
            model.encode_text
            if capacity == 1
            else lambda params, text: model.encode_text(
                params, packing.pack(text, jnp.zeros(64, jnp.int32), 1, capacity)[0]
            )
        )
        gradient = jax.grad(lambda params, text: jnp.sum(encode(params, text)))
        text = jax.ShapeDtypeStruct((64, 77), jnp.int32)
        return jax.jit(gradient).lower(params, text).compile().cost_analysis()["flops"]

    assert flops(0.5) < 0.6 * flops(1.0)
