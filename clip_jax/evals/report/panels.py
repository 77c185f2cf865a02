"""Qualitative examples for a report: retrieved texts and images of evenly spaced queries, and the largest errors."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clip_jax.evals.embed import embed_dataset
from clip_jax.evals.ranking import score_blocks
from clip_jax.typing import Embedder, EvalDataset

THUMBNAIL = 96  # pixels, the longer side


@dataclasses.dataclass(frozen=True)
class Match:
    """A candidate or a query: text, image (data URI), or both. `score` is the cosine similarity, NaN for a query."""

    text: str
    image: str
    score: float
    correct: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """A query and its matches, best first."""

    query: Match
    matches: tuple[Match, ...]


@dataclasses.dataclass(frozen=True)
class Panels:
    """Examples of one dataset. The matches of `mistakes` are the predicted text and the correct one."""

    name: str
    text_to_image: tuple[Row, ...]
    image_to_text: tuple[Row, ...]
    mistakes: tuple[Row, ...]


def panels(
    embedder: Embedder, dataset: EvalDataset, *, texts: int = 6, images: int = 6, matches: int = 5, mistakes: int = 6
) -> Panels:
    """Return the examples of a dataset: numbers of evenly spaced queries, matches of each, and largest errors.

    A mistake is an image whose best incorrect text has a lead over the best correct text. Pass the CachedEmbedder that
    computed the metrics to reuse its embeddings.
    """
    image_nE, text_ME = embed_dataset(embedder, dataset)

    def text(index: int, score: float = math.nan, correct: bool = True) -> Match:
        return Match(dataset.texts[index][0], "", score, correct)

    def image(index: int, score: float = math.nan, correct: bool = True) -> Match:
        name = dataset.image_names[index] if len(dataset.image_names) else ""
        return Match(name, thumbnail(dataset.images[index]), score, correct)

    text_ids = _evenly_spaced(dataset.query_texts(), texts)
    best_images = _best(text_ME[text_ids], image_nE, matches)
    text_rows = [
        Row(text(t), tuple(image(i, score, bool(correct_n[i])) for i, score in best))
        for t, correct_n, best in zip(text_ids.tolist(), dataset.positive_images(text_ids), best_images, strict=True)
    ]
    image_ids = _evenly_spaced(np.arange(len(image_nE)), images)
    best_texts = _best(image_nE[image_ids], text_ME, matches)
    image_rows = [
        Row(image(i), tuple(text(t, score, bool(correct_M[t])) for t, score in best))
        for i, correct_M, best in zip(image_ids.tolist(), dataset.positive_texts(image_ids), best_texts, strict=True)
    ]
    mistake_rows = [
        Row(image(i), (text(predicted, score, False), text(correct, correct_score)))
        for i, predicted, correct, score, correct_score in _mistakes(image_nE, text_ME, dataset, mistakes)
    ]
    return Panels(dataset.name, tuple(text_rows), tuple(image_rows), tuple(mistake_rows))


def thumbnail(encoded: bytes) -> str:
    """Return an image as a WebP data URI of at most THUMBNAIL pixels, with its transparency."""
    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _evenly_spaced(items: np.ndarray, count: int) -> np.ndarray:
    return items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def _best(
    queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"], count: int
) -> list[list[tuple[int, float]]]:
    """Return (candidate, score) of the best candidates of each query, without NaN scores."""
    result = []
    for _, scores_nM in score_blocks(queries_NE, candidates_ME):
        for scores_M in scores_nM:
            order = np.argsort(-scores_M, kind="stable")[:count]  # NaN sorts last
            result.append([(int(j), float(scores_M[j])) for j in order if not np.isnan(scores_M[j])])
    return result


def _mistakes(
    image_nE: Float[np.ndarray, "n E"], text_ME: Float[np.ndarray, "M E"], dataset: EvalDataset, count: int
) -> Sequence[tuple[int, int, int, float, float]]:
    """Return (image, best incorrect text, best correct text, their scores), the largest lead first."""
    found: list[tuple[float, int, int, int, float, float]] = []
    for rows, scores_bM in score_blocks(image_nE, text_ME):
        correct_bM, scores_bM = dataset.positive_texts(rows), np.nan_to_num(scores_bM, nan=-np.inf)
        wrong_bM, right_bM = np.where(correct_bM, -np.inf, scores_bM), np.where(correct_bM, scores_bM, -np.inf)
        right_b = right_bM.max(1)
        lead_b = np.where(np.isfinite(right_b), wrong_bM.max(1) - np.nan_to_num(right_b), -np.inf)
        for j in np.argsort(-lead_b)[:count]:
            wrong, right = int(wrong_bM[j].argmax()), int(right_bM[j].argmax())
            if lead_b[j] > 0:
                scores = float(wrong_bM[j, wrong]), float(right_bM[j, right])
                found.append((lead_b[j], rows.start + int(j), wrong, right, *scores))
    return [entry[1:] for entry in sorted(found, reverse=True)[:count]]
