"""Emoji as evaluation datasets: retrieval by name in 14 languages, zero-shot classification by category.

The concepts of the test and validation splits, and the vendor Noto, are never trained on; see data/sources/emoji.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.config import DataConfig
from clip_jax.data.sources.emoji import LANGUAGES, SPLITS, TRAINED_VENDORS, UNSEEN_VENDOR, EmojiSource, concepts
from clip_jax.typing import EvalDataset, Record

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

    Raises:
      ValueError: for an unknown split, or if the packages of the demo are not installed.
      Unavailable: if the images of Noto can't be downloaded.
    """
    if split not in EVAL_SPLITS:
        raise ValueError(f"the dataset 'emoji' has no split {split!r}; it has {', '.join(EVAL_SPLITS)}")
    vendors, splits, make = EVAL_SPLITS[split]
    features = ("name", "character", "category", "subcategory", *(f"name_{language}" for language in LANGUAGES))
    records = EmojiSource(config.cache_dir, features, vendors, splits)
    return make(f"emoji_{split}", [records.read(index) for index in range(len(records))])


def _retrieval(feature: str, name: str, records: Sequence[Record]) -> EvalDataset:
    """Return a dataset whose candidate texts are the images' names; equal names are one candidate."""
    texts = list(dict.fromkeys(record.captions[feature][0] for record in records))
    return _dataset(name, records, [(text,) for text in texts], texts, feature)


def _categories(name: str, records: Sequence[Record]) -> EvalDataset:
    return _dataset(name, records, list(CATEGORY_PROMPTS.values()), list(CATEGORY_PROMPTS), "category")


def _subcategories(name: str, records: Sequence[Record]) -> EvalDataset:
    slugs = sorted({concept.subcategory for concept in concepts()})
    return _dataset(name, records, [_subcategory_prompts(slug) for slug in slugs], slugs, "subcategory")


def _dataset(
    name: str, records: Sequence[Record], texts: list[tuple[str, ...]], classes: list[str], feature: str
) -> EvalDataset:
    class_ids = {text: class_id for class_id, text in enumerate(classes)}
    targets = np.array([class_ids[record.captions[feature][0]] for record in records], np.int64)
    names = [
        f"{record.captions['character'][0]} {record.captions['name'][0]} ({record.key.partition('/')[0]})"
        for record in records
    ]
    return EvalDataset(name, [record.image for record in records], texts, targets, names, ATTRIBUTION)


def _subcategory_prompts(slug: str) -> tuple[str, ...]:
    """Return ('face smiling', 'smiling face') for 'face-smiling', ('object',) for 'other-object'."""
    words = [word for word in slug.replace("&", "and").split("-") if word != "other"]
    return tuple(dict.fromkeys((" ".join(words), " ".join(reversed(words)))))


# split -> (vendors, stored splits, function from name and records to the dataset)
EVAL_SPLITS: dict[str, tuple[Sequence[str], Sequence[str], Callable[[str, Sequence[Record]], EvalDataset]]] = {
    "unseen_concepts": (TRAINED_VENDORS, ("test",), functools.partial(_retrieval, "name")),
    "unseen_vendor": ((UNSEEN_VENDOR,), ("train",), functools.partial(_retrieval, "name")),
    "unseen_both": ((UNSEEN_VENDOR,), ("test",), functools.partial(_retrieval, "name")),
    "validation_concepts": (TRAINED_VENDORS, ("validation",), functools.partial(_retrieval, "name")),
    "seen_concepts": (TRAINED_VENDORS, ("train",), functools.partial(_retrieval, "name")),
    "search": (TRAINED_VENDORS, SPLITS, functools.partial(_retrieval, "name")),
    "categories": (TRAINED_VENDORS, ("test",), _categories),
    "subcategories": (TRAINED_VENDORS, ("test",), _subcategories),
    **{
        f"unseen_concepts_{language}": (TRAINED_VENDORS, ("test",), functools.partial(_retrieval, f"name_{language}"))
        for language in LANGUAGES
    },
}
