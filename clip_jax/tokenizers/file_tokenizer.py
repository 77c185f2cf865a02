"""Base class of the tokenizers that read a user's file: cleaning of texts, padding of rows.

Source of the cleaning functions: open_clip `tokenizer.py` (`get_clean_fn`); big_vision
`evaluators/proj/image_text/prompt_engineering.py` (`_canonicalize_string_py`).
"""

from __future__ import annotations

import os
import pathlib
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int32, Integer

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


class FileTokenizer:
    """A tokenizer with a user's file. A row of ids is: tokens, end token, padding. Thread-safe.

    Subclasses implement `_load`, `_encode` and `_decode`.
    """

    vocab_size: int
    eos_id: int
    EXAMPLE_PATH: str  # for error messages

    def __init__(
        self,
        path: str | os.PathLike[str] | bytes,
        length: int,
        truncate: bool = True,
        *,
        clean: str = "none",
        pad_id: int = -1,
        keep_end: bool = True,
    ):
        """Read the file.

        Args:
          path: path or content of the file.
          length: ids per row, including special tokens.
          truncate: truncate texts that are too long, keeping the end token; False raises ValueError.
          clean: cleaning before tokenization: 'none', 'lower', 'whitespace' or 'canonicalize'.
          pad_id: -1 for the file's own.
          keep_end: False replaces the end token by padding, as in CLIPA's training.

        Raises:
          ImportError: if the library that reads the file is not installed.
          ValueError: if the file is missing, is no tokenizer, or has no end token, or if `length` is too short.
        """
        content = path if isinstance(path, bytes) else self._read(path)
        name = "the tokenizer's file" if isinstance(path, bytes) else f"tokenizer.path={os.fspath(path)!r}"
        if length < 3:
            raise ValueError(f"model.text.context_length={length} leaves no room for a text; use at least 3, e.g. 64")
        self.length, self.truncate = length, truncate
        self.vocab_size, self.eos_id, own_pad_id = self._load(content, name)
        self.pad_id = own_pad_id if pad_id < 0 else pad_id
        self._clean, self._keep_end = CLEAN[clean], keep_end

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        """Return one row of `length` ids per text.

        Raises:
          ValueError: if a text is too long and `truncate` is False.
          TypeError: if `texts` is one string.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"expected a sequence of texts, got one: wrap it, [{texts[:40]!r}]")
        rows = np.full((len(texts), self.length), self.pad_id, np.int32)
        for row, text, ids in zip(rows, texts, self._encode([self._clean(text) for text in texts]), strict=True):
            if len(ids) > self.length:
                if not self.truncate:
                    raise ValueError(
                        f"the text {text[:60]!r}… has {len(ids)} tokens with its end, but"
                        f" model.text.context_length={self.length}; shorten it, or pass truncate=True"
                    )
                ids = [*ids[: self.length - 1], self.eos_id]
            row[: len(ids)] = ids
        return rows if self._keep_end else np.where(rows == self.eos_id, np.int32(self.pad_id), rows)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of a row up to its end token."""
        row = list(map(int, ids))
        return self._decode(row[: row.index(self.eos_id)] if self.eos_id in row else row)

    def _read(self, path: str | os.PathLike[str]) -> bytes:
        file = pathlib.Path(path).expanduser()
        if not file.is_file():
            raise ValueError(
                f"tokenizer.path={os.fspath(path)!r}: the file does not exist; give e.g."
                f" --config.tokenizer.path={self.EXAMPLE_PATH}"
            )
        return file.read_bytes()

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        """Read the file's content; return vocabulary size, end id and padding id. `name` is for errors."""
        raise NotImplementedError

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, with its end token."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError
