"""The order of examples: a permutation per epoch, a function of integers, uncorrelated with the stored order."""

import numpy as np
import pytest

from clip_jax.data import order

# 5 standard deviations: the correlation of 100,000 independent pairs has a standard deviation of 0.003.
CORRELATION_BOUND = 0.016


@pytest.mark.parametrize("examples", [1, 2, 3, 7, 1000, 4097])
def test_every_epoch_is_a_permutation(examples):
    ids = order.indices(np.arange(3 * examples), examples, seed=5).numpy().reshape(3, examples)
    for epoch in ids:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(examples))


def test_epochs_and_seeds_have_different_orders():
    n = 1000
    first, second = order.indices(np.arange(2 * n), n, seed=0).numpy().reshape(2, n)
    other = order.indices(np.arange(n), n, seed=1).numpy()
    assert (first != second).mean() > 0.9
    assert (first != other).mean() > 0.9


def test_distant_position_is_independent_of_the_other_positions():
    far = 10**12 + np.arange(64)
    together = order.indices(far, 12_345, seed=3).numpy()
    alone = [int(order.indices(far[i : i + 1], 12_345, seed=3)[0]) for i in (0, 13, 63)]
    assert alone == together[[0, 13, 63]].tolist()


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbours_in_the_order_are_uncorrelated(lag):
    n = 100_000
    ids = order.indices(np.arange(n), n, seed=0).numpy()
    assert abs(np.corrcoef(ids[:-lag], ids[lag:])[0, 1]) < CORRELATION_BOUND


def test_draws_are_uniform_and_depend_on_every_word():
    ids = np.arange(100_000)
    u = order.fraction(order.draw(order.FEATURE, 7, 1, ids))
    assert u.min() >= 0 and u.max() < 1
    counts = np.bincount((u * 10).astype(int), minlength=10)
    assert abs(counts - 10_000).max() < 500  # 5 standard deviations of 95
    for other in [(order.VALUE, 7, 1), (order.FEATURE, 8, 1), (order.FEATURE, 7, 2)]:
        v = order.fraction(order.draw(*other, ids))
        assert abs(np.corrcoef(u, v)[0, 1]) < CORRELATION_BOUND


def test_the_finalizer_is_that_of_splitmix64():
    """The first numbers of SplitMix64 from state 0: the finalizer of multiples of its increment."""
    with np.errstate(over="ignore"):
        found = order._mix(np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    assert found.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_draws_depend_on_the_order_of_words():
    assert order.draw(order.FEATURE, 1, 2)[0] != order.draw(order.FEATURE, 2, 1)[0]


def test_augmentation_seeds_differ_by_example_and_epoch():
    seeds = np.concatenate([order.augmentation_seeds(0, np.full(500, e), np.arange(500)) for e in (0, 1)])
    assert seeds.shape == (1000, 2)
    assert len(np.unique(seeds)) == 2000


def test_replacements_are_in_range_and_vary_with_the_attempt():
    found = {order.replacement(17, attempt, 1000) for attempt in range(1, 101)}
    assert min(found) >= 0 and max(found) < 1000
    assert len(found) > 80
    assert order.replacement(17, 1, 1) == 0
