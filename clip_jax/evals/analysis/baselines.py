"""Baselines without a learned representation: retrieval accuracies that a trained model should exceed.

Ridge regression from pixels and histograms of oriented gradients (Dalal and Triggs, CVPR 2005) to hashed words and
character trigrams, evaluated by the model's own retrieval code; and the caption of the nearest training image.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clip_jax.evals.embed import CachedEmbedder, check_dataset
from clip_jax.evals.ranking import score_blocks, unit
from clip_jax.evals.retrieval import retrieval
from clip_jax.typing import EvalDataset

SIDE = 48  # pixels, side of the image for gradients
COARSE = 16  # pixels, side of the image for raw pixels
CELL, ORIENTATIONS = 8, 9  # pixels per cell side; histogram bins over 180°, as Dalal and Triggs
HOG_BATCH = 64  # images per batch: 64 × 48 × 48 × 9 × 4 bytes = 5 MiB of votes, within a CPU cache
BUCKETS = 4096  # of hashed words and trigrams
RIDGE = 1000.0  # added to the diagonal; features have variance 1. Tuned on the emoji's validation split
METRICS = ("image_to_text/recall_at_1", "image_to_text/recall_at_5")


def baselines(train: EvalDataset, datasets: Sequence[EvalDataset]) -> dict[str, float]:
    """Fit the baselines to `train` and evaluate them on `datasets`, with the candidates of the model's metrics.

    The keys are `baseline/ridge_pixels_hog/<dataset>/image_to_text/recall_at_{1,5}` and, for datasets whose texts are
    all in `train`, `baseline/nearest_neighbor/<dataset>/image_to_text/recall_at_1`.
    """
    check_dataset(train)
    features_nD = pixels_and_hog(train.images)
    ridge = fit_ridge(features_nD, train)
    cached = CachedEmbedder(ridge)  # the datasets of all languages share their images
    found: dict[str, float] = {}
    for dataset in datasets:
        metrics = retrieval(cached, dataset)
        for metric in METRICS:
            if (value := metrics.get(f"retrieval/{dataset.name}/{metric}")) is not None:
                found[f"baseline/ridge_pixels_hog/{dataset.name}/{metric}"] = value
        if (recall := _nearest_neighbor_recall(ridge, features_nD, train, dataset)) is not None:
            found[f"baseline/nearest_neighbor/{dataset.name}/image_to_text/recall_at_1"] = recall
    return found


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A linear map from image features to hashed text, an Embedder."""

    mean_D: Float[np.ndarray, "D"]
    std_D: Float[np.ndarray, "D"]
    weight_DV: Float[np.ndarray, "D V"]
    idf_V: Float[np.ndarray, "V"]
    text_mean_V: Float[np.ndarray, "V"]

    def standardize(self, features_nD: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        return (features_nD - self.mean_D) / self.std_D

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n V"]:
        """Return the predicted text vectors, normalized."""
        return unit(self.standardize(pixels_and_hog(images)) @ self.weight_DV)

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m V"]:
        """Return tf-idf vectors of hashed words and trigrams minus the training mean, normalized."""
        return unit(hashed_text(texts) * self.idf_V - self.text_mean_V)


def fit_ridge(features_nD: Float[np.ndarray, "n D"], train: EvalDataset) -> Ridge:
    """Fit tf-idf text vectors to standardized image features by ridge regression.

    The idf of a bucket is log(number of training texts / (1 + number of texts with the bucket)), at least 0.
    """
    text_MV = np.stack([hashed_text(prompts).mean(0) for prompts in train.texts])
    idf_V = np.maximum(np.log(len(text_MV) / (1 + (text_MV > 0).sum(0))), 0).astype(np.float32)
    text_nV = (text_MV * idf_V)[train.targets]
    text_mean_V = text_nV.mean(0)
    mean_D, std_D = features_nD.mean(0), features_nD.std(0) + 1e-3  # not 0: the corners of all emoji are white
    x_nD = (features_nD - mean_D) / std_D
    gram_DD = x_nD.T @ x_nD + RIDGE * np.eye(x_nD.shape[1], dtype=np.float32)
    weight_DV = np.linalg.solve(gram_DD, x_nD.T @ (text_nV - text_mean_V))
    return Ridge(mean_D, std_D, weight_DV, idf_V, text_mean_V)


def _nearest_neighbor_recall(
    ridge: Ridge, features_nD: Float[np.ndarray, "n D"], train: EvalDataset, dataset: EvalDataset
) -> float | None:
    """Return the fraction of images whose nearest training image has their text; None unless `train` has all texts."""
    known = {prompt for prompts in train.texts for prompt in prompts}
    if dataset.targets.ndim == 2 or any(known.isdisjoint(prompts) for prompts in dataset.texts):
        return None
    queries_ND, known_nD = (ridge.standardize(x_ND) for x_ND in (pixels_and_hog(dataset.images), features_nD))
    nearest = [scores_bn.argmax(1) for _, scores_bn in score_blocks(queries_ND, known_nD)]
    predicted = [train.texts[i] for i in train.targets[np.concatenate(nearest)]]
    correct = [dataset.texts[i] for i in dataset.targets]
    return float(np.mean([not set(a).isdisjoint(b) for a, b in zip(predicted, correct, strict=True)]))


def pixels_and_hog(images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
    """Return the pixels at COARSE px and the histograms of oriented gradients at SIDE px of encoded images."""
    from PIL import Image

    pixels, resized = [], []
    for encoded in images:
        rgba = Image.open(io.BytesIO(encoded)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba).convert("RGB")
        pixels.append(np.asarray(image.resize((COARSE, COARSE), Image.Resampling.BOX), np.float32).ravel() / 255)
        resized.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255)
    gradients = [hog(np.stack(resized[i : i + HOG_BATCH])) for i in range(0, len(resized), HOG_BATCH)]
    return np.concatenate([np.stack(pixels), np.concatenate(gradients)], axis=1)


def hog(x_BHWC: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B D"]:
    """Return histograms of oriented gradients: cells of CELL px, blocks of 2 by 2 cells, clipped at 0.2.

    A pixel votes with the gradient of its strongest channel, split between the two nearest orientations.
    """
    dy_BHWC, dx_BHWC = np.gradient(x_BHWC, axis=(1, 2))
    strongest_BHW1 = np.hypot(dy_BHWC, dx_BHWC).argmax(-1)[..., None]
    dy_BHW, dx_BHW = (np.take_along_axis(d, strongest_BHW1, -1)[..., 0] for d in (dy_BHWC, dx_BHWC))
    bin_BHW = np.arctan2(dy_BHW, dx_BHW) % np.pi / np.pi * ORIENTATIONS
    distance_BHWO = np.abs(bin_BHW[..., None] - np.arange(ORIENTATIONS, dtype=np.float32))
    distance_BHWO = np.minimum(distance_BHWO, ORIENTATIONS - distance_BHWO)  # orientations are periodic
    votes_BHWO = np.hypot(dy_BHW, dx_BHW)[..., None] * np.maximum(1 - distance_BHWO, 0)
    batch, rows, columns = len(x_BHWC), x_BHWC.shape[1] // CELL, x_BHWC.shape[2] // CELL
    cells = votes_BHWO.reshape(batch, rows, CELL, columns, CELL, ORIENTATIONS).sum((2, 4))
    blocks = np.concatenate([cells[:, i : rows - 1 + i, j : columns - 1 + j] for i in (0, 1) for j in (0, 1)], axis=-1)
    for _ in range(2):  # normalize, clip, normalize again
        blocks = np.minimum(blocks / (np.linalg.norm(blocks, axis=-1, keepdims=True) + 1e-2), 0.2)
    return blocks.reshape(batch, -1).astype(np.float32)


def hashed_text(texts: Sequence[str]) -> Float[np.ndarray, "n V"]:
    """Return hashed counts of words and of character trigrams in BUCKETS buckets, both with L2 norm about 1."""
    result_nV = np.zeros((len(texts), BUCKETS), np.float32)
    for row_V, text in zip(result_nV, texts, strict=True):
        words = text.lower().split()
        trigrams = [f" {word} "[i : i + 3] for word in words for i in range(len(word))]
        for tokens in (words, trigrams):
            for token in tokens:
                row_V[zlib.crc32(token.encode()) % BUCKETS] += len(tokens) ** -0.5
    return result_nV
