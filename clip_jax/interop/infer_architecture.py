"""A model's architecture from the shapes of its tensors, where no configuration comes with them.

Heads don't show in shapes: they are those of the known towers of that width, else 64 wide, as all of CLIP's paper are.
Nor does the activation, which whoever calls this has to add.

Source of the idea: openai/CLIP `clip/model.py` (`build_model`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from clip_jax.config import MODELS, Architecture, ResNet, TextTransformer, ViT
from clip_jax.interop.huggingface import mlp_ratio
from clip_jax.interop.name_tables import BIG_VISION, Table


def architecture(tensors: Mapping[str, np.ndarray], table: Table, where: str) -> Architecture:
    """Return the architecture with the default activation.

    Raises:
      ValueError: where the shapes leave something open, or a tensor that they are read from is missing.
    """
    found = _Shapes(tensors, table, where)
    logit_bias = found.has("logit_bias")
    siglip = logit_bias or table is BIG_VISION  # LiT's text tower is SigLIP's
    image = _image(found)
    blocks = "text/transformer/blocks"
    vocab_size, width = found.of("text/token_embedding/embedding")
    text = TextTransformer(
        vocab_size=vocab_size,
        length=found.of("text/positional_embedding")[-2],
        eos_id=1 if siglip else vocab_size - 1,  # OpenAI pools at the greatest id
        width=width,
        layers=found.layers(f"{blocks}/norm1/scale"),
        heads=_heads(found, "text", width),
        mlp_ratio=mlp_ratio(width, found.of(f"{blocks}/mlp/in/bias")[0]),
        causal=not siglip,
        pool="last" if siglip else "end",
        norm_epsilon=1e-6 if siglip else 1e-5,
        projection="bias" if found.has("text/projection_bias") else "linear",
        layer_scale=float(found.has(f"{blocks}/layer_scale1")),
    )
    embed_dim = found.of("text/projection")[0 if found.transposed("text/projection") else -1]
    return Architecture(image, text, embed_dim, logit_bias=logit_bias)


def image_tower(tensors: Mapping[str, np.ndarray], table: Table, where: str) -> ViT | ResNet:
    """Return the image tower alone, as `architecture` would."""
    return _image(_Shapes(tensors, table, where))


def _image(found: _Shapes) -> ViT | ResNet:
    return _resnet(found) if found.has("image/stem_norm3/scale") else _vit(found)


def _vit(found: _Shapes) -> ViT:
    tokens, width = found.of("image/positional_embedding")[-2:]
    class_token, pooled = found.has("image/class_embedding"), found.has("image/pool/probe")
    big_vision = pooled or found.has("image/patch_bias")  # SigLIP and LiT
    if class_token == pooled or found.has("image/norm_pre/scale") == big_vision:
        raise ValueError(f"{found.where}: its image tower is neither CLIP's nor SigLIP's; say which, e.g."
                         " model='vit_l14_clipa'")  # fmt: skip
    patch = found.of("image/patch_embedding")[-1 if found.transposed("image/patch_embedding") else 0]
    side = math.isqrt(tokens - class_token)
    if side * side != tokens - class_token:
        raise ValueError(f"{found.where}: the image tower has {tokens} positions, which are no square of patches")
    blocks = "image/transformer/blocks"
    return ViT(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=found.layers(f"{blocks}/norm1/scale"),
        heads=_heads(found, "image", width),
        mlp_ratio=mlp_ratio(width, found.of(f"{blocks}/mlp/in/bias")[0]),
        pool="attention" if pooled else "class",
        norm_pre=not big_vision,
        norm_epsilon=1e-6 if big_vision else 1e-5,
        patch_bias=big_vision,
        projection=found.has("image/projection"),
        layer_scale=float(found.has(f"{blocks}/layer_scale1")),
    )


def _resnet(found: _Shapes) -> ResNet:
    width = found.of("image/stem_norm3/scale")[0]
    layers = tuple(1 + found.layers(f"image/stage{stage}_rest/norm1/scale") for stage in range(4))
    side = math.isqrt(found.of("image/pool/positional_embedding")[0] - 1)
    return ResNet(32 * side, width, layers, width // 2)


def _heads(found: _Shapes, tower: str, width: int) -> int:
    query = found.of(f"{tower}/transformer/blocks/attention/query/kernel")
    if len(query) == 3:  # big_vision's and ours: width, heads, width of a head
        return query[1]
    for model in MODELS.values():
        known = getattr(model, tower)
        if known.kind != "resnet" and known.width == width and width >= 512:
            return known.heads
    if width % 64:
        raise ValueError(
            f"{found.where}: a width of {width} is no multiple of 64, so its heads can't be told; give model="
        )
    return width // 64


class _Shapes:
    """The shapes of a file's tensors, by our names."""

    def __init__(self, tensors: Mapping[str, np.ndarray], table: Table, where: str):
        self._tensors, self._table, self.where = tensors, table, where

    def transposed(self, path: str) -> bool:
        return self._table[path].transposed

    def has(self, path: str) -> bool:
        return path in self._table and self._name(path, 0) in self._tensors

    def of(self, path: str) -> tuple[int, ...]:
        name = self._name(path, 0)
        if name not in self._tensors:
            raise ValueError(f"{self.where} has no tensor {name!r}, which the model's {path} comes from")
        return self._tensors[name].shape

    def layers(self, path: str) -> int:
        count = 0
        while self._name(path, count) in self._tensors:
            count += 1
        return count

    def _name(self, path: str, layer: int) -> str:
        place = self._table[path]
        return place.name.format(layer + place.first)
