"""What needs no learned representation: the numbers that a trained model should beat.

Ridge regression from pixels and histograms of oriented gradients (Dalal and Triggs, CVPR 2005) to hashed words and
character trigrams, ranked by the same retrieval code as the model; and the caption of the nearest training picture.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clip_jax.evals.embed import CachedEmbedder, check_set
from clip_jax.evals.ranking import score_blocks, unit
from clip_jax.evals.retrieval import retrieval
from clip_jax.typing import EvalDataset

SIDE = 48  # px, of the picture that gradients are taken of
COARSE = 16  # px, of the picture that is used as it is
CELL, ORIENTATIONS = 8, 9  # px of a cell, bins of its histogram over half a turn, as Dalal and Triggs
HOG_BATCH = 64  # pictures whose votes are held at a time: 64 × 48 × 48 × 9 × 4 bytes = 5 MiB, within a cache
BUCKETS = 4096  # of hashed words and trigrams
RIDGE = 1000.0  # added to the diagonal; features have variance 1. Chosen on the emoji's validation families
MEASURES = ("image_to_text/recall_at_1", "image_to_text/recall_at_5")


def floors(train: EvalDataset, sets: Sequence[EvalDataset]) -> dict[str, float]:
    """Fit on `train` and return what the floors reach on each of `sets`.

    Keys: `floor/ridge_pixels_hog/<set>/image_to_text/recall_at_{1,5}` and, for sets whose texts are all in `train`,
    `floor/nearest_neighbour/<set>/image_to_text/recall_at_1`. Candidates and chance are those of the model's metrics.
    """
    check_set(train)
    features_nD = pixels_and_hog(train.images)
    ridge = CachedEmbedder(fit_ridge(features_nD, train))  # the sets of all languages have the same pictures
    metrics: dict[str, float] = {}
    for eval_set in sets:
        measured = retrieval(ridge, eval_set)
        for measure in MEASURES:
            if (value := measured.get(f"retrieval/{eval_set.name}/{measure}")) is not None:
                metrics[f"floor/ridge_pixels_hog/{eval_set.name}/{measure}"] = value
        if (recall := _nearest_neighbour(features_nD, train, eval_set)) is not None:
            metrics[f"floor/nearest_neighbour/{eval_set.name}/image_to_text/recall_at_1"] = recall
    return metrics


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A linear map from picture features to hashed text: an Embedder, so that retrieval measures it like a model."""

    mean_D: Float[np.ndarray, "D"]
    std_D: Float[np.ndarray, "D"]
    weight_DV: Float[np.ndarray, "D V"]
    rarity_V: Float[np.ndarray, "V"]
    text_mean_V: Float[np.ndarray, "V"]

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n V"]:
        """Return the text vector that each picture predicts, at length 1."""
        return unit((pixels_and_hog(images) - self.mean_D) / self.std_D @ self.weight_DV)

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m V"]:
        """Return hashed words and trigrams by rarity, less the training texts' mean, at length 1."""
        return unit(hashed_text(texts) * self.rarity_V - self.text_mean_V)


def fit_ridge(features_nD: Float[np.ndarray, "n D"], train: EvalDataset) -> Ridge:
    """Fit texts to standardised picture features by least squares with an L2 penalty.

    Pieces weigh by their rarity among the training texts: log(texts / (1 + texts that have it)).
    """
    text_MV = np.stack([hashed_text(wordings).mean(0) for wordings in train.texts])
    rarity_V = np.maximum(np.log(len(text_MV) / (1 + (text_MV > 0).sum(0))), 0).astype(np.float32)
    text_nV = (text_MV * rarity_V)[train.targets]
    text_mean_V = text_nV.mean(0)
    mean_D, std_D = _scale(features_nD)
    x_nD = (features_nD - mean_D) / std_D
    gram_DD = x_nD.T @ x_nD + RIDGE * np.eye(x_nD.shape[1], dtype=np.float32)
    weight_DV = np.linalg.solve(gram_DD, x_nD.T @ (text_nV - text_mean_V))
    return Ridge(mean_D, std_D, weight_DV, rarity_V, text_mean_V)


def _scale(features_nD: Float[np.ndarray, "n D"]) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
    return features_nD.mean(0), features_nD.std(0) + 1e-3  # corners are white in every emoji: no division by zero


def _nearest_neighbour(
    features_nD: Float[np.ndarray, "n D"], train: EvalDataset, eval_set: EvalDataset
) -> float | None:
    """Return how often the nearest training picture has the right text; None unless `train` has all texts."""
    known = {wording for wordings in train.texts for wording in wordings}
    if eval_set.targets.ndim == 2 or any(known.isdisjoint(wordings) for wordings in eval_set.texts):
        return None
    mean_D, std_D = _scale(features_nD)
    queries_NE = (pixels_and_hog(eval_set.images) - mean_D) / std_D
    nearest = [s.argmax(1) for _, s in score_blocks(queries_NE, (features_nD - mean_D) / std_D)]
    said = [train.texts[i] for i in train.targets[np.concatenate(nearest)]]
    right = [eval_set.texts[i] for i in eval_set.targets]
    return float(np.mean([not set(a).isdisjoint(b) for a, b in zip(said, right, strict=True)]))


def pixels_and_hog(images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
    """Return for encoded pictures the pixels at COARSE px and the histograms of oriented gradients at SIDE px."""
    from PIL import Image

    pixels, pictures = [], []
    for encoded in images:
        rgba = Image.open(io.BytesIO(encoded)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        picture = Image.alpha_composite(white, rgba).convert("RGB")
        pixels.append(np.asarray(picture.resize((COARSE, COARSE), Image.Resampling.BOX), np.float32).ravel() / 255)
        pictures.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255)
    gradients = [hog(np.stack(pictures[i : i + HOG_BATCH])) for i in range(0, len(pictures), HOG_BATCH)]
    return np.concatenate([np.stack(pixels), np.concatenate(gradients)], axis=1)


def hog(x_BHWC: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B D"]:
    """Return histograms of oriented gradients: cells of CELL px, blocks of 2 by 2 cells, clipped at 0.2.

    Each pixel counts by its strongest channel, shared between the two nearest orientations.
    """
    dy_BHWC, dx_BHWC = np.gradient(x_BHWC, axis=(1, 2))
    strongest_BHW1 = np.hypot(dy_BHWC, dx_BHWC).argmax(-1)[..., None]
    dy_BHW, dx_BHW = (np.take_along_axis(d, strongest_BHW1, -1)[..., 0] for d in (dy_BHWC, dx_BHWC))
    bin_BHW = np.arctan2(dy_BHW, dx_BHW) % np.pi / np.pi * ORIENTATIONS
    away_BHWO = np.abs(bin_BHW[..., None] - np.arange(ORIENTATIONS, dtype=np.float32))
    away_BHWO = np.minimum(away_BHWO, ORIENTATIONS - away_BHWO)  # half a turn is where it began
    votes_BHWO = np.hypot(dy_BHW, dx_BHW)[..., None] * np.maximum(1 - away_BHWO, 0)
    batch, rows, columns = len(x_BHWC), x_BHWC.shape[1] // CELL, x_BHWC.shape[2] // CELL
    cells = votes_BHWO.reshape(batch, rows, CELL, columns, CELL, ORIENTATIONS).sum((2, 4))
    blocks = np.concatenate([cells[:, i : rows - 1 + i, j : columns - 1 + j] for i in (0, 1) for j in (0, 1)], axis=-1)
    for _ in range(2):  # normalise, clip, normalise again
        blocks = np.minimum(blocks / (np.linalg.norm(blocks, axis=-1, keepdims=True) + 1e-2), 0.2)
    return blocks.reshape(batch, -1).astype(np.float32)


def hashed_text(texts: Sequence[str]) -> Float[np.ndarray, "n V"]:
    """Return counts of words and of character trigrams in BUCKETS buckets, each half at length 1."""
    result_nV = np.zeros((len(texts), BUCKETS), np.float32)
    for row_V, text in zip(result_nV, texts, strict=True):
        words = text.lower().split()
        trigrams = [f" {word} "[i : i + 3] for word in words for i in range(len(word))]
        for pieces in (words, trigrams):
            for piece in pieces:
                row_V[zlib.crc32(piece.encode()) % BUCKETS] += len(pieces) ** -0.5
    return result_nV
