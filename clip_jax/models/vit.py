"""Vision Transformer, with CLIP's extra norm before the blocks.

Source: Dosovitskiy et al. 2020; Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.architectures import ViT
from clip_jax.models.layers import LayerNorm, Transformer


class VisionTransformer(nn.Module):
    """Normalised pixels to the projected class token."""

    tower: ViT
    embed_dim: int
    activation: str
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        width, patch = self.tower.width, self.tower.patch_size
        scaled_normal = nn.initializers.normal(width**-0.5)

        patches_BLP = _patches(image, patch)
        # Stored as a convolution's kernel, as others exchange it; as a product its gradient is twice as fast on CPUs.
        kernel = self.param("patch_embedding", nn.initializers.lecun_normal(), (patch, patch, 3, width))
        x_BLD = patches_BLP @ kernel.reshape(-1, width).astype(self.dtype)

        class_embedding = self.param("class_embedding", scaled_normal, (width,)).astype(self.dtype)
        class_B1D = jnp.broadcast_to(class_embedding, (x_BLD.shape[0], 1, width))
        x_BLD = jnp.concatenate([class_B1D, x_BLD], axis=1)
        positions_LD = self.param("positional_embedding", scaled_normal, x_BLD.shape[1:])
        x_BLD = x_BLD + positions_LD[None].astype(self.dtype)

        x_BLD = LayerNorm(name="norm_pre")(x_BLD)
        x_BLD = Transformer(
            self.tower.layers,
            self.tower.heads,
            self.tower.mlp_ratio,
            self.activation,
            causal=False,
            dtype=self.dtype,
            remat=self.remat,
            name="transformer",
        )(x_BLD)
        x_BD = LayerNorm(name="norm_post")(x_BLD[:, 0])
        projection = self.param("projection", scaled_normal, (width, self.embed_dim))
        return x_BD @ projection.astype(self.dtype)


def _patches(image: Float[Array, "B H W 3"], patch: int) -> Float[Array, "B L P"]:
    """Cut [B H W C] into [B, H/p · W/p, p · p · C], rows first, as a strided convolution reads it."""
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)
