"""Tokenizers: texts to rows of token ids. `make_tokenizer` checks that tokenizer and text tower match."""

from __future__ import annotations

import functools

from clip_jax.config import TextTransformer, TokenizerConfig
from clip_jax.tokenizers.bpe import ClipBPE
from clip_jax.tokenizers.file_tokenizer import (
    FileTokenizer,
    HuggingFace,
    SentencePiece,
    XlmRoberta,
    fairseq_vocab_size,
)
from clip_jax.typing import Tokenizer


def _clip_bpe(config: TokenizerConfig, text: TextTransformer, truncate: bool, tokenizer_file: bytes) -> Tokenizer:
    for key in ("clean", "pad_id", "keep_end"):
        if (value := getattr(config, key)) != (default := getattr(TokenizerConfig(), key)):
            raise ValueError(f"tokenizer.{key}: expected {default!r} with clip_bpe, got {value!r}; remove it")
    return ClipBPE(text.context_length, text.vocab_size, truncate, tokenizer_file or config.path)


def _from_file(
    cls: type[FileTokenizer], config: TokenizerConfig, text: TextTransformer, truncate: bool, tokenizer_file: bytes
) -> Tokenizer:
    settings = {"clean": config.clean, "pad_id": config.pad_id, "keep_end": config.keep_end}
    return cls(tokenizer_file or config.path, text.context_length, truncate, **settings)


# config key `tokenizer.name` -> function of (config, text tower, truncate, content of the tokenizer's file or b"")
TOKENIZERS = {
    "clip_bpe": _clip_bpe,
    "sentencepiece": functools.partial(_from_file, SentencePiece),
    "xlm_roberta": functools.partial(_from_file, XlmRoberta),
    "huggingface": functools.partial(_from_file, HuggingFace),
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
        if not fit:
            expected = getattr(tokenizer, field)
            raise ValueError(
                f"model.text.{field}: expected {expected} by tokenizer.name={config.name!r}, got"
                f" {getattr(text, field)}; set model.text.{field}={expected}"
            )
    if text.vocab_size == getattr(tokenizer, "fairseq_vocab_size", None):
        raise ValueError(
            "tokenizer.name: expected 'xlm_roberta' for a SentencePiece model that starts with <unk>, <s>, </s> and a"
            f" text tower with two more tokens, model.text.vocab_size={text.vocab_size}, because fairseq's ids are one"
            " higher; got 'sentencepiece'; set tokenizer.name='xlm_roberta'"
        )
    return tokenizer
