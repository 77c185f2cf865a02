"""Hugging Face's `tokenizer.json`, read by the `tokenizers` library (extra: `clip-jax-tpu[interop]`).

Source: https://github.com/huggingface/tokenizers. The file defines normalization, pieces and special tokens; cleaning
before and padding after tokenization come from `TokenizerConfig`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer

from clip_jax.tokenizers.rows import CLEAN, check_length, check_texts, pad_rows, read_file

_PADDING = ("<pad>", "[PAD]")


class HuggingFace:
    """A row of ids is: the tokens that the file defines, with its special tokens, and padding. Thread-safe.

    The end token is the last token of an empty text. `pad_id` is the argument, the file's, the id of the token `<pad>`
    or `[PAD]`, or the end token: the first of these that exists.
    """

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
        """Read a tokenizer.

        Args:
          path: path or content of a `tokenizer.json`.
          length: ids per row, including special tokens.
          truncate: truncate texts that are too long, keeping the end token; False raises ValueError.
          clean: cleaning before tokenization: 'none', 'lower', 'whitespace' or 'canonicalize'.
          pad_id: -1 for the file's own.
          keep_end: False replaces the end token by padding, as in CLIPA's training.

        Raises:
          ImportError: without the library `tokenizers`.
          ValueError: if the file is missing, is no tokenizer, or adds no end token, or if `length` is too short.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("tokenizer.name='huggingface' needs a library: pip install tokenizers") from error
        content = path if isinstance(path, bytes) else read_file(path, "/data/bert/tokenizer.json")
        name = "the tokenizer's file" if isinstance(path, bytes) else f"tokenizer.path={os.fspath(path)!r}"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{name}: this is not a tokenizer.json ({error})") from error
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = self._tokenizer.encode("").ids
        if not special:
            raise ValueError(
                f"{name}: the tokenizer adds no end token, which the text tower needs for pooling; give its"
                " post_processor a template such as '$A </s>'"
            )
        self.length, self.truncate = check_length(length), truncate
        self.vocab_size, self.eos_id = self._tokenizer.get_vocab_size(), special[-1]
        pad_ids = (self._tokenizer.token_to_id(token) for token in _PADDING)
        own = padding.get("pad_id", next((pad_id for pad_id in pad_ids if pad_id is not None), self.eos_id))
        self.pad_id = own if pad_id < 0 else pad_id
        self._clean, self._keep_end = CLEAN[clean], keep_end

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        """Return one row of `length` ids per text.

        Raises:
          ValueError: if a text is too long and `truncate` is False.
          TypeError: if `texts` is one string.
        """
        encoded = self._tokenizer.encode_batch([self._clean(text) for text in check_texts(texts)])
        return pad_rows(texts, [encoding.ids for encoding in encoded], self.length, truncate=self.truncate,
                        eos_id=self.eos_id, pad_id=self.pad_id, keep_end=self._keep_end)  # fmt: skip

    def token(self, token_id: int) -> str:
        """Return the token of an id, as the file spells it."""
        return self._tokenizer.id_to_token(token_id)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of a row up to its end token."""
        row = list(map(int, ids))
        return self._tokenizer.decode(row[: row.index(self.eos_id)] if self.eos_id in row else row)
