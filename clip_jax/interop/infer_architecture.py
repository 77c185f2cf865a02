"""Architecture from the shapes of a model's tensors, for files without a config.

The number of attention heads is not visible in torch's shapes: it is that of the preset with the same shapes, that of
OpenAI's code for its archives, or the caller's. The activation is not visible either; the caller supplies it.

Source of the method: openai/CLIP `clip/model.py` (`build_model`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.config import MODELS, Architecture, ResNet, TextTransformer, ViT
from clip_jax.interop.huggingface import mlp_ratio
from clip_jax.interop.naming import Naming
from clip_jax.interop.one_tower import missing_tower

_BLOCKS = "transformer/blocks"


@dataclasses.dataclass(frozen=True)
class Heads:
    """Knowledge of the numbers of attention heads, in order of precedence."""

    given: Sequence[int] = ()  # of the image and of the text tower
    presets: Sequence[Architecture] = tuple(MODELS.values())  # models whose towers have the heads for their shapes
    width: int = 0  # of a head of all other towers; 0: unknown

    def of(self, tower: str) -> int:
        """Return the given number of heads of a tower, 0 if none is given."""
        return dict(zip(("image", "text"), self.given, strict=False)).get(tower, 0)


def architecture(tensors: Mapping[str, np.ndarray], naming: Naming, file: str, heads: Heads) -> Architecture:
    """Return the architecture with the default activation; of one tower alone, see `one_tower.architecture`.

    Raises:
      ValueError: for ambiguous or incomplete shapes.
    """
    shapes = _Shapes(tensors, naming, file, heads)
    logit_bias = shapes.has("logit_bias")
    missing = missing_tower(tensors, naming.table)
    text = TextTransformer() if missing == "text" else _text_tower(shapes, logit_bias or naming.siglip)
    image = ViT() if missing == "image" else _image_tower(shapes)
    embed_dim = 0 if missing else shapes.of("text/projection")[0 if naming.table["text/projection"].transposed else -1]
    return Architecture(image, text, embed_dim, logit_bias=logit_bias)


def _text_tower(shapes: _Shapes, siglip: bool) -> TextTransformer:
    vocab_size = shapes.of("text/token_embedding/embedding")[0]
    return TextTransformer(
        vocab_size=vocab_size,
        context_length=shapes.of("text/positional_embedding")[-2],
        eos_id=1 if siglip else vocab_size - 1,  # OpenAI pools at the greatest id
        causal=not siglip,
        pool="last" if siglip else "end",
        norm_epsilon=1e-6 if siglip else 1e-5,
        projection="bias" if shapes.has("text/projection_bias") else "linear",
        **_transformer(shapes, "text"),
    )


def image_size(tensors: Mapping[str, np.ndarray], naming: Naming, file: str) -> int:
    """Return the image size of the image tower in px. Raises ValueError for another tower than CLIP's."""
    return _image_tower(_Shapes(tensors, naming, file, Heads(width=1))).image_size


def _image_tower(shapes: _Shapes) -> ViT | ResNet:
    naming, file = shapes.naming, shapes.file
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
    fields = _transformer(shapes, "image")
    return ViT(
        image_size=_published_size(shapes, fields, side, patch),
        patch_size=patch,
        pool="attention" if attention_pool else "class",
        norm_pre=not big_vision,
        norm_epsilon=1e-6 if big_vision else 1e-5,
        patch_bias=big_vision,
        projection=shapes.has("image/projection"),
        **fields,
    )


def _published_size(shapes: _Shapes, fields: Mapping[str, Any], side: int, patch: int) -> int:
    """Return the image size of the preset with these shapes, e.g. SigLIP's 384 px, which are 27.4 patches of 14 px."""
    sizes = {
        preset.image_size
        for preset in _presets(shapes, "image", fields)
        if preset.patch_size == patch and preset.image_size // patch == side
    }
    return sizes.pop() if len(sizes) == 1 else side * patch


def _resnet(shapes: _Shapes) -> ResNet:
    width = shapes.of("image/stem_norm3/scale")[0]
    layers = tuple(1 + shapes.layers(f"image/stage{stage}_rest/norm1/scale") for stage in range(4))
    side = math.isqrt(shapes.of("image/pool/positional_embedding")[0] - 1)
    return ResNet(32 * side, width, layers, shapes.heads.of("image") or width // 2)  # OpenAI's and open_clip's rule


def _transformer(shapes: _Shapes, tower: str) -> dict[str, Any]:
    """Return the fields that a ViT and a text transformer share."""
    width = shapes.of(f"{tower}/positional_embedding")[-1]
    fields = {
        "width": width,
        "layers": shapes.layers(f"{tower}/{_BLOCKS}/norm1/scale"),
        "mlp_ratio": mlp_ratio(width, shapes.of(f"{tower}/{_BLOCKS}/mlp/in/bias")[0]),
        "layer_scale": float(shapes.has(f"{tower}/{_BLOCKS}/layer_scale1")),
    }
    return fields | {"heads": _heads(shapes, tower, fields)}


def _heads(shapes: _Shapes, tower: str, fields: Mapping[str, Any]) -> int:
    """Return the number of attention heads. Raises ValueError if it is unknown, or does not divide the width."""
    width, query = fields["width"], shapes.of(f"{tower}/{_BLOCKS}/attention/query/kernel")
    given, presets = shapes.heads.of(tower), {preset.heads for preset in _presets(shapes, tower, fields)}
    if len(query) == 3 and given in (0, query[1]):  # big_vision: width, heads, head dimension
        return query[1]
    if given and (width % given or len(query) == 3):
        expected = query[1] if len(query) == 3 else f"a divisor of the width {width}"
        raise ValueError(f"{shapes.file}: heads of the {tower} tower: expected {expected}, got {given}")
    found = given or (presets.pop() if len(presets) == 1 else shapes.heads.width and width // shapes.heads.width)
    if not found:
        raise ValueError(
            f"{shapes.file}: expected the attention heads of the {tower} tower (width {width}, no preset), got none,"
            " and a wrong number costs accuracy without an error; give heads=(image, text), e.g. heads=(12, 8), for a"
            " command --heads=12,8, or model="
        )
    return found


def _presets(shapes: _Shapes, tower: str, fields: Mapping[str, Any]) -> list[Any]:
    """Return the towers of the known models with these shapes."""

    def sizes(width: int, layers: int, ratio: float) -> tuple[int, int, int]:
        return width, layers, int(width * ratio)

    expected = sizes(fields["width"], fields["layers"], fields["mlp_ratio"])
    towers = [getattr(model, tower) for model in shapes.heads.presets]
    plain = [found for found in towers if isinstance(found, (ViT, TextTransformer))]
    return [found for found in plain if sizes(found.width, found.layers, found.mlp_ratio) == expected]


class _Shapes:
    """Shapes of a file's tensors by clip_jax paths."""

    def __init__(self, tensors: Mapping[str, np.ndarray], naming: Naming, file: str, heads: Heads):
        self._tensors, self._table = tensors, naming.table
        self.naming, self.file, self.heads = naming, file, heads

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
