"""Speed of ClipBPE against open_clip's `SimpleTokenizer`, alternately, on one core: `make bench-tokenizer`.

Every round has new texts and new tokenizers, so no word is cached from an earlier round; within a round both may cache
words, as in training. The ids have to be equal. Four corpora:

    captions   English words with Zipf-distributed frequencies
    web        the same with names, numbers, part codes, punctuation, capitals, and in a fifth of the texts other
               characters: 1.4 tokens a word
    new words  no word occurs twice
    any text   captions with accents, emoji, CJK, HTML entities and URLs, which need repair

Then the captions per second of `web` in chunks of 64, as in training, after as many others. The last line is the lowest
of the four median ratios.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

for operator in ("nms", "qnms"):  # torchvision without its compiled half, as in tests/peers/conftest.py
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import open_clip  # noqa: E402

from clip_jax.data.pipeline import CHUNK  # noqa: E402
from clip_jax.tokenizers import ClipBPE  # noqa: E402

ROUNDS, TEXTS, WARM_TEXTS = 7, 3_000, 40_000
_MARKS = (
    "café",
    "naïve",
    "Straße",
    "😀",
    "🚀🔥",
    "犬と猫",
    "&amp;",
    "it's",
    "http://example.com/a_b?c=1",
    "№ 5",
    "3×4",
    "—",
)


def main() -> None:
    """Print both speeds and their ratio for every corpus, and the lowest ratio in the last line."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    vocabulary = _words()
    print(f"{TEXTS:,} texts a round, {ROUNDS} rounds, one core; thousands of texts per second, medians")
    lowest = min(_compare(name, make, vocabulary) for name, make in CORPORA.items())
    print(f"web, with the words of {WARM_TEXTS:,} captions cached: {_warm(vocabulary):,.0f} captions/s and core")
    print(f"ratio: {lowest:.2f}")


def _warm(vocabulary: list[str]) -> float:
    rng, tokenizer = random.Random("warm"), ClipBPE()
    texts = [_web(rng, vocabulary) for _ in range(2 * WARM_TEXTS)]
    tokenizer(texts[:WARM_TEXTS])
    began = time.perf_counter()
    for start in range(WARM_TEXTS, len(texts), CHUNK):
        tokenizer(texts[start : start + CHUNK])
    return WARM_TEXTS / (time.perf_counter() - began)


def _compare(name: str, make: Callable[[random.Random, list[str]], str], vocabulary: list[str]) -> float:
    clip_jax_seconds, open_clip_seconds = [], []
    for number in range(ROUNDS):
        rng = random.Random(f"{name} {number}")
        texts = [make(rng, vocabulary) for _ in range(TEXTS)]
        pair = [(clip_jax_seconds, ClipBPE()), (open_clip_seconds, open_clip.tokenizer.SimpleTokenizer())]
        ids = {}
        for seconds, tokenize in pair if number % 2 else reversed(pair):  # the first one runs with a cold CPU cache
            began = time.perf_counter()
            rows = tokenize(texts)
            seconds.append(time.perf_counter() - began)
            ids[seconds is clip_jax_seconds] = np.asarray(rows)
        np.testing.assert_array_equal(ids[True], ids[False], err_msg=f"{name}: the ids differ")
    ratio = statistics.median(b / a for a, b in zip(clip_jax_seconds, open_clip_seconds, strict=True))
    speeds = [TEXTS / statistics.median(seconds) / 1e3 for seconds in (clip_jax_seconds, open_clip_seconds)]
    print(f"{name:<10} clip_jax {speeds[0]:7.1f}   open_clip {speeds[1]:7.1f}   {ratio:.2f} times as fast")
    return ratio


def _words() -> list[str]:
    """Return the complete words of the merge table, the most frequent first: the English of OpenAI's corpus."""
    vocabulary, _ = ClipBPE().as_huggingface()
    words = (token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    return [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]


def _caption(rng: random.Random, vocabulary: list[str]) -> str:
    # Zipf's law: ranks uniform in their logarithm.
    return " ".join(
        vocabulary[int(len(vocabulary) ** rng.random()) - 1] for _ in range(rng.randint(5, 25))
    ).capitalize()


def _web(rng: random.Random, vocabulary: list[str]) -> str:
    words = [_web_word(rng, vocabulary) for _ in range(rng.randint(5, 16))]
    if rng.random() < 0.2:
        words.insert(rng.randrange(len(words)), rng.choice(_MARKS))
    return " ".join(words)


def _web_word(rng: random.Random, vocabulary: list[str]) -> str:
    kind = rng.random()
    if kind < 0.04:
        word = str(rng.randint(1, 3000))
    elif kind < 0.06:
        word = "".join(rng.choices("ABCDEFGHKLM0123456789-", k=8))
    elif kind < 0.11:  # one of 300,000 names
        name = random.Random(int(300_000 ** rng.random()))
        word = name.choice(vocabulary[:3000])[:4] + name.choice(vocabulary[:3000])[:4]
    else:
        word = vocabulary[int(len(vocabulary) ** rng.random()) - 1]
    word += rng.choice(",.:!)") * (rng.random() < 0.1)
    return word.capitalize() if rng.random() < 0.4 else word


def _new_words(rng: random.Random, vocabulary: list[str]) -> str:
    syllables = [vocabulary[int(rng.random() * 2000)] for _ in range(24)]
    return " ".join(
        a[:4] + b[:3] + chr(97 + rng.randrange(26)) for a, b in zip(syllables[::2], syllables[1::2], strict=True)
    )


def _any_text(rng: random.Random, vocabulary: list[str]) -> str:
    words = _caption(rng, vocabulary).split()
    for mark in rng.sample(_MARKS, 2):
        words.insert(rng.randrange(len(words) + 1), mark)
    return " ".join(words)


CORPORA = {"captions": _caption, "web": _web, "new words": _new_words, "any text": _any_text}

if __name__ == "__main__":
    main()
