"""Preprocessing in the files of transformers and open_clip: read, written, or refused with the key."""

import dataclasses
import json

import numpy as np
import pytest

from clip_jax.config import Preprocess, TokenizerConfig, WeightsConfig
from clip_jax.interop import directory, image_processor, msgpack, open_clip, reading
from tests import tiny_models

TINY = tiny_models.ARCHITECTURES
VIT = TINY["vit"]


def _preprocess_of(folder, model=VIT, **files):
    """Return the preprocessing that is read from a Hugging Face directory with these JSON files alone."""
    directory.write(folder, tiny_models.params(model), WeightsConfig(model))
    for file in ("open_clip_config.json", "open_clip_model.safetensors", "preprocessor_config.json"):
        (folder / file).unlink()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return reading.read(folder).config.preprocess


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 64, "crop_size": 64}


def test_image_processor_of_transformers_5_is_read_and_has_precedence(tmp_path):
    """transformers 5 saves a processor as processor_config.json alone, with the image processor inside."""
    nested = {"image_processor": HALF | {"resample": 2}, "processor_class": "CLIPProcessor"}
    expected = Preprocess((0.5,) * 3, (0.5,) * 3, "bilinear", implementation="huggingface")
    assert _preprocess_of(tmp_path / "new", processor_config=nested) == expected
    old = HALF | {"resample": 0}
    assert _preprocess_of(tmp_path / "both", processor_config=nested, preprocessor_config=old) == expected
    legacy = {"processor_class": "CLIPProcessor"}  # transformers 4: without the image processor
    found = _preprocess_of(tmp_path / "old", processor_config=legacy, preprocessor_config=old)
    assert found == dataclasses.replace(expected, interpolation="nearest")
    with pytest.raises(ValueError, match=r"processor_config\.json: image_processor: expected a JSON object, got list"):
        _preprocess_of(tmp_path / "bad", processor_config={"image_processor": []})


def _read_processor(model=VIT, **keys):
    return image_processor.read(keys, model, "p.json")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {}),
        ({"size": {"shortest_edge": 80}}, {"resize_size": 80}),
        ({"size": 80}, {"resize_size": 80}),
        ({"size": 80, "default_to_square": True}, {"resize": "squash", "resize_size": 80}),
        ({"size": [80, 80]}, {"resize": "squash", "resize_size": 80}),
        ({"size": {"height": 64, "width": 64}, "do_center_crop": False}, {"resize": "squash"}),
        ({"do_resize": False}, {"resize": "none"}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"do_normalize": False, "do_rescale": False}, {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}),
        ({"do_rescale": False}, {"mean": (0.5 / 255,) * 3, "std": (0.5 / 255,) * 3}),
        ({"rescale_factor": 1 / 127.5}, {"mean": (0.25,) * 3, "std": (0.25,) * 3}),
        ({"rescale_factor": 1 / 255}, {}),
        ({"image_mean": 0.25, "image_std": 1}, {"mean": (0.25,) * 3, "std": (1.0,) * 3}),
        ({"resample": 1}, {"interpolation": "lanczos"}),
        ({"do_convert_rgb": False, "processor_class": "X", "do_pad": False, "anything": None}, {}),
    ],
)
def test_keys_of_the_image_processor_are_obeyed(keys, expected):
    found = _read_processor(**HALF | keys)
    expected = dataclasses.replace(Preprocess((0.5,) * 3, (0.5,) * 3, implementation="huggingface"), **expected)
    np.testing.assert_allclose([*found.mean, *found.std], [*expected.mean, *expected.std], rtol=1e-12)
    assert dataclasses.replace(found, mean=expected.mean, std=expected.std) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crop_size": 48}, r"crop_size: expected the model's image size, 64 px.* got 48"),
        ({"crop_size": {"height": 64, "width": 48}}, "crop_size: expected"),
        ({"size": {"height": 64, "width": 48}}, "size: expected shortest_edge, or equal height and width"),
        ({"size": {"shortest_edge": 64, "longest_edge": 99}}, "size: expected shortest_edge"),
        ({"size": {"longest_edge": 64}}, "size: expected shortest_edge"),
        ({"size": "64"}, "size: expected shortest_edge"),
        ({"do_center_crop": False}, "size: expected height and width of the model's image size"),
        ({"do_center_crop": False, "do_resize": False}, "do_resize: expected height and width of the model's"),
        (
            {"do_center_crop": False, "size": [80, 80]},
            "size: expected height and width of the model's image size, 64 px",
        ),
        ({"do_resize": "no"}, "do_resize: expected true or false, for clip_jax, got 'no'"),
        ({"do_pad": True, "pad_size": 64}, "do_pad: expected no such key"),
        ({"offset": 0.5}, r"offset: expected no such key, for clip_jax, got 0\.5"),
        ({"image_mean": [0.5]}, "image_mean: expected a number, or one for each of three"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std: expected positive"),
        ({"rescale_factor": 0}, "rescale_factor: expected a positive number"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type: expected CLIPImageProcessor or Siglip"),
        ({"image_processor_type": "SiglipImageProcessor", "do_center_crop": True, "crop_size": None}, "crop_size: exp"),
    ],
)
def test_unsupported_keys_of_the_image_processor_are_errors_with_their_names(keys, message):
    with pytest.raises(ValueError, match=f"p.json: {message}"):
        _read_processor(**HALF | keys)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"fill_color": 9, "resize_mode": "longest"}, {"fill_color": 9, "resize": "longest"}),
        ({"fill_color": 9}, {}),
        ({"interpolation": "random", "size": 999, "mode": "RGB"}, {}),
        ({"mean": 0.5, "std": None}, {"mean": (0.5,) * 3}),
        ({"mean": 0}, {}),  # as in open_clip, where 0 is no mean
    ],
)
def test_keys_of_the_open_clip_preprocessing_are_obeyed(keys, expected):
    assert open_clip.preprocess(keys, "f") == dataclasses.replace(Preprocess(implementation="openai"), **expected)


@pytest.mark.parametrize(
    "keys",
    [{"mode": "L"}, {"fill_color": [1, 2, 3]}, {"resize_mode": "crop"}, {"mean": [0.5]}, {"pad": 3}]
    + [{"interpolation": "lanczos"}],
)
def test_unsupported_keys_of_the_open_clip_preprocessing_are_errors_with_their_names(keys):
    with pytest.raises(ValueError, match=rf"f: preprocess_cfg\.{next(iter(keys))}: expected .* for clip_jax, got"):
        open_clip.preprocess(keys, "f")


EXPORTED = [Preprocess(), Preprocess(resize_size=80), Preprocess(resize="squash", resize_size=80)]
EXPORTED += [Preprocess(resize="none"), Preprocess(interpolation="box"), Preprocess(resize="longest", fill_color=9)]


@pytest.mark.parametrize("spec", EXPORTED, ids=str)
@pytest.mark.parametrize("siglip", [False, True])
def test_preprocessing_is_exported_or_refused_by_each_library(spec, siglip):
    """open_clip resizes to the image size; transformers has no padded 'longest'."""
    model, tokenizer = TINY["siglip" if siglip else "vit"], TokenizerConfig()
    size = model.image.image_size
    spec = dataclasses.replace(spec, resize_size=spec.resize_size and size + 16)
    if spec.resize == "longest":
        with pytest.raises(ValueError, match=r"transformers has no preprocess\.resize='longest'"):
            image_processor.write(spec, size, siglip)
    else:
        written = json.loads(json.dumps(image_processor.write(spec, size, siglip)))
        assert image_processor.read(written, model, "f") == dataclasses.replace(spec, implementation="huggingface")
    if spec in (Preprocess(), EXPORTED[-1]):
        written = open_clip._preprocess_config(spec, size)
        assert open_clip.preprocess(written, "f") == dataclasses.replace(spec, implementation="openai")
    else:
        with pytest.raises(ValueError, match=r"open_clip has no preprocess\.resize"):
            open_clip.config(TINY["vit"], dataclasses.replace(spec), tokenizer)


def test_resized_side_is_scaled_with_the_image_size(tmp_path):
    spec = Preprocess(resize_size=80)
    msgpack.write(tmp_path / "w.msgpack", tiny_models.params(VIT), WeightsConfig(VIT, preprocess=spec))
    assert reading.read(tmp_path / "w.msgpack", image_size=128).config.preprocess.resize_size == 160
