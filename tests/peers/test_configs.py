"""config.json as transformers understands it, and the preprocessing in open_clip's registry of published weights."""

import json

import jax
import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_jax.config import MODELS, PREPROCESS, preprocess_names
from clip_jax.interop import huggingface, reading
from clip_jax.models import make_model
from clip_jax.preprocess import preprocess
from clip_jax.tokenizers import ClipBPE
from tests import tiny_models
from tests.peers import peer_models

VIT = tiny_models.ARCHITECTURES["vit"]
FEATURES = 1e-6  # as in test_features


def _only_dicts(content):
    for key in ("text_config", "vision_config"):
        content[f"{key}_dict"] = content.pop(key)


def _dicts_complete_configs(content):
    for key in ("text_config", "vision_config"):
        content[f"{key}_dict"] = content[key] | {"hidden_act": "gelu"}
        content[key] = {"hidden_size": content[key]["hidden_size"], "num_attention_heads": 999}


def _text(**changes):
    return lambda content: content["text_config"].update(changes)


EDITS = {
    "unchanged": lambda content: None,
    "only *_dict": _only_dicts,
    "*_dict replaces": _dicts_complete_configs,
    "eos_token_id 2": _text(eos_token_id=2),
    "no eos_token_id": lambda content: content["text_config"].pop("eos_token_id"),
    "another eos_token_id": _text(eos_token_id=320),
    "gelu_fast": _text(hidden_act="gelu_fast"),
    "gelu_accurate": _text(hidden_act="gelu_accurate"),
    "gelu_python": _text(hidden_act="gelu_python"),
    "gelu_new": _text(hidden_act="gelu_new"),
}
REFUSED = {
    "eos_token_id null": (_text(eos_token_id=None), "eos_token_id"),
    "eos_token_id list": (_text(eos_token_id=[49_407]), "eos_token_id"),
    "image_size (h, w)": (lambda content: content["vision_config"].update(image_size=[64, 32]), "image_size"),
    "one channel": (lambda content: content["vision_config"].update(num_channels=1), "num_channels"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of transformers for each vocabulary size, and its config."""

    def save(vocab_size):
        content = huggingface.config(VIT)
        content["text_config"]["vocab_size"] = vocab_size
        folder = tmp_path_factory.mktemp("saved")
        torch.manual_seed(0)
        model = transformers.CLIPModel(transformers.CLIPConfig(**content))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
            model.logit_scale.fill_(3.0)
        model.save_pretrained(folder)
        return folder

    return {size: save(size) for size in (49_408, 49_410)}


def _edit(folder, tmp_path, edit):
    content = json.loads((folder / "config.json").read_text())
    edit(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("vocab_size", [49_408, 49_410])
@pytest.mark.parametrize("edit", EDITS)
def test_config_means_the_model_of_transformers(saved, tmp_path, edit, vocab_size):
    folder = _edit(saved[vocab_size], tmp_path, EDITS[edit])
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    if (edit, vocab_size) == ("eos_token_id 2", 49_410):  # pools at the greatest id, which can be an added token
        with pytest.raises(ValueError, match="eos_token_id: .* got 2 with 49,410 tokens"):
            reading.read(folder)
        return
    weights = reading.read(folder)
    pixels, tokens = tiny_models.inputs(VIT)
    tokens[:, 3] = 320
    functions = make_model(weights.config.model)
    image, text = (
        jax.jit(f)(weights.params, x) for f, x in ((functions.encode_image, pixels), (functions.encode_text, tokens))
    )
    with torch.no_grad():
        expected = peer_models.features(model, pixels, tokens)
    np.testing.assert_allclose(image, expected[0].numpy(), atol=FEATURES, rtol=0)
    np.testing.assert_allclose(text, expected[1].numpy(), atol=FEATURES, rtol=0)


@pytest.mark.parametrize("edit", REFUSED)
def test_config_that_transformers_cannot_use_is_refused_with_the_key(saved, tmp_path, edit):
    change, key = REFUSED[edit]
    folder = _edit(saved[49_408], tmp_path, change)
    pixels, tokens = tiny_models.inputs(VIT)
    with pytest.raises(Exception):  # noqa: B017, PT011 (of several types)
        peer_models.features(transformers.CLIPModel.from_pretrained(folder), pixels, tokens)
    with pytest.raises(ValueError, match=f"{key}: expected"):
        reading.read(folder)


OPEN_CLIP_NAMES = {
    **{"rn50": "RN50", "rn101": "RN101", "rn50x4": "RN50x4", "rn50x16": "RN50x16", "rn50x64": "RN50x64"},
    **{"vit_b32": "ViT-B-32-quickgelu", "vit_b16": "ViT-B-16-quickgelu", "vit_l14": "ViT-L-14-quickgelu"},
    **{"vit_l14_336": "ViT-L-14-336-quickgelu", "vit_b32_gelu": "ViT-B-32", "vit_b16_gelu": "ViT-B-16"},
    **{"vit_b32_256": "ViT-B-32-256", "vit_b16_plus_240": "ViT-B-16-plus-240", "vit_l14_gelu": "ViT-L-14"},
    **{"vit_h14": "ViT-H-14", "vit_h14_378": "ViT-H-14-378-quickgelu", "vit_g14": "ViT-g-14"},
    **{"vit_bigg14": "ViT-bigG-14", "vit_l14_clipa": "ViT-L-14-CLIPA", "vit_h14_clipa": "ViT-H-14-CLIPA"},
    **{"vit_bigg14_clipa": "ViT-bigG-14-CLIPA", "siglip_b16": "ViT-B-16-SigLIP"},
    **{"siglip_l16_256": "ViT-L-16-SigLIP-256", "siglip_so400m14": "ViT-SO400M-14-SigLIP"},
    **{"siglip_so400m14_384": "ViT-SO400M-14-SigLIP-384", "siglip2_b16": "ViT-B-16-SigLIP2"},
    **{"siglip2_b32_256": "ViT-B-32-SigLIP2-256", "siglip2_l16_256": "ViT-L-16-SigLIP2-256"},
    **{"siglip2_so400m16_256": "ViT-SO400M-16-SigLIP2-256", "siglip2_giant16_256": "ViT-gopt-16-SigLIP2-256"},
}


def _processor(**keys):
    """Return a CLIPProcessor, which transformers 5 saves as processor_config.json alone."""
    vocabulary, merges = ClipBPE().as_huggingface()
    tokenizer = transformers.CLIPTokenizer(vocabulary, [tuple(merge.split()) for merge in merges])
    sides = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    return transformers.CLIPProcessor(CLIPImageProcessorPil(**sides | keys), tokenizer)


@pytest.mark.parametrize("older", [False, True])
def test_saved_processor_means_the_pixels_of_transformers(saved, tmp_path, older):
    """Also with another preprocessor_config.json alongside, as older versions saved it."""
    folder = _edit(saved[49_408], tmp_path, lambda content: None)
    keys = {"image_mean": [0.5] * 3, "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_rescale": True}
    _processor(**keys).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    if older:
        _processor(image_mean=[0.1] * 3, resample=0).image_processor.save_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8))
    peer = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = peer(images=[image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    spec = reading.read(folder).config.preprocess
    found = (preprocess(image, 64, spec) / 255 - np.array(spec.mean)) / np.array(spec.std)
    assert spec.mean == (0.5,) * 3
    assert np.abs((found - expected) * np.array(spec.std) * 255).max() <= 1


def test_every_preset_has_a_name_in_open_clip():
    assert OPEN_CLIP_NAMES.keys() == MODELS.keys() - {"emoji"}


@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
def test_preprocessing_of_presets_equals_open_clips_registry(name):
    """All that the published weights of a model have, and no other."""
    registry = set()
    for tag in open_clip.list_pretrained_tags_by_model(OPEN_CLIP_NAMES[name]):
        found = open_clip.get_pretrained_cfg(OPEN_CLIP_NAMES[name], tag)
        registry.add((tuple(found["mean"]), tuple(found["std"]), found["interpolation"], found["resize_mode"]))
    specs = [PREPROCESS[key] for key in preprocess_names(MODELS[name])]
    assert {(spec.mean, spec.std, spec.interpolation, spec.resize) for spec in specs} == registry
