"""SentencePiece with a user's model file: the tokenizer of SigLIP and most multilingual text towers.

Source: Kudo and Richardson 2018 (arXiv:1808.06226), https://github.com/google/sentencepiece. The model file defines
normalization, pieces and special ids.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer

from clip_jax.tokenizers.rows import CLEAN, check_length, check_texts, pad_rows, read_file

_ABSENT = -1  # sentencepiece's id of a special piece that a model does not have


class SentencePiece:
    """A row of ids is: pieces, end token, padding. There is no start token, as in SigLIP and SigLIP 2. Thread-safe.

    `pad_id` is the argument, or the model's, or the end token if the model has none.
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
        """Read a model.

        Args:
          path: path or content of a `.model` file.
          length: ids per row, including the end token.
          truncate: truncate texts that are too long, keeping the end token; False raises ValueError.
          clean: cleaning before tokenization: 'none', 'lower', 'whitespace' or 'canonicalize'.
          pad_id: -1 for the model's own.
          keep_end: False replaces the end token by padding.

        Raises:
          ValueError: if the file is missing, is no model, or has no end token, or if `length` is too short.
        """
        import sentencepiece

        model_file = path if isinstance(path, bytes) else read_file(path, "/data/c4_en.model")
        name = "the model file" if isinstance(path, bytes) else f"tokenizer.path={os.fspath(path)!r}"
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_file)
        except RuntimeError as error:
            raise ValueError(f"{name}: this is not a SentencePiece model ({error})") from error
        self.length, self.truncate = check_length(length), truncate
        self.vocab_size = self._processor.vocab_size()
        self.eos_id, own = self._processor.eos_id(), self._processor.pad_id()
        if self.eos_id == _ABSENT:
            raise ValueError(
                f"{name}: the model has no end token, which the text tower needs for pooling;"
                " train it with one, e.g. spm_train --eos_id=1"
            )
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id if own == _ABSENT else own
        self._clean, self._keep_end = CLEAN[clean], keep_end

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        """Return one row of `length` ids per text.

        Raises:
          ValueError: if a text is too long and `truncate` is False.
          TypeError: if `texts` is one string.
        """
        encoded = [[*ids, self.eos_id] for ids in self._processor.encode([self._clean(t) for t in check_texts(texts)])]
        return pad_rows(texts, encoded, self.length, truncate=self.truncate, eos_id=self.eos_id, pad_id=self.pad_id,
                        keep_end=self._keep_end)  # fmt: skip

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of a row up to its end token."""
        row = list(map(int, ids))
        end = row.index(self.eos_id) if self.eos_id in row else len(row)
        return self._processor.decode(row[:end])
