"""Model architectures and image preprocessing as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Literal

from clip_jax.models.layers import Activation
from clip_jax.models.towers import ImageTower, TextTower, TextTransformer, ViT


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Everything that determines the shapes and the meaning of a model's parameters."""

    image: ImageTower = ViT()
    text: TextTower = TextTransformer()
    embed_dim: int = 512  # size of the embeddings of both towers
    logit_bias: bool = False  # learned bias of the logits, for the sigmoid loss


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Image preprocessing before the image tower; stored with the weights. The defaults are CLIP's.

    implementation: pipeline that is reproduced bit for bit. 'openai' (and open_clip): resize in the image's own mode,
      drop transparency, round the crop offset half to even. 'huggingface': convert to RGB first, round the crop
      offset down. 'clip_jax': as 'openai', but composite transparent images on white and keep the high byte of 16-bit
      images, as the training pipeline does.
    """

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # per channel, RGB in [0, 1]
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)  # per channel
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # PIL's, antialiased
    resize: Literal["shortest", "squash"] = "shortest"  # resize the shorter side and center-crop, or resize both sides
    implementation: Literal["clip_jax", "openai", "huggingface"] = "clip_jax"


def with_activation(model: Architecture, activation: Activation) -> Architecture:
    """Return the architecture with another activation function in both towers, where they have one."""
    return dataclasses.replace(
        model, image=model.image.with_activation(activation), text=model.text.with_activation(activation)
    )


def check(model: Architecture) -> None:
    """Check the sizes of both towers. Raises ValueError with the config key and a value that works."""
    model.image.check("model.image", model.embed_dim)
    model.text.check("model.text", model.embed_dim)
