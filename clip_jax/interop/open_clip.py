"""open_clip configurations: architecture, preprocessing and tokenizer of a `model_cfg`, read and written.

An unsupported key is an error; no key is ignored.

Source: open_clip `model.py` (CLIPVisionCfg, CLIPTextCfg), `model_configs/*.json`, `transform.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from clip_jax.config import (
    Activation,
    Architecture,
    Preprocess,
    ResNet,
    TextTransformer,
    TokenizerConfig,
    ViT,
    siglip_image,
)

# timm image towers of open_clip's SigLIP models -> (patch size in px, width, activation).
_TIMM: dict[str, tuple[int, int, Activation]] = {
    "vit_base_patch16_siglip_224": (16, 768, "gelu"),
    "vit_base_patch16_siglip_256": (16, 768, "gelu"),
    "vit_base_patch16_siglip_384": (16, 768, "gelu"),
    "vit_base_patch16_siglip_512": (16, 768, "gelu"),
    "vit_base_patch32_siglip_256": (32, 768, "gelu_tanh"),
    "vit_large_patch16_siglip_256": (16, 1024, "gelu"),
    "vit_large_patch16_siglip_384": (16, 1024, "gelu"),
    "vit_large_patch16_siglip_512": (16, 1024, "gelu_tanh"),
    "vit_so400m_patch14_siglip_224": (14, 1152, "gelu"),
    "vit_so400m_patch14_siglip_378": (14, 1152, "gelu"),
    "vit_so400m_patch14_siglip_384": (14, 1152, "gelu"),
    "vit_so400m_patch16_siglip_256": (16, 1152, "gelu_tanh"),
    "vit_so400m_patch16_siglip_384": (16, 1152, "gelu_tanh"),
    "vit_so400m_patch16_siglip_512": (16, 1152, "gelu_tanh"),
    "vit_giantopt_patch16_siglip_256": (16, 1536, "gelu_tanh"),
    "vit_giantopt_patch16_siglip_384": (16, 1536, "gelu_tanh"),
}
# Keys that name files or follow from the others.
_TOKENIZER_KEYS = {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}


# --------------------------------------------------------------------------------------------------------- reading


def architecture(config: Mapping[str, Any], file: str) -> Architecture:
    """Return the architecture of a `model_cfg`.

    Args:
      file: name for error messages.

    Raises:
      ValueError: with the key that clip_jax does not support.
    """
    config = dict(config)
    embed_dim, quick_gelu = config.pop("embed_dim"), config.pop("quick_gelu", False)
    vision, text = dict(config.pop("vision_cfg")), dict(config.pop("text_cfg"))
    logit_bias = config.pop("init_logit_bias", None) is not None
    for key in ("init_logit_scale", "custom_text"):
        config.pop(key, None)
    activation: Activation = "quick_gelu" if quick_gelu else "gelu"
    image_tower = _image_tower(vision, activation, file)
    text_tower = _text_tower(text, activation, file)
    _check_no_other_keys(file, "", config)
    return Architecture(image_tower, text_tower, embed_dim, logit_bias)


def _image_tower(vision: dict[str, Any], activation: Activation, file: str) -> ViT | ResNet:
    size = vision.pop("image_size", 224)
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise ValueError(f"{file}: vision_cfg.image_size: expected a square for clip_jax, got {size}")
        size = size[0]
    if (timm := vision.pop("timm_model_name", None)) is not None:
        if timm not in _TIMM:
            raise ValueError(f"{file}: vision_cfg.timm_model_name={timm!r} is not supported by clip_jax")
        expected = {"timm_pool": "map", "timm_proj": "none"}
        _check_no_other_keys(file, "vision_cfg.", vision, expected | {"timm_model_pretrained": False})
        return siglip_image(size, *_TIMM[timm])
    width, head_width, layers = vision.pop("width", 768), vision.pop("head_width", 64), vision.pop("layers", 12)
    if isinstance(layers, (list, tuple)):
        _check_no_other_keys(file, "vision_cfg.", vision, {"patch_size": None})
        return ResNet(size, width, tuple(layers), width * 32 // head_width)
    image = ViT(
        image_size=size,
        patch_size=vision.pop("patch_size", 16),
        width=width,
        layers=layers,
        heads=width // head_width,
        mlp_ratio=float(vision.pop("mlp_ratio", 4.0)),
        activation=_activation(vision, activation),
        norm_pre=not vision.pop("no_ln_pre", False),
        norm_epsilon=(vision.pop("norm_kwargs", None) or {}).get("eps", 1e-5),
        layer_scale=vision.pop("ls_init_value", None) or 0.0,
        pool={"tok": "class", "avg": "mean"}.get(vision.pop("pool_type", "tok"), "none"),
    )
    # clip_jax has the norm of the mean of the patches, not the mean of their norms.
    after_pool = vision.pop("final_ln_after_pool", False)
    if image.pool == "none" or (image.pool == "mean" and not after_pool):
        raise ValueError(f"{file}: vision_cfg.pool_type, final_ln_after_pool={after_pool}: not supported by clip_jax")
    vision.pop("patch_dropout", None)  # training only
    _check_no_other_keys(file, "vision_cfg.", vision)
    return image


def _text_tower(text: dict[str, Any], activation: Activation, file: str) -> TextTransformer:
    for key in _TOKENIZER_KEYS:
        text.pop(key, None)
    pool, eos_id = text.pop("pool_type", "argmax"), text.pop("eos_id", 2)
    vocab_size = text.pop("vocab_size", 49_408)
    if pool not in ("argmax", "eos", "last"):
        raise ValueError(f"{file}: text_cfg.pool_type: expected argmax, eos or last for clip_jax, got {pool!r}")
    projection = "bias" if text.pop("proj_bias", False) else "linear"
    if text.pop("proj_type", "linear") == "none":
        projection = "none"
    tower = TextTransformer(
        vocab_size=vocab_size,
        context_length=text.pop("context_length", 77),
        # 'argmax' pools at the greatest id, which is the end token of CLIP's vocabulary.
        eos_id=vocab_size - 1 if pool == "argmax" else eos_id if pool == "eos" else min(1, vocab_size - 1),
        width=text.pop("width", 512),
        layers=text.pop("layers", 12),
        heads=text.pop("heads", 8),
        mlp_ratio=float(text.pop("mlp_ratio", 4.0)),
        activation=_activation(text, activation),
        causal=not text.pop("no_causal_mask", False),
        pool="last" if pool == "last" else "end",
        norm_epsilon=(text.pop("norm_kwargs", None) or {}).get("eps", 1e-5),
        projection=projection,
        layer_scale=text.pop("ls_init_value", None) or 0.0,
    )
    _check_no_other_keys(file, "text_cfg.", text)
    return tower


def _activation(config: dict[str, Any], default: Activation) -> Activation:
    return "gelu_tanh" if (config.pop("act_kwargs", None) or {}).get("approximate") == "tanh" else default


def _check_no_other_keys(
    file: str, prefix: str, rest: Mapping[str, Any], allowed: Mapping[str, Any] | None = None
) -> None:
    for key, value in rest.items():
        if value in (None, False, {}) or (allowed and key in allowed and value == allowed[key]):
            continue
        raise ValueError(f"{file}: {prefix}{key}={value!r} is not supported by clip_jax")


def preprocess(config: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of a `preprocess_cfg`."""
    default = Preprocess(implementation="openai")
    mode, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise ValueError(
            "preprocess_cfg: expected resize_mode shortest or squash and interpolation bicubic or bilinear, got"
            f" {mode!r} and {interpolation!r}"
        )
    return Preprocess(
        mean=tuple(map(float, config.get("mean", default.mean))),
        std=tuple(map(float, config.get("std", default.std))),
        interpolation=interpolation,
        resize=mode,
        implementation="openai",
    )


def tokenizer(found: TokenizerConfig, config: Mapping[str, Any]) -> TokenizerConfig:
    """Return the tokenizer of a directory with the settings of its `model_cfg`."""
    text = config.get("model_cfg", config)["text_cfg"]
    settings = text.get("tokenizer_kwargs") or {}
    clean, supported = settings.get("clean", "whitespace"), ("whitespace", "lower", "canonicalize")
    if clean not in supported:
        raise ValueError(f"tokenizer_kwargs.clean: expected one of {', '.join(supported)}, got {clean!r}")
    return dataclasses.replace(found, clean=clean, keep_end=not settings.get("strip_sep_token", False))


# --------------------------------------------------------------------------------------------------------- writing


def config(model: Architecture, spec: Preprocess, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Return `{'model_cfg': …, 'preprocess_cfg': …}` for `open_clip_config.json`.

    Raises:
      ValueError: for a tower that open_clip does not have.
    """
    image, text = model.image, model.text
    for tower in (image, text):
        if type(tower) not in (*_VISION_CONFIGS, TextTransformer):
            raise ValueError(f"open_clip has no {type(tower).__name__} tower; use another format, e.g. msgpack")
    vision = _VISION_CONFIGS[type(image)](image)
    activations = {getattr(image, "activation", text.activation), text.activation}
    model_config: dict[str, Any] = {"embed_dim": model.embed_dim}
    if "timm_model_name" in vision:  # timm's activation is part of the name
        model_config |= {"custom_text": True}
    elif len(activations) > 1:
        raise ValueError(f"open_clip has one activation for both towers, this model has {sorted(activations)}")
    else:
        model_config |= {"quick_gelu": True} if "quick_gelu" in activations else {}
    model_config |= {"init_logit_bias": -10} if model.logit_bias else {}
    model_config |= {"vision_cfg": vision, "text_cfg": _text_config(text, tokenizer)}
    names = {"mean": list(spec.mean), "std": list(spec.std)}
    names |= {"interpolation": spec.interpolation, "resize_mode": spec.resize}
    return {"model_cfg": model_config, "preprocess_cfg": names}


def _resnet_config(image: ResNet) -> dict[str, Any]:
    sizes = {"image_size": image.image_size, "layers": list(image.layers), "width": image.width}
    return sizes | {"patch_size": None}


def _vit_config(image: ViT) -> dict[str, Any]:
    if image.pool == "attention":
        name = next((n for n, row in _TIMM.items() if siglip_image(image.image_size, *row) == image), None)
        if name is None:
            raise ValueError("open_clip's SigLIP image towers are timm's, and none of them equals model.image")
        timm = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
        return {"image_size": image.image_size} | timm
    vision = {"image_size": image.image_size, "layers": image.layers, "width": image.width}
    vision |= {"patch_size": image.patch_size, "head_width": image.width // image.heads}
    vision |= {"mlp_ratio": image.mlp_ratio} if image.mlp_ratio != 4.0 else {}
    vision |= {} if image.norm_pre else {"no_ln_pre": True}
    vision |= {"pool_type": "avg", "final_ln_after_pool": True} if image.pool == "mean" else {}
    return vision | ({"ls_init_value": image.layer_scale} if image.layer_scale else {})


_VISION_CONFIGS: dict[type, Callable[[Any], dict[str, Any]]] = {ViT: _vit_config, ResNet: _resnet_config}


def _text_config(text: TextTransformer, tokenizer: TokenizerConfig) -> dict[str, Any]:
    config: dict[str, Any] = {"context_length": text.context_length, "vocab_size": text.vocab_size}
    config |= {"width": text.width, "heads": text.heads, "layers": text.layers}
    config |= {"mlp_ratio": text.mlp_ratio} if text.mlp_ratio != 4.0 else {}
    config |= {"ls_init_value": text.layer_scale} if text.layer_scale else {}
    config |= {} if text.causal else {"no_causal_mask": True}
    config |= {"norm_kwargs": {"eps": text.norm_epsilon}} if text.norm_epsilon != 1e-5 else {}
    config |= {"linear": {}, "bias": {"proj_bias": True}, "none": {"proj_type": "none"}}[text.projection]
    config |= {"act_kwargs": {"approximate": "tanh"}} if text.activation == "gelu_tanh" else {}
    # The default tokenizer of open_clip is CLIP's with all merges; 'local' reads the tokenizer files of the directory.
    if tokenizer.name != "clip_bpe" or tokenizer.path or text.vocab_size != TextTransformer.vocab_size:
        # open_clip always cleans texts; 'whitespace' is the nearest to 'none'.
        settings = {"clean": "whitespace" if tokenizer.clean == "none" else tokenizer.clean}
        settings |= {} if tokenizer.keep_end else {"strip_sep_token": True}
        config |= {"hf_tokenizer_name": "local", "tokenizer_kwargs": settings}
    if text.pool == "last":
        config |= {"pool_type": "last"}
    elif text.eos_id != text.vocab_size - 1:
        config |= {"pool_type": "eos", "eos_id": text.eos_id}
    return config
