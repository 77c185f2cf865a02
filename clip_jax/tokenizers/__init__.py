"""Tokenizers: texts to rows of token ids. `make_tokenizer` checks that tokenizer and text tower match."""

from __future__ import annotations

from typing import Any

from clip_jax.config import TextTransformer, TokenizerConfig
from clip_jax.tokenizers.bpe import ClipBPE
from clip_jax.tokenizers.huggingface import HuggingFace
from clip_jax.tokenizers.sentencepiece import SentencePiece
from clip_jax.typing import Tokenizer


def _clip_bpe(config: TokenizerConfig, text: TextTransformer, truncate: bool, tokenizer_file: bytes) -> Tokenizer:
    for key, value in _settings(config).items():
        if value != getattr(TokenizerConfig(), key):
            raise ValueError(f"tokenizer.{key}={value!r} is for tokenizers with a file, not for clip_bpe")
    return ClipBPE(text.context_length, text.vocab_size, truncate, tokenizer_file or config.path)


def _sentencepiece(config: TokenizerConfig, text: TextTransformer, truncate: bool, tokenizer_file: bytes) -> Tokenizer:
    return SentencePiece(tokenizer_file or config.path, text.context_length, truncate, **_settings(config))


def _huggingface(config: TokenizerConfig, text: TextTransformer, truncate: bool, tokenizer_file: bytes) -> Tokenizer:
    return HuggingFace(tokenizer_file or config.path, text.context_length, truncate, **_settings(config))


def _settings(config: TokenizerConfig) -> dict[str, Any]:
    return {"clean": config.clean, "pad_id": config.pad_id, "keep_end": config.keep_end}


# config key `tokenizer.name` -> function of (config, text tower, truncate, content of the tokenizer's file or b"")
TOKENIZERS = {
    "clip_bpe": _clip_bpe,
    "sentencepiece": _sentencepiece,
    "huggingface": _huggingface,
}


def make_tokenizer(
    config: TokenizerConfig, text: TextTransformer, *, truncate: bool = True, tokenizer_file: bytes = b""
) -> Tokenizer:
    """Return the tokenizer of a text tower.

    >>> tokenizer = make_tokenizer(TokenizerConfig("clip_bpe"), TextTransformer(context_length=6))
    >>> tokenizer(["a happy dog"]).tolist()
    [[49406, 320, 900, 1929, 49407, 0]]

    Args:
      text: the text tower, for vocabulary size, length and end token.
      truncate: truncate texts that are too long, keeping the end token; False raises ValueError. Training and
        evaluation truncate; `clip_jax.load` raises by default, as OpenAI's `tokenize` does.
      tokenizer_file: content of the file `config.path`, if it is stored with the weights; empty to read the path.

    Raises:
      ValueError: if tokenizer and text tower do not match, or if the tokenizer's file can't be used.
    """
    tokenizer = TOKENIZERS[config.name](config, text, truncate, tokenizer_file)
    # An embedding table may be padded to a round number of rows: CLIPA has 32,000 for 30,522 tokens.
    rounded_up = tokenizer.vocab_size <= text.vocab_size <= 1.05 * tokenizer.vocab_size
    fits = {"vocab_size": rounded_up, "eos_id": text.pool != "end" or text.eos_id == tokenizer.eos_id}
    for field, fit in fits.items():
        given, expected = getattr(text, field), getattr(tokenizer, field)
        if not fit:
            raise ValueError(
                f"model.text.{field}={given} does not fit tokenizer.name={config.name!r}, whose {field} is {expected};"
                f" set model.text.{field}={expected}"
            )
    return tokenizer


__all__ = ["TOKENIZERS", "ClipBPE", "HuggingFace", "SentencePiece", "make_tokenizer"]
