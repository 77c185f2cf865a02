"""Hugging Face's configurations of CLIPModel and SiglipModel, read and written.

Source: transformers `configuration_clip.py`, `configuration_siglip.py` (they give what a config.json leaves out) and
`image_processing_clip.py`. An `eos_token_id` of 2 is their mark of old configs: the end token is then the greatest id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clip_jax.config import Activation, Architecture, Preprocess, TextTransformer, ViT, preprocess_of

_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_CLIP_IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_IMAGE |= {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_CLIP_TEXT |= {"vocab_size": 49_408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_IMAGE = _CLIP_IMAGE | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP_TEXT = _SIGLIP_IMAGE | {"vocab_size": 32_000, "max_position_embeddings": 64}


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture of a config.json.

    Raises:
      ValueError: if it is of another model, or asks for something that clip_jax doesn't build.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"{where}: model_type={kind!r} is not built by clip_jax; it reads 'clip' and 'siglip'")
    defaults = (_CLIP_IMAGE, _CLIP_TEXT) if kind == "clip" else (_SIGLIP_IMAGE, _SIGLIP_TEXT)
    image, text = (
        d | dict(config.get(k) or {}) for d, k in zip(defaults, ("vision_config", "text_config"), strict=True)
    )
    common_image, common_text = _transformer(image, where), _transformer(text, where)
    common_text |= {"vocab_size": text["vocab_size"], "length": text["max_position_embeddings"]}
    common_image |= {"image_size": image["image_size"], "patch_size": image["patch_size"]}
    if kind == "clip":
        eos_id = text.get("eos_token_id", 49_407)
        eos_id = text["vocab_size"] - 1 if eos_id == 2 else eos_id
        return Architecture(
            ViT(**common_image), TextTransformer(**common_text, eos_id=eos_id), config.get("projection_dim", 512)
        )
    tower = ViT(**common_image, pool="attention", norm_pre=False, patch_bias=True, projection=False)
    return Architecture(
        tower,
        TextTransformer(**common_text, eos_id=1, causal=False, pool="last", projection="bias"),
        text.get("projection_size") or text["hidden_size"],
        logit_bias=True,
    )


def _transformer(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    if config["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act={config['hidden_act']!r} is none of {', '.join(_ACTIVATIONS)}")
    return {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": mlp_ratio(config["hidden_size"], config["intermediate_size"]),
        "activation": _ACTIVATIONS[config["hidden_act"]],
        "norm_epsilon": config["layer_norm_eps"],
    }


def mlp_ratio(width: int, hidden: int) -> float:
    """Return the ratio whose product with `width`, cut to an integer, is `hidden`: with few digits where they do."""
    exact = hidden / width
    candidates = [round(exact, 4), round(exact + 5e-5, 4), exact, math.nextafter(exact, math.inf)]
    return next(ratio for ratio in candidates if int(width * ratio) == hidden)


def preprocess(config: Mapping[str, Any], model: Architecture) -> Preprocess:
    """Return what a preprocessor_config.json asks for; what it leaves out is as usual for the model.

    Raises:
      ValueError: for a way of resizing that clip_jax doesn't have.
    """
    default = preprocess_of(model)
    if (resample := config.get("resample", 3)) not in _RESAMPLE:
        raise ValueError(f"preprocessor_config.json: clip_jax resizes by {_RESAMPLE}, not by resample={resample!r}")
    size = config.get("size", {"height": 0} if default.resize == "squash" else {"shortest_edge": 0})
    return Preprocess(
        mean=tuple(map(float, config.get("image_mean", default.mean))),
        std=tuple(map(float, config.get("image_std", default.std))),
        interpolation=_RESAMPLE[resample],
        resize="squash" if isinstance(size, Mapping) and "height" in size else "shortest",
        implementation="huggingface",
    )


def config(model: Architecture) -> dict[str, Any]:
    """Return the config.json of a model. Raises ValueError for models that transformers doesn't have."""
    image, text = model.image, model.text
    siglip = image.kind == "vit" and image.pool == "attention"
    plain = ("class", True, True, False, "end", True, "linear")
    form = ("attention", False, False, True, "last", False, "bias") if siglip else plain
    if (
        image.kind != "vit"
        or image.layer_scale
        or text.layer_scale
        or form
        != (
            *(image.pool, image.norm_pre, image.projection, image.patch_bias),
            *(text.pool, text.causal, text.projection),
        )
    ):
        raise ValueError("transformers has no such model: its CLIPModel and SiglipModel are plain vision transformers")
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}

    def transformer(tower: ViT | TextTransformer) -> dict[str, Any]:
        return {
            "hidden_size": tower.width,
            "intermediate_size": int(tower.width * tower.mlp_ratio),
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "hidden_act": names[tower.activation],
            "layer_norm_eps": tower.norm_epsilon,
        }

    vision = transformer(image) | {"image_size": image.image_size, "patch_size": image.patch_size}
    words = transformer(text) | {"vocab_size": text.vocab_size, "max_position_embeddings": text.length}
    if siglip:
        words |= {"projection_size": model.embed_dim}
        return {"model_type": "siglip", "architectures": ["SiglipModel"], "vision_config": vision, "text_config": words}
    ends = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.eos_id, "projection_dim": model.embed_dim}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": model.embed_dim,
        "vision_config": vision | {"projection_dim": model.embed_dim},
        "text_config": words | ends,
    }


def preprocessor_config(spec: Preprocess, size: int, siglip: bool) -> dict[str, Any]:
    """Return the preprocessor_config.json."""
    squash = spec.resize == "squash"
    sides = {"height": size, "width": size}
    return {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": sides if squash else {"shortest_edge": size},
        "do_center_crop": not squash,
        "crop_size": sides,
        "resample": {name: number for number, name in _RESAMPLE.items()}[spec.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def special_tokens(start: str, end: str) -> dict[str, str]:
    """Return what CLIP's special tokens are called: the end token stands for padding and for the unknown too."""
    return {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
