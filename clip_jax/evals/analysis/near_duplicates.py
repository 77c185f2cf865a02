"""Near-duplicates of evaluation images in a training source, by embedding or by perceptual hash.

Both searches are exact and take the training source in blocks: memory does not depend on its size. A row is an index
into the whole source, counted over all blocks.

The detector of the paper (Radford et al. 2021, appendix C) is a network trained to recognize modified copies, with a
threshold chosen by hand for each dataset. Any image embedding can replace it: inspect pairs near a threshold before
relying on it. The hash requires no network. It finds images that were scaled, recompressed, or slightly changed in
brightness or contrast, but not mirrored, rotated or cropped ones. Images with too little structure for a hash, such as
the black frames that the paper's detector reported as duplicates, are counted in the log and never count as duplicates.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, UInt64

from clip_jax.config import Preprocess
from clip_jax.evals.ranking import BLOCK_SCORES, unit
from clip_jax.preprocess import ImageLike, preprocess

log = logging.getLogger(__name__)

HASH_BITS = 64
NO_HASH = np.uint64(0)  # the hash of an image without one
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


# ------------------------------------------------------------------------------------------------- by embedding


def nearest_similarity(
    eval_nE: Float[np.ndarray, "n E"], blocks: Iterable[Float[np.ndarray, "_ E"]]
) -> tuple[Float32[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return the highest cosine similarity of each evaluation embedding to a training embedding, and its row.

    Embeddings that are zero or not finite are never compared. Without anything to compare, the similarity is NaN and
    the row -1, so that no threshold makes the image a duplicate. The log has their number.
    """
    eval_nE = unit(eval_nE)
    best_n, row_n = np.full(len(eval_nE), np.nan, np.float32), np.full(len(eval_nE), NO_MATCH, np.int64)
    valid_n = np.flatnonzero(~np.isnan(eval_nE).any(1))
    seen = invalid = 0
    for block_mE in blocks:
        block_mE = unit(block_mE)
        valid_m = np.flatnonzero(~np.isnan(block_mE).any(1))
        rows_m = seen + valid_m
        seen, invalid = seen + len(block_mE), invalid + len(block_mE) - len(valid_m)
        if not len(valid_m):
            continue
        block_mE = block_mE[valid_m]
        step = max(1, BLOCK_SCORES // len(block_mE))
        for start in range(0, len(valid_n), step):
            queries = valid_n[start : start + step]
            scores = eval_nE[queries] @ block_mE.T
            nearest = scores.argmax(1)
            score = scores[np.arange(len(queries)), nearest]
            better = ~(score <= best_n[queries])  # also true for NaN, the initial value
            best_n[queries[better]], row_n[queries[better]] = score[better], rows_m[nearest[better]]
    _log_invalid(seen, invalid, len(eval_nE) - len(valid_n), "an embedding that is zero or not finite")
    return best_n, row_n


# ------------------------------------------------------------------------------------------- by perceptual hash


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
    return np.fromiter(map(_hash_or_none, images), np.uint64)


def nearest_hash(
    eval_n: UInt64[np.ndarray, "n"], blocks: Iterable[UInt64[np.ndarray, "..."]]
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return the distance of each evaluation hash to the nearest training hash, 0 to 64 bits, and its first row.

    NO_HASH is never compared. Without anything to compare, the distance is 65 and the row -1, so that no threshold
    makes the image a duplicate. The log has their number. Compares all pairs, about 8e8 per second and core: 25,000
    evaluation images with 10 million training images take 5 minutes.

    Args:
      blocks: hashes of the training source; `[hashes]` for a source in memory.
    """
    best_n, row_n = np.full(len(eval_n), HASH_BITS + 1), np.full(len(eval_n), NO_MATCH, np.int64)
    valid_n = np.flatnonzero(eval_n != NO_HASH)
    seen = invalid = 0
    for block_m in blocks:
        for first in range(0, len(block_m), _BLOCK):
            part_m = np.asarray(block_m[first : first + _BLOCK])
            valid_m = np.flatnonzero(part_m != NO_HASH)
            rows_m, invalid = seen + first + valid_m, invalid + len(part_m) - len(valid_m)
            if not len(valid_m):
                continue
            part_m = part_m[valid_m]
            for start in range(0, len(valid_n), _BLOCK):
                queries = valid_n[start : start + _BLOCK]
                distances = np.bitwise_count(eval_n[queries, None] ^ part_m)
                nearest = distances.argmin(1)
                distance = distances[np.arange(len(queries)), nearest]
                better = distance < best_n[queries]
                best_n[queries[better]], row_n[queries[better]] = distance[better], rows_m[nearest[better]]
        seen += len(block_m)
    _log_invalid(seen, invalid, len(eval_n) - len(valid_n), "no hash (too little structure, or not decodable)")
    return best_n, row_n


@functools.cache
def _dct_rows() -> Float64[np.ndarray, "8 32"]:
    """Return the lowest rows of the orthonormal DCT-II matrix."""
    u, x = np.arange(_LOW)[:, None], np.arange(_SIDE)
    return np.cos(np.pi * u * (2 * x + 1) / (2 * _SIDE)) * np.where(u == 0, np.sqrt(1 / _SIDE), np.sqrt(2 / _SIDE))


def _hash_or_none(image: ImageLike) -> np.uint64:
    try:
        return perceptual_hash(image)
    except ValueError:
        return NO_HASH


def _log_invalid(seen: int, invalid: int, invalid_eval: int, reason: str) -> None:
    if not seen:
        raise ValueError("the training source has no rows: expected blocks of it, such as [embeddings] or [hashes]")
    if invalid or invalid_eval:
        log.warning(
            "%d evaluation images and %d of %d training images have %s: they are not compared and never count as "
            "duplicates",
            *(invalid_eval, invalid, seen, reason),
        )
