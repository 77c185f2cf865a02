"""Rounding to half precision: to the nearest, or by chance, with the number itself as the mean.

Rounded to the nearest, a number that changes by less than half its last place never changes: bfloat16 keeps 8 bits, so
a moving average that takes in 1/1000 a step is stuck. Rounded up with the chance that the distance from below gives, it
moves as it should on average. Source: Gupta et al. 2015 (arXiv:1502.02551); Radford et al. 2021, section 2.5, rounds
the text encoder's weights so.

The bits come from a hash of element and key (the mixing steps of lowbias32,
https://github.com/skeeto/hash-prospector), not from `jax.random.bits`: Threefry took 16 ns an element on one CPU core,
5 s for the moments of ViT-B/32 at every step; rounding with the hash takes 1.2 ns, as long as rounding to the nearest.
They depend on an element's place in its array, on no sharding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt32

from clip_jax.typing import ArrayLike


def round_nearest(x: Float32[ArrayLike, "..."], dtype: str) -> Float[Array, "..."]:
    """Return `x` as 'bfloat16' or 'float16'; what is finite and too large becomes the largest number."""
    x = jnp.asarray(x)
    return jnp.where(jnp.isfinite(x), _within(x, dtype), x).astype(dtype)


def stochastic_round(x: Float32[ArrayLike, "..."], dtype: str, key: jax.Array) -> Float[Array, "..."]:
    """Return `x` as 'bfloat16' or 'float16', each element one of its two neighbours there, with `x` as their mean.

    The chance of the upper neighbour is exact to 2^-16. What is representable stays as it is, NaN and infinity too;
    finite numbers beyond the largest become the largest, the one place where the mean is not `x`.

    Args:
      key: of `jax.random.split` or `fold_in`, since its words are taken as the random numbers that they are there: to
        draw more would double the time that a step takes to compile. Equal keys round equally, on any mesh.
    """
    x = jnp.asarray(x)
    bits = _random_bits(key, x.shape) >> 16
    round_finite = {"bfloat16": _to_bfloat16, "float16": _to_float16}[dtype]
    return jnp.where(jnp.isfinite(x), round_finite(_within(x, dtype), bits), x.astype(dtype))


def _within(x: Float32[Array, "..."], dtype: str) -> Float32[Array, "..."]:
    largest = float(jnp.finfo(dtype).max)
    return jax.lax.clamp(-largest, x, largest)


def _to_bfloat16(x: Float32[Array, "..."], bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    # bfloat16 is the upper half of a float32: the sum carries into it as often as the lower half is large.
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + bits) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(jnp.bfloat16)


def _to_float16(x: Float32[Array, "..."], bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    # 11 bits from 2^-14 (exponent 113) on; below it the numbers are 2^-24 apart, however small. Powers of two are put
    # together from their bits, for no device may divide or flush them inexactly.
    exponent = jnp.maximum((jax.lax.bitcast_convert_type(x, jnp.uint32) >> 23) & 0xFF, 113)
    spacing, per_spacing = (
        jax.lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent - 10, 264 - exponent)
    )
    steps = jnp.abs(x) * per_spacing
    below = jnp.floor(steps)
    up = steps - below > (bits.astype(jnp.float32) + 0.5) * 2**-16
    return jnp.copysign((below + up) * spacing, x).astype(jnp.float16)


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):  # row-major, without a reshape that would gather a sharded array
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    first, second = jax.random.key_data(key)[:2]
    x = place + first
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = ((x ^ (x >> 15)) + second) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
