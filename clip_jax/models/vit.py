"""Vision Transformer, as CLIP, CLIPA and SigLIP have it.

Source: Dosovitskiy et al. 2020; Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`; open_clip
`transformer.py`; the pooling head: Zhai et al. 2022, big_vision `models/vit.py`. Patch dropout: Li et al. 2023 (FLIP).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from clip_jax.models.architecture import ViT
from clip_jax.models.layers import Compute, LayerNorm, Perceptron, Transformer, project_heads


class VisionTransformer(nn.Module):
    """Normalised pixels to one vector, projected where the tower has a projection."""

    tower: ViT
    embed_dim: int
    compute: Compute
    patch_dropout: float = 0.0  # the fraction of patches that training leaves out

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        train: bool = False,
        key_B: Key[Array, "B"] | None = None,
        project: bool = True,
    ) -> Float[Array, "B E"]:
        tower, width, patch, dtype = self.tower, self.tower.width, self.tower.patch_size, self.compute.dtype
        scaled_normal = nn.initializers.normal(width**-0.5)

        patches_BLP = _patches(image, patch)
        # Stored as a convolution's kernel, as others exchange it; as a product its gradient is twice as fast on CPUs.
        kernel = self.param("patch_embedding", nn.initializers.lecun_normal(), (patch, patch, 3, width))
        x_BLD = patches_BLP @ kernel.reshape(-1, width).astype(dtype)
        if tower.patch_bias:
            bias_D = self.param("patch_bias", nn.initializers.zeros, (width,))
            x_BLD = x_BLD + bias_D[None, None].astype(dtype)

        if tower.pool != "attention":
            class_embedding = self.param("class_embedding", scaled_normal, (width,)).astype(dtype)
            class_B1D = jnp.broadcast_to(class_embedding, (x_BLD.shape[0], 1, width))
            x_BLD = jnp.concatenate([class_B1D, x_BLD], axis=1)
        positions_LD = self.param("positional_embedding", scaled_normal, x_BLD.shape[1:])
        x_BLD = x_BLD + positions_LD[None].astype(dtype)
        if train and self.patch_dropout:
            x_BLD = self._drop_patches(x_BLD, key_B)

        if tower.norm_pre:
            x_BLD = LayerNorm(tower.norm_epsilon, name="norm_pre")(x_BLD)
        transformer = Transformer(tower, False, self.compute, name="transformer")
        norm = LayerNorm(tower.norm_epsilon, name="norm_post")
        if tower.pool == "class":
            x_BD = norm(transformer(x_BLD, pool=lambda x_BLD: x_BLD[:, 0]))
        elif tower.pool == "mean":
            x_BD = norm(transformer(x_BLD)[:, 1:].mean(axis=1))
        else:
            x_BD = AttentionHead(tower, dtype, name="pool")(norm(transformer(x_BLD)))
        if not (tower.projection and project):
            return x_BD
        return x_BD @ self.param("projection", scaled_normal, (width, self.embed_dim)).astype(dtype)

    def _drop_patches(self, x_BLD: Float[Array, "B L D"], key_B: Key[Array, "B"]) -> Float[Array, "B l D"]:
        """Keep as many patches of every picture as the fraction leaves, drawn by its own key, and the class token."""
        first = int(self.tower.pool != "attention")
        batch, patches = x_BLD.shape[0], x_BLD.shape[1] - first
        kept = max(1, int(patches * (1 - self.patch_dropout)))
        order_BL = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(key_B), axis=1)
        chosen_Bl = jnp.sort(order_BL[:, :kept], axis=1) + first
        chosen_Bl = jnp.concatenate([jnp.zeros((batch, first), chosen_Bl.dtype), chosen_Bl], axis=1)
        return jnp.take_along_axis(x_BLD, chosen_Bl[..., None], axis=1)


class AttentionHead(nn.Module):
    """One learnt query attends to all tokens; a residual perceptron follows."""

    tower: ViT
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        tower, width = self.tower, self.tower.width
        init = nn.initializers.normal(width**-0.5)
        probe_B1D = jnp.broadcast_to(self.param("probe", init, (width,)), (x_BLD.shape[0], 1, width))
        query, key, value = (
            project_heads(tower.heads, width, init, self.dtype, name)(source)
            for name, source in (("query", probe_B1D), ("key", x_BLD), ("value", x_BLD))
        )
        y_B1NK = jax.nn.dot_product_attention(query, key, value)
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")
        x_BD = out(y_B1NK)[:, 0]
        mlp = Perceptron(int(width * tower.mlp_ratio), tower.activation, width**-0.5, self.dtype, name="mlp")
        return x_BD + mlp(LayerNorm(tower.norm_epsilon, name="norm")(x_BD))


def _patches(image: Float[Array, "B H W 3"], patch: int) -> Float[Array, "B L P"]:
    """Cut [B H W C] into [B, H/p · W/p, p · p · C], rows first, as a strided convolution reads it.

    Pixels that fill no patch, at the right and the bottom, are not seen: SigLIP reads 378 of its 384 px.
    """
    batch, height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    x = image[:, : rows * patch, : columns * patch].reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)
