"""The order of examples: a permutation per epoch, a function of integers, uncorrelated with the stored order."""

import numpy as np
import pytest

from clip_jax.data import order, pipeline
from clip_jax.data.sources.synthetic import SyntheticSource
from tests import simulated_hosts

# 5 standard deviations: the correlation of 100,000 independent pairs has a standard deviation of 0.003.
CORRELATION_BOUND = 0.016


@pytest.mark.parametrize("examples", [1, 2, 3, 7, 1000, 4097])
def test_every_epoch_is_a_permutation(examples):
    ids = order.RecordOrder(examples, seed=5)(np.arange(3 * examples))[1].reshape(3, examples)
    for epoch in ids:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(examples))


def test_epochs_and_seeds_have_different_orders():
    n = 1000
    first, second = order.RecordOrder(n, seed=0)(np.arange(2 * n))[1].reshape(2, n)
    other = order.RecordOrder(n, seed=1)(np.arange(n))[1]
    assert (first != second).mean() > 0.9
    assert (first != other).mean() > 0.9


def test_distant_position_is_independent_of_the_other_positions():
    far = 10**12 + np.arange(64)
    ordered = order.RecordOrder(12_345, seed=3)
    together = ordered(far)[1]
    alone = [int(ordered(far[i : i + 1])[1][0]) for i in (0, 13, 63)]
    assert alone == together[[0, 13, 63]].tolist()


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbours_in_the_order_are_uncorrelated(lag):
    n = 100_000
    ids = order.RecordOrder(n, seed=0)(np.arange(n))[1]
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
    found = {int(order.RecordOrder(1000, 0).replacement(np.array([17]), attempt)[0]) for attempt in range(1, 101)}
    assert min(found) >= 0 and max(found) < 1000
    assert len(found) > 80
    assert order.RecordOrder(1, 0).replacement(np.array([17]), 1).tolist() == [0]


BLOCKS = {
    "uneven": ([3, 5, 2, 7], 4, 4, 3),
    "even": ([10] * 7, 8, 4, 5),
    "one example": ([1], 4, 2, 10),
    "fewer examples than lanes": ([1, 1, 1], 8, 8, 2),
    "many": (np.random.default_rng(0).integers(1, 50, 200).tolist(), 32, 16, 64),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_block_order_has_every_example_once_an_epoch(case):
    records, batch, lanes, window = BLOCKS[case]
    total = sum(records)
    ordered = order.BlockOrder(np.array(records), 5, batch, lanes, window)
    epochs, ids = ordered(np.arange((4 * total // batch + 2) * batch))
    for epoch in range(4):
        np.testing.assert_array_equal(np.sort(ids[epochs == epoch]), np.arange(total))
    assert (ids[epochs == 0] != ids[epochs == 1]).any() or total < 3
    # At any position the lanes are within one example of each other.
    for end in range(batch, 4 * total, batch):
        counts = np.bincount(ids[:end], minlength=total)
        assert counts.max() - counts.min() <= 2
        assert abs(counts - end / total).sum() <= total + 2 * lanes


def test_replacements_of_block_order_are_in_the_block_at_first():
    ordered = order.BlockOrder(np.array([3, 50, 7]), 0, 4, 4, 3)
    near = {int(ordered.replacement(np.array([20]), attempt)[0]) for attempt in range(1, order.BLOCK_ATTEMPTS + 1)}
    anywhere = {
        int(ordered.replacement(np.array([20]), order.BLOCK_ATTEMPTS + attempt)[0]) for attempt in range(1, 1001)
    }
    assert near <= set(range(3, 53)) and len(near) > 20
    assert anywhere == set(range(60))
    assert {int(ordered.replacement(np.array([59]), attempt)[0]) for attempt in range(1, 51)} == set(range(53, 60))


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_of_a_step_are_those_of_its_rows(case):
    records, batch, lanes, window = BLOCKS[case]
    ordered = order.BlockOrder(np.array(records), 5, batch, lanes, window)
    starts = np.cumsum([0, *records])
    for step in range(0, 60, 7):
        ids = ordered(np.arange(step * batch, (step + 1) * batch))[1]
        for rows in (slice(0, batch), slice(batch // 2, batch)):
            blocks = np.concatenate(ordered.blocks(step, rows))
            assert np.isin(np.searchsorted(starts, ids[rows], side="right") - 1, blocks).all()


def test_a_window_that_is_a_block_needs_no_other_block():
    ordered = order.BlockOrder(np.full(7, 10), 5, 10, 1, 10)
    for step in range(14):
        (needed,) = ordered.blocks(step, slice(0, 10), ahead=0)
        ids = ordered(np.arange(10 * step, 10 * step + 10))[1]
        assert needed.tolist() == np.unique(ids // 10).tolist() and len(needed) == 1


def test_block_order_of_two_billion_examples_is_arithmetic():
    records = np.full(1_000_000, 2000)
    ordered = order.BlockOrder(records, 0, 32_768, 64, 4000)
    for step in (0, 1, 300_000, 10**9):
        positions = step * 32_768 + np.array([0, 511, 512, 32_767])
        epochs, ids = ordered(positions)
        assert (epochs == positions // 2_000_000_000).all() and len(set(ids.tolist())) == 4
        assert [int(ordered(positions[i : i + 1])[1][0]) for i in range(4)] == ids.tolist()


def test_resuming_permutes_the_blocks_of_no_other_epoch(monkeypatch):
    permuted, permute, prefetched = [], order.BlockOrder._permuted_blocks, []
    monkeypatch.setattr(
        order.BlockOrder, "_permuted_blocks", lambda self, epoch: permuted.append(epoch) or permute(self, epoch)
    )
    ordered, step = order.BlockOrder(np.full(1_000_000, 2000), 0, 32_768, 64, 4000), 1_000_000
    source = SyntheticSource(1)
    source.prefetch = prefetched.append
    prefetch = pipeline._Prefetch(source, ordered, slice(512, 1024))
    prefetch(step)
    prefetch(step)
    ordered(step * 32_768 + np.arange(512, 1024))
    assert permuted == [step * 32_768 // 2_000_000_000] and len(prefetched) == 1
    assert len(prefetched[0]) <= 2 * 3  # a window of two blocks and the next one, which are parts of three


def test_64_hosts_read_every_example_once():
    ordered = order.BlockOrder(np.full(640, 10), 0, 640, 64, 20)
    found = simulated_hosts.requested_blocks(ordered, 640, 64, range(10))
    examples = np.concatenate([examples for _, examples in found.values()])
    np.testing.assert_array_equal(np.sort(examples), np.arange(6400))


@pytest.mark.parametrize("host", [0, 63])
def test_each_of_64_hosts_requests_its_blocks_once_an_epoch(host):
    """100 blocks, of which it shares the first and the last with other hosts."""
    ordered = order.BlockOrder(np.full(6400, 5), 0, 640, 64, 10)
    ((requests, examples),) = simulated_hosts.requested_blocks(ordered, 640, 64, range(100), [host]).values()
    assert 1.0 <= len(requests) * 5 / len(examples) <= 1.05


def test_block_order_separates_neighbours():
    """Neighbours in a batch are rarely of one block, and the rank of the block is uncorrelated with the position."""
    ordered = order.BlockOrder(np.full(2000, 50), 0, 1024, 64, 200)
    ids = ordered(np.arange(98 * 1024))[1]
    blocks = ids // 50
    # 5 standard deviations of 2000 values: blocks are permuted independently, their examples are not.
    assert abs(np.corrcoef(np.arange(len(ids)), blocks)[0, 1]) < 5 / np.sqrt(2000)
    assert abs(np.corrcoef(ids[:-1024], ids[1024:])[0, 1]) < 2 * CORRELATION_BOUND + 0.25
    distinct = np.mean([len(set(blocks[at : at + 1024].tolist())) for at in range(0, len(blocks), 1024)])
    assert distinct > 200  # of at most 64 lanes × 4 blocks of a window


def test_windows_are_permuted_without_cycle_walking(monkeypatch):
    """The cipher has at least 2^16 values: 30 µs for each record of a window of 60."""
    ordered = order.BlockOrder(np.full(20, 30), 0, 60, 2, 60)
    ordered._epoch(0)
    monkeypatch.setattr(order, "_shuffled", None)
    epochs, examples = ordered(np.arange(600))
    assert not epochs.any() and sorted(examples.tolist()) == list(range(600))
    assert np.corrcoef(np.arange(60), ordered(np.arange(600))[1][:60] % 60)[0, 1] < 0.5
