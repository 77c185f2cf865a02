"""`data.mixture`: the same number of pairs of each dataset in every batch, each record once an epoch of its dataset."""

import dataclasses
import logging

import numpy as np
import pytest

from clip_jax import data
from clip_jax.config import DataConfig, DatasetConfig, from_config_dict
from clip_jax.data.sources import mixture
from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.training import dry_run

BATCH = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two parts shards, read by blocks, and one part of another size, read by records."""
    folder = tmp_path_factory.mktemp("mixture")
    for number, count in enumerate((70, 41, 53)):
        write_tfrecord(folder / f"{number}.tfrecord", [{"png": b"-", "txt": f"{number} {i}"} for i in range(count)])
    shards = DatasetConfig(files=f"{folder}/*.tfrecord", weight=2.0, options={"order": "blocks", "lanes": 4})
    return DataConfig(
        mixture={"shards": shards, "made": DatasetConfig(source="synthetic", options={"examples": 37})},
        cache_dir=str(folder),
    )


@pytest.fixture(scope="module")
def source(config):
    return data.make_source(config)


def _order(source, steps, seed=0):
    """Return dataset, epoch and example of each position."""
    epochs, examples = source.order(seed, BATCH)(np.arange(steps * BATCH))
    datasets = np.array([source.key(example).partition(":")[0] for example in examples.tolist()])
    return datasets, epochs, examples


def test_every_batch_has_the_same_number_of_pairs_of_each_dataset(source):
    datasets, _, _ = _order(source, 30)
    for batch in datasets.reshape(30, BATCH):
        assert (batch == "shards").sum() == 16 and (batch == "made").sum() == 8
        for host in batch.reshape(8, 3):  # of eight
            assert (host == "shards").sum() == 2


def test_every_record_comes_once_in_an_epoch_of_its_dataset(source):
    datasets, epochs, examples = _order(source, 60)
    for name, size in (("shards", 164), ("made", 37)):
        of_dataset = datasets == name
        for epoch in range(3):
            found = examples[of_dataset & (epochs == epoch)]
            assert len(found) == size and len(set(found.tolist())) == size
    assert set(epochs[:BATCH].tolist()) == {0}


def test_the_order_depends_on_the_seed(source):
    one, other = (_order(source, 4, seed)[2] for seed in (0, 1))
    assert (one != other).mean() > 0.9


def test_equal_datasets_have_different_orders():
    one = DatasetConfig(source="synthetic", options={"examples": 64})
    source = data.make_source(DataConfig(mixture={"a": one, "b": one}))
    _, examples = source.order(0, 8)(np.arange(64))
    assert (examples[0::2] % 64 != examples[1::2] % 64).any()


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_blocks_of_the_next_steps_are_read_in_advance(config, hosts):
    """Each host's records are in the blocks that it begins to read at the step, and none in those of others."""
    source = data.make_source(config)
    order, rows = source.order(0, BATCH), BATCH // hosts
    shards, first = source._datasets[1], source._starts[1]
    assert source._names == ["made", "shards"]
    for step in (0, 1, 7, 100):
        for host in range(hosts):
            own = slice(host * rows, (host + 1) * rows)
            blocks = np.concatenate(order.blocks(step, own))
            positions = step * BATCH + np.arange(own.start, own.stop)
            examples = order(positions)[1]
            needed = np.searchsorted(shards._starts, examples[examples >= first] - first, side="right") - 1
            assert set(needed) <= set(blocks - source._first_blocks[1])
    source.prefetch(blocks)
    assert shards._blocks._planned == set((blocks - source._first_blocks[1]).tolist())


def test_replacements_are_of_the_same_dataset(source):
    order = source.order(0, BATCH)
    examples = np.arange(len(source))
    found = np.stack([order.replacement(examples, attempt) for attempt in range(1, 9)])
    assert ((found < 37) == (examples < 37)).all() and (found != examples).mean() > 0.8
    assert len(np.unique(found)) > 0.9 * len(source)


def test_fingerprint_depends_on_the_weights_and_not_on_the_order_of_names(config, source):
    other = {name: dataclasses.replace(one, weight=one.weight + 1) for name, one in config.mixture.items()}
    turned = dict(reversed(config.mixture.items()))
    fingerprints = [
        data.make_source(dataclasses.replace(config, mixture=mixture)).fingerprint() for mixture in (turned, other)
    ]
    assert fingerprints[0] == source.fingerprint() != fingerprints[1]


@pytest.mark.parametrize(
    ("weights", "batch", "expected"),
    [
        ((1.0, 1.0, 1.0), 32, (11, 11, 10)),
        ((0.999, 0.001), 32768, (32736, 32)),  # pairs
        ((0.9, 0.1), 4096, (3680, 416)),  # multiples of 16
        ((2.0, 2.0), 2, (1, 1)),
    ],
)
def test_rows_are_the_weights_shares(weights, batch, expected):
    rows = mixture.rows_of_datasets(dict(zip("abc", weights, strict=False)), batch)
    assert tuple(rows.values()) == expected and sum(expected) == batch


def test_rows_and_epochs_are_logged(source, caplog):
    with caplog.at_level(logging.INFO):
        source.order(0, BATCH)
    assert caplog.messages == [
        "made: 8 of 24 rows of a batch, 4.6 steps an epoch",
        "shards: 16 of 24 rows of a batch, 10.2 steps an epoch",
    ]


def test_mixtures_that_cannot_be_are_refused(config):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            data.make_source(dataclasses.replace(config, **changes))

    refused("data.files='x.tar', and data.mixture has datasets; give it in one of them", files="x.tar")
    missing = {"a": DatasetConfig(files="/nowhere/*.tar")}
    refused(r"data.mixture.a: .*/nowhere", mixture=missing)
    with pytest.raises(ValueError, match=r"data.mixture.a: .*/nowhere"):
        data.check_files(DataConfig(mixture=missing))
    with pytest.raises(ValueError, match=r"shards.weight=1 of 101 is no row of a batch of 8; give a larger weight"):
        mixture.rows_of_datasets({"shards": 1.0, "other": 100.0}, 8)


def test_flags_change_a_dataset(config):
    values = {"data": {"mixture": {"a": {"source": "synthetic", "weight": 3}}}, "train": {"batch_size": 8}}
    parsed = from_config_dict(values)
    assert parsed.data.mixture == {"a": DatasetConfig(source="synthetic", weight=3.0)}
    assert dry_run._data(parsed) == "a: 8 rows of a batch of synthetic"
