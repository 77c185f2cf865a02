"""What every source in SOURCES must keep; a line in SOURCES and in CONFIGS is its registration."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from clip_jax import data
from clip_jax.config import DataConfig
from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.typing import BadRecord, DataSource, Record

BATCH = 12


def _tfrecord(folder):
    for shard in range(3):
        records = []
        for i in range(20):
            file = io.BytesIO()
            Image.new("RGB", (9, 9), (10 * i, 80 * shard, 0)).save(file, "PNG")
            records.append({"png": file.getvalue(), "txt": f"picture {i} of {shard}"})
        write_tfrecord(folder / f"{shard:05d}.tfrecord", records)
    return DataConfig(source="tfrecord", files=f"{folder}/*.tfrecord", cache_dir=str(folder))


# How to set each source up in an empty folder, or in one that the session shares.
CONFIGS = {
    "tfrecord": lambda own, shared: _tfrecord(own),
    "emoji": lambda own, shared: DataConfig(source="emoji", cache_dir=str(shared / "emoji-cache")),
    "synthetic": lambda own, shared: DataConfig(source="synthetic", synthetic_examples=60),
}


@pytest.fixture(scope="module", params=data.SOURCES)
def config(request, tmp_path_factory):
    if request.param not in CONFIGS:
        raise AssertionError(f"say in CONFIGS how to set up {request.param!r}: a source without it is not tested")
    return CONFIGS[request.param](tmp_path_factory.mktemp("source"), tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def source(config):
    return data.SOURCES[config.source](config)


class Lengths:
    """A tokenizer that tells a caption's length."""

    vocab_size, length, pad_id, eos_id = 1000, 4, 0, 1

    def __call__(self, texts):
        return np.array([[2, min(len(text) + 3, 999), 1, 0] for text in texts], np.int32)


class Damaged:
    """A source of which every seventh record is bad."""

    def __init__(self, source):
        self._source = source
        self.key, self.fingerprint = source.key, source.fingerprint

    def __len__(self):
        return len(self._source)

    def read(self, index):
        if index % 7 == 3:
            raise BadRecord("damaged for the test")
        return self._source.read(index)


def _take(source, config, count, start_step=0, rows=slice(0, BATCH)):
    batches = data.batches(
        source, Lengths(), config, image_size=8, batch_size=BATCH, seed=3, start_step=start_step, rows=rows
    )
    return list(itertools.islice(batches, count))


def _assert_same(found, expected):
    np.testing.assert_array_equal(found.example_ids, expected.example_ids)
    np.testing.assert_array_equal(found.batch.image, expected.batch.image)
    np.testing.assert_array_equal(found.batch.text, expected.batch.text)


def test_keeps_the_protocol(source):
    assert isinstance(source, DataSource)
    record = source.read(0)
    assert isinstance(record, Record) and record.image and any(any(t) for t in record.captions.values())


def test_is_deterministic(source, config):
    again = data.SOURCES[config.source](config)
    assert len(again) == len(source) and again.fingerprint() == source.fingerprint()
    for index in range(0, len(source), max(1, len(source) // 20)):
        assert again.read(index) == source.read(index)
        assert again.key(index) == source.key(index)


def test_keys_tell_records_apart(source):
    assert len({source.key(index) for index in range(len(source))}) == len(source)


def test_an_index_out_of_range_is_an_error(source):
    with pytest.raises(IndexError):
        source.read(len(source))


def test_resumed_equals_uninterrupted(source, config):
    whole = _take(source, config, 4)
    for found, expected in zip(_take(source, config, 2, start_step=2), whole[2:], strict=True):
        _assert_same(found, expected)


def test_shards_are_disjoint_and_complete(source, config):
    (whole,) = _take(source, config, 1)
    parts = [_take(source, config, 1, rows=slice(4 * host, 4 * host + 4))[0] for host in range(3)]
    ids = np.concatenate([part.example_ids for part in parts])
    assert len(set(ids.tolist())) == BATCH
    np.testing.assert_array_equal(ids, whole.example_ids)
    np.testing.assert_array_equal(np.concatenate([part.batch.image for part in parts]), whole.batch.image)


def test_bad_records_are_counted_and_not_fatal(source, config):
    tolerant = dataclasses.replace(config, max_bad_fraction=1.0)
    intact, damaged = _take(source, config, 4), _take(Damaged(source), tolerant, 4)
    for before, after in zip(intact, damaged, strict=True):
        bad = before.example_ids % 7 == 3
        assert [r.key for r in after.replaced] == [source.key(int(i)) for i in before.example_ids[bad]]
        assert {r.reason for r in after.replaced} <= {"damaged for the test"}
        np.testing.assert_array_equal(after.batch.image[~bad], before.batch.image[~bad])
        assert not (after.example_ids % 7 == 3).any() and after.batch.mask.all()
    assert sum(len(batch.replaced) for batch in damaged) > 0
