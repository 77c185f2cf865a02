"""What tokenizers that come in a user's file have in common: texts cleaned before them, rows after them.

Source of the ways to clean: open_clip `tokenizer.py` (`get_clean_fn`); big_vision
`evaluators/proj/image_text/prompt_engineering.py` (`_canonicalize_string_py`).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from clip_jax.tokenizers.bpe import repair

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def _canonicalize(text: str) -> str:
    """Drop ASCII's punctuation, an underscore becoming a space, and lower the case, as SigLIP was evaluated."""
    return " ".join(repair(text).translate(_NO_PUNCTUATION).lower().split())


# `tokenizer.clean` -> what it does. 'lower' is SigLIP 2's way in transformers; the last two are open_clip's.
CLEAN: Mapping[str, Callable[[str], str]] = {
    "none": str,
    "lower": str.lower,
    "whitespace": repair,
    "canonicalize": _canonicalize,
}


def as_texts(texts: Sequence[str]) -> Sequence[str]:
    """Return the texts; raises TypeError if it is one string, which is a sequence of letters."""
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"expected a sequence of texts, got one: wrap it, [{texts[:40]!r}]")
    return texts


def check_length(length: int) -> int:
    """Return the length of a row; raises ValueError if no text fits."""
    if length < 3:
        raise ValueError(f"model.text.length={length} leaves no room for a text; use at least 3, e.g. 64")
    return length


def rows(
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    length: int,
    *,
    truncate: bool,
    eos_id: int,
    pad_id: int,
    keep_end: bool,
) -> Int32[np.ndarray, "n L"]:
    """Return token ids, their end token last, as rows of one length.

    Args:
      truncate: cut what is too long and put the end token last; else raise.
      keep_end: False for padding in place of every end token.

    Raises:
      ValueError: if a text is too long and `truncate` is False.
    """
    filled = np.full((len(texts), length), pad_id, np.int32)
    for row, text, ids in zip(filled, texts, encoded, strict=True):
        if len(ids) > length:
            if not truncate:
                raise ValueError(
                    f"the text {text[:60]!r}… has {len(ids)} tokens with its end, but model.text.length={length};"
                    " shorten it, or pass truncate=True to have it cut"
                )
            ids = [*ids[: length - 1], eos_id]
        row[: len(ids)] = ids
    return filled if keep_end else np.where(filled == eos_id, np.int32(pad_id), filled)
