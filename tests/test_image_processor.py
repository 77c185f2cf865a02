"""Preprocessing in the files of transformers and open_clip: read, written, or refused with the key."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from clip_jax.config import MODELS, PREPROCESS, Preprocess, TokenizerConfig, ViT, WeightsConfig, with_activation
from clip_jax.interop import (
    conversion,
    directory,
    huggingface,
    image_processor,
    msgpack,
    name_tables,
    open_clip,
    reading,
    torch_file,
)
from clip_jax.interop.naming import NAMINGS
from tests import tiny_models

TINY = tiny_models.ARCHITECTURES
VIT = TINY["vit"]


def _preprocess_of(folder, model=VIT, **files):
    """Return the preprocessing that is read from a Hugging Face directory with these JSON files alone."""
    directory.write(
        folder, tiny_models.params(model), WeightsConfig(model, preprocess=Preprocess(implementation="openai"))
    )
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


# ---------------------------------------------------------------------------- preprocessing of lone and renamed files


INCEPTION = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory with the config files of both libraries, whose preprocessing differs in the resize mode."""
    folder = tmp_path_factory.mktemp("exported") / "dir"
    directory.write(folder, tiny_models.params(VIT), WeightsConfig(VIT, preprocess=Preprocess(implementation="openai")))
    content = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps(content | {"preprocess_cfg": INCEPTION}))
    return folder


@pytest.mark.parametrize(
    ("file", "copy", "resize"),
    [
        ("open_clip_model.safetensors", "epoch_32.safetensors", "squash"),
        ("clip.pt", "last.pt", "squash"),
        ("clip.pt", "weights.bin", "squash"),
        ("model.safetensors", "open_clip_mine.safetensors", "shortest"),
    ],
)
def test_config_in_the_directory_counts_for_every_file_name(exported, tmp_path, file, copy, resize):
    """The names of the tensors decide between two config files; one alone counts for all files."""
    shutil.copytree(exported, tmp_path / "dir")
    shutil.copy(exported / file, tmp_path / "dir" / copy)
    for activation in ("", "gelu"):
        found = reading.read(tmp_path / "dir" / copy, activation=activation).config
        assert (found.preprocess.resize, found.model.text.activation) == (resize, activation or "quick_gelu")
    (tmp_path / "dir/config.json").unlink()
    assert reading.read(tmp_path / "dir" / copy).config.preprocess.resize == "squash"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_l14_clipa", ["clipa"]),
        ("vit_bigg14_clipa", ["clipa"]),
        ("vit_h14_378", ["dfn5b"]),
        ("siglip2_b16", ["siglip"]),
        ("vit_l14", ["openai"]),
        ("vit_l14_gelu", ["openai", "inception"]),
        ("vit_h14", ["openai", "dfn5b"]),
        ("rn50", ["openai"]),
    ],
)
def test_named_models_have_the_preprocessing_of_their_published_weights(tmp_path, name, expected):
    file = tmp_path / "w.pt"
    file.write_bytes(b"x")
    naming = NAMINGS[0]
    for model in (MODELS[name], with_activation(MODELS[name], "quick_gelu")):
        if model != MODELS[name] and name == "vit_l14_gelu":
            continue  # vit_l14
        if len(expected) == 1:
            found = reading._preprocess_of_tensors(file, naming, model, "")
            assert found == dataclasses.replace(PREPROCESS[expected[0]], implementation="openai")
        else:
            choices = ", ".join(map(repr, expected))
            with pytest.raises(
                ValueError, match=f"w.pt: expected the preprocessing.* got none; give preprocess=, one of {choices}, or"
            ):
                reading._preprocess_of_tensors(file, naming, model, "")
        for given in expected:
            found = reading._preprocess_of_tensors(file, naming, model, given)
            assert found == dataclasses.replace(PREPROCESS[given], implementation="openai")


def test_preprocessing_of_a_lone_file_follows_from_its_image_tower_or_is_an_argument(tmp_path):
    """Text towers and loss do not decide; a file without image tower has none; OpenAI's archives have OpenAI's."""
    file, naming = tmp_path / "w.pt", NAMINGS[0]
    file.write_bytes(b"x")
    for changes in ({"text": VIT.text}, {"logit_bias": True}, {"image": dataclasses.replace(ViT(), projection=False)}):
        model = dataclasses.replace(MODELS["vit_b32_gelu"], **changes)
        assert reading._preprocess_of_tensors(file, naming, model, "") == Preprocess(implementation="openai")
    wider = dataclasses.replace(MODELS["vit_b32"], image=dataclasses.replace(ViT(), image_size=256 + 32))
    for model in (VIT, wider, dataclasses.replace(VIT, logit_bias=True)):
        with pytest.raises(
            ValueError, match="expected the preprocessing, of an image tower without preset, got none; .*'openai', 'sig"
        ):
            reading._preprocess_of_tensors(file, naming, model, "")
        assert reading._preprocess_of_tensors(file, naming, model, "siglip").resize == "squash"
        assert reading._preprocess_of_tensors(file, naming, model, "", archive=True).resize == "shortest"
    tensors = dict(conversion.LazyTensors(VIT, tiny_models.params(VIT), name_tables.OPENAI))
    torch_file.write(file, {name: x for name, x in tensors.items() if not name.startswith("visual.")})
    assert reading.read(file, activation="gelu", heads=(2, 1), one_tower=True).config.preprocess == Preprocess()


def test_preprocessing_is_given_by_name_file_or_object(exported, tmp_path):
    processor = tmp_path / "p.json"
    processor.write_text(json.dumps({"image_processor": HALF | {"size": 80}}))
    nested = Preprocess((0.5,) * 3, (0.5,) * 3, implementation="huggingface", resize_size=80)
    cases = {"clipa": dataclasses.replace(PREPROCESS["clipa"], implementation="openai"), str(processor): nested}
    cases |= {str(exported / "open_clip_config.json"): open_clip.preprocess(INCEPTION, "f")}
    msgpack.write(tmp_path / "w.msgpack", tiny_models.params(VIT), WeightsConfig(VIT))
    (exported / "preprocessor_config.json").write_text(json.dumps({"do_pad": True}))  # unsupported, but not needed
    for path in (exported / "model.safetensors", exported / "clip.pt", tmp_path / "w.msgpack"):
        for given, expected in [*cases.items(), *((spec, spec) for spec in cases.values())]:
            assert reading.read(path, preprocess=given).config.preprocess == expected
    with pytest.raises(ValueError, match="preprocess='clip': expected one of openai, .* did you mean 'clipa'"):
        reading.read(tmp_path / "w.msgpack", preprocess="clip")


# --------------------------------------------------------------------------------------- config.json of transformers


def _text(**changes):
    return huggingface.config(VIT)["text_config"] | changes


def test_config_dicts_replace_the_configs_as_in_transformers():
    """CLIPConfig fills `text_config_dict` up with the defaults, not with text_config."""
    content = huggingface.config(VIT)
    old = {f"{key}_dict": content[key] for key in ("text_config", "vision_config")}
    rest = {key: value for key, value in content.items() if not key.endswith("_config")}
    assert huggingface.architecture(rest | old, "c") == VIT
    other = {"text_config": _text(hidden_act="gelu"), "vision_config": {"hidden_act": "gelu"}}
    assert huggingface.architecture(rest | other | old, "c") == VIT
    partial = {"text_config_dict": {"hidden_act": "gelu"}}
    text = huggingface.architecture(content | partial, "c").text
    assert (text.width, text.layers, text.activation) == (512, 12, "gelu")  # the defaults
    siglip = huggingface.config(TINY["siglip"])  # SiglipConfig ignores it
    assert huggingface.architecture(siglip | partial, "c") == TINY["siglip"]


@pytest.mark.parametrize(
    ("text", "eos_id"),
    [({"eos_token_id": 2}, 49_407), ({"eos_token_id": 49_407, "vocab_size": 49_410}, 49_407), ({"eos_token_id": 7}, 7)],
)
def test_end_token_of_the_config(text, eos_id):
    content = huggingface.config(VIT) | {"text_config": _text(**text)}
    assert huggingface.architecture(content, "c").text.eos_id == eos_id
    del content["text_config"]["eos_token_id"]
    assert huggingface.architecture(content, "c").text.eos_id == 49_407


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "text_config",
            {"eos_token_id": None},
            "text_config.eos_token_id: expected the id .* got None with 49,408 tokens",
        ),
        ("text_config", {"eos_token_id": [49_407]}, r"text_config.eos_token_id: expected .* \[49407\]"),
        (
            "text_config",
            {"eos_token_id": 2, "vocab_size": 49_410},
            "text_config.eos_token_id: .* got 2 with 49,410 tokens.* write",
        ),
        ("text_config", {"hidden_size": None}, "hidden_size: expected a number"),
        ("vision_config", {"image_size": [64, 32]}, r"image_size: expected a number, or a square .* got \[64, 32\]"),
        ("vision_config", {"num_channels": 1}, "vision_config.num_channels: expected 3"),
    ],
)
def test_config_of_another_model_is_refused_with_the_key(section, changes, message):
    content = huggingface.config(VIT)
    with pytest.raises(ValueError, match=f"c.json: {message}"):
        huggingface.architecture(content | {section: content[section] | changes}, "c.json")


def test_square_image_size_and_other_names_of_gelu_are_read():
    content = huggingface.config(VIT)
    content["vision_config"] |= {"image_size": [64, 64], "patch_size": [16, 16]}
    assert huggingface.architecture(content, "c") == VIT
    content["text_config"]["hidden_act"] = content["vision_config"]["hidden_act"] = "gelu_fast"
    assert huggingface.architecture(content, "c") == with_activation(VIT, "gelu_tanh")
