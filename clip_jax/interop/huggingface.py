"""Hugging Face configurations of CLIPModel and SiglipModel, read and written.

Source: transformers `configuration_clip.py`, `configuration_siglip.py` (defaults of keys that a config.json omits).
`eos_token_id=2` marks configs of early versions: the end token is then the greatest id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clip_jax.config import Activation, Architecture, TextTransformer, ViT

_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
}
_CLIP_IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_IMAGE |= {
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_CLIP_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_CLIP_TEXT |= {"vocab_size": 49_408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_IMAGE = _CLIP_IMAGE | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP_TEXT = _SIGLIP_IMAGE | {"vocab_size": 32_000, "max_position_embeddings": 64}

_CLIP_EOS = 49_407

# clip_jax field -> key of the configs.
_FIELDS = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
_FIELDS |= {"norm_epsilon": "layer_norm_eps"}
_IMAGE_FIELDS = _FIELDS | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT_FIELDS = _FIELDS | {"vocab_size": "vocab_size", "context_length": "max_position_embeddings"}

# Fields that transformers does not configure, by model_type: image tower, text tower.
_FIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (
        {"pool": "class", "norm_pre": True, "projection": True, "patch_bias": False, "layer_scale": 0.0},
        {"pool": "end", "causal": True, "projection": "linear", "layer_scale": 0.0},
    ),
    "siglip": (
        {"pool": "attention", "norm_pre": False, "projection": False, "patch_bias": True, "layer_scale": 0.0},
        {"pool": "last", "causal": False, "projection": "bias", "layer_scale": 0.0},
    ),
}


def architecture(config: Mapping[str, Any], file: str) -> Architecture:
    """Return the architecture of a config.json. Raises ValueError for an unsupported model type or activation."""
    family = config.get("model_type")
    if family not in _FIXED:
        raise ValueError(f"{file}: model_type: expected {' or '.join(map(repr, _FIXED))} for clip_jax, got {family!r}")
    defaults = (_CLIP_IMAGE, _CLIP_TEXT) if family == "clip" else (_SIGLIP_IMAGE, _SIGLIP_TEXT)
    image, text = (
        default | _tower_content(config, key, family, file)
        for default, key in zip(defaults, ("vision_config", "text_config"), strict=True)
    )
    for key, expected in {"num_channels": 3, "vision_use_head": True}.items():
        if image.get(key, expected) != expected:
            raise ValueError(f"{file}: vision_config.{key}: expected {expected} for clip_jax, got {image[key]!r}")
    if family == "clip":
        eos_id, embed_dim = _eos_id(text, file), config.get("projection_dim", 512)
    else:
        eos_id, embed_dim = 1, text.get("projection_size") or text["hidden_size"]
    return Architecture(
        ViT(**_tower(image, _IMAGE_FIELDS, file), **_FIXED[family][0]),
        TextTransformer(eos_id=eos_id, **_tower(text, _TEXT_FIELDS, file), **_FIXED[family][1]),
        embed_dim,
        logit_bias=family == "siglip",
    )


def _tower_content(config: Mapping[str, Any], key: str, family: str, file: str) -> dict[str, Any]:
    """Return `vision_config` or `text_config`.

    In CLIPConfig, all of `<key>_dict` and of its defaults replaces `<key>`; SiglipConfig ignores it.
    """
    given = config.get(f"{key}_dict") if family == "clip" else None
    given = config.get(key) if given is None else given
    if not isinstance(given, (dict, type(None))):
        raise ValueError(f"{file}: {key}: expected a JSON object, got {given!r}")
    return dict(given or {})


def _eos_id(text: Mapping[str, Any], file: str) -> int:
    """Return the id of the end token, at which CLIPTextModel pools.

    It pools at the greatest id of a text if the config has 2: the end token, unless tokens were added after it.
    """
    eos_id, vocab_size = text.get("eos_token_id", _CLIP_EOS), text["vocab_size"]
    if eos_id == 2 and vocab_size <= _CLIP_EOS + 1:
        return vocab_size - 1
    if type(eos_id) is not int or eos_id == 2:
        raise ValueError(
            f"{file}: text_config.eos_token_id: expected the id of the end token, got {eos_id!r} with {vocab_size:,}"
            f" tokens, where transformers fails or pools elsewhere; write CLIP's, {_CLIP_EOS}, or the tokenizer's"
        )
    return eos_id


def _tower(config: Mapping[str, Any], fields: Mapping[str, str], file: str) -> dict[str, Any]:
    if config["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"{file}: hidden_act: expected {', '.join(_ACTIVATIONS)}, got {config['hidden_act']!r}")
    tower = {field: _side(config[key], key, file) for field, key in fields.items()}
    ratio = mlp_ratio(config["hidden_size"], config["intermediate_size"])
    return tower | {"mlp_ratio": ratio, "activation": _ACTIVATIONS[config["hidden_act"]]}


def _side(value: Any, key: str, file: str) -> int | float:
    """Return a number, or that of a square `(h, w)`. Raises ValueError, with the key, for another value."""
    square = isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]
    if type(number := value[0] if square else value) not in (int, float):
        raise ValueError(f"{file}: {key}: expected a number, or a square (n, n), for clip_jax, got {value!r}")
    return number


def mlp_ratio(width: int, hidden: int) -> float:
    """Return a ratio with `int(width * ratio) == hidden`, rounded to four digits if possible."""
    exact = hidden / width
    candidates = [round(exact, 4), round(exact + 5e-5, 4), exact, math.nextafter(exact, math.inf)]
    return next(ratio for ratio in candidates if int(width * ratio) == hidden)


def config(model: Architecture) -> dict[str, Any]:
    """Return the config.json of a model. Raises ValueError for a model that transformers does not have."""
    towers = (model.image, model.text)
    plain = isinstance(model.image, ViT) and isinstance(model.text, TextTransformer)
    families = (
        family
        for family, fixed in _FIXED.items()
        if all(vars(tower) | fields == vars(tower) for tower, fields in zip(towers, fixed, strict=True))
    )
    if not plain or (family := next(families, None)) is None:
        raise ValueError("transformers has no such model: its CLIPModel and SiglipModel are plain Vision Transformers")
    vision, words = _tower_config(model.image, _IMAGE_FIELDS), _tower_config(model.text, _TEXT_FIELDS)
    content = {"model_type": family, "architectures": ["CLIPModel" if family == "clip" else "SiglipModel"]}
    if family == "siglip":
        words |= {"projection_size": model.embed_dim}
    else:
        projection = {"projection_dim": model.embed_dim}
        content, vision = content | projection, vision | projection
        words |= projection | {"bos_token_id": model.text.vocab_size - 2, "eos_token_id": model.text.eos_id}
    return content | {"vision_config": vision, "text_config": words}


def _tower_config(tower: ViT | TextTransformer, fields: Mapping[str, str]) -> dict[str, Any]:
    activations = {value: name for name, value in reversed(_ACTIVATIONS.items())}
    hidden = {"intermediate_size": int(tower.width * tower.mlp_ratio), "hidden_act": activations[tower.activation]}
    return {key: getattr(tower, field) for field, key in fields.items()} | hidden
