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
    # PIL's, antialiased except for 'nearest'.
    interpolation: Literal["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"] = "bicubic"
    # Side(s) that are resized to `resize_size`; 'squash': both sides. The center is then cropped, or padded, to the
    # image size of the model.
    resize: Literal["shortest", "squash", "longest", "none"] = "shortest"
    implementation: Literal["clip_jax", "openai", "huggingface"] = "clip_jax"
    resize_size: int = 0  # px; 0: the image size of the model
    fill_color: int = 0  # of the padding, in all channels, 0 to 255

    def pads(self, image_size: int) -> bool:
        """Return whether an image can be smaller than the image size (px) after resizing."""
        return self.resize in ("longest", "none") or 0 < self.resize_size < image_size

    def scaled(self, old: int, new: int) -> Preprocess:
        """Return the preprocessing for images of `new` px instead of `old`: `resize_size` in the same ratio."""
        return dataclasses.replace(self, resize_size=round(self.resize_size * new / old))

    @property
    def description(self) -> str:
        """Resize mode and interpolation, for reports."""
        size = f" to {self.resize_size} px" if self.resize_size else ""
        return f"{self.resize}{size}, {self.interpolation}"


def with_activation(model: Architecture, activation: Activation) -> Architecture:
    """Return the architecture with another activation function in both towers, where they have one."""
    return dataclasses.replace(
        model, image=model.image.with_activation(activation), text=model.text.with_activation(activation)
    )


def check(model: Architecture) -> None:
    """Check the sizes of both towers. Raises ValueError with the config key and a value that works."""
    model.image.check("model.image", model.embed_dim)
    model.text.check("model.text", model.embed_dim)
