"""Hashes of a training source's TFRecord shards on many machines, by Apache Beam, for a search for near-duplicates.

    hash_shards(expand("/data/cc3m/{00000..00331}.tfrecord"), "/data/cc3m-hashes", ["--runner=DirectRunner"])
    hashed = read_hashes("/data/cc3m-hashes")
    distances, rows = nearest_hash(hash_pictures(eval_pictures), hashed.values())
    names = [place(hashed, row) for row in rows]                                     # '00017.tfrecord#412'

One file for each shard: uint64[m], in which entry i is the hash of record i as `data.sources.tfrecord` counts them, 0
where it has none. A worker takes a whole shard, since `beam.io.ReadAllFromTFRecord` doesn't say which record it reads
and gives a shard up at its first damaged one. A shard whose file is there is not hashed again.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt64

from clip_jax.evals.analysis.duplicates import NOTHING, UNUSABLE, perceptual_hash

logger = logging.getLogger(__name__)

SUFFIX = ".hashes.npy"


def hash_shards(files: Sequence[str], output_dir: str, options: Sequence[str] | None = ()) -> None:
    """Hash the pictures of TFRecord shards into `output_dir`, one file for each shard.

    options: Beam's own flags, such as ['--runner=DataflowRunner', '--project=…']; its default runs on this machine.
      None: without Beam, one shard after another.

    Raises: ImportError without Apache Beam; ValueError where two shards have the same name.
    """
    names = Counter(os.path.basename(path) for path in files)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"several shards are called {twice[0]!r}, and their hashes would be one file: give each folder of shards "
            "an output_dir of its own"
        )
    epath.Path(output_dir).mkdir(parents=True, exist_ok=True)
    left = [path for path in files if not _output(path, output_dir).exists()]
    logger.info("%d of %d shards are hashed already", len(files) - len(left), len(files))
    if options is None:
        for path in left:
            hash_shard(path, output_dir)
    elif left:
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise ImportError("hash_shards needs Apache Beam: pip install apache-beam") from error
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            # Reshuffle: otherwise Beam fuses both steps, and one worker gets every shard.
            _ = pipeline | beam.Create(left) | beam.Reshuffle() | beam.Map(hash_shard, output_dir)


def hash_shard(path: str, output_dir: str) -> None:
    """Hash one shard's pictures. The file appears when it is complete, and not before."""
    from clip_jax.data.sources.tfrecord import TFRecordSource  # TensorFlow

    try:
        source = TFRecordSource([path], captions=(), cache_dir="")
    except ValueError as error:  # no records: none in training either, where other shards have some
        logger.warning("%s", error)
        source = ()
    hashes = np.full(len(source), UNUSABLE)
    for index in range(len(source)):
        try:
            hashes[index] = perceptual_hash(source.read(index).image)
        except ValueError as error:  # BadRecord too
            logger.info("%s has no hash: %s", source.key(index), error)
    output = _output(path, output_dir)
    partial = output.with_name(output.name + f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, hashes)
    partial.replace(output)


def read_hashes(output_dir: str) -> dict[str, UInt64[np.ndarray, "m"]]:
    """Return the hashes of every shard by its name, in the order of names.

    Raises: ValueError if there are none.
    """
    paths = sorted(epath.Path(output_dir).glob("*" + SUFFIX), key=lambda path: path.name)
    if not paths:
        raise ValueError(f"{output_dir} has no file *{SUFFIX}: hash_shards(files, {output_dir!r}) writes them")
    hashed = {}
    for path in paths:
        with path.open("rb") as file:
            hashed[path.name.removesuffix(SUFFIX)] = np.load(file)
    return hashed


def place(hashed: Mapping[str, UInt64[np.ndarray, "m"]], row: int) -> str | None:
    """Return 'shard#record' of a row over all shards, or None for the row of no near-duplicate."""
    if row == NOTHING:
        return None
    ends = np.cumsum([len(hashes) for hashes in hashed.values()])
    if not 0 <= row < ends[-1]:
        raise IndexError(f"row {row} of {ends[-1]}")
    shard = int(np.searchsorted(ends, row, side="right"))
    return f"{list(hashed)[shard]}#{row - (ends[shard] - len(list(hashed.values())[shard]))}"


def _output(path: str, output_dir: str) -> epath.Path:
    return epath.Path(output_dir) / (os.path.basename(path) + SUFFIX)
