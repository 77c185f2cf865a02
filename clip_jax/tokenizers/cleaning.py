"""Cleaning of texts before tokenization: `tokenizer.clean`.

Sources: openai/CLIP `clip/simple_tokenizer.py`; open_clip `tokenizer.py` (`get_clean_fn`); big_vision
`evaluators/proj/image_text/prompt_engineering.py` (`_canonicalize_string_py`); transformers `tokenization_siglip.py`.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable, Mapping

import ftfy
import regex
from ftfy.badness import is_bad

_WHITESPACE = regex.compile(r"\s+")
# Characters that ftfy does not change unless they are mojibake or not composed (NFC), without '&', the start of an HTML
# entity: ASCII; Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari and Thai letters; dashes and signs; kana, CJK and
# Hangul; emoji.
_UNTOUCHED = re.compile(
    r"[ -%'-~\xa1-\xac\xae-\u0131\u0134-\u0148\u014a-\u01c3\u01cd-\u01f0\u01f4-\u02af\u0370-\u04ff\u05d0-\u05ea"
    r"\u0620-\u064a\u0904-\u0939\u0e01-\u0e30\u2010-\u2017\u2020-\u2027\u2030-\u203a\u20a0-\u20bf\u2100-\u214f"
    r"\u2190-\u23ff\u2500-\u27bf\u3001-\u30ff\u4e00-\u9fff\uac00-\ud7a3\ufe0f\u200d\U0001f300-\U0001faff]*"
)
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str) -> str:
    """Repair and lower-case, as OpenAI does."""
    return repair(text).lower()


def repair(text: str) -> str:
    """Undo mojibake, HTML-unescape twice, and collapse whitespace to single spaces."""
    # ftfy and html do not change printable ASCII without '&', and its only whitespace is the space.
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())
    # ftfy and html take four times as long as the rest of the tokenizer.
    if not (_UNTOUCHED.fullmatch(text) and unicodedata.is_normalized("NFC", text) and not is_bad(text)):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    # str.strip and \s disagree on U+001C to U+001F, so both are needed, in this order.
    return _WHITESPACE.sub(" ", text.strip()).strip()


def _canonicalize(text: str) -> str:
    """Remove ASCII punctuation, replace underscores by spaces, and lower-case, as in SigLIP's evaluation."""
    return " ".join(repair(text).translate(_NO_PUNCTUATION).lower().split())


def _remove_punctuation(text: str) -> str:
    """Lower-case, remove ASCII punctuation and collapse whitespace, as transformers' SiglipTokenizer.

    It prepends "▁", the marker of a space, before it strips the text, so white space at the start remains as a marker.
    """
    collapsed = _WHITESPACE.sub(" ", text.replace("▁", " ").lower().translate(_DELETE_PUNCTUATION))
    return ("▁" if collapsed.startswith(" ") else "") + collapsed.strip()


# `tokenizer.clean` -> function. 'lower' is SigLIP 2's in transformers; 'whitespace' and 'canonicalize' are open_clip's.
CLEAN: Mapping[str, Callable[[str], str]] = {
    "none": str,
    "lower": str.lower,
    "whitespace": repair,
    "canonicalize": _canonicalize,
    "no_punctuation": _remove_punctuation,
}
