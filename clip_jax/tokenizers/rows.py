"""Shared by the tokenizers that read a user's file: cleaning of texts, padding of rows.

Source of the cleaning functions: open_clip `tokenizer.py` (`get_clean_fn`); big_vision
`evaluators/proj/image_text/prompt_engineering.py` (`_canonicalize_string_py`).
"""

from __future__ import annotations

import os
import pathlib
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from clip_jax.tokenizers.bpe import repair

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def _canonicalize(text: str) -> str:
    """Remove ASCII punctuation, replace underscores by spaces, and lower-case, as in SigLIP's evaluation."""
    return " ".join(repair(text).translate(_NO_PUNCTUATION).lower().split())


# `tokenizer.clean` -> function. 'lower' is SigLIP 2's in transformers; the last two are open_clip's.
CLEAN: Mapping[str, Callable[[str], str]] = {
    "none": str,
    "lower": str.lower,
    "whitespace": repair,
    "canonicalize": _canonicalize,
}


def check_texts(texts: Sequence[str]) -> Sequence[str]:
    """Return the texts; raises TypeError if they are one string, which is a sequence of letters."""
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"expected a sequence of texts, got one: wrap it, [{texts[:40]!r}]")
    return texts


def check_length(length: int) -> int:
    """Return the length of a row; raises ValueError if it is too short for a text."""
    if length < 3:
        raise ValueError(f"model.text.length={length} leaves no room for a text; use at least 3, e.g. 64")
    return length


def read_file(path: str | os.PathLike[str], example: str) -> bytes:
    """Return the content of the tokenizer's file; `example` is a path for the error message."""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer.path={os.fspath(path)!r}: the file does not exist; give e.g. --config.tokenizer.path={example}"
        )
    return file.read_bytes()


def pad_rows(
    texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    length: int,
    *,
    truncate: bool,
    eos_id: int,
    pad_id: int,
    keep_end: bool,
) -> Int32[np.ndarray, "n L"]:
    """Return token ids as rows of one length.

    Args:
      texts: for error messages.
      encoded: token ids of each text, including the end token.
      truncate: truncate texts that are too long, keeping the end token; False raises.
      keep_end: False replaces every end token by padding.

    Raises:
      ValueError: if a text is too long and `truncate` is False.
    """
    padded = np.full((len(texts), length), pad_id, np.int32)
    for row, text, ids in zip(padded, texts, encoded, strict=True):
        if len(ids) > length:
            if not truncate:
                raise ValueError(
                    f"the text {text[:60]!r}… has {len(ids)} tokens with its end, but model.text.length={length};"
                    " shorten it, or pass truncate=True"
                )
            ids = [*ids[: length - 1], eos_id]
        row[: len(ids)] = ids
    return padded if keep_end else np.where(padded == eos_id, np.int32(pad_id), padded)
