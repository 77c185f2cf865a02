"""Emoji as evaluation datasets: retrieval by name in 14 languages, zero-shot classification by category.

The concepts of the test and validation splits, and the vendor Noto, are never trained on; see data/sources/emoji.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clip_jax.config import DataConfig
from clip_jax.data.sources.emoji import LANGUAGES, SPLITS, TRAINED_VENDORS, UNSEEN_VENDOR, EmojiSource, concepts
from clip_jax.typing import EvalDataset

CATEGORY_PROMPTS = {
    "Smileys & Emotion": ("smiley face", "facial expression", "emotion", "heart"),
    "People & Body": ("person", "people", "part of the body", "hand gesture"),
    "Animals & Nature": ("animal", "plant", "nature", "flower"),
    "Food & Drink": ("food", "drink", "something to eat", "fruit"),
    "Travel & Places": ("vehicle", "building", "place", "weather and sky"),
    "Activities": ("sport", "game", "activity", "celebration"),
    "Objects": ("object", "tool", "thing of the household", "clothing"),
    "Symbols": ("symbol", "sign", "arrow", "button"),
}

ATTRIBUTION = (
    "Images: Twemoji, © Twitter, Inc and other contributors, CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/);"
    " OpenMoji (https://openmoji.org), CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/);"
    " Noto Emoji, © Google LLC, Apache-2.0. Resized."
)


def load(config: DataConfig, split: str) -> EvalDataset:
    """Return a split of EVAL_SPLITS.

    Raises ValueError for an unknown split, or if the packages of the demo are not installed; Unavailable if the images
    of Noto can't be downloaded.
    """
    if split not in EVAL_SPLITS:
        raise ValueError(f"the dataset 'emoji' has no split {split!r}; it has {', '.join(EVAL_SPLITS)}")
    vendors, splits, feature = EVAL_SPLITS[split]
    features = ("name", "character", "category", "subcategory", *(f"name_{language}" for language in LANGUAGES))
    source = EmojiSource(config.cache_dir, features, vendors, splits)
    records = [source.read(index) for index in range(len(source))]
    values = [record.captions[feature][0] for record in records]
    if feature == "category":
        prompts = CATEGORY_PROMPTS
    elif feature == "subcategory":
        prompts = {slug: _subcategory_prompts(slug) for slug in sorted({concept.subcategory for concept in concepts()})}
    else:  # retrieval: equal names are one candidate
        prompts = {value: (value,) for value in values}
    class_ids = {value: class_id for class_id, value in enumerate(prompts)}
    return EvalDataset(
        f"emoji_{split}",
        [record.image for record in records],
        list(prompts.values()),
        np.array([class_ids[value] for value in values], np.int64),
        [f"{r.captions['character'][0]} {r.captions['name'][0]} ({r.key.partition('/')[0]})" for r in records],
        ATTRIBUTION,
    )


def _subcategory_prompts(slug: str) -> tuple[str, ...]:
    """Return ('face smiling', 'smiling face') for 'face-smiling', ('object',) for 'other-object'."""
    words = [word for word in slug.replace("&", "and").split("-") if word != "other"]
    return tuple(dict.fromkeys((" ".join(words), " ".join(reversed(words)))))


# split -> (vendors, stored splits, feature of the records that is the text or class)
EVAL_SPLITS: dict[str, tuple[Sequence[str], Sequence[str], str]] = {
    "unseen_concepts": (TRAINED_VENDORS, ("test",), "name"),
    "unseen_vendor": ((UNSEEN_VENDOR,), ("train",), "name"),
    "unseen_both": ((UNSEEN_VENDOR,), ("test",), "name"),
    "validation_concepts": (TRAINED_VENDORS, ("validation",), "name"),
    "seen_concepts": (TRAINED_VENDORS, ("train",), "name"),
    "search": (TRAINED_VENDORS, SPLITS, "name"),
    "categories": (TRAINED_VENDORS, ("test",), "category"),
    "subcategories": (TRAINED_VENDORS, ("test",), "subcategory"),
    **{f"unseen_concepts_{language}": (TRAINED_VENDORS, ("test",), f"name_{language}") for language in LANGUAGES},
}
