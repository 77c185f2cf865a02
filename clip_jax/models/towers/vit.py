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
    LayerNorm,
    Rules,
    Transformer,
    TransformerConfig,
    attend_from_query,
    patches,
)
from clip_jax.models.towers.base import Encoder, ImageTower, check_multiple


@dataclasses.dataclass(frozen=True)
class ViT(TransformerConfig, ImageTower):
    """Vision Transformer (Dosovitskiy et al. 2020). The defaults are CLIP's ViT-B/32."""

    image_size: int = 224  # px
    patch_size: int = 32  # px
    width: int = 768
    layers: int = 12  # transformer blocks
    heads: int = 12  # attention heads; they divide the width
    # 'class': class token. 'mean': mean of the patches; the class token exists and is not pooled (CLIPA).
    # 'attention': learned query and MLP, no class token (SigLIP).
    pool: Literal["class", "mean", "attention"] = "class"
    norm_pre: bool = True  # layer norm before the first block
    patch_bias: bool = False  # of the patch embedding
    projection: bool = True  # False: the output has size `width`, which must be `embed_dim`
    kind: Literal["vit"] = "vit"

    supports_patch_dropout: ClassVar[bool] = True
    positions_path: ClassVar[tuple[str, ...]] = ("positional_embedding",)
    sharding_rules: ClassVar[Rules] = (
        *TRANSFORMER_RULES,
        (r"patch_embedding", ("fsdp",)),
        (r"projection", ("fsdp", None)),
        (r"patch_bias|class_embedding|positional_embedding|pool/probe", ()),
    )

    def encode(
        self, module: Encoder, image: Float[Array, "B H W 3"], train: bool, key_B: Key[Array, "B"] | None, project: bool
    ) -> Float[Array, "B E"]:
        width, patch, dtype = self.width, self.patch_size, module.compute.dtype
        scaled_normal = nn.initializers.normal(width**-0.5)

        # Stored as a convolution kernel, as in other libraries; a matmul, whose gradient is twice as fast on CPUs.
        kernel = module.param("patch_embedding", nn.initializers.lecun_normal(), (patch, patch, 3, width))
        x_BLD = patches(image, patch) @ kernel.reshape(-1, width).astype(dtype)
        if self.patch_bias:
            bias_D = module.param("patch_bias", nn.initializers.zeros, (width,))
            x_BLD = x_BLD + bias_D[None, None].astype(dtype)

        if self.pool != "attention":
            class_embedding = module.param("class_embedding", scaled_normal, (width,)).astype(dtype)
            class_B1D = jnp.broadcast_to(class_embedding, (x_BLD.shape[0], 1, width))
            x_BLD = jnp.concatenate([class_B1D, x_BLD], axis=1)
        positions_LD = module.param("positional_embedding", scaled_normal, x_BLD.shape[1:])
        x_BLD = x_BLD + positions_LD[None].astype(dtype)
        if train and module.patch_dropout:
            x_BLD = self._drop_patches(x_BLD, key_B, module.patch_dropout)

        if self.norm_pre:
            x_BLD = LayerNorm(self.norm_epsilon, name="norm_pre")(x_BLD)
        transformer = Transformer(self, False, module.compute, name="transformer")
        norm = LayerNorm(self.norm_epsilon, name="norm_post")
        if self.pool == "class":
            x_BD = norm(transformer(x_BLD, pool=lambda x_BLD: x_BLD[:, 0]))
        elif self.pool == "mean":
            x_BD = norm(transformer(x_BLD)[:, 1:].mean(axis=1))
        else:
            x_BD = MAPHead(self, dtype, name="pool")(norm(transformer(x_BLD)))
        if not (self.projection and project):
            return x_BD
        return x_BD @ module.param("projection", scaled_normal, (width, module.embed_dim)).astype(dtype)

    def _drop_patches(
        self, x_BLD: Float[Array, "B L D"], key_B: Key[Array, "B"], fraction: float
    ) -> Float[Array, "B l D"]:
        """Keep the class token and, per image, a random subset of the patches in order."""
        prefix = self.num_prefix_tokens
        batch, count = x_BLD.shape[0], x_BLD.shape[1] - prefix
        kept = max(1, int(count * (1 - fraction)))
        order_BL = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (count,)))(key_B), axis=1)
        indices_Bl = jnp.sort(order_BL[:, :kept], axis=1) + prefix
        indices_Bl = jnp.concatenate([jnp.zeros((batch, prefix), indices_Bl.dtype), indices_Bl], axis=1)
        return jnp.take_along_axis(x_BLD, indices_Bl[..., None], axis=1)

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
    def num_prefix_tokens(self) -> int:
        return int(self.pool != "attention")

    @property
    def attention_shape(self) -> AttentionShape | None:
        tokens = (self.image_size // self.patch_size) ** 2 + self.num_prefix_tokens
        return AttentionShape(self.heads, self.width // self.heads, tokens)

    @property
    def uncounted_flops(self) -> float:
        return self.post_attention_flops((self.image_size // self.patch_size) ** 2) if self.pool == "class" else 0.0

    def check(self, key: str, embed_dim: int) -> None:
        exact = not self.ignores_partial_patch
        check_multiple(f"{key}.image_size", self.image_size, f"{key}.patch_size", self.patch_size, exact=exact)
        check_multiple(f"{key}.width", self.width, f"{key}.heads", self.heads)
        super().check(key, embed_dim)


class MAPHead(nn.Module):
    """Multi-head attention pooling: one learned query attends to all tokens; a residual MLP follows."""

    config: ViT
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        config, width = self.config, self.config.width
        init = nn.initializers.normal(width**-0.5)
        probe_B1D = jnp.broadcast_to(self.param("probe", init, (width,)), (x_BLD.shape[0], 1, width))
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")
        x_BD = out(attend_from_query(probe_B1D, x_BLD, config.heads, self.dtype))[:, 0]
        mlp = MLP(config.mlp_width, config.activation, width**-0.5, self.dtype, name="mlp")
        return x_BD + mlp(LayerNorm(config.norm_epsilon, name="norm")(x_BD))
