"""Near-duplicates of evaluation pictures in a training source: by embedding, and by perceptual hash.

Both searches are exact, and take the training source in blocks: its size costs time, not memory. A row is a place in
the whole source, counted over all blocks.

The paper's detector (Radford et al. 2021, appendix C) is a network trained to tell changed copies, whose thresholds
were set by hand for each dataset. Any image embedding can stand in: look at pairs around a threshold before you trust
it. The hash needs no network; it finds pictures that were scaled, recompressed, or changed a little in brightness or
contrast, and does not find mirrored, rotated or cropped ones. Pictures with too little in them for a hash, such as the
black frames that the paper's detector took for duplicates, are reported and never count as duplicates.
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

logger = logging.getLogger(__name__)

HASH_BITS = 64
UNUSABLE = np.uint64(0)  # the hash of what has none
NOTHING = -1  # the row of no near-duplicate
# Copies nearly always differ in 0 to 2 bits, unlike photos in 32 ± 4. Of 63 fair coins at most 8 differ from 63 others
# with a probability of 5e-10, so that of evaluation pictures one in 5 has, by chance, one of 400 million that near; at
# most 4 with 7e-14. Drawings on white are nearer to each other: of pairs of emoji 3 in 1000 differ in at most 8 bits.
MAX_DISTANCE = 8

_SIDE, _LOW = 32, 8
_PIXELS = Preprocess(interpolation="bilinear", resize="squash")  # Pillow's averages over the area where it shrinks
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG
# Grey levels: coefficients so close to the median don't clear it. Half of those of a picture that is its own mirror
# image are 0, and so is their median; noise would draw their bits, and recompression draw them anew: of 240 JPEG copies
# of synthetic ones the furthest differed in 22 bits without a margin, in 7 at 2 grey levels, in 2 at 4.
_MARGIN = 4.0
_ENOUGH = 16  # coefficients further from the median than that; of emoji 1 in 100 have fewer
_HASHES = 512  # of either side at a time: 512² × 8 bytes = 2 MiB, which stay in a core's cache


# ------------------------------------------------------------------------------------------------- by embedding


def nearest_similarity(
    eval_nE: Float[np.ndarray, "n E"], blocks: Iterable[Float[np.ndarray, "_ E"]]
) -> tuple[Float32[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return the highest cosine of each evaluation embedding to a training embedding, and the row of that.

    NaN and row -1 where there is nothing to compare: an embedding that is zero or not finite, or a source of only such
    ones. So no threshold makes them duplicates. The log says how many there are.

    Raises: ValueError if no block has a row.
    """
    eval_nE = unit(eval_nE)
    best_n, row_n = np.full(len(eval_nE), np.nan, np.float32), np.full(len(eval_nE), NOTHING, np.int64)
    usable_n = np.flatnonzero(~np.isnan(eval_nE).any(1))
    seen = broken = 0
    for block_mE in blocks:
        block_mE = unit(block_mE)
        usable_m = np.flatnonzero(~np.isnan(block_mE).any(1))
        rows_m = seen + usable_m
        seen, broken = seen + len(block_mE), broken + len(block_mE) - len(usable_m)
        if not len(usable_m):
            continue
        block_mE = block_mE[usable_m]
        step = max(1, BLOCK_SCORES // len(block_mE))
        for start in range(0, len(usable_n), step):
            chosen = usable_n[start : start + step]
            scores = eval_nE[chosen] @ block_mE.T
            at = scores.argmax(1)
            score = scores[np.arange(len(chosen)), at]
            better = ~(score <= best_n[chosen])  # NaN: none yet
            best_n[chosen[better]], row_n[chosen[better]] = score[better], rows_m[at[better]]
    _report(seen, broken, len(eval_nE) - len(usable_n), "an embedding that is zero or not finite")
    return best_n, row_n


# ------------------------------------------------------------------------------------------- by perceptual hash


def perceptual_hash(picture: ImageLike) -> np.uint64:
    """Return 64 bits that stay nearly the same when a picture is scaled or recompressed; 0 if it has too little in it.

    The signs, about their median, of the 8 × 8 lowest frequencies of the discrete cosine transform (DCT-II) of 32 × 32
    grey pixels; the mean brightness is left out of the median. The first bit is the highest. Pictures of one colour and
    plain gradients have few signs but noise's: they get 0, `UNUSABLE`. Those that are mirror images of themselves have
    only some half of the bits to be told apart by: for them a distance of 4 says what 8 says for others.

    Raises: ValueError if the picture can't be decoded.
    Source: Krawetz 2011 (https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html), with the median
    for the mean, as is usual. Deviation: a coefficient must clear it by 4 grey levels.
    """
    grey_HW = preprocess(picture, _SIDE, _PIXELS) @ _LUMA
    low = (_cosines() @ grey_HW @ _cosines().T).ravel()
    above = low - np.median(low[1:])
    if np.sum(np.abs(above[1:]) > _MARGIN) < _ENOUGH:
        return UNUSABLE
    return np.packbits(above > _MARGIN).view(">u8")[0].astype(np.uint64)


def hash_pictures(pictures: Iterable[ImageLike]) -> UInt64[np.ndarray, "n"]:
    """Return the hash of each picture, 0 for those that have none: too little in them, or not to be decoded."""
    return np.fromiter(map(_hash_or_none, pictures), np.uint64)


def nearest_hash(
    eval_n: UInt64[np.ndarray, "n"], blocks: Iterable[UInt64[np.ndarray, "..."]]
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return the fewest bits in which each evaluation hash differs from a training hash, 0 to 64, and the row of that.

    The first row of those equally near. 65 and row -1 where there is nothing to compare, a hash of 0: so no threshold
    makes it a duplicate. The log says how many there are. A whole source in memory is `[hashes]`, one block. Compares
    every pair, some 8e8 a second on one core: 25,000 evaluation pictures with 10 million take 5 minutes.

    Raises: ValueError if no block has a row.
    """
    best_n, row_n = np.full(len(eval_n), HASH_BITS + 1), np.full(len(eval_n), NOTHING, np.int64)
    usable_n = np.flatnonzero(eval_n != UNUSABLE)
    seen = broken = 0
    for block_m in blocks:
        for first in range(0, len(block_m), _HASHES):
            part_m = np.asarray(block_m[first : first + _HASHES])
            usable_m = np.flatnonzero(part_m != UNUSABLE)
            rows_m, broken = seen + first + usable_m, broken + len(part_m) - len(usable_m)
            if not len(usable_m):
                continue
            part_m = part_m[usable_m]
            for start in range(0, len(usable_n), _HASHES):
                chosen = usable_n[start : start + _HASHES]
                distances = np.bitwise_count(eval_n[chosen, None] ^ part_m)
                at = distances.argmin(1)
                distance = distances[np.arange(len(chosen)), at]
                better = distance < best_n[chosen]
                best_n[chosen[better]], row_n[chosen[better]] = distance[better], rows_m[at[better]]
        seen += len(block_m)
    _report(seen, broken, len(eval_n) - len(usable_n), "no hash (too little in them, or not to be decoded)")
    return best_n, row_n


@functools.cache
def _cosines() -> Float64[np.ndarray, "8 32"]:
    """Return the lowest rows of the orthonormal DCT-II."""
    u, x = np.arange(_LOW)[:, None], np.arange(_SIDE)
    return np.cos(np.pi * u * (2 * x + 1) / (2 * _SIDE)) * np.where(u == 0, np.sqrt(1 / _SIDE), np.sqrt(2 / _SIDE))


def _hash_or_none(picture: ImageLike) -> np.uint64:
    try:
        return perceptual_hash(picture)
    except ValueError:
        return UNUSABLE


def _report(seen: int, broken: int, broken_eval: int, what: str) -> None:
    if not seen:
        raise ValueError("the training source has no rows; give blocks of it, such as [embeddings] or [hashes]")
    if broken or broken_eval:
        logger.warning(
            "%d evaluation pictures and %d of %d training pictures have %s: they are compared with none and count as "
            "no duplicates",
            *(broken_eval, broken, seen, what),
        )
