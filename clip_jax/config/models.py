"""Presets: published models by name.

Sources: Radford et al. 2021, tables 19 and 20, and the released weights for the paper's nine models; open_clip's
`model_configs` (Ilharco et al. 2021; Cherti et al. 2023) and timm for the others.
"""

from __future__ import annotations

import dataclasses

from clip_jax.config.schema import TokenizerConfig
from clip_jax.models.architecture import Architecture, Preprocess, with_activation
from clip_jax.models.layers import Activation
from clip_jax.models.towers import EdgeNet, ImageTower, ResNet, TextTransformer, ViT

_SIGLIP2_VOCABULARY = 256_000  # Gemma's


def _resnet(
    image_size: int, width: int, layers: tuple[int, ...], text_width: int, text_heads: int, embed_dim: int
) -> Architecture:
    image = ResNet(image_size, width, layers, heads=width // 2)
    return Architecture(image, TextTransformer(width=text_width, heads=text_heads), embed_dim)


def _vit(
    image: ViT, text_width: int, text_heads: int, *, text_layers: int = 12, activation: Activation = "gelu", **text
) -> Architecture:
    """Return a model whose `embed_dim` is the width of its text tower, as in all of open_clip's."""
    tower = TextTransformer(width=text_width, heads=text_heads, layers=text_layers, **text)
    return with_activation(Architecture(image, tower, text_width), activation)


def _clipa(image: ViT, text_width: int, text_heads: int, text_layers: int) -> Architecture:
    image = dataclasses.replace(image, norm_pre=False, pool="mean")
    text = {"vocab_size": 32_000, "context_length": 32, "eos_id": 102, "causal": False, "pool": "last"}
    return _vit(image, text_width, text_heads, text_layers=text_layers, **text)


# SigLIP's towers by width.
_SIGLIP_SIZES = {
    768: {"layers": 12, "heads": 12},
    1024: {"layers": 24, "heads": 16},
    1152: {"layers": 27, "heads": 16, "mlp_ratio": 3.7362},
    1536: {"layers": 40, "heads": 16},
}


def siglip_image(image_size: int, patch_size: int, width: int, activation: Activation) -> ViT:
    """Return SigLIP's image tower of a width, which determines layers, heads and MLP ratio."""
    return ViT(
        *(image_size, patch_size, width),
        **_SIGLIP_SIZES[width],
        activation=activation,
        pool="attention",
        norm_pre=False,
        norm_epsilon=1e-6,
        patch_bias=True,
        projection=False,
    )


def _siglip(
    image: ViT, vocab_size: int, text_activation: Activation, *, text_width: int = 0, context_length: int = 64
) -> Architecture:
    """Return a SigLIP model. By default, the text tower has the image tower's width."""
    width = text_width or image.width
    text = TextTransformer(
        *(vocab_size, context_length, 1, width),
        **_SIGLIP_SIZES[width],
        activation=text_activation,
        causal=False,
        pool="last",
        norm_epsilon=1e-6,
        projection="bias",
    )
    return Architecture(image, text, image.width, logit_bias=True)


def _at(image: ViT, image_size: int) -> ViT:
    return dataclasses.replace(image, image_size=image_size)


_B32 = ViT()
_B16 = ViT(patch_size=16)
_L14 = ViT(patch_size=14, width=1024, layers=24, heads=16)
_H14 = ViT(patch_size=14, width=1280, layers=32, heads=16)
_G14 = ViT(patch_size=14, width=1408, layers=40, heads=16, mlp_ratio=4.3637)
_BIGG14 = ViT(patch_size=14, width=1664, layers=48, heads=16, mlp_ratio=4.9231)

MODELS: dict[str, Architecture] = {
    # The paper's nine models as released, with QuickGELU. The comments are numbers of trained parameters.
    "rn50": _resnet(224, 64, (3, 4, 6, 3), 512, 8, 1024),  # 102,007,137
    "rn101": _resnet(224, 64, (3, 4, 23, 3), 512, 8, 512),  # 119,688,033
    "rn50x4": _resnet(288, 80, (4, 6, 10, 6), 640, 10, 640),  # 178,300,601
    "rn50x16": _resnet(384, 96, (6, 8, 18, 8), 768, 12, 768),  # 290,979,217
    "rn50x64": _resnet(448, 128, (3, 15, 36, 10), 1024, 16, 1024),  # 623,258,305
    "vit_b32": _vit(_B32, 512, 8, activation="quick_gelu"),  # 151,277,313
    "vit_b16": _vit(_B16, 512, 8, activation="quick_gelu"),  # 149,620,737
    "vit_l14": _vit(_L14, 768, 12, activation="quick_gelu"),  # 427,616,513
    "vit_l14_336": _vit(_at(_L14, 336), 768, 12, activation="quick_gelu"),  # 427,944,193
    # open_clip's models with exact GELU: LAION and DataComp weights. DFN and MetaCLIP weights need QuickGELU
    # (`with_activation`).
    "vit_b32_gelu": _vit(_B32, 512, 8),  # open_clip ViT-B-32
    "vit_b16_gelu": _vit(_B16, 512, 8),  # ViT-B-16
    "vit_b32_256": _vit(_at(_B32, 256), 512, 8),  # ViT-B-32-256
    "vit_b16_plus_240": _vit(ViT(240, 16, width=896, layers=12, heads=14), 640, 10),  # ViT-B-16-plus-240
    "vit_l14_gelu": _vit(_L14, 768, 12),  # ViT-L-14
    "vit_h14": _vit(_H14, 1024, 16, text_layers=24),  # ViT-H-14, 986,109,441
    "vit_h14_378": _vit(_at(_H14, 378), 1024, 16, text_layers=24),  # ViT-H-14-378
    "vit_g14": _vit(_G14, 1024, 16, text_layers=24),  # ViT-g-14, 1,366,678,273
    "vit_bigg14": _vit(_BIGG14, 1280, 20, text_layers=32),  # ViT-bigG-14, 2,539,567,105
    # CLIPA (Li et al. 2023): open_clip ViT-{L,H,bigG}-14-CLIPA, with BERT's vocabulary: set tokenizer.path.
    "vit_l14_clipa": _clipa(_L14, 768, 12, 12),
    "vit_h14_clipa": _clipa(_H14, 1024, 16, 24),
    "vit_bigg14_clipa": _clipa(_BIGG14, 1280, 20, 32),
    # SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025); activations as in open_clip and timm.
    "siglip_b16": _siglip(siglip_image(224, 16, 768, "gelu"), 32_000, "gelu"),
    "siglip_l16_256": _siglip(siglip_image(256, 16, 1024, "gelu"), 32_000, "gelu"),
    "siglip_so400m14": _siglip(siglip_image(224, 14, 1152, "gelu"), 32_000, "gelu", context_length=16),
    "siglip_so400m14_384": _siglip(siglip_image(384, 14, 1152, "gelu"), 32_000, "gelu"),
    "siglip2_b16": _siglip(siglip_image(224, 16, 768, "gelu"), _SIGLIP2_VOCABULARY, "gelu_tanh"),
    "siglip2_b32_256": _siglip(siglip_image(256, 32, 768, "gelu_tanh"), _SIGLIP2_VOCABULARY, "gelu_tanh"),
    "siglip2_l16_256": _siglip(siglip_image(256, 16, 1024, "gelu"), _SIGLIP2_VOCABULARY, "gelu_tanh"),
    "siglip2_so400m16_256": _siglip(siglip_image(256, 16, 1152, "gelu_tanh"), _SIGLIP2_VOCABULARY, "gelu_tanh"),
    "siglip2_giant16_256": _siglip(
        siglip_image(256, 16, 1536, "gelu_tanh"), _SIGLIP2_VOCABULARY, "gelu_tanh", text_width=1152
    ),
    # This project's, for 48 px images and two CPU cores.
    "emoji": Architecture(EdgeNet(), TextTransformer(20_514, 20, eos_id=20_513, width=96, layers=1, heads=3), 128),
}

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_PREPROCESS = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize="squash")

# Preprocessing of published weights. Source: open_clip `pretrained.py`.
PREPROCESS: dict[str, Preprocess] = {
    "openai": Preprocess(),  # and most of open_clip's
    "siglip": SIGLIP_PREPROCESS,
    "clipa": Preprocess(_IMAGENET_MEAN, _IMAGENET_STD, interpolation="bilinear", resize="squash"),
    "dfn5b": Preprocess(resize="squash"),  # DFN-5B's ViT-H/14, at 224 and 378 px
    "inception": Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # LAION-2B's ViT-L/14
}
# Models whose published weights do not have OpenAI's preprocessing alone.
_PREPROCESS_NAMES = {
    "vit_l14_gelu": ("openai", "inception"),
    "vit_h14": ("openai", "dfn5b"),
    "vit_h14_378": ("dfn5b",),
}


def preprocess_names(model: Architecture) -> tuple[str, ...]:
    """Return the names in PREPROCESS of the published weights with a model's image tower.

    Several if these differ; none if there are no such weights in MODELS.
    """
    pool = getattr(model.image, "pool", "")
    if pool in ("attention", "mean"):
        return ("siglip",) if pool == "attention" else ("clipa",)
    towers = {name: known.image for name, known in MODELS.items()}
    equal = [name for name, tower in towers.items() if tower == model.image]
    # DFN's weights have QuickGELU, and an image tower alone may have no projection.
    similar = [name for name, tower in towers.items() if _plain(tower) == _plain(model.image)]
    found = [name for model_name in equal or similar for name in _PREPROCESS_NAMES.get(model_name, ("openai",))]
    return tuple(dict.fromkeys(found))


def _plain(tower: ImageTower) -> ImageTower:
    return dataclasses.replace(tower, activation="gelu", projection=True) if isinstance(tower, ViT) else tower


def preprocess_of(model: Architecture) -> Preprocess:
    """Return the preprocessing of a model's published weights, the most common one if these differ; else OpenAI's."""
    return PREPROCESS[(*preprocess_names(model), "openai")[0]]


def tokenizer_of(model: Architecture) -> TokenizerConfig:
    """Return the tokenizer of a model's published weights, without the path of its file."""
    if model.logit_bias and model.text.vocab_size == _SIGLIP2_VOCABULARY:
        return TokenizerConfig("sentencepiece", clean="lower", pad_id=0)
    if model.logit_bias:  # SigLIP pads with the end token, 1, although its vocabulary has a <pad>
        return TokenizerConfig("sentencepiece", clean="canonicalize", pad_id=1)
    if getattr(model.text, "pool", "") == "last":  # CLIPA: BERT's tokenizer, without its [SEP]
        return TokenizerConfig("huggingface", clean="whitespace", pad_id=0, keep_end=False)
    return TokenizerConfig()


def name_of(architecture: Architecture) -> str:
    """Return the name of an architecture in MODELS, or 'custom'."""
    return next((name for name, known in MODELS.items() if known == architecture), "custom")
