"""Rounding to half precision: unbiased, exact for representable numbers, always one of the two neighbors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.training.rounding import round_nearest, stochastic_round

DTYPES = ["bfloat16", "float16"]
ROUND = jax.jit(stochastic_round, static_argnums=1)
DRAWS = 1 << 16
# Of the 60 means below, one exceeds 5 standard errors for one in 30,000 sets of keys; the keys are fixed.
STANDARD_ERRORS = 5
KEYS = jax.random.split(jax.random.key(0), 4)
RESOLUTION = 2**-16  # of the probability of the upper neighbor


def _neighbors(x, dtype):
    """Return the numbers of `dtype` at or below, and at or above x, as float64."""
    nearest = np.asarray(x, np.float32).astype(dtype)
    other = np.nextafter(nearest, np.where(nearest.astype(np.float32) < x, np.inf, -np.inf).astype(dtype))
    exact = nearest.astype(np.float32) == x
    pair = np.stack([nearest, np.where(exact, nearest, other)]).astype(np.float64)
    return pair.min(axis=0), pair.max(axis=0)


def _every_number(dtype):
    """Return all numbers of a dtype except subnormals of float32, which devices flush to zero."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
    return numbers[~(np.abs(numbers) < np.finfo(np.float32).tiny) | (numbers == 0)]


# A float16 below 6.1e-5 is subnormal; 3e-8 is half of the smallest.
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [("bfloat16", v) for v in (1e-30, 3e-8, 0.7, 1.0 + 2**-20, 255.3, 3e38)]
    + [("float16", v) for v in (1e-9, 3e-8, 1.2e-6, 6.1e-5, 0.7, 1.0 + 2**-20, 255.3, 65_490.0)],
)
def test_expected_value_is_exact(dtype, value, sign):
    x = np.float32(sign * value)
    low, high = _neighbors(x, dtype)
    probability = (np.float64(x) - low) / (high - low)
    for seed in range(2):
        drawn = np.asarray(ROUND(jnp.full(DRAWS, x), dtype, KEYS[seed]), np.float64)
        tolerance = STANDARD_ERRORS * np.sqrt(probability * (1 - probability) / DRAWS) + RESOLUTION
        assert abs((drawn.mean() - low) / (high - low) - probability) <= tolerance
        assert set(drawn) <= {low, high}


@pytest.mark.parametrize("dtype", DTYPES)
def test_representable_numbers_are_unchanged(dtype):
    numbers = _every_number(dtype)
    for seed in range(3):
        rounded = np.asarray(ROUND(numbers, dtype, KEYS[seed])).astype(np.float32)
        np.testing.assert_array_equal(rounded, numbers)  # NaN and infinity too
        np.testing.assert_array_equal(np.signbit(rounded[rounded == 0]), np.signbit(numbers[numbers == 0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_one_of_the_two_neighbors(dtype):
    rng = np.random.default_rng(0)
    largest = float(jnp.finfo(dtype).max)
    magnitudes = np.exp(rng.uniform(np.log(1e-37 if dtype == "bfloat16" else 1e-12), np.log(largest), 100_000))
    x = np.minimum(magnitudes, largest).astype(np.float32) * rng.choice(np.float32([-1, 1]), len(magnitudes))
    low, high = _neighbors(x, dtype)
    rounded = np.asarray(ROUND(x, dtype, KEYS[0]), np.float64)
    assert ((rounded == low) | (rounded == high)).all()
    between = low < high
    # Magnitudes are log-uniform, so the position between the neighbors is uniform: half are rounded up.
    assert abs((rounded == high)[between].mean() - 0.5) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_stay_finite(dtype):
    largest = float(jnp.finfo(dtype).max)
    beyond = np.float32([largest * (1 + 1e-3), 3.4e38, -3.4e38, np.inf, -np.inf, np.nan])
    expected = [largest, largest, -largest, np.inf, -np.inf, np.nan]
    for rounded in (round_nearest(beyond, dtype), *(ROUND(beyond, dtype, KEYS[s]) for s in range(3))):
        assert rounded.dtype == dtype
        np.testing.assert_array_equal(np.asarray(rounded, np.float64), expected)


def test_equal_keys_round_equally_for_any_sharding():
    x = np.random.default_rng(0).standard_normal((16, 24, 8)).astype(np.float32)
    single = ROUND(x, "bfloat16", KEYS[0])
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in ((), ("a",), ("b", "a"), (None, None, ("a", "b"))):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        np.testing.assert_array_equal(ROUND(sharded, "bfloat16", KEYS[0]), single)


def test_bits_of_adjacent_elements_and_of_keys_are_uncorrelated():
    up = [
        np.asarray(ROUND(jnp.full((256, 256), 1 + 2**-8), "bfloat16", KEYS[seed]), np.float32).ravel() > 1
        for seed in range(4)
    ]
    pairs = [(up[0][lag:], up[0][:-lag]) for lag in (1, 2, 255, 256, 257)] + [(up[0], other) for other in up[1:]]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < STANDARD_ERRORS / np.sqrt(DRAWS)
