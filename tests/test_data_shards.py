"""Shards in object stores: order, prefetching, faults, and losses in damaged shards."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from clip_jax import data
from clip_jax.config import DataConfig
from clip_jax.data import index, order, pipeline, storage
from clip_jax.data.sources.blocks import place
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.data.sources.tar import TarSource
from clip_jax.data.sources.tfrecord import TFRecordSource, write_tfrecord
from tests import object_store

BATCH, LANES, RECORDS = 24, 8, 600
OPTIONS = {"lanes": LANES, "window_blocks": 2}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Six shards of 100 records."""
    folder, synthetic = tmp_path_factory.mktemp("shards"), SyntheticSource(RECORDS)
    for shard in range(6):
        records = (synthetic.read(number) for number in range(100 * shard, 100 * shard + 100))
        rows = ({"png": r.image, "txt": f"number {100 * shard + i}"} for i, r in enumerate(records))
        write_tfrecord(folder / f"{shard:05d}.tfrecord", rows)
    return {f"bucket/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def store(content, monkeypatch):
    monkeypatch.setattr(index, "MIN_BLOCK_BYTES", 2**11)
    monkeypatch.setattr(index, "BLOCKS", 60)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    storage._store.cache_clear()
    with object_store.serve(dict(content)) as served:
        yield served
    storage._store.cache_clear()


@pytest.fixture
def config(store, tmp_path):
    return DataConfig(files="gs://bucket/*.tfrecord", cache_dir=str(tmp_path), options=OPTIONS)


class Numbers:
    """A tokenizer that encodes the number in a caption."""

    vocab_size, length, pad_id, eos_id = 1000, 3, 0, 1

    def __call__(self, texts):
        return np.array([[2, int(text.split()[-1]), 1] for text in texts], np.int32)


def _batches(config, steps, start=0, hosts=1):
    """Return caption numbers int[steps, BATCH] and example ids of the global batches, read by several hosts."""
    size = BATCH // hosts
    parts = []
    for host in range(hosts):
        source = data.make_source(config)
        rows = slice(size * host, size * (host + 1))
        batches = data.batches(
            source, Numbers(), config, image_size=8, batch_size=BATCH, seed=3, start_step=start, rows=rows
        )
        parts.append([(b.batch.text[:, 1], b.example_ids) for b in itertools.islice(batches, steps)])
    return [np.concatenate([part[step][0] for part in parts]) for step in range(steps)]


def test_every_record_comes_once_an_epoch_and_the_same_on_any_number_of_hosts(config, store):
    steps = 2 * RECORDS // BATCH
    alone = _batches(config, steps)
    for epoch in np.concatenate(alone).reshape(2, RECORDS):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(RECORDS))
    for hosts, start in ((2, 0), (3, 20), (8, 30)):
        found = _batches(config, 10, start, hosts)
        np.testing.assert_array_equal(found, alone[start : start + 10])


def test_faults_lose_no_record_and_change_no_order(config, store):
    expected = _batches(config, 25)
    store.fail_randomly(0.3)
    np.testing.assert_array_equal(_batches(config, 25), expected)


def test_a_host_reads_each_block_about_once(config, store):
    _batches(config, 1)  # the index
    store.bytes = store.requests = 0
    source = data.make_source(config)
    blocks = len(source._index.start)
    batches = data.batches(
        source, Numbers(), config, image_size=8, batch_size=BATCH, seed=3, start_step=0, rows=slice(0, BATCH)
    )
    for _ in itertools.islice(batches, RECORDS // BATCH):
        pass
    epoch = sum(len(shard) for shard in store.objects.values())
    # Blocks that two lanes share are read twice, and the windows of the next epoch have begun.
    assert epoch < store.bytes < 2.2 * epoch and store.requests < 2.2 * blocks + 10


def test_a_resumed_host_reads_the_windows_of_its_step_and_the_next_ones(config, store):
    source, step = data.make_source(config), 1_000_000
    ordered = source.order(3, BATCH)
    store.requests = 0
    pipeline._Prefetch(source, ordered, slice(0, BATCH))(step)
    for example in ordered(np.arange(step * BATCH, (step + 1) * BATCH))[1].tolist():
        source.read(example)
    source._blocks._pool.shutdown()  # waits for the reads that have begun
    windows = ordered.blocks(step, slice(0, BATCH))
    assert len(windows) == 2 * LANES and store.requests == len(set(np.concatenate(windows).tolist())) < 60


def test_rates_are_those_of_the_requests(config, store):
    activity = data.Activity()
    batches = data.batches(
        data.make_source(config),
        *(Numbers(), config),
        **{"image_size": 8, "batch_size": BATCH, "seed": 3, "start_step": 0, "rows": slice(0, BATCH)},
        activity=activity,
    )
    next(batches)
    rates = activity.rates()
    assert 0 < rates["data/storage"] < 1 and 0 < rates["data/tokenizer"] < 1
    assert rates["data/requests_per_second"] > 0 and rates["data/megabytes_per_second"] > 0
    assert activity.rates()["data/failed_requests"] == storage.counters.failures


def test_a_store_that_stays_away_ends_the_run_and_is_no_bad_record(config, store):
    source = data.make_source(config)
    store.failure = lambda request: 503
    source._stall = 0.5
    with pytest.raises(storage.StorageError, match="unreadable for"):
        source.read(0)


def test_bad_records_are_replaced_by_records_of_their_block(config, store):
    name = "bucket/00002.tfrecord"
    shard = bytearray(store.objects[name])
    source = data.make_source(config)
    number = 250
    block = place(source._starts, number)[0]
    store.objects[name] = bytes(shard[:-200]) + bytes([shard[-200] ^ 1]) + bytes(shard[-199:])
    ordered = source.order(3, BATCH)
    assert all(
        place(source._starts, int(ordered.replacement(np.array([number]), attempt)[0]))[0] == block
        for attempt in range(1, 40)
    )
    tolerant = DataConfig(files=config.files, cache_dir=config.cache_dir, options=OPTIONS, max_bad_fraction=0.5)
    numbers = np.concatenate(_batches(tolerant, RECORDS // BATCH))
    assert 299 not in numbers and len(numbers) == RECORDS and len(set(numbers.tolist())) == RECORDS - 1


def test_the_index_is_read_and_the_shards_are_not(config, store, caplog):
    assert "are read to count their records" not in caplog.text
    data.make_source(config)  # writes the index for all
    assert "6 of 6 shards have no index: 0.0 GB are read to count their records" in caplog.text
    files = storage.list_files(config.files)
    built, path = index.write_index(files, TFRecordSource.format)
    assert path == "gs://bucket/clip_jax_index.arrow" and built.records.sum() == RECORDS
    store.bytes = store.requests = 0
    source = data.make_source(DataConfig(files=config.files, cache_dir=""))
    assert len(source) == RECORDS and source.fingerprint() == built.fingerprint()
    assert store.bytes < 20_000 and store.requests == 3  # a listing; size and content of the index
    store.requests = 0
    data.make_source(DataConfig(files="gs://bucket/", cache_dir=""))
    assert store.requests == 3
    assert data.index_files(config.files) == f"{path}: 600 records in 6 shards (tfrecord), {len(built.start)} blocks"
    store.objects["bucket/clip_jax_index.arrow"] = store.objects["bucket/clip_jax_index.arrow"][:-100]
    assert data.make_source(DataConfig(files=config.files, cache_dir="")).fingerprint() == built.fingerprint()


def test_a_changed_shard_is_indexed_again_and_changes_the_fingerprint(config, store, caplog):
    before = data.make_source(config)
    shard = bytearray(store.objects["bucket/00001.tfrecord"])
    shard[20] ^= 1  # of the same size; the fixture's ETag is that of the first bytes
    store.objects["bucket/00001.tfrecord"] = bytes(shard)
    shard[-1] ^= 1
    after = data.make_source(config)
    assert "1 shards changed since they were indexed and are indexed again: 00001.tfrecord" in caplog.text
    assert len(after) == len(before)


@pytest.mark.parametrize("base", ["", "gs://bucket"])
def test_shards_of_a_wids_index_are_read_and_its_counts_compared(content, store, config, caplog, base):
    shards = [{"url": f"{shard:05d}.tfrecord", "nsamples": 100 + shard} for shard in (3, 1, 0)]
    index = {"wids_version": 1, "shardlist": shards} | ({"base_path": base} if base else {})
    place = "other/index.json" if base else "bucket/index.json"
    store.objects[place] = json.dumps(index).encode()
    source = data.make_source(dataclasses.replace(config, files=f"gs://{place}", cache_dir=""))
    assert [source.key(row).rpartition("/")[2] for row in (0, 100, 200)] == [f"0000{i}.tfrecord#0" for i in (0, 1, 3)]
    assert len(source) == 300
    assert "00003.tfrecord: expected 103 records, as the index of wids has it, got 100" in caplog.text
    assert "00001.tfrecord: expected 101" in caplog.text and "00000.tfrecord: expected" not in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{damaged", "expected an index of wids, with a 'shardlist' of 'url' and 'nsamples', got JSONDecodeError"),
        (b'{"files": []}', "expected an index of wids.* got KeyError: 'shardlist'"),
        (b'{"shardlist": [{"url": "9.tar"}]}', "1 of its 1 shards do not exist: gs://bucket/9.tar"),
    ],
)
def test_wrong_wids_indices_are_refused(store, text, message):
    store.objects["bucket/index.json"] = text
    with pytest.raises(ValueError, match=message):
        storage.list_files("gs://bucket/index.json")


def test_wrong_counts_of_img2dataset_are_named(content, store, config, caplog):
    counts = {0: b'{"successes": 100}', 1: b'{"successes": 120}', 2: b"{damaged", 3: b"[]"}
    store.objects |= {f"bucket/{shard:05d}_stats.json": text for shard, text in counts.items()}
    data.make_source(config)
    assert "00001.tfrecord: expected 120 records, as gs://bucket/00001_stats.json has it, got 100" in caplog.text
    damaged = [line for line in caplog.messages if "expected img2dataset's statistics" in line]
    assert len(damaged) == 2 and "00000.tfrecord: expected" not in caplog.text


def test_damaged_shards_beyond_the_limit_are_refused(content, tmp_path):
    for name, shard in content.items():
        (tmp_path / name.split("/")[1]).write_bytes(shard)
    (tmp_path / "00001.tfrecord").write_bytes(b"")
    (tmp_path / "00002.tfrecord").write_bytes(content["bucket/00002.tfrecord"][:5000])
    config = DataConfig(files=f"{tmp_path}/*.tfrecord", cache_dir="")
    with pytest.raises(
        ValueError, match=r"is lost in 2 of 6 shards, more than data.max_bad_fraction=0.01: .* is empty"
    ):
        data.make_source(config)
    (tmp_path / "00003.tfrecord").write_bytes(b"\x1f\x8b\x08" + bytes(100))
    with pytest.raises(ValueError, match=r"00003.tfrecord is compressed by gzip: .* gunzip 00003.tfrecord"):
        data.make_source(config)


def test_tar_shards_are_read_by_blocks_too(store, tmp_path):
    TarSource.tiny_config(tmp_path)
    store.objects |= {f"tars/{path.name}": path.read_bytes() for path in tmp_path.glob("*.tar")}
    config = DataConfig(source="tar", files="s3://tars/*.tar", cache_dir="", options=OPTIONS)
    source, local = data.make_source(config), TarSource(sorted(map(str, tmp_path.glob("*.tar"))), ("txt",), "")
    assert isinstance(source.order(0, BATCH), order.BlockOrder) and isinstance(local.order(0, BATCH), order.RecordOrder)
    assert [source.read(i).captions["txt"] for i in range(60)] == [local.read(i).captions["txt"] for i in range(60)]
    assert source.fingerprint() == local.fingerprint()


def test_an_interrupted_index_is_continued(config, store, monkeypatch):
    monkeypatch.setattr(index, "SHARDS_PER_WRITE", 2)
    scan, scanned = index._scan, []

    def interrupted(file, **options):
        scanned.append(file.path)
        if len(scanned) == 5:
            raise KeyboardInterrupt
        return scan(file, **options)

    monkeypatch.setattr(index, "_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.index_files(config.files)
    assert "600 records in 6 shards" in data.index_files(config.files)
    assert sorted(scanned[:4] + scanned[-2:]) == sorted(set(scanned)) and len(scanned) in (7, 8)
