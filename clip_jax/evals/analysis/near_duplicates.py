"""Near-duplicates of evaluation images in a training source, by embedding or by perceptual hash.

Both searches are exact and take the training source in blocks: memory does not depend on its size. Rows are counted
over all blocks.

The detector of the paper (Radford et al. 2021, appendix C) is a network trained to recognize modified copies, with a
threshold chosen by hand for each dataset. Any image embedding can replace it: inspect pairs near a threshold before
relying on it. The hash requires no network. It finds images that were scaled, recompressed, or slightly changed in
brightness or contrast, but not mirrored, rotated or cropped ones. Images with too little structure for a hash, such as
the black frames that the paper's detector reported as duplicates, are counted in the log and never count as duplicates.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Float64, Int64, UInt64

from clip_jax.config import Preprocess
from clip_jax.evals.ranking import BLOCK_SCORES, unit
from clip_jax.paths import write_atomically
from clip_jax.preprocess import ImageLike, preprocess

log = logging.getLogger(__name__)

HASH_BITS = 64
NO_HASH = np.uint64(0)  # the hash of an image without one
SUFFIX = ".hashes.npy"  # of the files of `hash_shards`
NO_MATCH = -1  # the row of an image without a near-duplicate
# Bits. Copies nearly always differ in 0 to 2 bits, unrelated photos in 32 ± 4. The probability that at most 8 of 63
# random bits differ is 5e-10: by chance one in 5 evaluation images has such a neighbor among 400 million; at most 4
# bits: 7e-14. Drawings on white are more similar: 3 in 1000 pairs of emoji differ in at most 8 bits.
MAX_DISTANCE = 8

_SIDE, _LOW = 32, 8
_PIXELS = Preprocess(interpolation="bilinear", resize="squash")  # Pillow averages over the area when it downsamples
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG
# Gray levels: coefficients within this margin of the median are not above it. In a mirror-symmetric image half of the
# coefficients and the median are 0: without a margin noise determines those bits, and recompression changes them.
# Largest distance of 240 JPEG copies of synthetic symmetric images: 22 bits without a margin, 7 at 2 levels, 2 at 4.
_MARGIN = 4.0
_MIN_COEFFICIENTS = 16  # outside of the margin; 1 in 100 emoji have fewer
_BLOCK = 512  # hashes of each side per step: 512² × 8 bytes = 2 MiB, within the cache of a core


def nearest_similarity(
    eval_nE: Float[np.ndarray, "n E"], blocks: Iterable[Float[np.ndarray, "_ E"]]
) -> tuple[Float32[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return the highest cosine similarity of each evaluation embedding to a training embedding, and its row.

    Embeddings that are zero or not finite are never compared, and the log has their number. Without anything to
    compare, the similarity is NaN and the row -1.
    """
    best_n, row_n = _nearest(
        unit(eval_nE),
        map(unit, blocks),
        lambda x_mE: ~np.isnan(x_mE).any(1),
        lambda queries_qE, train_mE: queries_qE @ train_mE.T,
        math.isqrt(BLOCK_SCORES),
        "an embedding that is zero or not finite",
    )
    return np.where(row_n == NO_MATCH, np.nan, best_n).astype(np.float32), row_n


def _nearest(
    eval_n: np.ndarray,
    blocks: Iterable[np.ndarray],
    valid: Callable[[np.ndarray], np.ndarray],
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
    step: int,
    invalid_reason: str,
) -> tuple[Float64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return the highest similarity of each valid row to a valid training row, and the first such training row."""
    best_n, row_n = np.full(len(eval_n), -np.inf), np.full(len(eval_n), NO_MATCH, np.int64)
    valid_n = np.flatnonzero(valid(eval_n))
    seen = invalid = 0
    for block_m in blocks:
        for first in range(0, len(block_m), step):
            part_m = np.asarray(block_m[first : first + step])
            valid_m = np.flatnonzero(valid(part_m))
            rows_m, invalid = seen + first + valid_m, invalid + len(part_m) - len(valid_m)
            part_m = part_m[valid_m]
            for start in range(0, len(valid_n) if len(part_m) else 0, step):
                queries = valid_n[start : start + step]
                scores = similarity(eval_n[queries], part_m)
                nearest = scores.argmax(1)
                score = scores[np.arange(len(queries)), nearest]
                better = score > best_n[queries]
                best_n[queries[better]], row_n[queries[better]] = score[better], rows_m[nearest[better]]
        seen += len(block_m)
    if not seen:
        raise ValueError("the training source has no rows: expected blocks of it, such as [embeddings] or [hashes]")
    if invalid or len(valid_n) < len(eval_n):
        log.warning(
            "%d evaluation images and %d of %d training images have %s: they are not compared and never count as "
            "duplicates",
            *(len(eval_n) - len(valid_n), invalid, seen, invalid_reason),
        )
    return best_n, row_n


def perceptual_hash(image: ImageLike) -> np.uint64:
    """Return 64 bits that change little when an image is scaled or recompressed; NO_HASH for too little structure.

    Bits are the signs, relative to their median, of the 8 × 8 lowest frequencies of the discrete cosine transform
    (DCT-II) of 32 × 32 gray pixels, highest bit first. The median excludes the mean brightness. Images of one color and
    plain gradients have too few coefficients above noise. Only about half of the bits of a mirror-symmetric image are
    informative: for them a distance of 4 is as significant as 8 for others.

    Source: Krawetz 2011 (https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html), with the median
    in place of the mean, as is usual. Deviation: a coefficient must exceed it by 4 gray levels.
    """
    gray_HW = preprocess(image, _SIDE, _PIXELS) @ _LUMA
    low = (_dct_rows() @ gray_HW @ _dct_rows().T).ravel()
    above = low - np.median(low[1:])
    if np.sum(np.abs(above[1:]) > _MARGIN) < _MIN_COEFFICIENTS:
        return NO_HASH
    return np.packbits(above > _MARGIN).view(">u8")[0].astype(np.uint64)


def hash_images(images: Iterable[ImageLike]) -> UInt64[np.ndarray, "n"]:
    """Return the hash of each image, NO_HASH for too little structure or images that can't be decoded."""

    def hash_or_none(image: ImageLike) -> np.uint64:
        try:
            return perceptual_hash(image)
        except ValueError:
            return NO_HASH

    return np.fromiter(map(hash_or_none, images), np.uint64)


def nearest_hash(
    eval_n: UInt64[np.ndarray, "n"], blocks: Iterable[UInt64[np.ndarray, "..."]]
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return the distance of each evaluation hash to the nearest training hash, 0 to 64 bits, and its first row.

    NO_HASH is never compared, and the log has its number. Without anything to compare, the distance is 65 and the row
    -1. Compares all pairs, about 8e8 per second and core: 25,000 evaluation images with 10 million training images
    take 5 minutes.
    """
    equal_n, row_n = _nearest(
        eval_n,
        blocks,
        lambda hash_m: hash_m != NO_HASH,
        lambda queries_q, train_m: np.bitwise_count(~queries_q[:, None] ^ train_m),  # number of equal bits
        _BLOCK,
        "no hash (too little structure, or not decodable)",
    )
    return np.where(row_n == NO_MATCH, HASH_BITS + 1, HASH_BITS - equal_n).astype(np.int64), row_n


@functools.cache
def _dct_rows() -> Float64[np.ndarray, "8 32"]:
    """Return the lowest rows of the orthonormal DCT-II matrix."""
    u, x = np.arange(_LOW)[:, None], np.arange(_SIDE)
    return np.cos(np.pi * u * (2 * x + 1) / (2 * _SIDE)) * np.where(u == 0, np.sqrt(1 / _SIDE), np.sqrt(2 / _SIDE))


# One file per TFRecord shard: uint64[m] of the hashes of its records in the order of `data.sources.tfrecord`, NO_HASH
# for records without one. With Apache Beam a worker processes a whole shard: `beam.io.ReadAllFromTFRecord` does not
# return record numbers and stops at the first damaged record of a shard.


def hash_shards(files: Sequence[str], output_dir: str, options: Sequence[str] | None = ()) -> None:
    """Hash the images of TFRecord shards into `output_dir`, one file per shard; shards that have a file are skipped.

    Args:
      options: flags of Beam, such as ['--runner=DataflowRunner', '--project=…']; () runs on this machine; None hashes
        one shard after another without Beam.
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
    """Hash the images of one shard."""
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
    write_atomically(_output_path(path, output_dir), lambda file: np.save(file, hashes))


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
