"""Tokenizer classes of transformers 5 that take vocabulary and merges from tokenizer.json and define the rest.

Each replaces the normalizer, the pre-tokenizer and options of the model, most also special tokens around a text, even
if tokenizer.json has others. Source: transformers `models/*/tokenization_*.py`, release 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from clip_jax.tokenizers.bpe import END, START


def _sequence(kind: str, *members: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(members)}


def _split(pattern: Mapping[str, str], behavior: str, invert: bool) -> dict[str, Any]:
    return {"type": "Split", "pattern": dict(pattern), "behavior": behavior, "invert": invert}


_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_LOWERCASE = {"type": "Lowercase"}
# OpenAI's pattern, without the flag for upper case: the text is in lower case.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CLIP_PARTS = {
    "normalizer": _sequence(
        "normalizers", {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, _LOWERCASE
    ),
    "pre_tokenizer": _sequence("pretokenizers", _split({"Regex": _CLIP_WORDS}, "Removed", True), _BYTE_LEVEL),
}
_GEMMA_PARTS = {
    "normalizer": _SPACES,
    "pre_tokenizer": _split({"String": " "}, "MergedWithPrevious", False),
}


def _words_with_marker(file: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of XLM-R's and T5's classes: the file's character map, words, and "▁" before each."""
    normalizer = file["normalizer"] or {}
    charsmap = [part for part in normalizer.get("normalizers", [normalizer]) if part.get("type") == "Precompiled"]
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    marker = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    return {
        "normalizer": charsmap[0] if charsmap else None,
        "pre_tokenizer": _sequence("pretokenizers", {"type": "WhitespaceSplit"}, marker),
    }


def _bert(file: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    normalizer = {"type": "BertNormalizer", "clean_text": True, "strip_accents": settings.get("strip_accents")}
    normalizer |= {"handle_chinese_chars": settings.get("tokenize_chinese_chars", True)}
    normalizer |= {"lowercase": settings.get("do_lower_case", True)}
    return {"normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}}


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """A tokenizer class that takes vocabulary and merges from tokenizer.json and defines the rest."""

    model: str  # type of the model
    tokens: Mapping[str, str]  # default special tokens
    parts: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]  # of (file, settings)
    options: Mapping[str, Any]  # of the model; `unk_token` is the special token
    template: tuple[str, ...] | None  # special tokens around the text, '' for the text; None: the file's
    padding_side: str = "right"


def _named(text: str) -> dict[str, str]:
    return {f"{key}_token": token for key, token in (pair.split("=") for pair in text.split())}


_BPE_OPTIONS = {"dropout": None, "ignore_merges": False}
_CLIP_OPTIONS = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False}
_GEMMA = TokenizerClass(
    "BPE",
    _named("bos=<bos> eos=<eos> unk=<unk> pad=<pad> mask=<mask>"),
    lambda file, settings: _GEMMA_PARTS,
    _BPE_OPTIONS
    | {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    | {"fuse_unk": True, "byte_fallback": True},
    None,
    "left",
)
_XLM_ROBERTA = "bos=<s> eos=</s> unk=<unk> sep=</s> pad=<pad> cls=<s> mask=<mask>"
REBUILT: Mapping[str, TokenizerClass] = {
    "CLIPTokenizer": TokenizerClass(
        "BPE",
        _named(f"bos={START} eos={END} unk={END} pad={END}"),
        lambda file, settings: CLIP_PARTS,
        _BPE_OPTIONS | _CLIP_OPTIONS | {"byte_fallback": False},
        ("bos_token", "", "eos_token"),
    ),
    "GemmaTokenizer": _GEMMA,
    "Siglip2Tokenizer": dataclasses.replace(
        _GEMMA,
        parts=lambda file, settings: _GEMMA_PARTS | {"normalizer": _sequence("normalizers", _LOWERCASE, _SPACES)},
    ),
    "XLMRobertaTokenizer": TokenizerClass(
        *("Unigram", _named(_XLM_ROBERTA), _words_with_marker),
        {"unk_id": 3, "byte_fallback": False},
        ("bos_token", "", "eos_token"),
    ),
    "T5Tokenizer": TokenizerClass(
        "Unigram",
        _named("eos=</s> unk=<unk> pad=<pad>"),
        lambda file, settings: _words_with_marker(file, {}),
        {"unk_id": 2, "byte_fallback": False},
        ("", "eos_token"),
    ),
    "BertTokenizer": TokenizerClass(
        "WordPiece",
        _named("unk=[UNK] sep=[SEP] pad=[PAD] cls=[CLS] mask=[MASK]"),
        _bert,
        {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        ("cls_token", "", "sep_token"),
    ),
}
