"""Weights of one tower alone, as transformers saves them, by directory and by file."""

import numpy as np
import pytest
import torch
import transformers

import clip_jax
from clip_jax.config import SIGLIP_PREPROCESS
from clip_jax.interop import conversion, name_tables, reading, torch_file
from tests import tiny_models
from tests.peers.peer_models import normalized

CLIP = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"projection_dim": 32}
IMAGE = CLIP | {"image_size": 32, "patch_size": 8}
TEXT = CLIP | {"vocab_size": 600, "max_position_embeddings": 16, "eos_token_id": 599, "bos_token_id": 598}
CLASSES = {
    "CLIPVisionModel": (transformers.CLIPVisionConfig, IMAGE),
    "CLIPVisionModelWithProjection": (transformers.CLIPVisionConfig, IMAGE),
    "SiglipVisionModel": (transformers.SiglipVisionConfig, IMAGE),
    "CLIPTextModel": (transformers.CLIPTextConfig, TEXT),
    "CLIPTextModelWithProjection": (transformers.CLIPTextConfig, TEXT),
    "SiglipTextModel": (transformers.SiglipTextConfig, TEXT | {"projection_size": 64}),
}


def _features(model, name, rng):
    """Return inputs of a tower and its normalized embeddings."""
    if "Vision" in name:
        inputs = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
        spec = SIGLIP_PREPROCESS if "Siglip" in name else None
        output = model(normalized(inputs, spec))
    else:
        inputs = rng.integers(3, 598, (3, 16)).astype(np.int32)
        inputs[:, 9], inputs[:, 10:] = 599, 0
        output = model(torch.tensor(inputs).long())
    embeddings = next(
        getattr(output, key) for key in ("image_embeds", "text_embeds", "pooler_output") if hasattr(output, key)
    )
    return inputs, torch.nn.functional.normalize(embeddings, dim=-1).detach().numpy()


@pytest.mark.parametrize("name", CLASSES)
def test_one_tower_gives_the_features_of_transformers(name, tmp_path):
    config, sizes = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    processor = transformers.SiglipImageProcessor if "Siglip" in name else transformers.CLIPImageProcessor
    sides = {"height": 32, "width": 32}
    processor(size=sides if "Siglip" in name else {"shortest_edge": 32}, crop_size=sides).save_pretrained(tmp_path)
    inputs, expected = _features(model, name, np.random.default_rng(0))
    activation = "gelu_tanh" if "Siglip" in name else "quick_gelu"
    for loaded in (
        clip_jax.load(tmp_path),
        clip_jax.load(tmp_path / "model.safetensors"),
        _alone(tmp_path, activation),
    ):
        tower, other = ("image", "text") if "Vision" in name else ("text", "image")
        encode = {"image": loaded._encode_image, "text": loaded._encode_text}[tower]
        np.testing.assert_allclose(np.asarray(encode(loaded.params, inputs)), expected, atol=2e-6)
        with pytest.raises(ValueError, match=f"expected weights of both towers with {other}, got the {tower} tower"):
            _ = loaded.encode_text(["a dog"]) if other == "text" else loaded.encode_image([b"an image"])
        with pytest.raises(ValueError, match="with logit_scale, got the"):
            loaded.scale  # noqa: B018


def _alone(folder, activation):
    """Load the weights without the config that is stored alongside them."""
    target, preprocess = folder / "alone", "siglip" if activation == "gelu_tanh" else "openai"
    target.mkdir()
    (target / "w.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return clip_jax.load(target / "w.safetensors", activation=activation, heads=(2, 2), preprocess=preprocess)


def test_half_a_state_dict_is_read(tmp_path):
    model = tiny_models.ARCHITECTURES["vit"]
    params, given = tiny_models.params(model), {"activation": "quick_gelu", "heads": (2, 1), "preprocess": "openai"}
    tensors = dict(conversion.LazyTensors(model, params, name_tables.OPENAI))
    for tower in ("image", "text"):
        half = {name: x for name, x in tensors.items() if name.startswith("visual.") == (tower == "image")}
        torch_file.write(tmp_path / "w.pt", half)
        found = clip_jax.load(tmp_path / "w.pt", **given)
        assert getattr(found.config.model, tower) == getattr(model, tower) and found.params.keys() == {tower}
        for name, array in conversion.flat(params[tower]).items():
            np.testing.assert_array_equal(conversion.flat(found.params[tower])[name], array)
        with pytest.raises(ValueError, match="expected weights of both towers, got none of the"):
            reading.read(tmp_path / "w.pt", **given)
        torch_file.write(tmp_path / "w.pt", half | {"stranger": np.ones(3)})
        with pytest.raises(ValueError, match="expected no other tensors, got 1 unused: stranger"):
            clip_jax.load(tmp_path / "w.pt", **given)
