"""Captions end to end instead of each in a row of its own: what comes after an end token costs nothing.

Under a causal mask, pooled at the end token, a caption's padding is dead weight, and captions fill a quarter of their
rows. Here they follow one another in a stream that is cut into chunks no shorter than the longest caption, so that a
caption lies in two chunks at most, and every chunk attends to itself and to the one before. Nothing is sorted or fitted
into bins: all is computed on the device from the rows, with static shapes. Embeddings are the same to rounding.

Packing of sequences for attention is due to Krell et al. 2021 (arXiv:2107.02027), who fill bins.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class Stream(NamedTuple):
    """The captions of each of S groups end to end, in R chunks of P tokens.

    token_SRP: ids. position_SRP: of a token in its caption. caption_SRP: whose it is, of its group's.
    end_Sb: where every caption's end token lies in its group's stream.
    """

    token_SRP: Int32[Array, "S R P"]
    position_SRP: Int32[Array, "S R P"]
    caption_SRP: Int32[Array, "S R P"]
    end_Sb: Int32[Array, "S b"]

    def mask(self) -> Bool[Array, "S R P P2"]:
        """Tell for the tokens of a chunk which of the chunk before and of their own they attend to."""
        caption, length = self.caption_SRP, self.caption_SRP.shape[-1]
        same = caption[..., :, None] == jnp.concatenate([before(caption, -1), caption], axis=-1)[..., None, :]
        at = jnp.arange(2 * length)
        return same & (at[None] <= at[length:, None])[None, None]

    def ends(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "N D"]:
        """Return what lies at the end tokens, of all chunks of all groups."""
        x_STD = x_BPD.reshape(len(self.end_Sb), -1, x_BPD.shape[-1])
        return jnp.take_along_axis(x_STD, self.end_Sb[..., None], axis=1).reshape(-1, x_BPD.shape[-1])


def before(x: Array, fill: int = 0) -> Array:
    """Return the chunk before each of [S R …], and `fill` before the first."""
    first = jnp.full_like(x[:, :1], fill)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def chunks(rows: int, length: int, capacity: float) -> tuple[int, int]:
    """Return how many chunks of how many tokens come nearest to `capacity`, a fraction, of rows of a length."""
    size = -(-length // 8) * 8  # eight rows are a TPU's tile
    return max(1, round(capacity * rows * length / size)), size


def pack(
    text_BL: Int32[Array, "B L"], end_B: Int32[Array, "B"], groups: int, capacity: float
) -> tuple[Stream, Int32[Array, " S"]]:
    """Return the streams, and how many tokens each group has: more than its stream holds are cut off.

    Args:
      text_BL: rows in `groups` equal parts, each packed by itself, so that nothing crosses devices.
      end_B: where the end tokens are.
      capacity: the fraction of the rows' B · L positions that the streams have room for, to the nearest chunk.
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
    position_ST = jnp.minimum(position_ST, length - 1)  # what follows the last caption: nothing looks there
    token_ST = text_SbL[group_S1, caption_ST, position_ST]
    shape = (groups, count, size)
    stream = Stream(token_ST.reshape(shape), position_ST.reshape(shape), caption_ST.reshape(shape), stop_Sb - 1)
    return stream, stop_Sb[:, -1]
