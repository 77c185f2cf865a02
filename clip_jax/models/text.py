"""The text tower: a transformer, causal and pooled at the end token in CLIP, neither in SigLIP and CLIPA.

Source: Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`; open_clip `transformer.py`. OpenAI pools at the
greatest token id, which is its end token; we look for the end token itself, so that any vocabulary works. Padding is
not masked: in a causal tower it comes after the end token and is never seen; SigLIP and CLIPA were trained to see it.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from clip_jax.models.architecture import TextTransformer as Tower
from clip_jax.models.layers import Compute, LayerNorm, Transformer
from clip_jax.models.packing import Stream
from clip_jax.typing import ArrayLike


class TextTransformer(nn.Module):
    """Token ids, in rows or end to end, to the vector of one position, projected where the tower has a projection."""

    tower: Tower
    embed_dim: int
    compute: Compute

    @nn.compact
    def __call__(self, text: Int32[ArrayLike, "B L"] | Stream) -> Float[Array, "B E"]:
        tower, dtype = self.tower, self.compute.dtype
        tokens = nn.Embed(
            tower.vocab_size,
            tower.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=dtype,
            name="token_embedding",
        )
        positions_LD = self.param("positional_embedding", nn.initializers.normal(0.01), (tower.length, tower.width))
        transformer = Transformer(tower, tower.causal, self.compute, name="transformer")
        positions_LD = positions_LD.astype(dtype)
        if isinstance(text, Stream):
            x_SRPD = tokens(text.token_SRP) + positions_LD[text.position_SRP]
            x_BD = transformer(x_SRPD.reshape(-1, *x_SRPD.shape[2:]), text.mask(), text.ends)
        else:

            def pool(x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
                if tower.pool == "last":
                    return x_BLD[:, -1]
                return jnp.take_along_axis(x_BLD, end_positions(tower, text)[:, None, None], axis=1)[:, 0]

            x_BD = transformer(tokens(text) + positions_LD[None], pool=pool)
        # The norm works on each position alone, so it may follow the pooling.
        x_BD = LayerNorm(tower.norm_epsilon, name="norm_final")(x_BD)
        if tower.projection == "none":
            return x_BD
        projection = self.param("projection", nn.initializers.normal(tower.width**-0.5), (tower.width, self.embed_dim))
        x_BE = x_BD @ projection.astype(dtype)
        if tower.projection == "bias":
            bias_E = self.param("projection_bias", nn.initializers.zeros, (self.embed_dim,))
            x_BE = x_BE + bias_E[None].astype(dtype)
        return x_BE


def end_positions(tower: Tower, text_BL: Int32[ArrayLike, "B L"]) -> Int32[Array, "B"]:
    """Return where the first end token of every row is; 0 where there is none."""
    return jnp.argmax(jnp.asarray(text_BL) == tower.eos_id, axis=1).astype(jnp.int32)
