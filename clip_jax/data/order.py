"""The order of examples, as a pure function of integers.

Position p of the endless sequence of examples lies in epoch p // n at offset p % n; a keyed permutation of [0, n)
maps the offset to the example. Nothing is stored: a resumed run needs the number of its next step and nothing
else, and any number of hosts reads the same global batches.

The permutation is TensorFlow's `RandomIndexShuffle`, a block cipher that walks its cycles. Its Python wrapper,
`tf.random.experimental.index_shuffle`, uses 4 rounds: at a million examples neighbours then correlate by up to 0.4.
24 rounds leave 0.003, what chance leaves.

Everything else that is random about an example (which caption, how the picture is changed, what stands in for a
damaged record) hashes (seed, epoch, example, purpose) with the finaliser of SplitMix64 (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators"), so it depends neither on the host nor on the thread.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

ROUNDS = 24  # even, at least 4

# Purposes of draws. Their numbers are part of what a seed means: add, never renumber.
FEATURE, VALUE, AUGMENT, REPLACE, COUNT = range(5)


def indices(positions: np.ndarray | tf.Tensor, examples: int, seed: int) -> tf.Tensor:
    """Return the example at each position, int64[n]; each epoch is another permutation of the `examples`.

    Args:
      positions: int64[n], in the endless sequence: step × global batch size + row.
    """
    positions = tf.cast(positions, tf.int64)
    epochs, offsets = positions // examples, positions % examples
    keys = tf.stack([tf.fill(tf.shape(epochs), tf.constant(seed, tf.int64)), epochs, tf.zeros_like(epochs)], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=offsets, seed=keys, max_index=tf.constant(examples - 1, tf.int64), rounds=ROUNDS
    )


def draw(purpose: np.ndarray | int, *words: np.ndarray | int) -> np.ndarray:
    """Return a uint64 for each row of the words (seed, epoch, example, …), which broadcast against each other."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        state = _mix(np.atleast_1d(purpose).astype(np.uint64) + np.uint64(1))
        for word in words:
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + _mix(np.atleast_1d(word).astype(np.uint64)))
    return state


def fraction(bits: np.ndarray) -> np.ndarray:
    """Return draws as float64 in [0, 1): their 53 highest bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augmentation_seeds(seed: int, epochs: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Return int64[n, 2], the seeds of TensorFlow's stateless draws for each example in its epoch."""
    halves = [draw(AUGMENT, seed, epochs, example_ids, half) for half in (0, 1)]
    return np.stack(halves, axis=1).astype(np.int64)


def replacement(example: int, attempt: int, examples: int) -> int:
    """Return the example that stands in for a damaged one, at the given attempt (from 1)."""
    return int(draw(REPLACE, example, attempt)[0] % np.uint64(examples))


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
