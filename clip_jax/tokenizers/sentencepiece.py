"""SentencePiece with a user's model file: SigLIP's and most multilingual text towers' tokenizer.

Source: Kudo and Richardson 2018 (arXiv:1808.06226), https://github.com/google/sentencepiece. The model file decides
normalisation, pieces and special ids.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer

from clip_jax.tokenizers.rows import CLEAN, as_texts, check_length, rows

_ABSENT = -1  # sentencepiece's id of a special piece that a model doesn't have


class SentencePiece:
    """Texts to rows of token ids: pieces, end, padding. Safe in several threads.

    There is no start token, as in SigLIP and SigLIP 2: of the text towers none needs it. `pad_id` is the one given, the
    model's, or its end token where it has none.
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
          path: a `.model` file, or what one contains.
          length: of a row, the end token included.
          truncate: cut a text that is too long before the row's end and put the end token there; else raise.
          clean: 'none', 'lower', 'whitespace' or 'canonicalize', before anything else.
          pad_id: -1 for the model's own.
          keep_end: False for padding in place of the end token.

        Raises:
          ValueError: if the file is missing, is no model, or has no end token, or `length` leaves no room.
        """
        import sentencepiece

        model_file = path if isinstance(path, bytes) else _read(path)
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
                f"{name}: the model has no end token, where the text tower reads its result;"
                " train it with one, e.g. spm_train --eos_id=1"
            )
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id if own == _ABSENT else own
        self._clean, self._keep_end = CLEAN[clean], keep_end

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        """Return one row of `length` ids for every text.

        Raises:
          ValueError: if a text is too long and `truncate` is False.
          TypeError: if one string was given where several are expected.
        """
        encoded = [[*ids, self.eos_id] for ids in self._processor.encode([self._clean(t) for t in as_texts(texts)])]
        return rows(texts, encoded, self.length, truncate=self.truncate, eos_id=self.eos_id, pad_id=self.pad_id,
                    keep_end=self._keep_end)  # fmt: skip

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of one row, up to its end token."""
        row = list(map(int, ids))
        end = row.index(self.eos_id) if self.eos_id in row else len(row)
        return self._processor.decode(row[:end])


def _read(path: str | os.PathLike[str]) -> bytes:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer.path={os.fspath(path)!r}: there is no such file; give a SentencePiece model,"
            " e.g. --config.tokenizer.path=/data/c4_en.model"
        )
    return file.read_bytes()
