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
from clip_jax.models.layers import TRANSFORMER_RULES, LayerNorm, Rules, Transformer, TransformerConfig
from clip_jax.models.packing import Stream
from clip_jax.models.towers.base import Encoder, TextTower, check_multiple
from clip_jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class TextTransformer(TransformerConfig, TextTower):
    """Transformer over token ids. The defaults are those of CLIP's ViT-B models."""

    vocab_size: int = 49_408
    context_length: int = 77  # tokens, start and end tokens included
    eos_id: int = 49_407  # end token; the tokenizer must have the same
    width: int = 512
    layers: int = 12  # transformer blocks
    heads: int = 8  # attention heads; they divide the width
    causal: bool = True  # attention to earlier tokens only
    pool: Literal["end", "last"] = "end"  # first end token, or last position, padding or not (SigLIP, CLIPA)
    projection: Literal["linear", "bias", "none"] = "linear"  # 'none': `width` must be `embed_dim`
    kind: Literal["transformer"] = "transformer"

    sharding_rules: ClassVar[Rules] = (
        *TRANSFORMER_RULES,
        # By width: in a loop, XLA sums the scattered gradients of a sharded vocabulary wrongly (openxla/xla#49143).
        (r"token_embedding/embedding", ("fsdp",)),
        (r"projection", ("fsdp", None)),
        (r"positional_embedding|projection_bias", ()),
    )

    def encode(self, module: Encoder, text: Int32[ArrayLike, "B L"] | Stream) -> Float[Array, "B E"]:
        dtype = module.compute.dtype
        tokens = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=dtype,
            name="token_embedding",
        )
        positions_LD = module.param(
            "positional_embedding", nn.initializers.normal(0.01), (self.context_length, self.width)
        )
        transformer = Transformer(self, self.causal, module.compute, name="transformer")
        positions_LD = positions_LD.astype(dtype)
        if isinstance(text, Stream):
            x_SRPD = tokens(text.token_SRP) + positions_LD[text.position_SRP]
            x_BD = transformer(x_SRPD.reshape(-1, *x_SRPD.shape[2:]), text.mask(), text.ends)
        else:

            def pool(x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
                if self.pool == "last":
                    return x_BLD[:, -1]
                return jnp.take_along_axis(x_BLD, self.end_positions(text)[:, None, None], axis=1)[:, 0]

            x_BD = transformer(tokens(text) + positions_LD[None], pool=pool)
        # Layer norm acts on each position separately, so it may follow the pooling.
        x_BD = LayerNorm(self.norm_epsilon, name="norm_final")(x_BD)
        if self.projection == "none":
            return x_BD
        init = nn.initializers.normal(self.width**-0.5)
        x_BE = x_BD @ module.param("projection", init, (self.width, module.embed_dim)).astype(dtype)
        if self.projection == "bias":
            bias_E = module.param("projection_bias", nn.initializers.zeros, (module.embed_dim,))
            x_BE = x_BE + bias_E[None].astype(dtype)
        return x_BE

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
        return self.post_attention_flops(self.context_length - 1)

    @property
    def supports_packing(self) -> bool:
        return self.causal and self.pool == "end"

    def end_positions(self, text_BL: Int32[ArrayLike, "B L"]) -> Int32[Array, "B"]:
        return jnp.argmax(jnp.asarray(text_BL) == self.eos_id, axis=1).astype(jnp.int32)

    def check(self, key: str, embed_dim: int) -> None:
        check_multiple(f"{key}.width", self.width, f"{key}.heads", self.heads)
        super().check(key, embed_dim)
