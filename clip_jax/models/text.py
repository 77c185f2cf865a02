"""The text tower: a transformer, causal and pooled at the end token in CLIP, neither in SigLIP and CLIPA.

Source: Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`; open_clip `transformer.py`. OpenAI pools at the
greatest token id, which is its end token; we look for the end token itself, so that any vocabulary works. Padding is
not masked: in a causal tower it comes after the end token and is never seen; SigLIP and CLIPA were trained to see it.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from clip_jax.architectures import TextTransformer as Tower
from clip_jax.models.layers import LayerNorm, Transformer
from clip_jax.typing import ArrayLike


class TextTransformer(nn.Module):
    """Token ids to the vector of one position, projected where the tower has a projection."""

    tower: Tower
    embed_dim: int
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, text_BL: Int32[ArrayLike, "B L"]) -> Float[Array, "B E"]:
        tower = self.tower
        tokens = nn.Embed(
            tower.vocab_size,
            tower.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="token_embedding",
        )
        positions_LD = self.param("positional_embedding", nn.initializers.normal(0.01), (tower.length, tower.width))
        x_BLD = tokens(text_BL) + positions_LD[None].astype(self.dtype)
        x_BLD = Transformer(tower, causal=tower.causal, dtype=self.dtype, remat=self.remat, name="transformer")(x_BLD)
        if tower.pool == "end":
            end_B = jnp.argmax(text_BL == tower.eos_id, axis=1)
            x_BD = jnp.take_along_axis(x_BLD, end_B[:, None, None], axis=1)[:, 0]
        else:
            x_BD = x_BLD[:, -1]
        # The norm works on each position alone, so it may follow the pooling.
        x_BD = LayerNorm(tower.norm_epsilon, name="norm_final")(x_BD)
        if tower.projection == "none":
            return x_BD
        projection = self.param("projection", nn.initializers.normal(tower.width**-0.5), (tower.width, self.embed_dim))
        x_BE = x_BD @ projection.astype(self.dtype)
        if tower.projection == "bias":
            bias_E = self.param("projection_bias", nn.initializers.zeros, (self.embed_dim,))
            x_BE = x_BE + bias_E[None].astype(self.dtype)
        return x_BE
