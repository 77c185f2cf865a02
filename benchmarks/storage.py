"""Reading training shards from an object store that is simulated on the loopback: `make bench-storage`.

The store is another process that answers each request after 80 ms, and fails 2 % of them (429, 503, cut connections).
Printed: records per second that are fetched, with and without failures; bytes fetched per byte used; requests per
second of 64 simulated hosts at the rate of the fastest; start and positions of an index of two billion records;
records per second of TFRecord and tar that two threads read from local disk, check, parse and tokenize, of which the
last line has the lower. See docs/performance.md.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import object_store  # noqa: E402

RECORD_BYTES, RECORDS, SHARDS = 33_000, 12_000, 12
LATENCY, FAILURES = 0.08, 0.02
BATCH, LANES = 512, 8
HOST_IMAGES_PER_SECOND = 99_000  # ViT-B/32 on a v6e host of 8 chips
BILLIONS = 50_000, 40_000, 20  # shards, records of each, blocks of each
WORDS = (
    "a photo of the dog cat running on green grass under blue sky with two children playing near an old stone bridge"
)


class _Large:
    """Stands for the content of a shard of 1.3 GB."""

    def __len__(self) -> int:
        return BILLIONS[1] * RECORD_BYTES

    def __getitem__(self, index: slice) -> bytes:
        return b""


def serve(pipe, folder: str, fraction: float, billions: bool) -> None:
    """Serve the shards of a folder until the parent closes the pipe."""
    objects = {f"bucket/{path.name}": path.read_bytes() for path in pathlib.Path(folder).iterdir()}
    if billions:
        objects |= {f"bucket/set/{number:05d}.tfrecord": _Large() for number in range(BILLIONS[0])}
    with object_store.serve(objects, LATENCY) as store:
        store.fail_randomly(fraction)
        pipe.send(store.url)
        while pipe.recv() == "counts":
            pipe.send((store.requests, store.bytes))


class Server:
    """The store in a process of its own, which shares no interpreter lock with the reader."""

    def __init__(self, folder: str, fraction: float = 0.0, billions: bool = False):
        self._pipe, child = multiprocessing.get_context("spawn").Pipe()
        arguments = (child, folder, fraction, billions)
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        url = self._pipe.recv()
        os.environ |= {name: value.format(url=url) for name, value in object_store.ENVIRONMENT.items()}
        from clip_jax.data import storage

        storage._store.cache_clear()

    def counts(self) -> tuple[int, int]:
        self._pipe.send("counts")
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send("end")
        self._process.join()


def write_shards(folder: str, kind: str) -> None:
    """Write shards with all features of img2dataset, as TFRecord or tar."""
    from clip_jax.data import write_tfrecord

    rng, words = np.random.default_rng(0), WORDS.split()
    for shard in range(SHARDS):
        rows = (_row(rng, words, f"{shard:05d}{number:04d}") for number in range(RECORDS // SHARDS))
        if kind == "tfrecord":
            write_tfrecord(f"{folder}/{shard:05d}.tfrecord", ({"jpg": image, **fields} for image, fields in rows))
            continue
        with tarfile.open(f"{folder}/{shard:05d}.tar", "w") as archive:
            for image, fields in rows:
                text, metadata = fields["txt"].encode(), json.dumps(fields).encode()
                for ending, content in (("jpg", image), ("json", metadata), ("txt", text)):
                    member = tarfile.TarInfo(f"{fields['key']}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def _row(rng: np.random.Generator, words: list[str], key: str) -> tuple[bytes, dict[str, str | int]]:
    text = " ".join(rng.choice(words, 10))
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 256)
    texts = {"key": key, "txt": text, "caption": text, "url": f"https://example.com/{key}.jpg", "status": "success"}
    image = rng.bytes(RECORD_BYTES - 900)
    return image, {**texts, **sizes, "error_message": "", "exif": "{}", "sha256": rng.bytes(32).hex()}


def fetch(folder: str, fraction: float) -> str:
    """Print the rate of an epoch of records, without parsing; return a hash of the records in their order."""
    from clip_jax import data
    from clip_jax.config import DataConfig
    from clip_jax.data.pipeline import _Prefetch
    from clip_jax.data.sources.blocks import place

    server = Server(folder, fraction)
    config = DataConfig(files="gs://bucket/{00000..00011}.tfrecord", cache_dir=folder, options={"lanes": LANES})
    source = data.make_source(config)
    order = source.order(0, BATCH)
    prefetch = _Prefetch(source, order, slice(0, BATCH))
    before, start, seen, content = server.counts(), time.monotonic(), 0, hashlib.sha256()
    for step in range(RECORDS // BATCH):
        prefetch(step)
        for index in order(np.arange(step * BATCH, (step + 1) * BATCH))[1].tolist():
            record = source._read(*place(source._starts, index))
            seen += len(record)
            content.update(index.to_bytes(8) + record[:64])
    seconds, after = time.monotonic() - start, server.counts()
    records, fetched = RECORDS // BATCH * BATCH, after[1] - before[1]
    print(
        f"fetch from a store of {LATENCY * 1000:.0f} ms, {fraction:.0%} of the requests fail:"
        f" {records / seconds:,.0f} records/s, {seen / seconds / 1e6:.0f} MB/s,"
        f" {after[0] - before[0]} requests, bytes fetched / used {fetched / seen:.2f}",
        flush=True,
    )
    server.close()
    return content.hexdigest()


def parse(folder: str, kind: str) -> float:
    """Return the records a second that two threads read from disk, check, parse and tokenize; the best of 4 epochs."""
    from clip_jax import data
    from clip_jax.config import DataConfig
    from clip_jax.data import pipeline
    from clip_jax.tokenizers import ClipBPE

    options = {"order": "blocks", "lanes": LANES}
    config = DataConfig(files=f"{folder}/*.{kind}", cache_dir=folder, options=options)
    source, tokenizer = data.make_source(config), ClipBPE(length=77)
    order = source.order(0, BATCH)
    filters = pipeline.Filters(config, source, order)
    prefetch = pipeline._Prefetch(source, order, slice(0, BATCH))
    rates = []
    with ThreadPoolExecutor(2) as threads, ThreadPoolExecutor(pipeline.READ_THREADS) as pool:

        def chunk(number: int) -> None:
            positions = np.arange(number * pipeline.CHUNK, (number + 1) * pipeline.CHUNK)
            epochs, ids = order(positions)
            prefetch(int(positions[0]) // BATCH)
            pipeline._fetch(source, tokenizer, config, 0, data.Activity(), pool, filters, ids, epochs)

        chunks = RECORDS // pipeline.CHUNK
        for epoch in range(4):
            start = time.monotonic()
            list(threads.map(chunk, range(epoch * chunks, (epoch + 1) * chunks)))
            rates.append(chunks * pipeline.CHUNK / (time.monotonic() - start))
    listed = ", ".join(f"{rate:,.0f}" for rate in rates)
    print(f"read {kind} from disk, check, parse, tokenize: {listed} records/s", flush=True)
    return max(rates)


def billions(folder: str) -> None:
    """Print the start from an index of two billion records, and some positions."""
    from clip_jax import data
    from clip_jax.config import DataConfig
    from clip_jax.data import index, storage

    shards, records, blocks = BILLIONS
    server = Server(folder, billions=True)
    files = storage.list_files(f"gs://bucket/set/{{00000..{shards - 1:05d}}}.tfrecord")
    size = records * RECORD_BYTES
    starts, counts = np.arange(blocks) * (size // blocks), np.full(blocks, records // blocks)
    built = index.Index([index.Shard(file, starts, counts, size, "", "") for file in files])
    index._write(f"gs://bucket/set/{index.NAME}", "gs://bucket/set", built, data.TFRecordSource.format)
    before = server.counts()
    config = DataConfig(files=f"gs://bucket/set/{{00000..{shards - 1:05d}}}.tfrecord", cache_dir="")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(start_from_index, (config,)), f"{server.counts()[0] - before[0]} requests", flush=True)
    source = data.make_source(config)
    batch, last = 32_768, len(source) // 32_768 - 1
    expected = {}
    for hosts, step in itertools.product((8, 3, 5, 64), (1, 300_000, last)):
        start = time.monotonic()
        order = source.order(0, batch)
        edges = np.linspace(0, batch, hosts + 1).astype(int)
        ids = [order(step * batch + np.arange(first, end))[1] for first, end in itertools.pairwise(edges)]
        joined = np.concatenate(ids)
        assert np.array_equal(joined, expected.setdefault(step, joined))
        print(
            f"  {hosts} hosts resume at step {step:,}: the same ids, {(time.monotonic() - start) / hosts:.2f} s a host"
        )
    server.close()


def simulated(records: int, steps: range, hosts: range, batch: int = 32_768) -> None:
    """Print the requests and bytes of some of 64 hosts that read blocks of 2,000 records, without data."""
    import simulated_hosts

    from clip_jax.data.order import BlockOrder
    from clip_jax.data.sources.shards import LANES, WINDOW_BLOCKS

    size = BILLIONS[1] // BILLIONS[2]
    ordered = BlockOrder(np.full(records // size, size), 0, batch, LANES, WINDOW_BLOCKS * size)
    found = simulated_hosts.requested_blocks(ordered, batch, 64, steps, hosts)
    examples = np.concatenate([examples for _, examples in found.values()])
    assert len(np.unique(examples)) == min(len(examples), records)  # none missing, none twice in an epoch
    ratios = np.array([len(requests) * size / len(examples) for requests, examples in found.values()])
    requests = ratios * HOST_IMAGES_PER_SECOND / size
    print(
        f"{len(hosts)} of 64 hosts, steps {steps[0]:,} to {steps[-1]:,} of {records:,} records, simulated:"
        f" bytes fetched / used {ratios.max():.3f} at most; at {HOST_IMAGES_PER_SECOND:,} images/s a host"
        f" {requests.max():.1f} requests/s",
        flush=True,
    )


def start_from_index(config) -> str:
    """Open the source as the first thing of a process; return the seconds and the memory."""
    from clip_jax import data

    memory, start = _resident(), time.monotonic()
    source = data.make_source(config)
    source.fingerprint()
    source.order(0, 32_768)(np.arange(32_768))
    return (
        f"start with {len(source):,} records in {config.files}: {time.monotonic() - start:.1f} s,"
        f" {_resident():.2f} GB in all, {_resident() - memory:.2f} GB of it for the source,"
    )


def _resident() -> float:
    statm = pathlib.Path("/proc/self/statm").read_text().split()
    return int(statm[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, "tfrecord")
        contents = [fetch(folder, fraction) for fraction in (0.0, FAILURES)]
        assert contents[0] == contents[1]
        print("with failures the same records in the same order, none lost", flush=True)
        simulated(2_000_000_000, range(300_000, 302_000), range(0, 64, 16))
        simulated(12_400_000, range(379), range(64))  # an epoch
        billions(folder)
        write_shards(folder, "tar")
        rate = min(parse(folder, kind) for kind in ("tfrecord", "tar"))
    print(f"result: {rate:,.0f} records/s")


if __name__ == "__main__":
    main()
