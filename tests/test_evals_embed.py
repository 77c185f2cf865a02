"""Embedding in padded batches, on a mesh, and with a cache."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from clip_jax.evals.datasets.files import LazySequence
from clip_jax.evals.embed import CachedEmbedder, DiskCachedEmbedder, FeatureCache, ModelEmbedder

# The batch size may change the order of summation.
FLOAT32_ROUNDING = 1e-6
SIDE = 4


def pixels(images):
    return np.stack(
        [np.full((SIDE, SIDE, 3), image[0], np.uint8) + np.arange(SIDE, dtype=np.uint8)[:, None] for image in images]
    )


class Letters:
    vocab_size, length, pad_id, eos_id = 256, 6, 0, 255

    def __call__(self, texts):
        return np.array([[*map(ord, text[:5].ljust(5))] + [255] for text in texts], np.int32)


PARAMS = {
    "image": jax.random.normal(jax.random.key(0), (SIDE * SIDE * 3, 8)),
    "text": jax.random.normal(jax.random.key(1), (256, 8)),
}


def encode_image(params, image):
    return jnp.tanh(image.reshape(len(image), -1) / 255 @ params["image"])


def encode_text(params, text):
    return params["text"][text].sum(1)


def embedder(**changes):
    given = {"tokenizer": Letters(), "preprocess": pixels, "params": PARAMS}
    return ModelEmbedder(**{"encode_image": encode_image, "encode_text": encode_text} | given | changes)


IMAGES = [bytes([i]) for i in range(5, 205, 20)]
TEXTS = ["a dog", "cat", "", "owl", "a bee", "fox", "ant"]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 16])
def test_batch_size_and_padding_do_not_change_the_embeddings(batch_size):
    found = embedder(batch_size=batch_size)
    image, text = found.image(IMAGES), found.text(TEXTS)
    expected = encode_image(PARAMS, jnp.asarray(pixels(IMAGES)))
    expected_text = encode_text(PARAMS, jnp.asarray(Letters()(TEXTS)))
    for got, want in ((image, expected), (text, expected_text)):
        want = want / jnp.linalg.norm(want, axis=1, keepdims=True)
        assert got.dtype == np.float32 and isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, want, atol=FLOAT32_ROUNDING)


def test_each_encoder_is_traced_once_for_all_batches_calls_and_parameters():
    traced = []

    def counted(params, image):
        traced.append(image.shape)
        return encode_image(params, image)

    for scale in (1.0, 2.0):
        params = jax.tree.map(lambda x, scale=scale: x * scale, PARAMS)
        found = embedder(encode_image=counted, params=params, batch_size=4)
        found.image(IMAGES), found.image(IMAGES[:3])
    assert traced == [(4, SIDE, SIDE, 3)]


def test_a_mesh_gives_the_same_embeddings():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, replicated = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    sharded = embedder(batch_size=8, put=lambda x: jax.device_put(x, rows), out_sharding=replicated)
    np.testing.assert_allclose(sharded.image(IMAGES), embedder().image(IMAGES), atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(sharded.text(TEXTS), embedder().text(TEXTS), atol=FLOAT32_ROUNDING)


def test_only_zero_embeddings_are_nan():
    def zero_at_two(params, text):
        x = encode_text(params, text)
        return jnp.where((text[:, 0] == ord("o"))[:, None], 0.0, x)

    found = embedder(encode_text=zero_at_two, batch_size=3).text(TEXTS)
    assert np.isnan(found).all(1).tolist() == [text == "owl" for text in TEXTS]
    np.testing.assert_allclose(np.linalg.norm(np.delete(found, 3, 0), axis=1), 1, atol=FLOAT32_ROUNDING)


def test_bfloat16_outputs_are_returned_as_float32():
    found = embedder(encode_text=lambda params, text: encode_text(params, text).astype(jnp.bfloat16)).text(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, embedder().text(TEXTS), atol=2**-8)  # bfloat16 keeps 8 bits


def test_on_batch_is_called_after_every_batch_and_may_raise():
    calls = []
    embedder(batch_size=4, on_batch=lambda: calls.append(1)).image(IMAGES)
    assert len(calls) == 3

    def preempted():
        raise InterruptedError("preempted")

    with pytest.raises(InterruptedError, match="preempted"):
        embedder(batch_size=4, on_batch=preempted).text(TEXTS)


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="images: expected at least one"):
        embedder().image([])


class Counting:
    def __init__(self):
        self.calls = []

    def image(self, images):
        self.calls.append(list(images))
        return np.array([[i[0], 1] for i in images], np.float32)

    def text(self, texts):
        self.calls.append(list(texts))
        return np.array([[len(t), 1] for t in texts], np.float32)


def test_the_cache_embeds_every_input_once_and_preserves_the_order():
    counting = Counting()
    cached = CachedEmbedder(counting)
    assert cached.image([b"b", b"a", b"b"])[:, 0].tolist() == [98, 97, 98]
    assert cached.image([b"c", b"a"])[:, 0].tolist() == [99, 97]
    assert cached.text(["xy", "x", "xy"])[:, 0].tolist() == [2, 1, 2]
    assert cached.text(["x"]).tolist() == [[1, 1]]
    assert counting.calls == [[b"b", b"a"], [b"c"], ["xy", "x"]]


@pytest.mark.parametrize("cached", [CachedEmbedder, lambda e: DiskCachedEmbedder(e, FeatureCache("", ""))])
def test_a_cache_keeps_the_names_of_the_images(cached):
    """In messages about an image that can't be decoded."""

    class Named(Counting):
        def image(self, images):
            self.names = [images.name_of(index) for index in range(len(images))]
            return super().image(images)

    named, content = Named(), [b"b", b"b", b"a"]
    cached(named).image(LazySequence(3, content.__getitem__, lambda index: f"{index}.jpg"))
    assert named.names == ["0.jpg", "2.jpg"]


@pytest.mark.parametrize("cached", [CachedEmbedder, lambda e: DiskCachedEmbedder(e, FeatureCache("", ""))])
def test_an_image_that_cannot_be_read_is_an_error_and_not_the_end(cached, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks read an item at random

    def read(index):
        return [b"a", b"b"][index]

    with pytest.raises(IndexError):
        cached(Counting()).image(LazySequence(3, read))
