"""Architectures as data: the dataclasses that decide the shapes and the meaning of a model's parameters."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class ViT:
    """Vision Transformer (Dosovitskiy et al. 2020). The defaults are CLIP's.

    pool: 'class': the class token. 'mean': of the patches; the class token is there, unused (CLIPA). 'attention': a
      learnt query and a perceptron, no class token (SigLIP).
    layer_scale: what the gains of the residual branches start at; 0: there are none.
    activation: OpenAI's weights need 'quick_gelu', most others 'gelu'; the wrong one costs 2.7 points of ImageNet,
      silently. SigLIP's are 'gelu_tanh' in Hugging Face's copy, 'gelu' in some of open_clip's.
    """

    image_size: int = 224  # px
    patch_size: int = 32  # px
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"
    pool: Literal["class", "mean", "attention"] = "class"
    norm_pre: bool = True  # before the first block
    norm_epsilon: float = 1e-5
    patch_bias: bool = False
    projection: bool = True  # without one, `embed_dim` is `width`
    layer_scale: float = 0.0
    kind: Literal["vit"] = "vit"


@dataclasses.dataclass(frozen=True)
class ResNet:
    """CLIP's ModifiedResNet: three stages more than its stem, bottlenecks four times as wide at their end."""

    image_size: int = 224  # px
    width: int = 64  # of the stem
    layers: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks of each stage
    heads: int = 32  # of the attention at the end, which is 32 × width wide
    kind: Literal["resnet"] = "resnet"


@dataclasses.dataclass(frozen=True)
class EdgeNet:
    """Oriented edges in cells, convolutions over the cells, a perceptron: small pictures, minutes of CPU."""

    image_size: int = 48  # px
    orientations: int = 8
    cell: int = 4  # px
    channels: tuple[int, ...] = (96, 192)  # of the convolutions; each halves the sides
    width: int = 512
    layers: int = 1
    kind: Literal["edges"] = "edges"


@dataclasses.dataclass(frozen=True)
class TextTransformer:
    """Transformer over token ids. The defaults are CLIP's.

    pool: 'end': the first end token. 'last': the last position, whatever stands there (SigLIP, CLIPA).
    projection: 'none' needs `embed_dim` to be `width`.
    """

    vocab_size: int = 49_408
    length: int = 77  # tokens, start and end included
    eos_id: int = 49_407  # where the sequence is pooled; the tokenizer must agree
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"
    causal: bool = True
    pool: Literal["end", "last"] = "end"
    norm_epsilon: float = 1e-5
    projection: Literal["linear", "bias", "none"] = "linear"
    layer_scale: float = 0.0
    kind: Literal["transformer"] = "transformer"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Two towers and the space where they meet: all that decides the shapes and the meaning of the parameters."""

    image: ViT | ResNet | EdgeNet = ViT()
    text: TextTransformer = TextTransformer()
    embed_dim: int = 512
    logit_bias: bool = False  # of the sigmoid loss


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Image preprocessing before the image tower; stored with the weights. The defaults are CLIP's.

    implementation: pipeline that is reproduced bit for bit. 'openai' (and open_clip): resize in the image's own mode,
      drop transparency, round the crop offset half to even. 'huggingface': convert to RGB first, round the crop
      offset down. 'clip_jax': as 'openai', but composite transparent images on white and keep the high byte of 16-bit
      images, as the training pipeline does.
    """

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0 to 1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # PIL's, antialiased
    resize: Literal["shortest", "squash"] = "shortest"  # the shorter side and a centre crop, or both sides
    implementation: Literal["clip_jax", "openai", "huggingface"] = "clip_jax"


def with_activation(model: Architecture, activation: Activation) -> Architecture:
    """Return the same model with another activation in all its transformers."""
    image, text = model.image, dataclasses.replace(model.text, activation=activation)
    if image.kind == "vit":
        image = dataclasses.replace(image, activation=activation)
    return dataclasses.replace(model, image=image, text=text)


def check(model: Architecture) -> None:
    """Raise ValueError, naming the config's key and a value that works, where sizes don't go together."""
    image, text = model.image, model.text
    part, step = {
        "vit": lambda: ("model.image.patch_size", image.patch_size),
        "resnet": lambda: ("2**(1 + len(model.image.layers))", 2 << len(image.layers)),
        "edges": lambda: ("model.image.cell · 2**len(model.image.channels)", image.cell << len(image.channels)),
    }[image.kind]()
    # SigLIP's 384 px at 14 px a patch leave 6 px unseen, as published; elsewhere that is a mistake.
    remainder = image.image_size % step if getattr(image, "pool", "class") != "attention" else 0
    if (size := image.image_size) < step or remainder:
        raise ValueError(
            f"model.image.image_size={size} is not a multiple of {part}={step}; use {max(1, size // step) * step}"
        )
    inner = image.width << (len(image.layers) + 1) if image.kind == "resnet" else image.width
    for key, tower, width in (("image", image, inner), ("text", text, text.width)):
        if hasattr(tower, "heads") and width % tower.heads:
            raise ValueError(f"model.{key}.width={tower.width} is not a multiple of model.{key}.heads={tower.heads}")
    unprojected = {"image": getattr(image, "projection", True) is False, "text": text.projection == "none"}
    for key, tower in (("image", image), ("text", text)):
        if unprojected[key] and tower.width != model.embed_dim:
            raise ValueError(
                f"model.{key} has no projection, so model.embed_dim={model.embed_dim} has to be its width {tower.width}"
            )
