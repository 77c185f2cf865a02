"""EdgeNet: a small image tower for 48 px images that trains in minutes on a CPU.

The stem is a convolution initialized as Sobel's operator in eight directions, pooled over cells and normalized over
neighboring cells as in histograms of oriented gradients (Dalal and Triggs, CVPR 2005), and trained from there. An image
becomes 12 × 12 cells, on which convolutions are fast. docs/emoji.md compares it with other towers on 1,260
concepts. No model of this kind is published.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from clip_jax.models.layers import NORM_RULES, LayerNorm, Rules
from clip_jax.models.towers.base import Encoder, ImageTower, check_multiple

# Contrast below this counts as noise; in standard deviations, because pixels are normalized.
_MIN_CONTRAST = 1e-3


@dataclasses.dataclass(frozen=True)
class EdgeNet(ImageTower):
    """Oriented edges in cells, convolutions over the cells, residual dense layers."""

    image_size: int = 48  # px
    orientations: int = 8  # edge directions
    cell: int = 4  # px, side of a cell
    channels: tuple[int, ...] = (96, 192)  # per convolution; each convolution halves the sides
    width: int = 512  # of the dense layers
    layers: int = 1  # residual dense layers
    kind: Literal["edgenet"] = "edgenet"

    sharding_rules: ClassVar[Rules] = (
        *NORM_RULES,
        (r"stem/kernel|conv\d+/kernel", ("fsdp",)),  # output channels
        (r"(embedding|layer\d+|projection)/kernel", ("fsdp", None)),
        (r"(conv\d+|embedding|layer\d+)/bias", ()),
    )

    def encode(
        self, module: Encoder, image: Float[Array, "B H W 3"], train: bool, key_B: Key[Array, "B"] | None, project: bool
    ) -> Float[Array, "B E"]:
        del train, key_B  # the same in training and inference
        dtype = module.compute.dtype
        x_BHWC = EdgeStem(self.orientations, self.cell, dtype, name="stem")(image)
        for number, channels in enumerate(self.channels):
            x_BHWC = LayerNorm(name=f"conv_norm{number}")(x_BHWC)
            x_BHWC = jax.nn.relu(nn.Conv(channels, (3, 3), dtype=dtype, name=f"conv{number}")(x_BHWC))
            # Maximum in the first stages, for the presence of a feature; mean in the last, for its amount.
            pool = nn.avg_pool if number == len(self.channels) - 1 else nn.max_pool
            x_BHWC = pool(x_BHWC, (2, 2), (2, 2))
        x_BD = LayerNorm(name="norm_pre")(x_BHWC.reshape(image.shape[0], -1))
        x_BD = nn.Dense(self.width, dtype=dtype, name="embedding")(x_BD)
        for layer in range(self.layers):
            y_BD = jax.nn.relu(LayerNorm(name=f"norm{layer}")(x_BD))
            x_BD = x_BD + nn.Dense(self.width, dtype=dtype, name=f"layer{layer}")(y_BD)
        x_BD = LayerNorm(name="norm_post")(x_BD)
        if not project:
            return x_BD
        return nn.Dense(module.embed_dim, use_bias=False, dtype=dtype, name="projection")(x_BD)

    def layer(self, path: str) -> int | range:
        """Stem, convolutions, embedding, dense layers, output."""
        name, convolutions = path.split("/")[0], len(self.channels)
        if name == "stem":
            return 0
        if match := re.fullmatch(r"conv(?:_norm)?(\d+)", name):
            return 1 + int(match[1])
        if name in ("norm_pre", "embedding"):
            return convolutions + 1
        match = re.fullmatch(r"(?:norm|layer)(\d+)", name)
        return convolutions + 2 + int(match[1]) if match else self.output_layer

    @property
    def output_layer(self) -> int:
        return len(self.channels) + 2 + self.layers

    def tiny(self) -> EdgeNet:
        return dataclasses.replace(self, channels=(16, 32), width=64)

    @property
    def description(self) -> str:
        return f"edge net, {len(self.channels)} convolutions, {self.layers} layer(s) of {self.width}"

    @property
    def stride(self) -> int:
        return self.cell << len(self.channels)

    def check(self, key: str, embed_dim: int) -> None:
        stride_key = f"{key}.cell · 2**len({key}.channels)"
        check_multiple(f"{key}.image_size", self.image_size, stride_key, self.stride)
        super().check(key, embed_dim)


class EdgeStem(nn.Module):
    """Features per cell: edges, edges relative to their surroundings, mean color."""

    orientations: int
    cell: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        kernel = self.param("kernel", lambda key: jnp.asarray(sobel(self.orientations))).astype(self.dtype)
        dimensions = ("NHWC", "HWIO", "NHWC")
        edges = jax.nn.relu(jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dimensions))
        edges, color = self._cell_means(edges), self._cell_means(image)
        surroundings = nn.avg_pool(edges, (3, 3), padding="SAME")
        contrast = jnp.sqrt(jnp.sum(jnp.square(surroundings), axis=-1, keepdims=True) + _MIN_CONTRAST)
        return jnp.concatenate([edges / contrast, edges, color], axis=-1)

    def _cell_means(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        batch, height, width, channels = x.shape
        shape = (batch, height // self.cell, self.cell, width // self.cell, self.cell, channels)
        return x.reshape(shape).mean(axis=(2, 4))


def sobel(orientations: int) -> Float[np.ndarray, "3 3 3 O"]:
    """Return Sobel's operator rotated into each direction, applied to the mean of the three colors."""
    horizontal = np.outer([1, 2, 1], [-1, 0, 1]) / 8
    angles = 2 * np.pi * np.arange(orientations) / orientations
    rotated = horizontal[..., None] * np.cos(angles) + horizontal.T[..., None] * np.sin(angles)
    return np.repeat(rotated[:, :, None, :] * 2 / 3, 3, axis=2).astype(np.float32)
