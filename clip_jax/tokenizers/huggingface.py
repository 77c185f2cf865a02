"""Hugging Face's `tokenizer.json`: whatever their `tokenizers` library reads. It is an extra: `clip-jax-tpu[interop]`.

Source: https://github.com/huggingface/tokenizers. The file decides normalisation, pieces and special tokens; the way to
clean before it and the padding after it are not in it, and come from `TokenizerConfig`.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer

from clip_jax.tokenizers.rows import CLEAN, as_texts, check_length, rows

_PADDING = ("<pad>", "[PAD]")


class HuggingFace:
    """Texts to rows of token ids: what the file puts before, tokens, end, padding. Safe in several threads.

    The end token is what the file puts last behind an empty text. `pad_id` is the one given, the file's, that of the
    token `<pad>` or `[PAD]`, or the end token: the first that there is.
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
          path: a `tokenizer.json`, or what one contains.
          length: of a row, special tokens included.
          truncate: cut a text that is too long before the row's end and put the end token there; else raise.
          clean: 'none', 'lower', 'whitespace' or 'canonicalize', before anything else.
          pad_id: -1 for the file's own.
          keep_end: False for padding in place of the end token, as CLIPA was trained.

        Raises:
          ImportError: without the library `tokenizers`.
          ValueError: if the file is missing, is no tokenizer, or adds no end token, or `length` leaves no room.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("tokenizer.name='huggingface' needs a library: pip install tokenizers") from error
        content = path if isinstance(path, bytes) else _read(path)
        name = "the tokenizer's file" if isinstance(path, bytes) else f"tokenizer.path={os.fspath(path)!r}"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # The library raises plain Exceptions.
        except Exception as error:
            raise ValueError(f"{name}: this is not a tokenizer.json ({error})") from error
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = self._tokenizer.encode("").ids
        if not special:
            raise ValueError(
                f"{name}: the tokenizer adds no end token, where the text tower reads its result; give its"
                " post_processor a template such as '$A </s>'"
            )
        self.length, self.truncate = check_length(length), truncate
        self.vocab_size, self.eos_id = self._tokenizer.get_vocab_size(), special[-1]
        known = (self._tokenizer.token_to_id(token) for token in _PADDING)
        own = padding.get("pad_id", next((number for number in known if number is not None), self.eos_id))
        self.pad_id = own if pad_id < 0 else pad_id
        self._clean, self._keep_end = CLEAN[clean], keep_end

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        """Return one row of `length` ids for every text.

        Raises:
          ValueError: if a text is too long and `truncate` is False.
          TypeError: if one string was given where several are expected.
        """
        encoded = self._tokenizer.encode_batch([self._clean(text) for text in as_texts(texts)])
        return rows(texts, [encoding.ids for encoding in encoded], self.length, truncate=self.truncate,
                    eos_id=self.eos_id, pad_id=self.pad_id, keep_end=self._keep_end)  # fmt: skip

    def token(self, number: int) -> str:
        """Return how the file writes a token."""
        return self._tokenizer.id_to_token(number)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of one row, up to its end token."""
        row = list(map(int, ids))
        return self._tokenizer.decode(row[: row.index(self.eos_id)] if self.eos_id in row else row)


def _read(path: str | os.PathLike[str]) -> bytes:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer.path={os.fspath(path)!r}: there is no such file; give a tokenizer.json of Hugging Face's,"
            " e.g. --config.tokenizer.path=/data/bert/tokenizer.json"
        )
    return file.read_bytes()
