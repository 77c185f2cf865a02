"""Rounding to half precision: to the nearest, or stochastically, which is unbiased.

A number that changes by less than half a unit in the last place never changes when it is rounded to the nearest:
bfloat16 has 8 bits, so an exponential moving average with decay 0.999 does not move. Stochastic rounding selects the
upper neighbor with the probability that makes the expected value exact (Gupta et al. 2015, arXiv:1502.02551).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt32

from clip_jax.typing import ArrayLike


def round_nearest(x: Float32[ArrayLike, "..."], dtype: str) -> Float[Array, "..."]:
    """Return `x` as 'bfloat16' or 'float16'; finite numbers beyond the range become the largest number."""
    x = jnp.asarray(x)
    return jnp.where(jnp.isfinite(x), _clip_to_range(x, dtype), x).astype(dtype)


def stochastic_round(x: Float32[ArrayLike, "..."], dtype: str, key: jax.Array) -> Float[Array, "..."]:
    """Return `x` as 'bfloat16' or 'float16', rounded to one of the two neighbors with expected value `x`.

    The probability of the upper neighbor is exact to 2^-16. Representable numbers, NaN and infinity are unchanged.
    Finite numbers beyond the range become the largest number, the one case with another expected value.

    Args:
      key: PRNG key from `jax.random.split` or `fold_in`: its words are used as random numbers, because drawing more
        doubled the compilation time of a step. Equal keys round equally on every mesh.
    """
    x = jnp.asarray(x)
    bits = _random_bits(key, x.shape) >> 16
    round_finite = {"bfloat16": _to_bfloat16, "float16": _to_float16}[dtype]
    return jnp.where(jnp.isfinite(x), round_finite(_clip_to_range(x, dtype), bits), x.astype(dtype))


def _clip_to_range(x: Float32[Array, "..."], dtype: str) -> Float32[Array, "..."]:
    largest = float(jnp.finfo(dtype).max)
    return jax.lax.clamp(-largest, x, largest)


def _to_bfloat16(x: Float32[Array, "..."], bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    # bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half carries into the upper half with
    # probability lower half / 2^16.
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + bits) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(jnp.bfloat16)


def _to_float16(x: Float32[Array, "..."], bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    # 11 significant bits from 2^-14 (exponent 113) on; below it the spacing is 2^-24. Powers of two are built from
    # their bits, because devices may divide inexactly and flush subnormals.
    exponent = jnp.maximum((jax.lax.bitcast_convert_type(x, jnp.uint32) >> 23) & 0xFF, 113)
    spacing, per_spacing = (
        jax.lax.bitcast_convert_type(bits << 23, jnp.float32) for bits in (exponent - 10, 264 - exponent)
    )
    steps = jnp.abs(x) * per_spacing
    below = jnp.floor(steps)
    up = steps - below > (bits.astype(jnp.float32) + 0.5) * 2**-16
    return jnp.copysign((below + up) * spacing, x).astype(jnp.float16)


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return a hash of element index and key, which does not depend on the sharding.

    1.2 ns per element on one CPU core, rounding included. Threefry (`jax.random.bits`) took 16 ns, 5 s per step for the
    moments of ViT-B/32.
    """
    first, second = jax.random.key_data(key)[:2]
    return mix(element_index(shape) + first, second)


def mix(x: UInt32[Array, "..."], word: UInt32[Array, ""] | int = 0) -> UInt32[Array, "..."]:
    """Return a bijection of uint32 for each `word`: lowbias32 of https://github.com/skeeto/hash-prospector for 0."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = ((x ^ (x >> 15)) + word) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def element_index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return the row-major index of every element, without a reshape, which would gather a sharded array."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index
