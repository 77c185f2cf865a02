"""The models by name: what decides the shapes and the meaning of parameters, as data.

Dimensions and parameter counts: Radford et al. 2021, tables 19 and 20, and the released weights.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ViT:
    """Vision Transformer (Dosovitskiy et al. 2020) as CLIP has it: a norm before the blocks, class token pooled."""

    image_size: int = 224  # px
    patch_size: int = 32  # px
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    kind: Literal["vit"] = "vit"


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
    """Causal transformer, pooled at the end token."""

    vocab_size: int = 49_408
    length: int = 77  # tokens, start and end included
    eos_id: int = 49_407  # where the sequence is pooled; the tokenizer must agree
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    kind: Literal["transformer"] = "transformer"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Two towers and the space where they meet: all that decides the shapes and the meaning of the parameters."""

    image: ViT | EdgeNet = ViT()
    text: TextTransformer = TextTransformer()
    embed_dim: int = 512
    # OpenAI's weights need 'quick_gelu', most others 'gelu'; the wrong one costs 2.7 points of ImageNet, silently.
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What happens to a picture before the image tower; it travels with the weights. Defaults: OpenAI's."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0 to 1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # PIL's, antialiased
    resize: Literal["shortest", "squash"] = "shortest"  # the shorter side and a centre crop, or both sides


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer; its vocabulary must fit `model.text.vocab_size`, its length is `model.text.length`."""

    name: Literal["clip_bpe", "sentencepiece"] = "clip_bpe"
    # clip_bpe: empty for the published merge table. sentencepiece: the `.model` file.
    path: str = ""


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """All that weights need to mean the same elsewhere: it travels in their file (clip_jax/interop/msgpack.py).

    tokenizer_file: what `tokenizer.path` contained, so that the weights outlive that path; empty without a path.
    source: for people: where the weights come from.
    """

    model: Architecture = Architecture()
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocess: Preprocess = Preprocess()
    source: str = ""
    tokenizer_file: bytes = dataclasses.field(default=b"", repr=False)


_TEXT_512 = TextTransformer(width=512, heads=8)
_TEXT_768 = TextTransformer(width=768, heads=12)

MODELS: dict[str, Architecture] = {
    "vit_b32": Architecture(ViT(patch_size=32), _TEXT_512, 512),  # 151,277,313 parameters
    "vit_b16": Architecture(ViT(patch_size=16), _TEXT_512, 512),  # 149,620,737
    "vit_l14": Architecture(ViT(patch_size=14, width=1024, layers=24, heads=16), _TEXT_768, 768),  # 427,616,513
    "vit_l14_336": Architecture(
        ViT(image_size=336, patch_size=14, width=1024, layers=24, heads=16), _TEXT_768, 768
    ),  # 427,944,193
    # Ours, for 48 px pictures and two CPU cores; README says what was tried.
    "emoji": Architecture(EdgeNet(), TextTransformer(20_514, 20, eos_id=20_513, width=96, layers=1, heads=3), 128),
}


def name_of(architecture: Architecture) -> str:
    """Return the name in MODELS of an equal architecture, or 'custom'."""
    return next((name for name, known in MODELS.items() if known == architecture), "custom")
