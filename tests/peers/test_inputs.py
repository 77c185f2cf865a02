"""Token ids and pixels against open_clip and transformers, on difficult texts and on all image modes."""

import dataclasses
import json
import pathlib
import random

import numpy as np
import open_clip
import pytest
import transformers
from PIL import Image

from clip_jax.config import SIGLIP_PREPROCESS, Preprocess, WeightsConfig, tokenizer_of
from clip_jax.interop import directory
from clip_jax.preprocess import preprocess
from clip_jax.tokenizers import TOKENIZERS as TOKENIZER_KINDS
from clip_jax.tokenizers import ClipBPE
from tests import tiny_models, tiny_tokenizers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/clip_bpe.json"
SIZES = [
    (640, 427),
    (427, 640),
    (499, 400),
    (300, 300),
    (225, 224),
    (224, 227),
    (50, 31),
    (17, 17),
    (300, 500),
    (801, 333),
]
MODES = ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"]


def _texts():
    hard = [row["text"] for row in json.loads(GOLDEN.read_text())["rows"] if "text" in row]
    rng = random.Random(0)
    ranges = [(32, 127), (32, 127), (160, 1024), (0x4E00, 0x4F00), (0x1F600, 0x1F650), (0x600, 0x6FF), (1, 32)]
    fuzz = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60))) for _ in range(3000)]
    return hard + fuzz


def test_token_ids_equal_open_clip():
    texts = [text for text in _texts() if "<" not in text]  # open_clip renamed the special tokens
    expected = open_clip.tokenizer.SimpleTokenizer()(texts).numpy()
    np.testing.assert_array_equal(ClipBPE()(texts), expected)


TOKENIZERS = [
    ("siglip_timm", "sentencepiece", tiny_tokenizers.siglip_model),
    ("clipa", "huggingface", tiny_tokenizers.tokenizer_json),
]


@pytest.mark.parametrize(("model", "kind", "content"), TOKENIZERS)
def test_token_ids_equal_those_of_the_exported_directory(model, kind, content, tmp_path):
    architecture = tiny_models.ARCHITECTURES[model]
    tokenizer = dataclasses.replace(tokenizer_of(architecture), name=kind)
    config = WeightsConfig(architecture, tokenizer, tokenizer_file=content())
    directory.write(tmp_path / "dir", tiny_models.params(architecture), config)
    sentences = tiny_tokenizers.SENTENCES
    texts = [*sentences, "A RED_dog, in: the park!", "", "caf\u00c3\u00a9 &amp; bar", " ".join(sentences), "\u72ac zq"]
    found = TOKENIZER_KINDS[kind](config.tokenizer, architecture.text, True, content())(texts)
    expected = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'dir'}")(texts).numpy()
    np.testing.assert_array_equal(found, expected)
    if kind == "sentencepiece":  # transformers drops an underscore, and undoes neither mojibake nor HTML
        settings = {"padding": "max_length", "max_length": architecture.text.context_length, "truncation": True}
        plain = [text.replace("_", " ") for text in texts if "&" not in text]
        expected = transformers.AutoTokenizer.from_pretrained(tmp_path / "dir")(plain, **settings)["input_ids"]
        np.testing.assert_array_equal(
            TOKENIZER_KINDS[kind](config.tokenizer, architecture.text, True, content())(plain), expected
        )


def test_open_clip_reads_a_tokenizer_with_fewer_merges_from_the_exported_directory(tmp_path):
    architecture = tiny_models.ARCHITECTURES["vit_gelu"]
    directory.write(tmp_path / "dir", tiny_models.params(architecture), WeightsConfig(architecture))
    sentences = tiny_tokenizers.SENTENCES
    texts = [*sentences, "A RED_dog, in: the park", "", "caf\u00c3\u00a9 &amp; bar", " ".join(sentences), "\u72ac zq"]
    found = ClipBPE(architecture.text.context_length, architecture.text.vocab_size)(texts)
    expected = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'dir'}")(texts).numpy()
    # open_clip pads with the end token, and pools at the first one. No text here contains id 0, an exclamation mark.
    np.testing.assert_array_equal(np.where(found == 0, architecture.text.eos_id, found), expected)


def _image(width, height, mode):
    rng = np.random.default_rng([width, height])
    pixels = np.clip(np.linspace(-60, 315, width)[None, :, None] + rng.normal(0, 60, (height, width, 4)), 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("squash", [False, True])
def test_pixels_equal_open_clip(mode, squash):
    spec = dataclasses.replace(SIGLIP_PREPROCESS if squash else Preprocess(), implementation="openai")
    expected = open_clip.transform.image_transform(
        224, False, mean=spec.mean, std=spec.std, resize_mode=spec.resize, interpolation="bicubic"
    )
    for size in SIZES:
        image = _image(*size, mode)
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        found = (preprocess(image, 224, spec).astype(np.float32) / 255 - mean) / std
        np.testing.assert_allclose(expected(image).numpy().transpose(1, 2, 0), found, atol=1e-6, err_msg=f"{size}")


@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_transformers(mode):
    processor = transformers.CLIPImageProcessorPil() if hasattr(transformers, "CLIPImageProcessorPil") else None
    if processor is None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        processor = CLIPImageProcessorPil()
    spec = Preprocess(implementation="huggingface")
    for size in SIZES:
        image = _image(*size, mode)
        expected = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        found = (preprocess(image, 224, spec).astype(np.float32) / 255 - np.array(spec.mean)) / np.array(spec.std)
        np.testing.assert_allclose(expected, found, atol=1e-6, err_msg=f"{size}")
