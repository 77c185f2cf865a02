"""open_clip's configurations: which architecture, preprocessing and tokenizer a `model_cfg` describes, and back.

What we don't build is refused by the key that asks for it; nothing is left out in silence.

Source: open_clip `model.py` (CLIPVisionCfg, CLIPTextCfg), `model_configs/*.json`, `transform.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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

# timm's towers that open_clip's SigLIPs are made of -> (patch size in px, width, activation).
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


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture of a `model_cfg`.

    Args:
      where: what the config is called, for errors.

    Raises:
      ValueError: naming the key that asks for something that clip_jax doesn't build.
    """
    config = dict(config)
    embed_dim, quick_gelu = config.pop("embed_dim"), config.pop("quick_gelu", False)
    vision, text = dict(config.pop("vision_cfg")), dict(config.pop("text_cfg"))
    logit_bias = config.pop("init_logit_bias", None) is not None
    for key in ("init_logit_scale", "custom_text"):
        config.pop(key, None)
    activation: Activation = "quick_gelu" if quick_gelu else "gelu"
    image = _image(vision, activation, where)
    tower = _text(text, activation, where)
    _refuse_rest(where, "", config)
    return Architecture(image, tower, embed_dim, logit_bias)


def _image(vision: dict[str, Any], activation: Activation, where: str) -> ViT | ResNet:
    size = vision.pop("image_size", 224)
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise ValueError(f"{where}: vision_cfg.image_size={size} is not square; clip_jax takes squares")
        size = size[0]
    if (timm := vision.pop("timm_model_name", None)) is not None:
        if timm not in _TIMM:
            raise ValueError(f"{where}: vision_cfg.timm_model_name={timm!r} is a tower that clip_jax does not build")
        expected = {"timm_pool": "map", "timm_proj": "none"}
        _refuse_rest(where, "vision_cfg.", vision, expected | {"timm_model_pretrained": False})
        return siglip_image(size, *_TIMM[timm])
    width, head_width, layers = vision.pop("width", 768), vision.pop("head_width", 64), vision.pop("layers", 12)
    if isinstance(layers, (list, tuple)):
        _refuse_rest(where, "vision_cfg.", vision, {"patch_size": None})
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
    # The mean of normed patches is another function than the norm of their mean, which is what we build.
    after_pool = vision.pop("final_ln_after_pool", False)
    if image.pool == "none" or (image.pool == "mean" and not after_pool):
        raise ValueError(
            f"{where}: vision_cfg.pool_type with final_ln_after_pool={after_pool} is not built by clip_jax"
        )
    vision.pop("patch_dropout", None)  # of training
    _refuse_rest(where, "vision_cfg.", vision)
    return image


def _text(text: dict[str, Any], activation: Activation, where: str) -> TextTransformer:
    for key in _TOKENIZER_KEYS:
        text.pop(key, None)
    pool, eos_id = text.pop("pool_type", "argmax"), text.pop("eos_id", 2)
    vocab_size = text.pop("vocab_size", 49_408)
    if pool not in ("argmax", "eos", "last"):
        raise ValueError(f"{where}: text_cfg.pool_type={pool!r} is not built by clip_jax; it has argmax, eos, last")
    projection = "bias" if text.pop("proj_bias", False) else "linear"
    if text.pop("proj_type", "linear") == "none":
        projection = "none"
    tower = TextTransformer(
        vocab_size=vocab_size,
        length=text.pop("context_length", 77),
        # 'argmax' finds the greatest id, which is the end token of CLIP's vocabulary.
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
    _refuse_rest(where, "text_cfg.", text)
    return tower


def _activation(config: dict[str, Any], default: Activation) -> Activation:
    return "gelu_tanh" if (config.pop("act_kwargs", None) or {}).get("approximate") == "tanh" else default


def _refuse_rest(where: str, prefix: str, rest: Mapping[str, Any], allowed: Mapping[str, Any] | None = None) -> None:
    for key, value in rest.items():
        if value in (None, False, {}) or (allowed and key in allowed and value == allowed[key]):
            continue
        raise ValueError(f"{where}: {prefix}{key}={value!r} asks for something that clip_jax does not build")


def preprocess(config: Mapping[str, Any]) -> Preprocess:
    """Return what a `preprocess_cfg` asks for."""
    default = Preprocess(implementation="openai")
    mode = config.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash") or config.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
        raise ValueError(
            f"preprocess_cfg={dict(config)}: clip_jax resizes by 'shortest' or 'squash', bicubic or bilinear"
        )
    return Preprocess(
        mean=tuple(map(float, config.get("mean", default.mean))),
        std=tuple(map(float, config.get("std", default.std))),
        interpolation=config.get("interpolation", "bicubic"),
        resize=mode,
        implementation="openai",
    )


def tokenizer(found: TokenizerConfig, config: Mapping[str, Any]) -> TokenizerConfig:
    """Return the tokenizer that was found beside a `model_cfg`, with what that says of its use."""
    text = config.get("model_cfg", config)["text_cfg"]
    settings = text.get("tokenizer_kwargs") or {}
    clean = settings.get("clean", "whitespace")
    if clean not in ("whitespace", "lower", "canonicalize"):
        raise ValueError(f"tokenizer_kwargs.clean={clean!r} asks for something that clip_jax does not do")
    return dataclasses.replace(found, clean=clean, keep_end=not settings.get("strip_sep_token", False))


def config(model: Architecture, spec: Preprocess, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Return `{'model_cfg': …, 'preprocess_cfg': …}` for `open_clip_config.json`.

    Raises:
      ValueError: for towers that open_clip doesn't have.
    """
    image, text = model.image, model.text
    if image.kind == "edges":
        raise ValueError("open_clip has no tower like clip_jax's EdgeNet, so no directory can be written for it")
    activations = {text.activation} | ({image.activation} if image.kind == "vit" else set())
    text_config = {
        "context_length": text.length, "vocab_size": text.vocab_size, "width": text.width, "heads": text.heads,
        "layers": text.layers,
    }  # fmt: skip
    text_config |= {"mlp_ratio": text.mlp_ratio} if text.mlp_ratio != 4.0 else {}
    text_config |= {"ls_init_value": text.layer_scale} if text.layer_scale else {}
    text_config |= {} if text.causal else {"no_causal_mask": True}
    text_config |= {"norm_kwargs": {"eps": text.norm_epsilon}} if text.norm_epsilon != 1e-5 else {}
    text_config |= {"linear": {}, "bias": {"proj_bias": True}, "none": {"proj_type": "none"}}[text.projection]
    text_config |= {"act_kwargs": {"approximate": "tanh"}} if text.activation == "gelu_tanh" else {}
    # Its own tokenizer is CLIP's with all merges; told of another, it looks for that one's files in the same directory.
    if tokenizer.name != "clip_bpe" or tokenizer.path or text.vocab_size != TextTransformer.vocab_size:
        # It has no way to leave a text as it is; 'whitespace' is the nearest.
        settings = {"clean": "whitespace" if tokenizer.clean == "none" else tokenizer.clean}
        settings |= {} if tokenizer.keep_end else {"strip_sep_token": True}
        text_config |= {"hf_tokenizer_name": "local", "tokenizer_kwargs": settings}
    if text.pool == "last":
        text_config["pool_type"] = "last"
    elif text.eos_id != text.vocab_size - 1:
        text_config |= {"pool_type": "eos", "eos_id": text.eos_id}
    model_config: dict[str, Any] = {"embed_dim": model.embed_dim}
    if image.kind == "resnet":
        vision = {
            "image_size": image.image_size,
            "layers": list(image.layers),
            "width": image.width,
            "patch_size": None,
        }
        model_config |= {"quick_gelu": True} if "quick_gelu" in activations else {}
    elif image.pool == "attention":
        name = next((n for n, row in _TIMM.items() if siglip_image(image.image_size, *row) == image), None)
        if name is None:
            raise ValueError("open_clip's SigLIP towers are timm's, and none of those equals model.image")
        vision = {"image_size": image.image_size, "timm_model_name": name, "timm_model_pretrained": False}
        vision |= {"timm_pool": "map", "timm_proj": "none"}
        model_config |= {"custom_text": True}
    else:
        if len(activations) > 1:
            raise ValueError(f"open_clip has one activation for both towers, this model has {sorted(activations)}")
        vision = {"image_size": image.image_size, "layers": image.layers, "width": image.width}
        vision |= {"patch_size": image.patch_size, "head_width": image.width // image.heads}
        vision |= {"mlp_ratio": image.mlp_ratio} if image.mlp_ratio != 4.0 else {}
        vision |= {} if image.norm_pre else {"no_ln_pre": True}
        vision |= {"pool_type": "avg", "final_ln_after_pool": True} if image.pool == "mean" else {}
        vision |= {"ls_init_value": image.layer_scale} if image.layer_scale else {}
        model_config |= {"quick_gelu": True} if "quick_gelu" in activations else {}
    model_config |= {"init_logit_bias": -10} if model.logit_bias else {}
    spec_config = {
        "mean": list(spec.mean), "std": list(spec.std), "interpolation": spec.interpolation, "resize_mode": spec.resize,
    }  # fmt: skip
    return {"model_cfg": model_config | {"vision_cfg": vision, "text_cfg": text_config}, "preprocess_cfg": spec_config}
