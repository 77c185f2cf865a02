"""A small image tower for 48 px pictures and minutes of CPU: oriented edges in cells, convolutions over the cells.

The stem is a convolution that starts as Sobel's operator in eight directions, pooled and normalised over neighbouring
cells as in histograms of oriented gradients (Dalal and Triggs, CVPR 2005), and learns from there. A picture is then
12 × 12 cells, where convolutions cost little. What it was compared with on the demo's 1,260 concepts is in README.
Ours; no published twin.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clip_jax.models.architecture import EdgeNet as Tower
from clip_jax.models.layers import LayerNorm

# Contrast below this is taken for noise; pixels are normalised, so it is in standard deviations.
_FAINT = 1e-3


class EdgeNet(nn.Module):
    """Normalised pixels to a projected vector."""

    tower: Tower
    embed_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], train: bool = False, project: bool = True
    ) -> Float[Array, "B E"]:
        del train  # it does the same in training
        x_BHWC = EdgeStem(self.tower.orientations, self.tower.cell, self.dtype, name="stem")(image)
        for number, channels in enumerate(self.tower.channels):
            x_BHWC = LayerNorm(name=f"conv_norm{number}")(x_BHWC)
            x_BHWC = jax.nn.relu(nn.Conv(channels, (3, 3), dtype=self.dtype, name=f"conv{number}")(x_BHWC))
            # What was found matters at first, and how much of it at the end.
            pool = nn.avg_pool if number == len(self.tower.channels) - 1 else nn.max_pool
            x_BHWC = pool(x_BHWC, (2, 2), (2, 2))
        x_BD = LayerNorm(name="norm_pre")(x_BHWC.reshape(image.shape[0], -1))
        x_BD = nn.Dense(self.tower.width, dtype=self.dtype, name="embedding")(x_BD)
        for layer in range(self.tower.layers):
            y_BD = jax.nn.relu(LayerNorm(name=f"norm{layer}")(x_BD))
            x_BD = x_BD + nn.Dense(self.tower.width, dtype=self.dtype, name=f"layer{layer}")(y_BD)
        x_BD = LayerNorm(name="norm_post")(x_BD)
        if not project:
            return x_BD
        return nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, name="projection")(x_BD)


class EdgeStem(nn.Module):
    """Cells of edges, of edges relative to their surroundings, and of colour."""

    orientations: int
    cell: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        kernel = self.param("kernel", lambda key: jnp.asarray(sobel(self.orientations))).astype(self.dtype)
        dimensions = ("NHWC", "HWIO", "NHWC")
        edges = jax.nn.relu(jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dimensions))
        edges, colour = self._cells(edges), self._cells(image)
        around = nn.avg_pool(edges, (3, 3), padding="SAME")
        contrast = jnp.sqrt(jnp.sum(jnp.square(around), axis=-1, keepdims=True) + _FAINT)
        return jnp.concatenate([edges / contrast, edges, colour], axis=-1)

    def _cells(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        batch, height, width, channels = x.shape
        shape = (batch, height // self.cell, self.cell, width // self.cell, self.cell, channels)
        return x.reshape(shape).mean(axis=(2, 4))


def sobel(orientations: int) -> Float[np.ndarray, "3 3 3 O"]:
    """Return Sobel's operator turned into each direction, over the mean of the three colours."""
    horizontal = np.outer([1, 2, 1], [-1, 0, 1]) / 8
    angles = 2 * np.pi * np.arange(orientations) / orientations
    turned = horizontal[..., None] * np.cos(angles) + horizontal.T[..., None] * np.sin(angles)
    return np.repeat(turned[:, :, None, :] * 2 / 3, 3, axis=2).astype(np.float32)
