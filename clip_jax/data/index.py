"""The index of a dataset of shards: where their blocks of records are, a few megabytes for billions of records.

A block is a run of whole records of one shard. The index is an Arrow file, one row per shard, memory-mapped when local:

* `clip_jax_index.arrow` in the folder of the shards, written by `python -m clip_jax.index` for all hosts, or
* a file of `data.cache_dir`, for local shards and stores that can't be written.

The first run without an index writes one.

Shards of which size or version differ from the index are read again.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from clip_jax.data import storage
from clip_jax.data.storage import File
from clip_jax.paths import is_url, write_atomically

log = logging.getLogger(__name__)

NAME = "clip_jax_index.arrow"
WRITABLE = ("gs://", "s3://", "az://")
VERSION = "1"
SCAN_THREADS = 16
SHARDS_PER_WRITE = 1000  # of an index that is being built
READ_BYTES = 16 * 2**20  # of a shard in a store at a time, while its records are counted
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 2**20, 2**26
BLOCKS = 4096  # aimed at in small datasets, so that lanes have many

Read = Callable[[int, int], bytes]  # a file's bytes from an offset to another, fewer at its end


@dataclasses.dataclass(frozen=True)
class Scan:
    """The records of a shard or of a part of it."""

    offsets: Int64[np.ndarray, "n"]  # of each record, and the end of the last
    content: str  # hash of names, lengths and checksums in the file
    problem: str  # why the records end before the file does; '' if they don't


@runtime_checkable
class Format(Protocol):
    """How records follow each other in a shard."""

    name: str

    def scan(self, read: Read, start: int, stop: int) -> Scan:
        """Return the records between two offsets, of which the first is that of a record."""

    def offsets(self, block: bytes) -> Int64[np.ndarray, "n"] | None:
        """Return the offsets of a block's records and of its end, without checksums; None if they don't fit."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file's records by blocks."""

    file: File
    starts: Int64[np.ndarray, "b"]  # offset of each block
    records: Int64[np.ndarray, "b"]  # number of records of each block
    stop: int  # offset of the end of the last record
    content: str
    problem: str


class Index:
    """The blocks of all shards, in the shards' order."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        counts = [len(shard.starts) for shard in shards]
        self.shard_of = np.repeat(np.arange(len(shards)), counts)  # by block
        self.start = np.concatenate([np.zeros(0, np.int64), *(shard.starts for shard in shards)])
        self.records = np.concatenate([np.zeros(0, np.int64), *(shard.records for shard in shards)])
        ends = [np.append(shard.starts[1:], shard.stop)[: len(shard.starts)] for shard in shards]
        self.stop = np.concatenate([np.zeros(0, np.int64), *ends])

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sizes, counts and contents in order; independent of their folder."""
        digest = hashlib.sha256()
        for shard in self.shards:
            name, size = os.path.basename(shard.file.path), shard.file.size
            digest.update(f"{name} {size} {int(shard.records.sum())} {shard.content}\n".encode())
        return digest.hexdigest()[:16]


def open_index(files: Sequence[File], format: Format, cache_dir: str, max_stall_seconds: float = 600.0) -> Index:
    """Return the index of shards, from the file in their folder or the cache; other shards are read and indexed.

    Args:
      files: the shards, in order.
      cache_dir: local folder for an index; '' for none.
    """
    folder, cached = _folder(files), _cached(files, cache_dir)
    known = _load(f"{folder}/{NAME}", folder, format) | (_load(str(cached), folder, format) if cached else {})
    index, scanned = build(files, format, known, max_stall_seconds)
    if scanned:
        shared = [f"{folder}/{NAME}"] if folder.startswith(WRITABLE) else []
        for path in (*shared, *([str(cached)] if cached else [])):
            try:
                _write(path, folder, index, format)
                break
            except (OSError, ValueError) as error:  # disk full or read-only; a folder of that name
                log.warning("%s: index not cached: %s", path, error)
    return index


def write_index(
    files: Sequence[File],
    format: Format,
    max_stall_seconds: float = 600.0,
    beam_options: Sequence[str] | None = None,
) -> tuple[Index, str]:
    """Index shards in a file in their folder, without reading unchanged ones again; return the index and its path.

    The file is written every SHARDS_PER_WRITE shards, so that an interrupted command is continued by the next.

    Args:
      beam_options: flags of Apache Beam, whose workers index the shards, such as ['--runner=DataflowRunner'].
    """
    folder = _folder(files)
    path = f"{folder}/{NAME}"
    known = _load(path, folder, format)
    if beam_options:
        _scan_with_beam(files, format, known, path, max_stall_seconds, beam_options)
        known = _load(path, folder, format)
    for end in range(0, len(files), SHARDS_PER_WRITE):
        index, scanned = build(files[: end + SHARDS_PER_WRITE], format, known, max_stall_seconds)
        known |= {_absolute(shard.file.path): shard for shard in index.shards}
        if scanned or len(known) != len(files):
            _write(path, folder, index, format)
    return index, path


def build(
    files: Sequence[File], format: Format, known: dict[str, Shard], max_stall_seconds: float
) -> tuple[Index, list[Shard]]:
    """Return the index of shards and those of them that had to be read, because `known` lacks them or they changed."""
    stored = [known.get(_absolute(file.path)) for file in files]
    fresh = [_is_fresh(old, file) for old, file in zip(stored, files, strict=True)]
    new = [file for file, is_fresh in zip(files, fresh, strict=True) if not is_fresh]
    _announce(new, [old for old, ok in zip(stored, fresh, strict=True) if old and not ok], len(files))
    block_bytes = block_size(sum(file.size for file in files))
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scan = functools.partial(_scan, format=format, block_bytes=block_bytes, max_stall_seconds=max_stall_seconds)
        scanned = list(_with_progress(pool.map(scan, new), new))
    _check_counts(scanned)
    found = iter(scanned)
    shards = [
        dataclasses.replace(old, file=file) if ok else next(found)
        for old, ok, file in zip(stored, fresh, files, strict=True)
    ]
    return Index(shards), scanned


def _check_counts(shards: Sequence[Shard]) -> None:
    """Warn of shards that have another number of records than wids' index or img2dataset's `<shard>_stats.json` states.

    They have no offsets, so the records are counted nevertheless (`successes`, img2dataset/logger.py).
    """
    for shard in shards:
        expected, count = shard.file.records, int(shard.records.sum())
        if expected not in (None, count):
            log.warning(
                "%s: expected %s records, as the index of wids has it, got %d", shard.file.path, expected, count
            )
    for folder in {os.path.dirname(shard.file.path) for shard in shards}:
        if is_url(folder) and not folder.startswith(WRITABLE):  # a web server has no listing
            continue
        base = folder if is_url(folder) else glob.escape(folder or ".")
        try:
            listed = {os.path.basename(file.path): file.path for file in storage.list_files(f"{base}/*_stats.json")}
        except (ValueError, OSError):  # there are none
            continue
        for shard in shards:
            at, name = os.path.split(shard.file.path)
            path = listed.get(f"{name.partition('.')[0]}_stats.json", "")
            if at != folder or not path:
                continue
            try:
                expected = json.loads(storage.read_file(path))["successes"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s: expected img2dataset's statistics: %s", path, error)
                continue
            if expected != (count := int(shard.records.sum())):
                log.warning("%s: expected %s records, as %s has it, got %d", shard.file.path, expected, path, count)


def _is_fresh(old: Shard | None, file: File) -> bool:
    return old is not None and (old.file.size, old.file.version) == (file.size, file.version)


def _scan_with_beam(
    files: Sequence[File],
    format: Format,
    known: dict[str, Shard],
    path: str,
    max_stall_seconds: float,
    options: Sequence[str],
) -> None:
    """Write the index of known and new shards, in any order. Workers read the shards; one of them writes."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError("--beam_options needs Apache Beam: pip install apache-beam") from error
    stored = [(file, known.get(_absolute(file.path))) for file in files]
    fresh = [dataclasses.replace(old, file=file) for file, old in stored if _is_fresh(old, file)]
    new = [file for file, old in stored if not _is_fresh(old, file)]
    block_bytes, folder = block_size(sum(file.size for file in files)), os.path.dirname(path)
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # Reshuffle: otherwise Beam fuses the steps, and one worker gets all shards.
        shards = pipeline | beam.Create(new) | beam.Reshuffle()
        shards |= beam.Map(_scan, format, block_bytes, max_stall_seconds)
        _ = (
            shards
            | beam.combiners.ToList()
            | beam.Map(lambda scanned: _write(path, folder, Index([*fresh, *scanned]), format))
        )


def block_size(total_bytes: int) -> int:
    """Return a power of two that divides a dataset into some thousands of blocks, of at most 64 MiB."""
    return int(np.clip(2 ** round(np.log2(max(1, total_bytes) / BLOCKS)), MIN_BLOCK_BYTES, MAX_BLOCK_BYTES))


def _scan(file: File, format: Format, block_bytes: int, max_stall_seconds: float) -> Shard:
    read = functools.partial(storage.read_range, file.path, max_stall_seconds=max_stall_seconds)
    scan = format.scan(_buffered(read) if is_url(file.path) else read, 0, file.size)
    offsets = scan.offsets[:-1]
    firsts = np.flatnonzero(np.diff(offsets // block_bytes, prepend=-1))
    records = np.diff(firsts, append=len(offsets))
    return Shard(file, offsets[firsts], records, int(scan.offsets[-1]), scan.content, scan.problem)


def _buffered(read: Read) -> Read:
    """Return a reader of small ranges in ascending order, which reads large ones from the store."""
    begin, buffer = 0, b""

    def buffered(start: int, stop: int) -> bytes:
        nonlocal begin, buffer
        if not begin <= start <= stop <= begin + len(buffer):
            begin, buffer = start, read(start, max(stop, start + READ_BYTES))
        return buffer[start - begin : stop - begin]

    return buffered


def _announce(new: Sequence[File], changed: Sequence[Shard], files: int) -> None:
    if changed:
        names = ", ".join(shard.file.path for shard in changed[:3])
        log.warning("%d shards changed since they were indexed and are indexed again: %s", len(changed), names)
    if remote := [file for file in new if is_url(file.path)]:
        gigabytes = sum(file.size for file in remote) / 1e9
        log.warning(
            "%d of %d shards have no index: %.1f GB are read to count their records; in advance:"
            " python -m clip_jax.index DATA",
            len(remote),
            files,
            gigabytes,
        )


def _with_progress(shards: Iterable[Shard], files: Sequence[File]) -> Iterator[Shard]:
    began = last = time.monotonic()
    for number, shard in enumerate(shards, 1):
        yield shard
        if time.monotonic() - last > 10:
            last = time.monotonic()
            left = (last - began) / number * (len(files) - number)
            log.info("indexed %d of %d shards, %.0f s left", number, len(files), left)


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _folder(files: Sequence[File]) -> str:
    """Return the deepest folder that has all files; '' for several stores."""
    paths = [_absolute(file.path) for file in files]
    folder = os.path.dirname(paths[0]).rstrip("/")
    while folder and not all(path.startswith(f"{folder}/") for path in paths):
        folder = os.path.dirname(folder).rstrip("/")
    return folder


def _cached(files: Sequence[File], cache_dir: str) -> Path | None:
    """Return the index of these paths in the cache."""
    name = hashlib.sha256("\n".join(_absolute(file.path) for file in files).encode()).hexdigest()[:32]
    return Path(cache_dir).expanduser() / "index" / f"{name}.arrow" if cache_dir else None


_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("stop", pa.int64()),
        ("content", pa.string()),
        ("problem", pa.string()),
        ("starts", pa.list_(pa.int64())),
        ("records", pa.list_(pa.int64())),
    ]
)


def _write(path: str, folder: str, index: Index, format: Format) -> None:
    names = (_absolute(shard.file.path)[len(folder) + 1 :] for shard in index.shards)
    rows = [
        (name, s.file.size, s.file.version, s.stop, s.content, s.problem, s.starts, s.records)
        for name, s in zip(names, index.shards, strict=True)
    ]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), _SCHEMA.types, strict=True)]
    schema = _SCHEMA.with_metadata({"version": VERSION, "format": format.name})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema))
    content = sink.getvalue()
    if path.startswith(WRITABLE):
        storage.write_file(path, content.to_pybytes())
    else:
        write_atomically(path, lambda file: file.write(content))


def _load(path: str, folder: str, format: Format) -> dict[str, Shard]:
    """Return the shards of an index by path, of which it has the part below `folder`; none if missing or damaged."""
    try:
        source = pa.BufferReader(storage.read_file(path)) if is_url(path) else pa.memory_map(path)
        table = pa.ipc.open_file(source).read_all()
        if table.schema.metadata != {b"version": VERSION.encode(), b"format": format.name.encode()}:
            raise ValueError(f"expected version {VERSION} and format {format.name}, got {table.schema.metadata}")
        return {f"{folder}/{shard.file.path}": shard for shard in _shards(table)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("%s: damaged, indexed again: %s", path, error)
        return {}


def _shards(table: pa.Table) -> Iterator[Shard]:
    table = table.combine_chunks()
    columns = {name: table[name].to_pylist() for name in ("name", "size", "version", "stop", "content", "problem")}
    blocks = {}
    for name in ("starts", "records"):
        column = pa.concat_arrays(table[name].chunks) if table.num_rows else pa.array([], pa.list_(pa.int64()))
        blocks[name] = column.offsets.to_numpy(), column.values.to_numpy()
    ends, starts = blocks["starts"]
    records = blocks["records"][1]
    if len(starts) != len(records) or not np.array_equal(ends, blocks["records"][0]):
        raise ValueError("starts and records of blocks differ in number")
    for row, name in enumerate(columns["name"]):
        part = slice(ends[row], ends[row + 1])
        file = File(name, columns["size"][row], columns["version"][row])
        content, problem, stop = (columns[key][row] for key in ("content", "problem", "stop"))
        yield Shard(file, starts[part], records[part], stop, content, problem)
