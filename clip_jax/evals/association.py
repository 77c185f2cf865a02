"""Associations: which of several pictures go with a cue (WinoGAViL, Bitton et al. 2022, https://arxiv.org/abs/2207.12576).

As many pictures are chosen as go with the cue, those of the highest cosines; the number is the Jaccard index between
what is chosen and what is right. The cue's sentence, and that cues with 10 or 12 pictures count, are datacomp's:
https://github.com/mlfoundations/datacomp/blob/170b603/eval_utils/wino_eval.py. Deviation: ties and NaN count against
the model, where datacomp's `argsort` breaks them by place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clip_jax.evals.embed import mean_of_wordings
from clip_jax.evals.metrics import Predictions, Undefined, interval_of_mean, jaccard
from clip_jax.evals.ranking import scores
from clip_jax.typing import Cue, Embedder

MANY = 10  # candidates of the cues that datacomp counts


def wording(cue: str) -> str:
    """Return the sentence that datacomp makes of a cue: 'A wing', 'An egg'."""
    return f"{'An' if cue[:1].lower() in 'aeiou' else 'A'} {cue.lower()}"


def association(
    embedder: Embedder, name: str, images: Sequence[bytes], cues: Sequence[Cue], wordings: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the mean Jaccard index over cues with 10 candidates or more, as `jaccard`, and over all.

    wordings: of each cue one sentence or more, averaged as those of a class are.

    Keys: `zeroshot/<name>/{jaccard,jaccard_all}`, under each `/ci_low`, `/ci_high` (95 %, over cues), `/candidates`
    (mean) and `/chance`.

    Raises: Undefined without a cue of 10 candidates.
    """
    if not any(len(cue.candidates) >= MANY for cue in cues):
        raise Undefined(f"none of the {len(cues)} cues has {MANY} candidates, as those have that are counted")
    image_nE = embedder.image(images)
    texts = embedder.text([text for several in wordings for text in several])
    scores_Cn = scores(mean_of_wordings(texts, np.array([len(several) for several in wordings])), image_nE)
    jaccard_C = np.array([_jaccard(scores_n, cue) for scores_n, cue in zip(scores_Cn, cues, strict=True)])
    candidates_C = np.array([len(cue.candidates) for cue in cues])
    chance_C = np.array([chance(len(cue.candidates), int(cue.right.sum())) for cue in cues])
    metrics = {}
    for measure, counted_C in (("jaccard", candidates_C >= MANY), ("jaccard_all", candidates_C > 0)):
        key = f"zeroshot/{name}/{measure}"
        low, high = interval_of_mean(jaccard_C[counted_C])
        metrics |= {key: float(jaccard_C[counted_C].mean()), f"{key}/ci_low": low, f"{key}/ci_high": high}
        metrics |= {
            f"{key}/candidates": float(candidates_C[counted_C].mean()),
            f"{key}/chance": float(chance_C[counted_C].mean()),
        }
    return metrics


def chance(candidates: int, right: int) -> float:
    """Return the expected Jaccard index of `right` pictures drawn out of the candidates (hypergeometric)."""
    ways, wrong = math.comb(candidates, right), candidates - right
    drawn = range(max(0, right - wrong), right + 1)  # of those that are right
    return sum(math.comb(right, i) * math.comb(wrong, right - i) / ways * i / (2 * right - i) for i in drawn)


def _jaccard(scores_n: Float[np.ndarray, "n"], cue: Cue) -> float:
    return jaccard(Predictions(scores_n[None, cue.candidates], cue.right[None]))
