"""SentencePiece with a user's model file: SigLIP's and most multilingual text towers' tokenizer.

Source: Kudo and Richardson 2018 (arXiv:1808.06226), https://github.com/google/sentencepiece. The model file decides
normalisation, pieces and special ids; nothing is cleaned before it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer

_ABSENT = -1  # sentencepiece's id of a special piece that a model doesn't have


class SentencePiece:
    """Texts to rows of token ids: start (where the model has one), pieces, end, padding. Safe in several threads.

    `pad_id` is the model's, or its end token where it has none, as in SigLIP.
    """

    def __init__(self, path: str | os.PathLike[str] | bytes, length: int, truncate: bool = True):
        """Read a model.

        Args:
          path: a `.model` file, or what one contains.
          length: of a row, start and end token included.
          truncate: cut a text that is too long before the row's end and put the end token there; else raise.

        Raises:
          ValueError: if the file is missing, is no model, or has no end token, or `length` leaves no room.
        """
        import sentencepiece

        if length < 3:
            raise ValueError(f"model.text.length={length} leaves no room for a text; use at least 3, e.g. 64")
        model_file = path if isinstance(path, bytes) else _read(path)
        name = "the model file" if isinstance(path, bytes) else f"tokenizer.path={os.fspath(path)!r}"
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_file)
        except RuntimeError as error:
            raise ValueError(f"{name}: this is not a SentencePiece model ({error})") from error
        self.length, self.truncate = length, truncate
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id, pad = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        if self.eos_id == _ABSENT:
            raise ValueError(
                f"{name}: the model has no end token, where the text tower reads its result;"
                " train it with one, e.g. spm_train --eos_id=1"
            )
        self.pad_id = self.eos_id if pad == _ABSENT else pad
        self._start = [] if self.bos_id == _ABSENT else [self.bos_id]

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        """Return one row of `length` ids for every text.

        Raises:
          ValueError: if a text is too long and `truncate` is False.
          TypeError: if one string was given where several are expected.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"expected a sequence of texts, got one: wrap it, [{texts[:40]!r}]")
        rows = np.full((len(texts), self.length), self.pad_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [*self._start, *self._processor.encode(text), self.eos_id]
            if len(ids) > self.length:
                if not self.truncate:
                    raise ValueError(
                        f"the text {text[:60]!r}… has {len(ids)} tokens with start and end, but"
                        f" model.text.length={self.length}; shorten it, or pass truncate=True to have it cut"
                    )
                ids[self.length - 1 :] = [self.eos_id]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of one row, up to its end token."""
        row = list(map(int, ids))
        end = row.index(self.eos_id) if self.eos_id in row else len(row)
        return self._processor.decode(row[len(self._start) : end])


def _read(path: str | os.PathLike[str]) -> bytes:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer.path={os.fspath(path)!r}: there is no such file; give a SentencePiece model,"
            " e.g. --config.tokenizer.path=/data/c4_en.model"
        )
    return file.read_bytes()
