"""Packed captions: concatenated instead of padded, so positions after the end token cost nothing.

In a causal tower that pools at the end token, padding has no effect, and captions fill a quarter of their positions.
Here the captions of a group are concatenated to a stream, which is split into chunks no shorter than the longest
caption. A caption then spans at most two chunks, and each chunk attends to itself and the previous one. Unlike the bins
of Krell et al. 2021 (arXiv:2107.02027), this runs on the device with static shapes. Embeddings are equal to rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class Stream(NamedTuple):
    """The concatenated captions of each of S groups, in R chunks of P tokens.

    token_SRP: token ids.
    position_SRP: position of each token in its caption.
    caption_SRP: index of each token's caption in its group.
    end_Sb: position of each caption's end token in the group's stream.
    """

    token_SRP: Int32[Array, "S R P"]
    position_SRP: Int32[Array, "S R P"]
    caption_SRP: Int32[Array, "S R P"]
    end_Sb: Int32[Array, "S b"]

    def mask(self) -> Bool[Array, "S R P P2"]:
        """Return the attention mask: a chunk's tokens against the previous chunk and its own, causal, by caption."""
        caption, length = self.caption_SRP, self.caption_SRP.shape[-1]
        keys = jnp.concatenate([previous_chunk(caption, -1), caption], axis=-1)
        same = caption[..., :, None] == keys[..., None, :]
        at = jnp.arange(2 * length)
        return same & (at[None] <= at[length:, None])[None, None]

    def ends(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "N D"]:
        """Return the activations at the end tokens, given those of all chunks of all groups."""
        x_STD = x_BPD.reshape(len(self.end_Sb), -1, x_BPD.shape[-1])
        return jnp.take_along_axis(x_STD, self.end_Sb[..., None], axis=1).reshape(-1, x_BPD.shape[-1])


def previous_chunk(x: Array, fill: int = 0) -> Array:
    """Shift [S, R, …] by one chunk along R; `fill` precedes the first."""
    first = jnp.full_like(x[:, :1], fill)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def chunks(texts: int, length: int, capacity: float) -> tuple[int, int]:
    """Return the number of chunks and tokens per chunk nearest to `capacity`, a fraction of all positions."""
    size = -(-length // 8) * 8  # a TPU tile has eight rows
    return max(1, round(capacity * texts * length / size)), size


def pack(
    text_BL: Int32[Array, "B L"], end_B: Int32[Array, "B"], groups: int, capacity: float
) -> tuple[Stream, Int32[Array, " S"]]:
    """Return the streams, and the number of tokens in each group; tokens beyond a stream's size are cut off.

    Args:
      text_BL: token ids. Each of `groups` equal parts of the batch is packed separately, without communication
        between devices.
      end_B: positions of the end tokens.
      capacity: size of the streams as a fraction of the B · L positions, rounded to chunks.
    """
    length = text_BL.shape[1]
    text_SbL, end_Sb = text_BL.reshape(groups, -1, length), end_B.reshape(groups, -1).astype(jnp.int32)
    count, size = chunks(text_SbL.shape[1], length, capacity)
    stop_Sb = jnp.cumsum(end_Sb + 1, axis=1)
    start_Sb = stop_Sb - end_Sb - 1
    group_S1 = jnp.arange(groups)[:, None]
    starts_ST = jnp.zeros((groups, count * size), jnp.int32).at[group_S1, start_Sb].set(1, mode="drop")
    caption_ST = jnp.cumsum(starts_ST, axis=1) - 1
    position_ST = jnp.arange(count * size)[None] - jnp.take_along_axis(start_Sb, caption_ST, axis=1)
    position_ST = jnp.minimum(position_ST, length - 1)  # positions after the last caption, which are never pooled
    token_ST = text_SbL[group_S1, caption_ST, position_ST]
    shape = (groups, count, size)
    stream = Stream(token_ST.reshape(shape), position_ST.reshape(shape), caption_ST.reshape(shape), stop_Sb - 1)
    return stream, stop_Sb[:, -1]
