"""open_clip configurations: architecture, preprocessing and tokenizer of a `model_cfg`, read and written.

An unsupported key is an error; no key is ignored.

Source: open_clip `model.py` (CLIPVisionCfg, CLIPTextCfg), `model_configs/*.json`, `transform.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from clip_jax import config as configs
from clip_jax.config import Activation, Architecture, Preprocess, ResNet, TextTransformer, TokenizerConfig, ViT

# timm image towers of open_clip's SigLIP models -> (patch size in px, width, activation).
_TIMM: dict[str, tuple[int, int, Activation]] = {
    f"vit_{name}_patch{patch}_siglip_{size}": (patch, width, activation)
    for name, patch, width, activation, sizes in (
        ("base", 16, 768, "gelu", (224, 256, 384, 512)),
        ("base", 32, 768, "gelu_tanh", (256,)),
        ("large", 16, 1024, "gelu", (256, 384)),
        ("large", 16, 1024, "gelu_tanh", (512,)),
        ("so400m", 14, 1152, "gelu", (224, 378, 384)),
        ("so400m", 16, 1152, "gelu_tanh", (256, 384, 512)),
        ("giantopt", 16, 1536, "gelu_tanh", (256, 384)),
    )
    for size in sizes
}
_RESIZE_MODES, _INTERPOLATION = ("shortest", "longest", "squash"), ("bicubic", "bilinear")


def architecture(config: Mapping[str, Any], file: str) -> Architecture:
    """Return the architecture of a `model_cfg`. Raises ValueError, with the key, if clip_jax does not support it."""
    config = dict(config)
    embed_dim = config.pop("embed_dim")
    activation: Activation = "quick_gelu" if config.pop("quick_gelu", False) else "gelu"
    image_tower = _image_tower(dict(config.pop("vision_cfg")), activation, file)
    text_tower = _text_tower(dict(config.pop("text_cfg")), activation, file)
    logit_bias = config.pop("init_logit_bias", None) is not None
    _check_no_other_keys(file, "", config, ignored=("init_logit_scale", "custom_text"))
    return Architecture(image_tower, text_tower, embed_dim, logit_bias)


def _image_tower(vision: dict[str, Any], activation: Activation, file: str) -> ViT | ResNet:
    size = vision.pop("image_size", 224)
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise ValueError(f"{file}: vision_cfg.image_size: expected a square for clip_jax, got {size}")
        size = size[0]
    if (timm := vision.pop("timm_model_name", None)) is not None:
        if timm not in _TIMM:
            raise ValueError(f"{file}: vision_cfg.timm_model_name: expected a SigLIP tower for clip_jax, got {timm!r}")
        fixed = {"timm_pool": "map", "timm_proj": "none", "timm_model_pretrained": False}
        _check_no_other_keys(file, "vision_cfg.", vision, fixed)
        return configs.siglip_image(size, *_TIMM[timm])
    head_width, layers = vision.pop("head_width", 64), vision.get("layers", 12)
    if isinstance(layers, (list, tuple)):
        width = vision.pop("width", 768)
        _check_no_other_keys(file, "vision_cfg.", vision, {"patch_size": None}, ignored=("layers",))
        return ResNet(size, width, tuple(layers), width * 32 // head_width)
    shared = _transformer(vision, 768, activation)
    pool, after_pool = vision.pop("pool_type", "tok"), vision.pop("final_ln_after_pool", False)
    # clip_jax has the norm of the mean of the patches, not the mean of their norms.
    if pool not in ("tok", "avg") or (pool == "avg" and not after_pool):
        raise ValueError(
            f"{file}: vision_cfg.pool_type: expected tok, or avg with final_ln_after_pool, for clip_jax, got {pool!r}"
            f" with final_ln_after_pool={after_pool}"
        )
    image = ViT(
        image_size=size,
        patch_size=vision.pop("patch_size", 16),
        heads=shared["width"] // head_width,
        norm_pre=not vision.pop("no_ln_pre", False),
        pool="class" if pool == "tok" else "mean",
        **shared,
    )
    _check_no_other_keys(file, "vision_cfg.", vision, ignored=("patch_dropout",))  # training only
    return image


def _text_tower(text: dict[str, Any], activation: Activation, file: str) -> TextTransformer:
    pool, eos_id = text.pop("pool_type", "argmax"), text.pop("eos_id", 2)
    if pool not in ("argmax", "eos", "last"):
        raise ValueError(f"{file}: text_cfg.pool_type: expected argmax, eos or last for clip_jax, got {pool!r}")
    vocab_size, projection = text.pop("vocab_size", 49_408), text.pop("proj_type", "linear")
    biased = text.pop("proj_bias", False)
    tower = TextTransformer(
        vocab_size=vocab_size,
        context_length=text.pop("context_length", 77),
        # 'argmax' pools at the greatest id, which is the end token of CLIP's vocabulary.
        eos_id=vocab_size - 1 if pool == "argmax" else eos_id if pool == "eos" else min(1, vocab_size - 1),
        heads=text.pop("heads", 8),
        causal=not text.pop("no_causal_mask", False),
        pool="last" if pool == "last" else "end",
        projection="none" if projection == "none" else "bias" if biased else "linear",
        **_transformer(text, 512, activation),
    )
    _check_no_other_keys(file, "text_cfg.", text, ignored=("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"))
    return tower


def _transformer(config: dict[str, Any], width: int, activation: Activation) -> dict[str, Any]:
    """Pop the keys that both towers have; return them as fields, with open_clip's defaults."""
    tanh = (config.pop("act_kwargs", None) or {}).get("approximate") == "tanh"
    return {
        "width": config.pop("width", width),
        "layers": config.pop("layers", 12),
        "mlp_ratio": float(config.pop("mlp_ratio", 4.0)),
        "activation": "gelu_tanh" if tanh else activation,
        "norm_epsilon": (config.pop("norm_kwargs", None) or {}).get("eps", 1e-5),
        "layer_scale": config.pop("ls_init_value", None) or 0.0,
    }


def _check_no_other_keys(
    file: str, prefix: str, rest: Mapping[str, Any], allowed: Mapping[str, Any] = {}, ignored: Iterable[str] = ()
) -> None:
    for key, value in rest.items():
        if key not in ignored and value not in (None, False, {}) and (key not in allowed or value != allowed[key]):
            raise ValueError(f"{file}: {prefix}{key}: expected a key that clip_jax supports, got {value!r}")


def preprocess(config: Mapping[str, Any], file: str) -> Preprocess:
    """Return the preprocessing of a `preprocess_cfg`; absent keys and null have open_clip's defaults.

    `size` is not used: open_clip replaces it by the image size of the model. Its interpolation 'random' is bicubic
    outside training. Raises ValueError for a key or value that `clip_jax.preprocess` does not reproduce.
    """
    given = {key: value for key, value in config.items() if value is not None}
    choices = {"mode": ("RGB",), "interpolation": (*_INTERPOLATION, "random"), "resize_mode": _RESIZE_MODES}
    for key, value in given.items():
        if key not in ("size", "mean", "std", "fill_color", *choices):
            raise _unsupported(file, key, "no such key", value)
        if key in choices and value not in choices[key]:
            raise _unsupported(file, key, " or ".join(choices[key]), value)
    mode, interpolation = given.get("resize_mode", "shortest"), given.get("interpolation", "bicubic")
    fill_color = given.get("fill_color", 0)
    if type(fill_color) is not int or not 0 <= fill_color <= 255:
        raise _unsupported(file, "fill_color", "an integer from 0 to 255", fill_color)
    return Preprocess(
        mean=_channels(file, "mean", given.get("mean") or Preprocess.mean),
        std=_channels(file, "std", given.get("std") or Preprocess.std),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        resize=mode,
        implementation="openai",
        fill_color=fill_color if mode == "longest" else 0,
    )


def _channels(file: str, key: str, value: Any) -> tuple[float, ...]:
    channels = value if isinstance(value, (list, tuple)) else (value,) * 3
    if len(channels) != 3 or not all(isinstance(x, (int, float)) for x in channels):
        raise _unsupported(file, key, "a number, or one for each of three channels", value)
    return tuple(map(float, channels))


def _unsupported(file: str, key: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{file}: preprocess_cfg.{key}: expected {expected}, for clip_jax, got {value!r}")


def _preprocess_config(spec: Preprocess, image_size: int) -> dict[str, Any]:
    """Return a `preprocess_cfg`. Raises ValueError if open_clip does not have the preprocessing."""
    resizes = spec.resize in _RESIZE_MODES and spec.resize_size in (0, image_size)
    if not resizes or spec.interpolation not in _INTERPOLATION:
        raise ValueError(
            f"open_clip has no preprocess.resize={spec.resize!r} with resize_size={spec.resize_size} and"
            f" interpolation={spec.interpolation!r}; it resizes to the image size, {image_size} px, bicubic or bilinear"
        )
    pixels = {"mean": list(spec.mean), "std": list(spec.std)}
    pixels |= {"interpolation": spec.interpolation, "resize_mode": spec.resize}
    return pixels | ({"fill_color": spec.fill_color} if spec.fill_color and spec.resize == "longest" else {})


def tokenizer(config: Mapping[str, Any], model: Architecture) -> TokenizerConfig | None:
    """Return the cleaning and padding of a `model_cfg` for the tokenizer in its directory.

    None if it names no tokenizer: open_clip then has CLIP's, even if the directory contains another.
    """
    text = config.get("model_cfg", config)["text_cfg"]
    settings, named = dict(text.get("tokenizer_kwargs") or {}), text.get("hf_tokenizer_name")
    if mode := text.get("tokenizer_mode"):
        raise ValueError(f"text_cfg.tokenizer_mode: expected none for clip_jax, got {mode!r}; give tokenizer=")
    default = "whitespace" if named else "lower"
    clean, supported = settings.pop("clean", default), ("whitespace", "lower", "canonicalize")
    strip = settings.pop("strip_sep_token", False)
    if clean not in supported:
        raise ValueError(f"tokenizer_kwargs.clean: expected one of {', '.join(supported)}, got {clean!r}")
    _check_no_other_keys("open_clip_config.json", "tokenizer_kwargs.", settings)
    if not named and model.text.vocab_size == TextTransformer.vocab_size:
        if clean != default or strip:
            raise ValueError(
                f"tokenizer_kwargs: expected none without hf_tokenizer_name, got {text['tokenizer_kwargs']}; give"
                " tokenizer=TokenizerConfig() for OpenAI's cleaning"
            )
        return None
    return dataclasses.replace(configs.tokenizer_of(model), clean=clean, keep_end=not strip)


def config(model: Architecture, spec: Preprocess, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Return the content of `open_clip_config.json`. Raises ValueError for a tower that open_clip does not have."""
    image, text = model.image, model.text
    for tower in (image, text):
        if type(tower) not in (*_VISION_CONFIGS, TextTransformer):
            raise ValueError(f"open_clip has no {type(tower).__name__} tower; use another format, e.g. msgpack")
    vision, content = _VISION_CONFIGS[type(image)](image), {"embed_dim": model.embed_dim}
    activations = {getattr(image, "activation", text.activation), text.activation}
    if "timm_model_name" in vision:  # timm's activation is part of the name
        content |= {"custom_text": True}
    elif len(activations) > 1:
        raise ValueError(f"open_clip has one activation for both towers, this model has {sorted(activations)}")
    else:
        content |= {"quick_gelu": True} if "quick_gelu" in activations else {}
    content |= {"init_logit_bias": -10} if model.logit_bias else {}
    content |= {"vision_cfg": vision, "text_cfg": _text_config(text, tokenizer)}
    return {"model_cfg": content, "preprocess_cfg": _preprocess_config(spec, image.image_size)}


def _resnet_config(image: ResNet) -> dict[str, Any]:
    return {"image_size": image.image_size, "layers": list(image.layers), "width": image.width, "patch_size": None}


def _vit_config(image: ViT) -> dict[str, Any]:
    if image.pool == "attention":
        name = next((n for n, row in _TIMM.items() if configs.siglip_image(image.image_size, *row) == image), None)
        if name is None:
            raise ValueError("open_clip's SigLIP image towers are timm's, and none of them equals model.image")
        timm = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
        return {"image_size": image.image_size} | timm
    vision = _transformer_config(image) | {"image_size": image.image_size, "patch_size": image.patch_size}
    vision |= {"head_width": image.width // image.heads} | ({} if image.norm_pre else {"no_ln_pre": True})
    return vision | ({"pool_type": "avg", "final_ln_after_pool": True} if image.pool == "mean" else {})


_VISION_CONFIGS: dict[type, Callable[[Any], dict[str, Any]]] = {ViT: _vit_config, ResNet: _resnet_config}


def _text_config(text: TextTransformer, tokenizer: TokenizerConfig) -> dict[str, Any]:
    config = _transformer_config(text) | {"context_length": text.context_length, "vocab_size": text.vocab_size}
    config |= {"heads": text.heads} | ({} if text.causal else {"no_causal_mask": True})
    config |= {"linear": {}, "bias": {"proj_bias": True}, "none": {"proj_type": "none"}}[text.projection]
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


def _transformer_config(tower: ViT | TextTransformer) -> dict[str, Any]:
    config: dict[str, Any] = {"width": tower.width, "layers": tower.layers}
    config |= {"mlp_ratio": tower.mlp_ratio} if tower.mlp_ratio != 4.0 else {}
    config |= {"ls_init_value": tower.layer_scale} if tower.layer_scale else {}
    config |= {"norm_kwargs": {"eps": tower.norm_epsilon}} if tower.norm_epsilon != 1e-5 else {}
    return config | ({"act_kwargs": {"approximate": "tanh"}} if tower.activation == "gelu_tanh" else {})
