"""A small residual convolution net, for pictures of 32 to 64 px and minutes of CPU. Ours; no published twin."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.architectures import ConvNet


class ConvolutionNet(nn.Module):
    """Normalised pixels to a projected mean over positions."""

    tower: ConvNet
    embed_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        x = image
        for stage, (width, blocks) in enumerate(zip(self.tower.widths, self.tower.blocks, strict=True)):
            x = nn.Conv(width, (3, 3), strides=2, dtype=self.dtype, name=f"stage{stage}_down")(x)
            for block in range(blocks):
                x = ResidualBlock(self.dtype, name=f"stage{stage}_block{block}")(x)
        x_BD = nn.LayerNorm(dtype=self.dtype, name="norm_final")(x.mean(axis=(1, 2)))
        return nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, name="projection")(x_BD)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(norm(x)))))."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        width = x.shape[-1]
        y = jax.nn.relu(nn.GroupNorm(num_groups=8, dtype=self.dtype, name="norm")(x))
        y = nn.Conv(width, (3, 3), dtype=self.dtype, name="conv1")(y)
        y = nn.Conv(width, (3, 3), dtype=self.dtype, name="conv2")(jax.nn.relu(y))
        return x + y
