"""Inference with loaded weights: embeddings, batching, zero-shot, errors; no TensorFlow import."""

import copy
import dataclasses
import io
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax.config import (
    Architecture,
    Preprocess,
    TextTransformer,
    TokenizerConfig,
    ViT,
    WeightsConfig,
    with_activation,
)
from clip_jax.inference import _as_list, _as_texts, load
from clip_jax.interop import directory, msgpack
from clip_jax.models import make_model
from clip_jax.preprocess import open_image, preprocess, preprocess_many
from clip_jax.tokenizers import ClipBPE
from tests.tiny_tokenizers import sentencepiece_model

TINY = Architecture(
    ViT(image_size=16, patch_size=8, width=32, layers=1, heads=2),
    TextTransformer(vocab_size=600, context_length=12, eos_id=599, width=32, layers=1, heads=2),
    embed_dim=8,
)
CONFIG = WeightsConfig(TINY, preprocess=Preprocess(mean=(0.2, 0.3, 0.4)), source="a test")
# Programs compiled for different batch sizes may order float32 sums differently.
ROUNDING = 1e-5
TEXTS = ["a dog", "two cats", "", "!"]


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(make_model(TINY).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def file(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.msgpack"
    msgpack.write(path, params, CONFIG)
    return path


@pytest.fixture(scope="module")
def model(file):
    return clip_jax.load(file)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)) for i in range(5)]


def test_embeddings_equal_those_of_the_model_functions(model, params, images):
    reference = jax.tree.map(jax.jit, make_model(TINY, CONFIG.preprocess))
    pixels = np.stack([preprocess(image, 16, CONFIG.preprocess) for image in images])
    tokens = ClipBPE(length=12, vocab_size=600)(TEXTS)
    np.testing.assert_allclose(model.encode_image(images), reference.encode_image(params, pixels), atol=ROUNDING)
    np.testing.assert_allclose(model.encode_text(TEXTS), reference.encode_text(params, tokens), atol=ROUNDING)


def test_rows_are_unit_float32_vectors(model, images):
    for rows in (model.encode_image(images), model.encode_text(TEXTS)):
        assert rows.dtype == np.float32 and rows.shape[1] == 8
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=ROUNDING)


@pytest.mark.parametrize("count", [1, 3, 64, 65, 130])
def test_embedding_is_independent_of_the_number_of_inputs(model, images, count):
    many = [images[i % len(images)] for i in range(count)]
    one_by_one = np.concatenate([model.encode_image([image]) for image in images])
    np.testing.assert_allclose(model.encode_image(many), np.resize(one_by_one, (count, 8)), atol=ROUNDING)
    texts = [TEXTS[i % len(TEXTS)] for i in range(count)]
    np.testing.assert_allclose(model.encode_text(texts), np.resize(model.encode_text(TEXTS), (count, 8)), atol=ROUNDING)


def test_encoder_compiles_once_per_power_of_two(file, images):
    model = load(file)
    for count in (1, 2, 3, 4, 50, 64, 65, 100, 130, 3):  # batches of 1, 2, 4 and 64; 100 is 64 and 64 for 36
        model.encode_text(["a dog"] * count)
    assert model._encode_text._cache_size() == 4


def test_devices_share_a_batch(model, images):
    """On eight CPU devices, with batches that do not divide by eight."""
    shared = model.on_devices(jax.devices())
    assert (model.max_batch, shared.max_batch) == (64, 8 * 64)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(shared.params))
    many = (images * 103)[:513]
    np.testing.assert_allclose(shared.encode_image(images), model.encode_image(images), atol=ROUNDING)
    np.testing.assert_allclose(shared.encode_image(many), model.encode_image(many), atol=ROUNDING)
    np.testing.assert_allclose(shared.encode_text(TEXTS), model.encode_text(TEXTS), atol=ROUNDING)
    assert shared.encode_image([]).shape == (0, 8)


def test_preprocessed_pixels_are_encoded_unchanged(model, images):
    pixels = preprocess_many(images, 16, CONFIG.preprocess)
    np.testing.assert_array_equal(model.encode_pixels(pixels), model.encode_image(images))
    for wrong in (pixels.astype(np.float32), pixels[:, :8], pixels[0]):
        with pytest.raises(ValueError, match=r"pixels: expected uint8\[n 16 16 3\], got "):
            model.encode_pixels(wrong)


def test_empty_input_gives_empty_output(model):
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 8)


def test_paths_bytes_arrays_and_pil_images_are_equivalent(model, images, tmp_path):
    path = tmp_path / "image.png"
    images[0].save(path)
    rows = model.encode_image([images[0], path, str(path), path.read_bytes(), np.array(images[0])])
    np.testing.assert_allclose(rows, np.repeat(rows[:1], 5, axis=0), atol=ROUNDING)
    stack = np.stack([np.array(images[0])] * 2)
    np.testing.assert_allclose(model.encode_image(stack), rows[:2], atol=ROUNDING)


def test_logits_are_scaled_cosines(model, images):
    scale = np.exp(model.params["logit_scale"])
    expected = scale * model.encode_image(images) @ model.encode_text(TEXTS).T
    np.testing.assert_allclose(model.logits(images, TEXTS), expected, atol=scale * ROUNDING)


def test_zero_shot_is_the_softmax_over_mean_prompt_embeddings(model, images):
    templates, classes = ("a {}", "the {}!"), ["dog", "cat", "owl"]
    vectors = []
    for name in classes:
        mean = model.encode_text([template.format(name) for template in templates]).mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    logits = np.float64(model.scale) * model.encode_image(images) @ np.stack(vectors).T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.zero_shot(images, classes, templates), expected, atol=100 * ROUNDING)


def test_zero_shot_accepts_class_names_with_braces_and_refuses_templates_without(model, images):
    assert model.zero_shot(images, ["{x}", "{}"], ["a {}"]).shape == (5, 2)
    with pytest.raises(ValueError, match=r"templates: expected '\{\}' for the class name, got 'a photo'"):
        model.zero_shot(images, ["dog"], ["a photo"])


@pytest.mark.parametrize("single", ["a dog", b"bytes", Image.new("RGB", (9, 9)), np.zeros((9, 9, 3), np.uint8)])
def test_single_item_instead_of_a_sequence_is_refused(single):
    with pytest.raises(TypeError, match="expected a sequence, e.g. a list with one image"):
        _as_list(single, "image")


def test_single_string_instead_of_texts_is_refused(model):
    with pytest.raises(TypeError, match="e.g. a list with one text, got one str"):
        model.encode_text("a dog")


def test_error_has_the_image_index_across_batches(model, images):
    with pytest.raises(ValueError, match="image 66: .*expected an image, got"):
        model.encode_image([images[0]] * 66 + [b"broken"])


def test_overlong_text_raises_unless_truncate_is_set(file, model):
    with pytest.raises(ValueError, match=r"model\.text\.context_length=12"):
        model.encode_text(["dog " * 50])
    assert load(file, truncate=True).encode_text(["dog " * 50]).shape == (1, 8)


def test_model_has_its_config_and_a_short_repr(model):
    assert model.config == CONFIG and model.tokenizer.vocab_size == 600
    assert "Array" not in repr(model) and len(repr(model)) < 2000
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.params = {}


def test_parameter_with_another_shape_is_refused_with_its_name(params, tmp_path):
    text = dataclasses.replace(TINY.text, width=16)
    msgpack.write(tmp_path / "a", params, dataclasses.replace(CONFIG, model=dataclasses.replace(TINY, text=text)))
    with pytest.raises(ValueError, match=r"parameter text/\S+: expected shape \(.*\) by its config, got \("):
        load(tmp_path / "a")


def test_missing_and_additional_parameters_are_refused_with_their_names(params, tmp_path):
    msgpack.write(tmp_path / "less", {k: v for k, v in params.items() if k != "logit_scale"}, CONFIG)
    with pytest.raises(ValueError, match=r"logit_scale: expected shape \(\) by its config, got none"):
        load(tmp_path / "less")
    msgpack.write(tmp_path / "more", {**params, "bias": np.zeros(3)}, CONFIG)
    with pytest.raises(ValueError, match=r"bias: expected shape none by its config, got \(3,\)"):
        load(tmp_path / "more")


def test_tokenizer_with_another_vocabulary_is_refused(params, tmp_path):
    config = dataclasses.replace(CONFIG, tokenizer=TokenizerConfig(path="own"), tokenizer_file=b"t h\nth e</w>\n")
    msgpack.write(tmp_path / "a", params, config)
    with pytest.raises(ValueError, match=r"model\.text\.vocab_size: expected 515 to 516 .*, got 600"):
        load(tmp_path / "a")


def test_loading_and_encoding_import_neither_tensorflow_nor_orbax(file):
    script = f"""
import sys, clip_jax
assert not {{"jax", "flax", "numpy"}} & sys.modules.keys(), "import clip_jax must be fast"
model = clip_jax.load({str(file)!r})
model.encode_text(["a dog"])
import clip_jax.search
assert not {{"tensorflow", "orbax", "torch"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    assert clip_jax.load is load and "load" in dir(clip_jax)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = clip_jax.laod


# ------------------------------------------------------------------------------------------ weights of other libraries


def test_directory_is_loaded_with_its_activation_and_preprocessing(params, images, tmp_path):
    gelu = with_activation(TINY, "gelu")
    directory.write(tmp_path / "dir", params, WeightsConfig(gelu, preprocess=CONFIG.preprocess))
    loaded = load(tmp_path / "dir")
    assert loaded.config.model == gelu
    pixels = np.stack([preprocess(image, 16, loaded.config.preprocess) for image in images])
    reference = jax.jit(make_model(gelu, CONFIG.preprocess).encode_image)(params, pixels)
    np.testing.assert_allclose(loaded.encode_image(images), reference, atol=ROUNDING)
    assert np.abs(load(tmp_path / "dir", activation="quick_gelu").encode_image(images) - reference).max() > 1e-4


def test_image_size_and_context_length_are_resized(file, images):
    larger = load(file, image_size=32, context_length=20)
    assert larger.encode_image(images).shape == (5, 8)
    assert larger.tokenizer(["a"]).shape == (1, 20)
    with pytest.raises(ValueError, match="image_size: expected a multiple of 8, got 30; use 24"):
        load(file, image_size=30)


def test_weights_without_tokenizer_encode_images_and_refuse_texts(params, images, tmp_path):
    msgpack.write(tmp_path / "w.msgpack", params, WeightsConfig(TINY, TokenizerConfig("sentencepiece")))
    loaded = load(tmp_path / "w.msgpack")
    assert loaded.encode_image(images).shape == (5, 8)
    with pytest.raises(ValueError, match="tokenizer: expected one of 600 tokens .*, got none; load its file"):
        loaded.encode_text(["a dog"])
    (tmp_path / "own.model").write_bytes(sentencepiece_model(vocab_size=50))
    with pytest.raises(ValueError, match=r"vocab_size: expected .* by tokenizer\.name='sentencepiece', got 600"):
        load(tmp_path / "w.msgpack", tokenizer=str(tmp_path / "own.model"))
    assert load(tmp_path / "w.msgpack", tokenizer=TokenizerConfig()).encode_text(["a dog"]).shape == (1, 8)


def test_logit_bias_is_added(params, images, tmp_path):
    biased = dataclasses.replace(TINY, logit_bias=True)
    msgpack.write(tmp_path / "w.msgpack", params | {"logit_bias": np.float32(-3)}, WeightsConfig(biased))
    loaded = load(tmp_path / "w.msgpack")
    cosines = loaded.encode_image(images) @ loaded.encode_text(TEXTS).T
    np.testing.assert_allclose(loaded.logits(images, TEXTS), loaded.scale * cosines - 3, atol=1e-4)


def test_zero_shot_of_a_sigmoid_model_is_the_sigmoid_of_its_logits(model, params, images, tmp_path):
    biased = dataclasses.replace(TINY, logit_bias=True)
    msgpack.write(tmp_path / "w.msgpack", params | {"logit_bias": np.float32(-3)}, WeightsConfig(biased))
    loaded, classes = load(tmp_path / "w.msgpack"), ["dog", "cat"]
    logits = np.float64(loaded.logits(images, [f"a {name}" for name in classes]))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(loaded.zero_shot(images, classes, ["a {}"]), sigmoid, atol=100 * ROUNDING)
    for probabilities, expected in (("sigmoid", sigmoid), ("softmax", softmax)):
        found = loaded.zero_shot(images, classes, ["a {}"], probabilities=probabilities)
        np.testing.assert_allclose(found, expected, atol=100 * ROUNDING)
    np.testing.assert_allclose(model.zero_shot(images, classes, ["a {}"]).sum(axis=1), 1, atol=ROUNDING)
    with pytest.raises(ValueError, match="probabilities.*did you mean 'sigmoid'"):
        model.zero_shot(images, classes, ["a {}"], probabilities="sigmoids")


def test_pickled_and_copied_models_encode_as_the_original(model, images):
    expected = model.encode_image(images), model.encode_text(TEXTS)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert other.config == model.config
        np.testing.assert_allclose(other.encode_image(images), expected[0], atol=ROUNDING)
        np.testing.assert_allclose(other.encode_text(TEXTS), expected[1], atol=ROUNDING)


@pytest.mark.parametrize("wrong", [None, b"a cat", 3])
def test_item_that_is_no_text_is_an_error_with_its_index(wrong):
    with pytest.raises(TypeError, match=rf"text 66: expected a str, got {type(wrong).__name__}"):
        _as_texts(["a"] * 66 + [wrong])


@pytest.mark.parametrize("wrong", [None, 3])
def test_item_that_is_no_image_is_an_error_with_its_index(model, images, wrong):
    with pytest.raises(TypeError, match=rf"expected a PIL image, .* got {type(wrong).__name__}"):
        open_image(wrong)
    with pytest.raises(TypeError):  # under test by the annotations, otherwise with "image 1: "
        model.encode_image([images[0], wrong])


def test_files_jax_arrays_and_lazily_opened_images_are_images(model, images):
    encoded = io.BytesIO()
    images[0].save(encoded, "PNG")
    lazy, content = Image.open(io.BytesIO(encoded.getvalue())), jax.numpy.asarray(np.array(images[0]))
    rows = model.encode_image([images[0], io.BytesIO(encoded.getvalue()), lazy, content])
    np.testing.assert_allclose(rows, np.repeat(rows[:1], 4, axis=0), atol=ROUNDING)
    np.testing.assert_allclose(model.encode_image(jax.numpy.stack([content] * 2)), rows[:2], atol=ROUNDING)
    with pytest.raises(TypeError, match=r"a list with one image|Actual value: u8\[20,30,3\]"):  # with type checks
        model.encode_image(content)
    truncated = encoded.getvalue()[:-200]
    for broken in (Image.open(io.BytesIO(truncated)), io.BytesIO(truncated)):
        with pytest.raises(ValueError, match="image 1: .*expected an image, got .*truncated"):
            model.encode_image([images[0], broken])
