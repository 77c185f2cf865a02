"""Pictures of what a model does: answers to texts and pictures taken evenly from a set, and its worst mistakes."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clip_jax.evals.embed import embed_set
from clip_jax.evals.ranking import score_blocks
from clip_jax.typing import Embedder, EvalDataset

THUMBNAIL = 96  # px of the longer side


@dataclasses.dataclass(frozen=True)
class Match:
    """One answer, or one query, where `score` is NaN: a text, a picture as a data URI, or both."""

    text: str
    image: str
    score: float
    right: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """A query and its answers, best first."""

    query: Match
    answers: tuple[Match, ...]


@dataclasses.dataclass(frozen=True)
class Panels:
    """What a report shows of one set. `mistakes` answer with the text that was chosen, then the right one."""

    name: str
    text_to_image: tuple[Row, ...]
    image_to_text: tuple[Row, ...]
    mistakes: tuple[Row, ...]


def panels(
    embedder: Embedder, eval_set: EvalDataset, *, texts: int = 6, pictures: int = 6, answers: int = 5, mistakes: int = 6
) -> Panels:
    """Return a set's panels: so many texts, pictures and mistakes as rows, so many answers in each.

    Queries stand at even distances in the set: nobody picked them. Mistakes are those pictures whose best wrong text is
    ahead of the right one by most. Give the CachedEmbedder that the metrics used, and nothing is embedded twice.
    """
    image_nE, text_ME = embed_set(embedder, eval_set)

    def shown(score: float, right: bool, *, text: int | None = None, image: int | None = None) -> Match:
        name = eval_set.image_names[image] if image is not None and len(eval_set.image_names) else ""
        said = eval_set.texts[text][0] if text is not None else name
        return Match(said, "" if image is None else thumbnail(eval_set.images[image]), score, right)

    asked_t = _evenly(eval_set.asked_texts(), texts)
    text_rows = [
        Row(shown(math.nan, True, text=t), tuple(shown(s, bool(right_n[i]), image=i) for i, s in best))
        for t, right_n, best in zip(
            asked_t.tolist(),
            eval_set.right_images(asked_t),
            _best(text_ME[asked_t], image_nE, answers),
            strict=True,
        )
    ]
    asked_p = _evenly(np.arange(len(image_nE)), pictures)
    image_rows = [
        Row(shown(math.nan, True, image=i), tuple(shown(s, bool(right_M[t]), text=t) for t, s in best))
        for i, right_M, best in zip(
            asked_p.tolist(),
            eval_set.right_texts(asked_p),
            _best(image_nE[asked_p], text_ME, answers),
            strict=True,
        )
    ]
    mistake_rows = [
        Row(
            shown(math.nan, True, image=i),
            (shown(said_score, False, text=t), shown(right_score, True, text=right)),
        )
        for i, t, right, said_score, right_score in _mistakes(image_nE, text_ME, eval_set, mistakes)
    ]
    return Panels(eval_set.name, tuple(text_rows), tuple(image_rows), tuple(mistake_rows))


def thumbnail(encoded: bytes) -> str:
    """Return a picture as a data URI of at most THUMBNAIL px, transparency kept."""
    from PIL import Image

    picture = Image.open(io.BytesIO(encoded))
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _evenly(items: np.ndarray, count: int) -> np.ndarray:
    return items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def _best(
    queries_NE: Float[np.ndarray, "N E"], candidates_ME: Float[np.ndarray, "M E"], count: int
) -> list[list[tuple[int, float]]]:
    """Return for each query the best candidates with their scores; those without a score are left out."""
    result = []
    for _, scores_nM in score_blocks(queries_NE, candidates_ME):
        for scores_M in scores_nM:
            order = np.argsort(-scores_M, kind="stable")[:count]  # NaN sorts last
            result.append([(int(j), float(scores_M[j])) for j in order if not np.isnan(scores_M[j])])
    return result


def _mistakes(
    image_nE: Float[np.ndarray, "n E"],
    text_ME: Float[np.ndarray, "M E"],
    eval_set: EvalDataset,
    count: int,
) -> Sequence[tuple[int, int, int, float, float]]:
    """Return (picture, wrong text, best right text, their scores), the largest lead first."""
    found: list[tuple[float, int, int, int, float, float]] = []
    for rows, scores_bM in score_blocks(image_nE, text_ME):
        right_bM, scores_bM = eval_set.right_texts(rows), np.nan_to_num(scores_bM, nan=-np.inf)
        wrong_bM, best_bM = np.where(right_bM, -np.inf, scores_bM), np.where(right_bM, scores_bM, -np.inf)
        said_b, right_b = wrong_bM.argmax(1), best_bM.argmax(1)
        said_score_b, right_score_b = wrong_bM.max(1), best_bM.max(1)
        lead_b = np.where(np.isfinite(right_score_b), said_score_b - np.nan_to_num(right_score_b), -np.inf)
        for j in np.argsort(-lead_b)[:count]:
            if lead_b[j] > 0:
                scores = float(said_score_b[j]), float(right_score_b[j])
                found.append((lead_b[j], rows.start + int(j), int(said_b[j]), int(right_b[j]), *scores))
    return [entry[1:] for entry in sorted(found, reverse=True)[:count]]
