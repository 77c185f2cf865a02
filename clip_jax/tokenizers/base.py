"""Base class of all tokenizers: rows of ids of one length from the ids of texts."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32, Int64, Integer

from clip_jax.paths import check_not_pointer


class RowTokenizer:
    """Texts to rows of ids. Thread-safe. Subclasses set the ids and implement `_encode` and `_decode`."""

    vocab_size: int
    pad_id: int
    eos_id: int
    _keep_end: bool = True  # False: padding replaces the end token
    _pad_left: bool = False  # True: padding before the tokens

    def __init__(self, length: int, truncate: bool):
        if length < 3:
            raise ValueError(f"model.text.context_length: expected at least 3, got {length}; use e.g. 77")
        self.length, self.truncate = length, truncate

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        """Return one row of `length` ids per text: its tokens with the end token, and padding.

        Raises:
          ValueError: if a text is too long and `truncate` is False.
          TypeError: if `texts` is one string.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"expected a sequence of texts, got one: wrap it, [{texts[:40]!r}]")
        rows = np.full((len(texts), self.length), self.pad_id, np.int32)
        for row, text, ids in zip(rows, texts, self._encode(texts), strict=True):
            if len(ids) > self.length:
                if not self.truncate:
                    raise ValueError(
                        f"the text {text[:60]!r}…: expected at most model.text.context_length={self.length} tokens with"
                        f" start and end, got {len(ids)}; shorten it, or pass truncate=True"
                    )
                ids = [*ids[: self.length - 1], self.eos_id]
            start = self.length - len(ids) if self._pad_left else 0
            row[start : start + len(ids)] = ids
        return rows if self._keep_end else np.where(rows == self.eos_id, np.int32(self.pad_id), rows)

    def count(self, texts: Sequence[str]) -> Int64[np.ndarray, "n"]:
        """Return the number of tokens of each text with special tokens; with `truncate` it may be that of the row."""
        return np.array([len(ids) for ids in self._encode(texts)], np.int64)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of a row up to its end token."""
        return self._decode(list(itertools.takewhile(lambda token: token != self.eos_id, map(int, ids))))

    def _encode(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """Return the ids of each text, with special tokens."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def read_file(path: str | os.PathLike[str], example: str = "/data/c4_en.model") -> bytes:
    """Return the content of a tokenizer's file.

    Raises ValueError if it is missing, with a path as example, or a Git LFS pointer.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer.path={os.fspath(path)!r}: expected a file, got none; give e.g."
            f" --config.tokenizer.path={example}"
        )
    check_not_pointer(file)
    return file.read_bytes()
