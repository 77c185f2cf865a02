"""Tokenizers that read a user's file: SentencePiece, also with XLM-R's ids, and Hugging Face's `tokenizer.json`.

The file defines normalization, pieces and special tokens; cleaning before and padding after tokenization come from
`TokenizerConfig`.

Sources: Kudo and Richardson 2018 (arXiv:1808.06226), https://github.com/google/sentencepiece; fairseq's ids:
transformers `convert_slow_tokenizer.py` (XLMRobertaConverter), Conneau et al. 2020 (arXiv:1911.02116);
https://github.com/huggingface/tokenizers (extra: `clip-jax-tpu[interop]`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from clip_jax.tokenizers.base import RowTokenizer, read_file
from clip_jax.tokenizers.cleaning import CLEAN


class FileTokenizer(RowTokenizer):
    """A tokenizer with a user's file. Subclasses also implement `_load`."""

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
          clean: cleaning before tokenization: a key of `cleaning.CLEAN`.
          pad_id: -1 for the file's own.
          keep_end: False replaces the end token by padding, as in CLIPA's training.

        Raises:
          ValueError: if the file is missing, is no tokenizer, or has no end token, or if `length` is too short.
        """
        super().__init__(length, truncate)
        content = path if isinstance(path, bytes) else read_file(path, self.EXAMPLE_PATH)
        name = "the tokenizer's file" if isinstance(path, bytes) else f"tokenizer.path={os.fspath(path)!r}"
        self.vocab_size, self.eos_id, own_pad_id = self._load(content, name)
        self.pad_id = own_pad_id if pad_id < 0 else pad_id
        self._clean, self._keep_end = CLEAN[clean], keep_end

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        """Read the file's content; return vocabulary size, end id and padding id. `name` is for errors."""
        raise NotImplementedError


def _load_sentencepiece(content: bytes, name: str, first_pieces: int = 0) -> tuple[Any, list[str]]:
    """Return a SentencePieceProcessor and its first pieces. `name` is for errors."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a SentencePiece model, got {error}; give another file") from error
    return processor, [processor.id_to_piece(i) for i in range(min(first_pieces, processor.vocab_size()))]


class SentencePiece(FileTokenizer):
    """The tokenizer of SigLIP and most multilingual text towers. A row of ids is: pieces, end token, padding.

    `pad_id` is the argument, or the model's, or the end token if the model has none.
    """

    EXAMPLE_PATH = "/data/c4_en.model"
    fairseq_vocab_size = 0  # of the model with fairseq's ids; 0 if it has them already, or has other first pieces

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        self._processor, first = _load_sentencepiece(content, name, first_pieces=3)
        self.fairseq_vocab_size = _fairseq_vocab_size(self._processor, first)
        eos_id, pad_id = self._processor.eos_id(), self._processor.pad_id()
        if eos_id < 0:  # absent
            raise ValueError(
                f"{name}: expected an end token, which the text tower needs for pooling, got none; train the model"
                " with one, e.g. spm_train --eos_id=1"
            )
        return self._processor.vocab_size(), eos_id, eos_id if pad_id < 0 else pad_id

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*ids, self.eos_id] for ids in self._processor.encode([self._clean(text) for text in texts])]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


_FAIRSEQ_PIECES = ["<unk>", "<s>", "</s>"]  # the first pieces of a model whose ids fairseq changes


def fairseq_vocab_size(content: bytes) -> int:
    """Return the vocabulary size of a SentencePiece model with fairseq's ids, 0 if it has other first pieces."""
    return _fairseq_vocab_size(*_load_sentencepiece(content, "the tokenizer's file", first_pieces=3))


def _fairseq_vocab_size(processor: Any, first: list[str]) -> int:
    return processor.vocab_size() + 2 if first == _FAIRSEQ_PIECES else 0


def piece_ids(content: bytes, name: str) -> dict[str, int]:
    """Return the ids of a SentencePiece model's pieces for `tokenizer.name` 'sentencepiece' or 'xlm_roberta'."""
    processor, _ = _load_sentencepiece(content, "the tokenizer's file")
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    if name == "xlm_roberta":
        pieces = ["<s>", "<pad>", "</s>", "<unk>", *pieces[3:], "<mask>"]
    return {piece: number for number, piece in enumerate(pieces)}


class XlmRoberta(SentencePiece):
    """The tokenizer of XLM-R, XLM-V and MetaCLIP 2. A row of ids is: <s>, pieces, </s>, padding.

    The ids are fairseq's: <s> 0, <pad> 1, </s> 2, <unk> 3, then the model's pieces from its fourth on, one higher than
    in the model, and <mask> last. The vocabulary has two more tokens than the model.
    """

    EXAMPLE_PATH = "/data/sentencepiece.bpe.model"

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        self._processor, first = _load_sentencepiece(content, name, first_pieces=3)
        if first != _FAIRSEQ_PIECES:
            raise ValueError(
                f"{name}: expected the first pieces <unk>, <s>, </s> for tokenizer.name='xlm_roberta', got"
                f" {', '.join(first)}; use tokenizer.name='sentencepiece'"
            )
        return self._processor.vocab_size() + 2, 2, 1

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._processor.encode([self._clean(text) for text in texts])
        return [[0, *(piece + 1 if piece else 3 for piece in row), 2] for row in rows]

    def _decode(self, ids: list[int]) -> str:
        pieces = (0 if number == 3 else number - 1 for number in ids if number > 2)
        return self._processor.decode([piece for piece in pieces if piece < self._processor.vocab_size()])


def load_tokenizer_json(content: bytes, name: str) -> Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.json. `name` is for errors."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tokenizer.name='huggingface' needs a library: pip install tokenizers") from error
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"{name}: expected a tokenizer.json, got {error}; give another file") from error


def added_token(**flags: Any) -> Any:
    """Return a `tokenizers.AddedToken`."""
    import tokenizers

    return tokenizers.AddedToken(**flags)


class HuggingFace(FileTokenizer):
    """A row of ids is: the tokens that the file defines, with its special tokens, and padding.

    The end token is the last token of an empty text. `pad_id` is the argument, the file's, the id of the token `<pad>`
    or `[PAD]`, or the end token: the first of these that exists. Padding and truncation are on the file's sides, by
    default right. Truncation keeps all special tokens.
    """

    EXAMPLE_PATH = "/data/bert/tokenizer.json"

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        self._tokenizer = load_tokenizer_json(content, name)
        padding, truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
        self._pad_left = padding.get("direction") == "left"
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = self._tokenizer.encode("").ids
        if not special:
            raise ValueError(
                f"{name}: expected an end token, which the text tower needs for pooling, got none; give the file's"
                " post_processor a template such as '$A </s>'"
            )
        named = [self._tokenizer.token_to_id(token) for token in ("<pad>", "[PAD]")]
        own_pad_id = next(token for token in (padding.get("pad_id"), *named, special[-1]) if token is not None)
        if self.truncate:
            if self.length <= len(special):
                raise ValueError(
                    f"model.text.context_length: expected at least {len(special) + 1} by {name}, which adds"
                    f" {len(special)} special tokens to a text, got {self.length}; use e.g. 77"
                )
            self._tokenizer.enable_truncation(self.length, direction=truncation.get("direction", "right"))
        return self._tokenizer.get_vocab_size(), special[-1], own_pad_id

    def token(self, token_id: int) -> str:
        """Return the token of an id, as the file spells it."""
        return self._tokenizer.id_to_token(token_id)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch([self._clean(text) for text in texts])]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
