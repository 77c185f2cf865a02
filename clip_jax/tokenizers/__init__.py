"""Texts to token ids. A tokenizer and the text tower that reads its ids must agree; `make_tokenizer` sees to it."""

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
            raise ValueError(f"tokenizer.{key}={value!r} is for tokenizers with a file; clip_bpe has CLIP's own way")
    return ClipBPE(text.length, text.vocab_size, truncate, tokenizer_file or config.path)


def _sentencepiece(config: TokenizerConfig, text: TextTransformer, truncate: bool, tokenizer_file: bytes) -> Tokenizer:
    return SentencePiece(tokenizer_file or config.path, text.length, truncate, **_settings(config))


def _huggingface(config: TokenizerConfig, text: TextTransformer, truncate: bool, tokenizer_file: bytes) -> Tokenizer:
    return HuggingFace(tokenizer_file or config.path, text.length, truncate, **_settings(config))


def _settings(config: TokenizerConfig) -> dict[str, Any]:
    return {"clean": config.clean, "pad_id": config.pad_id, "keep_end": config.keep_end}


# name in `tokenizer.name` -> (config, text tower, truncate, its file's content where that travelled) -> Tokenizer
TOKENIZERS = {
    "clip_bpe": _clip_bpe,
    "sentencepiece": _sentencepiece,
    "huggingface": _huggingface,
}


def make_tokenizer(
    config: TokenizerConfig, text: TextTransformer, *, truncate: bool = True, tokenizer_file: bytes = b""
) -> Tokenizer:
    """Return the tokenizer of a text tower.

    Args:
      truncate: cut texts that are too long, keeping the end token; False raises. Training and evaluation cut,
        because one long caption must not end a run; `clip_jax.load` raises unless told otherwise, as OpenAI does.
      tokenizer_file: what `config.path` contained, where it travelled with the weights; empty to read the path.

    Raises:
      ValueError: if tokenizer and text tower disagree, or the tokenizer's file can't be used.
    """
    tokenizer = TOKENIZERS[config.name](config, text, truncate, tokenizer_file)
    # A tower may have some rows more than there are tokens, a round number for the hardware: CLIPA 32,000 for 30,522.
    rounded_up = tokenizer.vocab_size <= text.vocab_size <= 1.05 * tokenizer.vocab_size
    fits = {"vocab_size": rounded_up, "eos_id": text.pool != "end" or text.eos_id == tokenizer.eos_id}
    for field, fit in fits.items():
        theirs, ours = getattr(text, field), getattr(tokenizer, field)
        if not fit:
            raise ValueError(
                f"model.text.{field}={theirs} does not fit tokenizer.name={config.name!r}, whose {field} is {ours};"
                f" set model.text.{field}={ours}"
            )
    return tokenizer


__all__ = ["TOKENIZERS", "ClipBPE", "HuggingFace", "SentencePiece", "make_tokenizer"]
