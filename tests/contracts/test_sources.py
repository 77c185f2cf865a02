"""Contract of every class in SOURCES, on the records of its `tiny_config`."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from clip_jax import data
from clip_jax.config import DataConfig, DatasetConfig, default_config, from_config_dict
from clip_jax.typing import BadRecord, DataSource, Record

BATCH = 12


class ToySource:
    """A source registered outside the package, with an option of its own."""

    def __init__(self, color):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(file, "PNG")
        self._image = file.getvalue()

    @classmethod
    def from_config(cls, config, color="red"):
        return cls(color)

    @classmethod
    def tiny_config(cls, folder):
        return DataConfig(source="toy", options={"color": "blue"})

    def __len__(self):
        return 60

    def key(self, index):
        return f"toy#{index}"

    def read(self, index):
        if index >= len(self):
            raise IndexError(index)
        return Record(self.key(index), self._image, {"txt": (f"image {index}",)})

    def fingerprint(self):
        return "toy"


class Mixture:
    """A mixture of shards that are read by blocks, and of images that are made one by one."""

    @classmethod
    def tiny_config(cls, folder):
        shards = dataclasses.asdict(data.TFRecordSource.tiny_config(folder))
        shards = DatasetConfig(files=shards["files"], options={"order": "blocks", "lanes": 4}, weight=2.0)
        other = DatasetConfig(source="synthetic", options={"examples": 50})
        return DataConfig(mixture={"shards": shards, "other": other}, cache_dir=str(folder))


SOURCES = data.SOURCES | {"toy": ToySource, "mixture": Mixture}


@pytest.fixture(scope="module", params=SOURCES)
def config(request, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"{request.param}-cache"  # test_data_emoji.py has the same for emoji
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, request.param, SOURCES[request.param])
        yield SOURCES[request.param].tiny_config(folder)


@pytest.fixture(scope="module")
def source(config):
    return data.make_source(config)


class CaptionLengths:
    """A tokenizer that encodes the length of a caption."""

    vocab_size, length, pad_id, eos_id = 1000, 4, 0, 1

    def __call__(self, texts):
        return np.array([[2, min(len(text) + 3, 999), 1, 0] for text in texts], np.int32)


class Damaged:
    """A source in which every seventh record is bad."""

    def __init__(self, source):
        self._source = source
        self.key, self.fingerprint = source.key, source.fingerprint
        if hasattr(source, "order"):  # by blocks
            self.order, self.prefetch = source.order, source.prefetch

    def __len__(self):
        return len(self._source)

    def read(self, index):
        if index % 7 == 3:
            raise BadRecord("damaged for the test")
        return self._source.read(index)


def _take(source, config, count, start_step=0, rows=slice(0, BATCH)):
    batches = data.batches(
        source, CaptionLengths(), config, image_size=8, batch_size=BATCH, seed=3, start_step=start_step, rows=rows
    )
    return list(itertools.islice(batches, count))


def test_source_implements_the_protocol(source, config):
    assert isinstance(source, DataSource) and (config.mixture or config.source in data.SOURCES)
    record = source.read(0)
    assert isinstance(record, Record) and record.image and any(any(t) for t in record.captions.values())


def test_source_is_deterministic(source, config):
    again = data.make_source(config)
    assert len(again) == len(source) and again.fingerprint() == source.fingerprint()
    for index in range(0, len(source), max(1, len(source) // 20)):
        assert again.read(index) == source.read(index)
        assert again.key(index) == source.key(index)


def test_keys_are_unique(source):
    assert len({source.key(index) for index in range(len(source))}) == len(source)


def test_held_out_records_are_apart_from_the_others(source, config):
    try:
        part = data.make_source(dataclasses.replace(config, validation_fraction=0.5))
    except ValueError as error:  # a single file that is read by blocks
        assert "in 1 files, which are held out whole" in str(error)
        return
    found = [
        f"{name}:{held.source.key(index)}" if name else held.source.key(index)
        for name, held in part.held_out.items()
        for index in held
    ]
    trained = [part.key(index) for index in range(len(part))]
    keys = [source.key(index) for index in range(len(source))]
    assert sorted(found + trained) == sorted(keys)
    assert 10 < len(found) < len(source) - 10 and part.read(3) == source.read(keys.index(trained[3]))


def test_index_out_of_range_raises(source):
    with pytest.raises(IndexError):
        source.read(len(source))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 3, 4])
def test_resumed_equals_uninterrupted_on_any_number_of_hosts(source, config, hosts):
    size = BATCH // hosts
    uninterrupted = _take(source, config, 4)
    resumed = [_take(source, config, 2, start_step=2, rows=slice(size * h, size * (h + 1))) for h in range(hosts)]
    for shards, expected in zip(zip(*resumed, strict=True), uninterrupted[2:], strict=True):
        batches = [shard.batch for shard in shards]
        np.testing.assert_array_equal(np.concatenate([shard.example_ids for shard in shards]), expected.example_ids)
        np.testing.assert_array_equal(np.concatenate([batch.image for batch in batches]), expected.batch.image)
        np.testing.assert_array_equal(np.concatenate([batch.text for batch in batches]), expected.batch.text)


@pytest.mark.slow
def test_shards_of_three_hosts_are_disjoint_and_complete(source, config):
    (expected,) = _take(source, config, 1)
    shards = [_take(source, config, 1, rows=slice(4 * host, 4 * host + 4))[0] for host in range(3)]
    ids = np.concatenate([shard.example_ids for shard in shards])
    assert len(set(ids.tolist())) == BATCH
    np.testing.assert_array_equal(ids, expected.example_ids)


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------- sources by name


def test_source_registered_outside_the_package_is_opened_by_name(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "toy", ToySource)
    config = default_config()
    config.data.source, config.data.options = "toy", {"color": "lime"}
    config = from_config_dict(config).data
    (batch,) = _take(data.make_source(config), config, 1)
    assert (batch.batch.image == [0, 255, 0]).all()


def test_contract_fails_for_a_source_that_is_not_deterministic(monkeypatch):
    class Unstable(ToySource):
        colors = iter(["red", "blue"])

        @classmethod
        def from_config(cls, config, color="red"):
            return cls(next(cls.colors))

    monkeypatch.setitem(data.SOURCES, "toy", Unstable)
    config = Unstable.tiny_config(None)
    with pytest.raises(AssertionError):
        test_source_is_deterministic(data.make_source(config), config)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("tfrecords", {}, "data.source='tfrecords' is none of tfrecord, .*did you mean 'tfrecord'"),
        ("synthetic", {"exampels": 5}, "has no option 'exampels'; did you mean 'examples'\\? Its options: examples"),
        ("synthetic", {"examples": 0}, "data.options.examples=0: expected at least 1"),
        ("emoji", {"examples": 5}, "has no option 'examples'; its options: none"),
    ],
)
def test_wrong_source_or_option_raises(source, options, message):
    with pytest.raises(ValueError, match=message):
        data.make_source(DataConfig(source=source, options=options))
