"""Vision Transformer as in CLIP, CLIPA and SigLIP.

Sources: Dosovitskiy et al. 2020; Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`; open_clip
`transformer.py`. Attention pooling: Zhai et al. 2022, big_vision `models/vit.py`. Patch dropout: Li et al. 2023 (FLIP).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from clip_jax.models.attention import AttentionShape
from clip_jax.models.layers import (
    MLP,
    TRANSFORMER_RULES,
    Activation,
    Compute,
    LayerNorm,
    Rules,
    Transformer,
    mlp_width,
    post_attention_flops,
    project_heads,
)
from clip_jax.models.towers.base import ImageTower, check_heads, check_multiple


@dataclasses.dataclass(frozen=True)
class ViT(ImageTower):
    """Vision Transformer (Dosovitskiy et al. 2020). The defaults are CLIP's ViT-B/32."""

    image_size: int = 224  # px
    patch_size: int = 32  # px
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0  # hidden width of the MLP / width
    # OpenAI's weights need 'quick_gelu', most others 'gelu'; the wrong one costs 2.7 points of ImageNet accuracy
    # without an error. SigLIP: 'gelu_tanh' in Hugging Face's copies, 'gelu' in some of open_clip's.
    activation: Activation = "quick_gelu"
    # 'class': class token. 'mean': mean of the patches; the class token exists and is not pooled (CLIPA).
    # 'attention': learned query and MLP, no class token (SigLIP).
    pool: Literal["class", "mean", "attention"] = "class"
    norm_pre: bool = True  # layer norm before the first block
    norm_epsilon: float = 1e-5
    patch_bias: bool = False
    projection: bool = True  # False: the output has size `width`, which must be `embed_dim`
    layer_scale: float = 0.0  # initial gain of the residual branches; 0: no layer scale
    kind: Literal["vit"] = "vit"

    supports_patch_dropout: ClassVar[bool] = True
    stacked: ClassVar[str] = r"transformer/blocks/.*"
    sharding_rules: ClassVar[Rules] = (
        *TRANSFORMER_RULES,
        (r"patch_embedding", ("fsdp",)),
        (r"projection", ("fsdp", None)),
        (r"patch_bias|class_embedding|positional_embedding|pool/probe", ()),
    )

    def module(self, embed_dim: int, compute: Compute, patch_dropout: float = 0.0) -> nn.Module:
        return VisionTransformer(self, embed_dim, compute, patch_dropout)

    def layer(self, path: str) -> int | range:
        if path.startswith("transformer/"):
            return range(1, self.layers + 1)
        first = path.startswith(("patch_", "class_", "positional_", "norm_pre"))
        return 0 if first else self.output_layer

    @property
    def output_layer(self) -> int:
        return self.layers + 1

    def tiny(self) -> ViT:
        sizes = {"width": 32, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
        return dataclasses.replace(self, image_size=32, patch_size=16, **sizes)

    @property
    def description(self) -> str:
        return f"{self.layers} layers of {self.width}, patches of {self.patch_size} px"

    @property
    def fixed_embed_dim(self) -> int | None:
        return None if self.projection else self.width

    @property
    def stride(self) -> int:
        return self.patch_size

    @property
    def ignores_partial_patch(self) -> bool:
        return self.pool == "attention"  # SigLIP's 384 px are 27 patches of 14 px and 6 px that are ignored

    @property
    def positions_path(self) -> tuple[str, ...] | None:
        return ("positional_embedding",)

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.pool != "attention")

    @property
    def attention_shape(self) -> AttentionShape | None:
        tokens = (self.image_size // self.patch_size) ** 2 + self.num_prefix_tokens
        return AttentionShape(self.heads, self.width // self.heads, tokens)

    @property
    def uncounted_flops(self) -> float:
        return post_attention_flops(self, (self.image_size // self.patch_size) ** 2) if self.pool == "class" else 0.0

    def check(self, key: str, embed_dim: int) -> None:
        exact = not self.ignores_partial_patch
        check_multiple(f"{key}.image_size", self.image_size, f"{key}.patch_size", self.patch_size, exact=exact)
        check_heads(key, self.width, self.heads, self.width)
        super().check(key, embed_dim)


class VisionTransformer(nn.Module):
    """Encodes normalized pixels. See `ImageTower`."""

    config: ViT
    embed_dim: int
    compute: Compute
    patch_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        train: bool = False,
        key_B: Key[Array, "B"] | None = None,
        project: bool = True,
    ) -> Float[Array, "B E"]:
        config, width, patch, dtype = self.config, self.config.width, self.config.patch_size, self.compute.dtype
        scaled_normal = nn.initializers.normal(width**-0.5)

        patches_BLP = _patches(image, patch)
        # Stored as a convolution kernel, as in other libraries; a matmul, whose gradient is twice as fast on CPUs.
        kernel = self.param("patch_embedding", nn.initializers.lecun_normal(), (patch, patch, 3, width))
        x_BLD = patches_BLP @ kernel.reshape(-1, width).astype(dtype)
        if config.patch_bias:
            bias_D = self.param("patch_bias", nn.initializers.zeros, (width,))
            x_BLD = x_BLD + bias_D[None, None].astype(dtype)

        if config.pool != "attention":
            class_embedding = self.param("class_embedding", scaled_normal, (width,)).astype(dtype)
            class_B1D = jnp.broadcast_to(class_embedding, (x_BLD.shape[0], 1, width))
            x_BLD = jnp.concatenate([class_B1D, x_BLD], axis=1)
        positions_LD = self.param("positional_embedding", scaled_normal, x_BLD.shape[1:])
        x_BLD = x_BLD + positions_LD[None].astype(dtype)
        if train and self.patch_dropout:
            x_BLD = self._drop_patches(x_BLD, key_B)

        if config.norm_pre:
            x_BLD = LayerNorm(config.norm_epsilon, name="norm_pre")(x_BLD)
        transformer = Transformer(config, False, self.compute, name="transformer")
        norm = LayerNorm(config.norm_epsilon, name="norm_post")
        if config.pool == "class":
            x_BD = norm(transformer(x_BLD, pool=lambda x_BLD: x_BLD[:, 0]))
        elif config.pool == "mean":
            x_BD = norm(transformer(x_BLD)[:, 1:].mean(axis=1))
        else:
            x_BD = MAPHead(config, dtype, name="pool")(norm(transformer(x_BLD)))
        if not (config.projection and project):
            return x_BD
        return x_BD @ self.param("projection", scaled_normal, (width, self.embed_dim)).astype(dtype)

    def _drop_patches(self, x_BLD: Float[Array, "B L D"], key_B: Key[Array, "B"]) -> Float[Array, "B l D"]:
        """Keep the class token and, per image, a random subset of the patches in order."""
        prefix = self.config.num_prefix_tokens
        batch, patches = x_BLD.shape[0], x_BLD.shape[1] - prefix
        kept = max(1, int(patches * (1 - self.patch_dropout)))
        order_BL = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(key_B), axis=1)
        indices_Bl = jnp.sort(order_BL[:, :kept], axis=1) + prefix
        indices_Bl = jnp.concatenate([jnp.zeros((batch, prefix), indices_Bl.dtype), indices_Bl], axis=1)
        return jnp.take_along_axis(x_BLD, indices_Bl[..., None], axis=1)


class MAPHead(nn.Module):
    """Multi-head attention pooling: one learned query attends to all tokens; a residual MLP follows."""

    config: ViT
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        config, width = self.config, self.config.width
        init = nn.initializers.normal(width**-0.5)
        probe_B1D = jnp.broadcast_to(self.param("probe", init, (width,)), (x_BLD.shape[0], 1, width))
        query, key, value = (
            project_heads(config.heads, width, init, self.dtype, name)(source)
            for name, source in (("query", probe_B1D), ("key", x_BLD), ("value", x_BLD))
        )
        y_B1NK = jax.nn.dot_product_attention(query, key, value)
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")
        x_BD = out(y_B1NK)[:, 0]
        mlp = MLP(mlp_width(config), config.activation, width**-0.5, self.dtype, name="mlp")
        return x_BD + mlp(LayerNorm(config.norm_epsilon, name="norm")(x_BD))


def _patches(image: Float[Array, "B H W 3"], patch: int) -> Float[Array, "B L P"]:
    """Split images [B, H, W, C] into flat patches [B, H/p · W/p, p · p · C] in row-major order.

    Pixels after the last whole patch are ignored: SigLIP uses 378 of its 384 px.
    """
    batch, height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    x = image[:, : rows * patch, : columns * patch].reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)
