"""Architecture from the shapes of a model's tensors, for files without a config.

The number of attention heads is not visible in torch's shapes: it is that of the preset of the same width, or one per
64 features, as in all models of the CLIP paper. The activation is not visible either; the caller supplies it.

Source of the method: openai/CLIP `clip/model.py` (`build_model`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.config import MODELS, Architecture, ResNet, TextTransformer, ViT
from clip_jax.interop.huggingface import mlp_ratio
from clip_jax.interop.naming import Naming

_BLOCKS = "transformer/blocks"


def architecture(tensors: Mapping[str, np.ndarray], naming: Naming, file: str) -> Architecture:
    """Return the architecture with the default activation. Raises ValueError for ambiguous or incomplete shapes."""
    shapes = _Shapes(tensors, naming, file)
    logit_bias = shapes.has("logit_bias")
    siglip = logit_bias or naming.siglip
    vocab_size = shapes.of("text/token_embedding/embedding")[0]
    text = TextTransformer(
        vocab_size=vocab_size,
        context_length=shapes.of("text/positional_embedding")[-2],
        eos_id=1 if siglip else vocab_size - 1,  # OpenAI pools at the greatest id
        causal=not siglip,
        pool="last" if siglip else "end",
        norm_epsilon=1e-6 if siglip else 1e-5,
        projection="bias" if shapes.has("text/projection_bias") else "linear",
        **_transformer(shapes, "text"),
    )
    embed_dim = shapes.of("text/projection")[0 if naming.table["text/projection"].transposed else -1]
    return Architecture(image_tower(tensors, naming, file), text, embed_dim, logit_bias=logit_bias)


def image_tower(tensors: Mapping[str, np.ndarray], naming: Naming, file: str) -> ViT | ResNet:
    """Return the image tower with the default activation. See `architecture`."""
    shapes = _Shapes(tensors, naming, file)
    if shapes.has("image/stem_norm3/scale"):
        return _resnet(shapes)
    tokens = shapes.of("image/positional_embedding")[-2]
    class_token, attention_pool = shapes.has("image/class_embedding"), shapes.has("image/pool/probe")
    big_vision = attention_pool or shapes.has("image/patch_bias")  # SigLIP and LiT
    if class_token == attention_pool or shapes.has("image/norm_pre/scale") == big_vision:
        raise ValueError(
            f"{file}: expected the image tower of CLIP, SigLIP or LiT, got another; give the model, e.g."
            " model='vit_l14_clipa'"
        )
    patch = shapes.of("image/patch_embedding")[-1 if naming.table["image/patch_embedding"].transposed else 0]
    side = math.isqrt(tokens - class_token)
    if side * side != tokens - class_token:
        raise ValueError(f"{file}: expected position embeddings of a square grid of patches, got {tokens}; give model=")
    return ViT(
        image_size=side * patch,
        patch_size=patch,
        pool="attention" if attention_pool else "class",
        norm_pre=not big_vision,
        norm_epsilon=1e-6 if big_vision else 1e-5,
        patch_bias=big_vision,
        projection=shapes.has("image/projection"),
        **_transformer(shapes, "image"),
    )


def _resnet(shapes: _Shapes) -> ResNet:
    width = shapes.of("image/stem_norm3/scale")[0]
    layers = tuple(1 + shapes.layers(f"image/stage{stage}_rest/norm1/scale") for stage in range(4))
    side = math.isqrt(shapes.of("image/pool/positional_embedding")[0] - 1)
    return ResNet(32 * side, width, layers, width // 2)


def _transformer(shapes: _Shapes, tower: str) -> dict[str, Any]:
    """Return the fields that a ViT and a text transformer share."""
    width = shapes.of(f"{tower}/positional_embedding")[-1]
    return {
        "width": width,
        "layers": shapes.layers(f"{tower}/{_BLOCKS}/norm1/scale"),
        "heads": _heads(shapes, tower, width),
        "mlp_ratio": mlp_ratio(width, shapes.of(f"{tower}/{_BLOCKS}/mlp/in/bias")[0]),
        "layer_scale": float(shapes.has(f"{tower}/{_BLOCKS}/layer_scale1")),
    }


def _heads(shapes: _Shapes, tower: str, width: int) -> int:
    query = shapes.of(f"{tower}/{_BLOCKS}/attention/query/kernel")
    if len(query) == 3:  # big_vision: width, heads, head dimension
        return query[1]
    for preset in (getattr(model, tower) for model in MODELS.values()):
        if isinstance(preset, (ViT, TextTransformer)) and preset.width == width >= 512:
            return preset.heads
    if width % 64:
        raise ValueError(f"{shapes.file}: expected a width that is a multiple of 64, got {width}; give model=")
    return width // 64


class _Shapes:
    """Shapes of a file's tensors by clip_jax paths."""

    def __init__(self, tensors: Mapping[str, np.ndarray], naming: Naming, file: str):
        self._tensors, self._table, self.file = tensors, naming.table, file

    def has(self, path: str) -> bool:
        return path in self._table and self._name(path) in self._tensors

    def of(self, path: str) -> tuple[int, ...]:
        name = self._name(path)
        if name not in self._tensors:
            raise ValueError(f"{self.file}: expected a tensor {name!r} for {path}, got none")
        return self._tensors[name].shape

    def layers(self, path: str) -> int:
        return next(layer for layer in itertools.count() if self._name(path, layer) not in self._tensors)

    def _name(self, path: str, layer: int = 0) -> str:
        return self._table[path].of_layer(layer)
