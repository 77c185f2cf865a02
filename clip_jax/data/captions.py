"""The caption of a record: one or several of its texts, by draws."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax.data import order
from clip_jax.typing import Record

MAX_CAPTION_CHARACTERS = 8192  # a caption may have megabytes; a few hundred characters fill every tokenizer's row


def caption_draws(texts: int, seed: int, epochs: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Return float64[n, 3, texts] in [0, 1): draws for the number of texts, their features, and their values."""
    purposes = np.array([order.COUNT, order.FEATURE, order.VALUE])[None, :, None]
    words = epochs[:, None, None], example_ids[:, None, None], np.arange(texts)[None, None]
    return order.fraction(order.draw(purposes, seed, *words))


def choose_caption(
    record: Record,
    weights: Mapping[str, float],
    by_count: Sequence[float] = (0.0,),
    by_feature: Sequence[float] = (0.0,),
    by_value: Sequence[float] = (0.0,),
) -> str | None:
    """Return one or more texts joined by commas, or None if the record has no usable text.

    The texts are distinct, also without regard to case.

    Args:
      by_count: draws in [0, 1); the first selects the number of texts, 1 to len(by_count).
      by_feature, by_value: draws in [0, 1); each pair selects a feature, by weight, and one of its texts.
    """
    usable = {
        name: texts
        for name, weight in weights.items()
        if weight > 0 and (texts := [t for text in record.captions.get(name, ()) if (t := clean(text))])
    }
    selected = []
    count = 1 + int(by_count[0] * len(by_count))
    for u, v in zip(by_feature[:count], by_value[:count], strict=True):
        if not usable:
            break
        names = list(usable)
        edges = list(itertools.accumulate(weights[name] for name in names))
        name = names[bisect.bisect_right(edges, u * edges[-1], hi=len(names) - 1)]
        text = usable[name][int(v * len(usable[name]))]
        selected.append(text)
        if len(selected) < count:
            usable = _without(usable, text.casefold())
    return ", ".join(selected) or None


def _without(usable: Mapping[str, Sequence[str]], folded: str) -> dict[str, list[str]]:
    """Return the texts by feature but for one, in any case; no features without texts."""
    others = {name: [text for text in texts if text.casefold() != folded] for name, texts in usable.items()}
    return {name: texts for name, texts in others.items() if texts}


def clean(text: str) -> str:
    """Return a caption without NUL, byte order marks (of files from Windows), lone surrogates and outer white space."""
    text = text[:MAX_CAPTION_CHARACTERS]
    if not text.isascii():  # JSON may have half of an emoji
        text = text.encode("utf-8", "ignore").decode().replace("\ufeff", "")
    return text.replace("\0", "").strip()
