"""SentencePiece with a user's `.model` file: the tokenizer of SigLIP and most multilingual text towers.

Source: Kudo and Richardson 2018 (arXiv:1808.06226), https://github.com/google/sentencepiece. The model file defines
normalization, pieces and special ids.
"""

from __future__ import annotations

from clip_jax.tokenizers.file_tokenizer import FileTokenizer

_ABSENT = -1  # sentencepiece's id of a special piece that a model does not have


class SentencePiece(FileTokenizer):
    """A row of ids is: pieces, end token, padding. There is no start token, as in SigLIP and SigLIP 2.

    `pad_id` is the argument, or the model's, or the end token if the model has none.
    """

    EXAMPLE_PATH = "/data/c4_en.model"

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ValueError(f"{name}: this is not a SentencePiece model ({error})") from error
        eos_id, pad_id = self._processor.eos_id(), self._processor.pad_id()
        if eos_id == _ABSENT:
            raise ValueError(
                f"{name}: the model has no end token, which the text tower needs for pooling;"
                " train it with one, e.g. spm_train --eos_id=1"
            )
        return self._processor.vocab_size(), eos_id, eos_id if pad_id == _ABSENT else pad_id

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [[*ids, self.eos_id] for ids in self._processor.encode(texts)]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)
