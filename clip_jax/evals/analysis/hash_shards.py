"""Perceptual hashes of a training source's TFRecord shards, on many machines by Apache Beam.

Output: one file per shard, uint64[m] of the hashes of its records in the order of `data.sources.tfrecord`, NO_HASH for
records without one. A worker processes a whole shard: `beam.io.ReadAllFromTFRecord` does not return record numbers and
stops at the first damaged record of a shard. Shards whose output exists are skipped.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt64

from clip_jax.evals.analysis.near_duplicates import NO_HASH, NO_MATCH, perceptual_hash

log = logging.getLogger(__name__)

SUFFIX = ".hashes.npy"


def hash_shards(files: Sequence[str], output_dir: str, options: Sequence[str] | None = ()) -> None:
    """Hash the images of TFRecord shards into `output_dir`, one file per shard.

    Args:
      options: flags of Beam, such as ['--runner=DataflowRunner', '--project=…']; () runs on this machine; None hashes
        one shard after another without Beam.

    Raises ImportError if Apache Beam is not installed, and ValueError if two shards have the same file name.
    """
    names = Counter(os.path.basename(path) for path in files)
    if duplicates := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"several shards are named {duplicates[0]!r}, and would share one output file: use an output_dir for each "
            "folder of shards"
        )
    epath.Path(output_dir).mkdir(parents=True, exist_ok=True)
    remaining = [path for path in files if not _output_path(path, output_dir).exists()]
    log.info("%d of %d shards are hashed already", len(files) - len(remaining), len(files))
    if options is None:
        for path in remaining:
            hash_shard(path, output_dir)
    elif remaining:
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise ImportError("hash_shards requires Apache Beam: pip install apache-beam") from error
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            # Reshuffle: otherwise Beam fuses both steps, and one worker gets all shards.
            _ = pipeline | beam.Create(remaining) | beam.Reshuffle() | beam.Map(hash_shard, output_dir)


def hash_shard(path: str, output_dir: str) -> None:
    """Hash the images of one shard. The output file is written atomically."""
    from clip_jax.data.sources.tfrecord import TFRecordSource  # TensorFlow

    try:
        source = TFRecordSource([path], captions=(), cache_dir="")
    except ValueError as error:  # a shard without records, which training skips too if other shards have some
        log.warning("%s", error)
        source = ()
    hashes = np.full(len(source), NO_HASH)
    for index in range(len(source)):
        try:
            hashes[index] = perceptual_hash(source.read(index).image)
        except ValueError as error:  # or its subclass BadRecord
            log.info("%s has no hash: %s", source.key(index), error)
    output = _output_path(path, output_dir)
    partial = output.with_name(output.name + f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, hashes)
    partial.replace(output)


def read_hashes(output_dir: str) -> dict[str, UInt64[np.ndarray, "m"]]:
    """Return the hashes of every shard by its file name, sorted."""
    hashes = {}
    for path in sorted(epath.Path(output_dir).glob("*" + SUFFIX), key=lambda path: path.name):
        with path.open("rb") as file:
            hashes[path.name.removesuffix(SUFFIX)] = np.load(file)
    if not hashes:
        raise ValueError(f"{output_dir} has no file *{SUFFIX}: write them by hash_shards(files, {output_dir!r})")
    return hashes


def record_name(hashes: Mapping[str, UInt64[np.ndarray, "m"]], row: int) -> str | None:
    """Return 'shard#record' of a row over all shards, None for NO_MATCH."""
    if row == NO_MATCH:
        return None
    sizes = [len(shard) for shard in hashes.values()]
    ends = np.cumsum(sizes)
    if not 0 <= row < ends[-1]:
        raise IndexError(f"row {row} of {ends[-1]}")
    shard = int(np.searchsorted(ends, row, side="right"))
    return f"{list(hashes)[shard]}#{row - (ends[shard] - sizes[shard])}"


def _output_path(path: str, output_dir: str) -> epath.Path:
    return epath.Path(output_dir) / (os.path.basename(path) + SUFFIX)
