"""The models by name: what decides the shapes and the meaning of parameters, as data.

Source of a row: its comment. Radford et al. 2021, tables 19 and 20, and the released weights for the paper's nine;
open_clip's `model_configs` (Ilharco et al. 2021; Cherti et al. 2023) and timm for the others.
"""

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
    """What happens to a picture before the image tower; it travels with the weights. Defaults: CLIP's numbers.

    like: whose pipeline, to the bit. 'openai', and open_clip: resized in the picture's own mode, transparency dropped,
      crop offset rounded half to even. 'huggingface': RGB first, crop offset rounded down. 'clip_jax': as 'openai',
      but transparent pictures are laid on white and 16-bit ones keep their high byte, as training sees them.
    """

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0 to 1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # PIL's, antialiased
    resize: Literal["shortest", "squash"] = "shortest"  # the shorter side and a centre crop, or both sides
    like: Literal["clip_jax", "openai", "huggingface"] = "clip_jax"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer; its vocabulary must fit `model.text.vocab_size`, its length is `model.text.length`.

    path: clip_bpe: empty for the published merge table. sentencepiece: the `.model` file. huggingface: tokenizer.json.

    The rest is for the latter two, whose files don't say it:

    clean: 'lower'; 'whitespace': mojibake and HTML undone, white space collapsed; 'canonicalize': that, punctuation
      dropped, lower case.
    pad_id: behind the end token; -1 for the file's own, or the end token where it has none.
    keep_end: False for padding in place of the end token.
    """

    name: Literal["clip_bpe", "sentencepiece", "huggingface"] = "clip_bpe"
    path: str = ""
    clean: Literal["none", "lower", "whitespace", "canonicalize"] = "none"
    pad_id: int = -1
    keep_end: bool = True


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


def with_activation(model: Architecture, activation: Activation) -> Architecture:
    """Return the same model with another activation in all its transformers."""
    image, text = model.image, dataclasses.replace(model.text, activation=activation)
    if image.kind == "vit":
        image = dataclasses.replace(image, activation=activation)
    return dataclasses.replace(model, image=image, text=text)


def _resnet(size: int, width: int, layers: tuple[int, ...], text: int, heads: int, embed_dim: int) -> Architecture:
    return Architecture(ResNet(size, width, layers, width // 2), TextTransformer(width=text, heads=heads), embed_dim)


def _vit(
    image: ViT, text_width: int, text_heads: int, *, text_layers: int = 12, activation: Activation = "gelu", **text
) -> Architecture:
    """Return a model whose embedding is as wide as its text tower, as all of open_clip's are."""
    tower = TextTransformer(width=text_width, heads=text_heads, layers=text_layers, **text)
    return with_activation(Architecture(image, tower, text_width), activation)


_GEMMA = 256_000  # tokens


def _siglip(
    image: ViT, vocab_size: int, text_activation: Activation, *, text_width: int = 0, length: int = 64
) -> Architecture:
    """Return a model of SigLIP's form; the text tower is as deep and wide as that of the same name."""
    width = text_width or image.width
    layers, heads, ratio = {768: (12, 12, 4.0), 1024: (24, 16, 4.0), 1152: (27, 16, 3.7362)}[width]
    text = TextTransformer(
        *(vocab_size, length, 1, width, layers, heads, ratio, text_activation),
        causal=False,
        pool="last",
        norm_epsilon=1e-6,
        projection="bias",
    )
    return Architecture(image, text, image.width, logit_bias=True)


def siglip_image(size: int, patch: int, width: int, activation: Activation) -> ViT:
    """Return SigLIP's image tower of a width: depth and heads follow from it."""
    layers, heads, ratio = {
        768: (12, 12, 4.0),
        1024: (24, 16, 4.0),
        1152: (27, 16, 3.7362),
        1536: (40, 16, 4.0),
    }[width]
    return ViT(
        *(size, patch, width, layers, heads, ratio, activation),
        pool="attention",
        norm_pre=False,
        norm_epsilon=1e-6,
        patch_bias=True,
        projection=False,
    )


def _clipa(image: ViT, text_width: int, text_heads: int, text_layers: int) -> Architecture:
    image = dataclasses.replace(image, norm_pre=False, pool="mean")
    text = {"vocab_size": 32_000, "length": 32, "eos_id": 102, "causal": False, "pool": "last"}
    return _vit(image, text_width, text_heads, text_layers=text_layers, **text)


_L14 = ViT(patch_size=14, width=1024, layers=24, heads=16)
_H14 = ViT(patch_size=14, width=1280, layers=32, heads=16)
_G14 = ViT(patch_size=14, width=1408, layers=40, heads=16, mlp_ratio=4.3637)
_BIGG14 = ViT(patch_size=14, width=1664, layers=48, heads=16, mlp_ratio=4.9231)


def _at(image: ViT, size: int) -> ViT:
    return dataclasses.replace(image, image_size=size)


MODELS: dict[str, Architecture] = {
    # The paper's nine, as released: QuickGELU. Trained parameters behind each.
    "rn50": _resnet(224, 64, (3, 4, 6, 3), 512, 8, 1024),  # 102,007,137
    "rn101": _resnet(224, 64, (3, 4, 23, 3), 512, 8, 512),  # 119,688,033
    "rn50x4": _resnet(288, 80, (4, 6, 10, 6), 640, 10, 640),  # 178,300,601
    "rn50x16": _resnet(384, 96, (6, 8, 18, 8), 768, 12, 768),  # 290,979,217
    "rn50x64": _resnet(448, 128, (3, 15, 36, 10), 1024, 16, 1024),  # 623,258,305
    "vit_b32": _vit(ViT(), 512, 8, activation="quick_gelu"),  # 151,277,313
    "vit_b16": _vit(ViT(patch_size=16), 512, 8, activation="quick_gelu"),  # 149,620,737
    "vit_l14": _vit(_L14, 768, 12, activation="quick_gelu"),  # 427,616,513
    "vit_l14_336": _vit(_at(_L14, 336), 768, 12, activation="quick_gelu"),  # 427,944,193
    # open_clip's, exact GELU: LAION and DataComp weights. DFN's and MetaCLIP's are QuickGELU: with_activation.
    "vit_b32_gelu": _vit(ViT(), 512, 8),  # open_clip ViT-B-32
    "vit_b16_gelu": _vit(ViT(patch_size=16), 512, 8),  # ViT-B-16
    "vit_b32_256": _vit(ViT(256), 512, 8),  # ViT-B-32-256
    "vit_b16_plus_240": _vit(ViT(240, 16, 896, 12, 14), 640, 10),  # ViT-B-16-plus-240
    "vit_l14_gelu": _vit(_L14, 768, 12),  # ViT-L-14
    "vit_h14": _vit(_H14, 1024, 16, text_layers=24),  # ViT-H-14, 986,109,441
    "vit_h14_378": _vit(_at(_H14, 378), 1024, 16, text_layers=24),  # ViT-H-14-378
    "vit_g14": _vit(_G14, 1024, 16, text_layers=24),  # ViT-g-14, 1,366,678,273
    "vit_bigg14": _vit(_BIGG14, 1280, 20, text_layers=32),  # ViT-bigG-14, 2,539,567,105
    # CLIPA (Li et al. 2023): open_clip ViT-{L,H,bigG}-14-CLIPA. BERT's vocabulary: give tokenizer.path.
    "vit_l14_clipa": _clipa(_L14, 768, 12, 12),
    "vit_h14_clipa": _clipa(_H14, 1024, 16, 24),
    "vit_bigg14_clipa": _clipa(_BIGG14, 1280, 20, 32),
    # SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025); activations as in open_clip and timm.
    "siglip_b16": _siglip(siglip_image(224, 16, 768, "gelu"), 32_000, "gelu"),
    "siglip_l16_256": _siglip(siglip_image(256, 16, 1024, "gelu"), 32_000, "gelu"),
    "siglip_so400m14": _siglip(siglip_image(224, 14, 1152, "gelu"), 32_000, "gelu", length=16),
    "siglip_so400m14_384": _siglip(siglip_image(384, 14, 1152, "gelu"), 32_000, "gelu"),
    "siglip2_b16": _siglip(siglip_image(224, 16, 768, "gelu"), _GEMMA, "gelu_tanh"),
    "siglip2_b32_256": _siglip(siglip_image(256, 32, 768, "gelu_tanh"), _GEMMA, "gelu_tanh"),
    "siglip2_l16_256": _siglip(siglip_image(256, 16, 1024, "gelu"), _GEMMA, "gelu_tanh"),
    "siglip2_so400m16_256": _siglip(siglip_image(256, 16, 1152, "gelu_tanh"), _GEMMA, "gelu_tanh"),
    "siglip2_giant16_256": _siglip(siglip_image(256, 16, 1536, "gelu_tanh"), _GEMMA, "gelu_tanh", text_width=1152),
    # Ours, for 48 px pictures and two CPU cores; README says what was tried.
    "emoji": Architecture(EdgeNet(), TextTransformer(20_514, 20, eos_id=20_513, width=96, layers=1, heads=3), 128),
}

SIGLIP_PREPROCESS = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize="squash")


def preprocess_of(model: Architecture) -> Preprocess:
    """Return what the published weights of a model expect: SigLIP's differ from CLIP's."""
    return SIGLIP_PREPROCESS if model.logit_bias else Preprocess()


def tokenizer_of(model: Architecture) -> TokenizerConfig:
    """Return what the published weights of a model expect, but for the path of its file."""
    if model.logit_bias and model.text.vocab_size == _GEMMA:  # SigLIP 2
        return TokenizerConfig("sentencepiece", clean="lower", pad_id=0)
    if model.logit_bias:  # SigLIP pads with the end token, 1, though its vocabulary has a <pad>
        return TokenizerConfig("sentencepiece", clean="canonicalize", pad_id=1)
    if model.text.pool == "last":  # CLIPA: BERT's, whose [SEP] is left out
        return TokenizerConfig("huggingface", clean="whitespace", pad_id=0, keep_end=False)
    return TokenizerConfig()


def name_of(architecture: Architecture) -> str:
    """Return the name in MODELS of an equal architecture, or 'custom'."""
    return next((name for name, known in MODELS.items() if known == architecture), "custom")


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
