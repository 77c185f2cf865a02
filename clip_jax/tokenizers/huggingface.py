"""Hugging Face's `tokenizer.json`, read by the `tokenizers` library (extra: `clip-jax-tpu[interop]`).

Source: https://github.com/huggingface/tokenizers. The file defines normalization, pieces and special tokens; cleaning
before and padding after tokenization come from `TokenizerConfig`.
"""

from __future__ import annotations

from clip_jax.tokenizers.file_tokenizer import FileTokenizer

_PADDING = ("<pad>", "[PAD]")


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
        pad_ids = [number for token in _PADDING if (number := self._tokenizer.token_to_id(token)) is not None]
        pad_id = padding.get("pad_id", [*pad_ids, special[-1]][0])
        return self._tokenizer.get_vocab_size(), special[-1], pad_id

    def token(self, token_id: int) -> str:
        """Return the token of an id, as the file spells it."""
        return self._tokenizer.id_to_token(token_id)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
