"""The order of examples, as a pure function of integers.

Position p of the infinite sequence of examples is offset p % n of epoch p // n; a keyed permutation of [0, n) maps the
offset to the example. All other randomness of an example (caption, augmentation, replacement of a damaged record) is a
hash of (seed, epoch, example, purpose) by the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"), so it depends neither on the host nor on the thread.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# Of TensorFlow's `RandomIndexShuffle`, a block cipher with cycle walking; even. With 4 rounds, as in its Python wrapper
# `tf.random.experimental.index_shuffle`, neighbors of a million examples correlate by up to 0.4; 24 leave 0.003, the
# level of chance.
ROUNDS = 24

# Purposes of draws. The numbers are part of the meaning of a seed: append, never renumber.
FEATURE, VALUE, AUGMENT, REPLACE, COUNT = range(5)


def indices(positions: np.ndarray | tf.Tensor, examples: int, seed: int) -> tf.Tensor:
    """Return the example index at each position, int64[n], in the infinite sequence: step × global batch size + row."""
    positions = tf.cast(positions, tf.int64)
    epochs, offsets = positions // examples, positions % examples
    keys = tf.stack([tf.fill(tf.shape(epochs), tf.constant(seed, tf.int64)), epochs, tf.zeros_like(epochs)], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=offsets, seed=keys, max_index=tf.constant(examples - 1, tf.int64), rounds=ROUNDS
    )


def draw(purpose: np.ndarray | int, *words: np.ndarray | int) -> np.ndarray:
    """Return a uint64 hash of the purpose and the words (seed, epoch, example, …), which broadcast."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        state = _mix(np.atleast_1d(purpose).astype(np.uint64) + np.uint64(1))
        for word in words:
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + _mix(np.atleast_1d(word).astype(np.uint64)))
    return state


def fraction(bits: np.ndarray) -> np.ndarray:
    """Return uint64 draws as float64 in [0, 1), from their 53 highest bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augmentation_seeds(seed: int, epochs: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Return int64[n, 2], seeds for TensorFlow's stateless random functions, one per example and epoch."""
    halves = [draw(AUGMENT, seed, epochs, example_ids, half) for half in (0, 1)]
    return np.stack(halves, axis=1).astype(np.int64)


def replacement(example: int, attempt: int, examples: int) -> int:
    """Return the example that replaces a damaged one; `attempt` counts from 1."""
    return int(draw(REPLACE, example, attempt)[0] % np.uint64(examples))


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
