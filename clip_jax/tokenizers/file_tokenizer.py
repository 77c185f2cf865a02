"""Tokenizers that read a user's file: SentencePiece and Hugging Face's `tokenizer.json`.

The file defines normalization, pieces and special tokens; cleaning before and padding after tokenization come from
`TokenizerConfig`.

Sources: Kudo and Richardson 2018 (arXiv:1808.06226), https://github.com/google/sentencepiece;
https://github.com/huggingface/tokenizers (extra: `clip-jax-tpu[interop]`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

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
          clean: cleaning before tokenization: 'none', 'lower', 'whitespace' or 'canonicalize'.
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


class SentencePiece(FileTokenizer):
    """The tokenizer of SigLIP and most multilingual text towers. A row of ids is: pieces, end token, padding.

    `pad_id` is the argument, or the model's, or the end token if the model has none.
    """

    EXAMPLE_PATH = "/data/c4_en.model"

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ValueError(f"{name}: expected a SentencePiece model, got {error}; give another file") from error
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


class HuggingFace(FileTokenizer):
    """A row of ids is: the tokens that the file defines, with its special tokens, and padding.

    The end token is the last token of an empty text. `pad_id` is the argument, the file's, the id of the token `<pad>`
    or `[PAD]`, or the end token: the first of these that exists.
    """

    EXAMPLE_PATH = "/data/bert/tokenizer.json"

    def _load(self, content: bytes, name: str) -> tuple[int, int, int]:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("tokenizer.name='huggingface' needs a library: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{name}: expected a tokenizer.json, got {error}; give another file") from error
        padding = self._tokenizer.padding or {}
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
        return self._tokenizer.get_vocab_size(), special[-1], own_pad_id

    def token(self, token_id: int) -> str:
        """Return the token of an id, as the file spells it."""
        return self._tokenizer.id_to_token(token_id)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch([self._clean(text) for text in texts])]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
