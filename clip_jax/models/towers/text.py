"""Text transformer: causal and pooled at the end token in CLIP, bidirectional and pooled at the last in SigLIP, CLIPA.

Sources: Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`; open_clip `transformer.py`. OpenAI pools at the
largest token id, which is its end token; this tower searches for the end token itself, so any vocabulary works. Padding
is not masked: in a causal tower it follows the end token and has no effect; SigLIP and CLIPA were trained with it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from clip_jax.models.attention import AttentionShape
from clip_jax.models.layers import (
    TRANSFORMER_RULES,
    Activation,
    Compute,
    LayerNorm,
    Rules,
    Transformer,
    post_attention_flops,
)
from clip_jax.models.packing import Stream
from clip_jax.models.towers.base import TextTower, check_heads
from clip_jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class TextTransformer(TextTower):
    """Transformer over token ids. The defaults are those of CLIP's ViT-B models."""

    vocab_size: int = 49_408
    context_length: int = 77  # tokens, start and end tokens included
    eos_id: int = 49_407  # end token; the tokenizer must have the same
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0  # hidden width of the MLP / width
    activation: Activation = "quick_gelu"
    causal: bool = True
    pool: Literal["end", "last"] = "end"  # first end token, or last position, padding or not (SigLIP, CLIPA)
    norm_epsilon: float = 1e-5
    projection: Literal["linear", "bias", "none"] = "linear"  # 'none': `width` must be `embed_dim`
    layer_scale: float = 0.0  # initial gain of the residual branches; 0: no layer scale
    kind: Literal["transformer"] = "transformer"

    stacked: ClassVar[str] = r"transformer/blocks/.*"
    sharding_rules: ClassVar[Rules] = (
        *TRANSFORMER_RULES,
        # By width: in a loop, XLA sums the scattered gradients of a sharded vocabulary wrongly (openxla/xla#49143).
        (r"token_embedding/embedding", ("fsdp",)),
        (r"projection", ("fsdp", None)),
        (r"positional_embedding|projection_bias", ()),
    )

    def module(self, embed_dim: int, compute: Compute, patch_dropout: float = 0.0) -> nn.Module:
        return TextEncoder(self, embed_dim, compute)

    def layer(self, path: str) -> int | range:
        if path.startswith("transformer/"):
            return range(1, self.layers + 1)
        return 0 if path.startswith(("token_", "positional_")) else self.output_layer

    @property
    def output_layer(self) -> int:
        return self.layers + 1

    def tiny(self) -> TextTransformer:
        return dataclasses.replace(self, width=32, layers=2, heads=2, mlp_ratio=4.0)

    @property
    def description(self) -> str:
        return f"{self.layers} layers of {self.width}"

    @property
    def fixed_embed_dim(self) -> int | None:
        return self.width if self.projection == "none" else None

    @property
    def attention_shape(self) -> AttentionShape | None:
        return AttentionShape(self.heads, self.width // self.heads, self.context_length)

    @property
    def uncounted_flops(self) -> float:
        return post_attention_flops(self, self.context_length - 1)

    @property
    def supports_packing(self) -> bool:
        return self.causal and self.pool == "end"

    def end_positions(self, text_BL: Int32[ArrayLike, "B L"]) -> Int32[Array, "B"]:
        return jnp.argmax(jnp.asarray(text_BL) == self.eos_id, axis=1).astype(jnp.int32)

    def check(self, key: str, embed_dim: int) -> None:
        check_heads(key, self.width, self.heads, self.width)
        super().check(key, embed_dim)


class TextEncoder(nn.Module):
    """Encodes token ids, padded or packed. See `TextTower`."""

    config: TextTransformer
    embed_dim: int
    compute: Compute

    @nn.compact
    def __call__(self, text: Int32[ArrayLike, "B L"] | Stream) -> Float[Array, "B E"]:
        config, dtype = self.config, self.compute.dtype
        tokens = nn.Embed(
            config.vocab_size,
            config.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=dtype,
            name="token_embedding",
        )
        positions_LD = self.param(
            "positional_embedding", nn.initializers.normal(0.01), (config.context_length, config.width)
        )
        transformer = Transformer(config, config.causal, self.compute, name="transformer")
        positions_LD = positions_LD.astype(dtype)
        if isinstance(text, Stream):
            x_SRPD = tokens(text.token_SRP) + positions_LD[text.position_SRP]
            x_BD = transformer(x_SRPD.reshape(-1, *x_SRPD.shape[2:]), text.mask(), text.ends)
        else:

            def pool(x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
                if config.pool == "last":
                    return x_BLD[:, -1]
                return jnp.take_along_axis(x_BLD, config.end_positions(text)[:, None, None], axis=1)[:, 0]

            x_BD = transformer(tokens(text) + positions_LD[None], pool=pool)
        # Layer norm acts on each position separately, so it may follow the pooling.
        x_BD = LayerNorm(config.norm_epsilon, name="norm_final")(x_BD)
        if config.projection == "none":
            return x_BD
        init = nn.initializers.normal(config.width**-0.5)
        x_BE = x_BD @ self.param("projection", init, (config.width, self.embed_dim)).astype(dtype)
        if config.projection == "bias":
            bias_E = self.param("projection_bias", nn.initializers.zeros, (self.embed_dim,))
            x_BE = x_BE + bias_E[None].astype(dtype)
        return x_BE
