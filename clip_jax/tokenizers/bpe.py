"""CLIP's byte-level byte-pair encoding, identical to OpenAI's on any text.

A text is repaired (ftfy), unescaped as HTML twice, its whitespace collapsed, lower-cased, split into words by a
regular expression, and every word's UTF-8 bytes are merged pair by pair, the earliest merge of the table first.

Source: https://github.com/openai/CLIP/blob/2558ec83f8fdfd5b500bf0c7255d1f53b5dbf588/clip/simple_tokenizer.py,
Sennrich et al. 2016 (arXiv:1508.07909). The table `clip_merges.txt.gz` is OpenAI's (clip_merges.LICENSE): its header
and the 48,894 merges that CLIP uses. Two properties of OpenAI's are kept because weights depend on them: a text that
contains `<|endoftext|>` contains that token, and padding is id 0, which is also the token '!'. open_clip renamed the
special tokens, so there such a text is read as ordinary characters.

Deviation: a `vocab_size` below 49,408 keeps the first merges only, and the two special tokens stay the last two ids.
Any text can still be written, in more tokens: what a small model with a small embedding table wants.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import heapq
import html
import importlib.resources
import itertools
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import ftfy
import numpy as np
import regex
from ftfy.badness import is_bad
from jaxtyping import Int32, Integer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_VOCAB_SIZE = 49_408  # of the published table: 512 bytes, 48,894 merges, start and end
_BYTE_SYMBOLS = 512  # every byte inside a word, then every byte at a word's end
_PRINTABLE = 188  # bytes that Latin-1 prints
_WORD_END = "</w>"
_SPLIT = regex.compile(
    rf"{regex.escape(START)}|{regex.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
_WHITESPACE = regex.compile(r"\s+")
# Characters that ftfy leaves alone where they aren't mojibake and are composed (NFC), and no '&', with which HTML's
# entities begin: ASCII; letters of Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari and Thai; dashes and signs; kana,
# CJK and Hangul; emoji.
_UNTOUCHED = re.compile(
    r"[ -%'-~\xa1-\xac\xae-\u0131\u0134-\u0148\u014a-\u01c3\u01cd-\u01f0\u01f4-\u02af\u0370-\u04ff\u05d0-\u05ea"
    r"\u0620-\u064a\u0904-\u0939\u0e01-\u0e30\u2010-\u2017\u2020-\u2027\u2030-\u203a\u20a0-\u20bf\u2100-\u214f"
    r"\u2190-\u23ff\u2500-\u27bf\u3001-\u30ff\u4e00-\u9fff\uac00-\ud7a3\ufe0f\u200d\U0001f300-\U0001faff]*"
)
# Captions repeat their words: a corpus's 65,536 most recent words are nearly all that it holds. Longer ones (addresses,
# text without spaces) rarely come again, so they are not kept: 64 characters bound the cache to some 100 MB at worst.
_CACHED_WORDS = 65_536
_CACHED_LENGTH = 64  # characters


class ClipBPE:
    """Texts to rows of token ids: start, tokens, end, zeros. Safe to call from several threads.

    `pad_id` is 0, a real token ('!'): find a text's end by `eos_id`, the greatest id, never by looking for padding.
    """

    pad_id: int = 0

    def __init__(
        self, length: int = 77, vocab_size: int = MAX_VOCAB_SIZE, truncate: bool = True, merges_path: str | bytes = ""
    ):
        """Read the merge table.

        Args:
          length: of a row, start and end token included.
          truncate: cut a text that is too long before the row's end and put the end token there; else raise.
          merges_path: a table of one's own, or what its file contains, plain or gzip, one merge a line, the most
            frequent first; empty for CLIP's.

        Raises:
          ValueError: if the vocabulary or the length is out of range, or the table is not one.
        """
        if length < 3:
            raise ValueError(
                f"model.text.length={length} leaves no room between start and end; use at least 3, e.g. 77"
            )
        table = _read_table(merges_path)
        largest = len(table.symbols) + 2
        if not _BYTE_SYMBOLS + 3 <= vocab_size <= largest:
            raise ValueError(
                f"model.text.vocab_size={vocab_size} is out of range: the tokenizer clip_bpe has 512 bytes, 1 to"
                f" {len(table.pairs)} merges and 2 special tokens; use {_BYTE_SYMBOLS + 3} to {largest}"
            )
        self.length, self.vocab_size, self.truncate = length, vocab_size, truncate
        self.bos_id, self.eos_id = vocab_size - 2, vocab_size - 1
        self._symbols = table.symbols[: vocab_size - 2]
        self._merges = {
            pair: _BYTE_SYMBOLS + rank for rank, pair in enumerate(table.pairs[: vocab_size - 2 - _BYTE_SYMBOLS])
        }
        self._words = table.words
        self._recent = functools.lru_cache(_CACHED_WORDS)(self._encode_chunk)

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
            ids = self.encode(text)
            if len(ids) > self.length - 2:
                self._check_length(text, len(ids) + 2)
                del ids[self.length - 2 :]
            row[: len(ids) + 2] = (self.bos_id, *ids, self.eos_id)
        return rows

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of any length, without start and end."""
        ids: list[int] = []
        for chunk in clean(text).split(" "):
            # No word reaches over a space, so a chunk has the same ids whatever stands around it.
            ids += self._recent(chunk) if len(chunk) <= _CACHED_LENGTH else self._encode_chunk(chunk)
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "L"]) -> str:
        """Return the text of one row, up to its end token and without its start: in lower case, words set apart."""
        kept = itertools.takewhile(lambda token: token != self.eos_id, map(int, ids))
        text = b"".join(self._symbols[token] for token in kept if token != self.bos_id)
        return text.decode("utf-8", errors="replace").strip()

    def as_huggingface(self) -> tuple[dict[str, int], list[str]]:
        """Return what Hugging Face's `vocab.json` and `merges.txt` hold: ids of written tokens, merges in order."""
        written = [_CHARACTERS[byte] for byte in _byte_order()]
        for symbol in self._symbols[256:]:
            ending = _WORD_END if symbol.endswith(b" ") else ""
            written.append("".join(_CHARACTERS[byte] for byte in symbol.removesuffix(b" ")) + ending)
        vocabulary = {token: number for number, token in enumerate([*written, START, END])}
        return vocabulary, [f"{written[first]} {written[second]}" for first, second in self._merges]

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        whole = self._words.get(chunk)
        if whole is not None and whole < self.bos_id:
            return (whole,)
        ids: list[int] = []
        for word in _SPLIT.findall(chunk):
            if word in (START, END):
                ids.append(self.bos_id if word == START else self.eos_id)
            else:
                ids += self._encode_word(word)
        return tuple(ids)

    def _encode_word(self, word: str) -> Iterable[int]:
        ids = [_BYTE_ID[byte] for byte in word.encode()]
        ids[-1] += 256
        return (_merge if len(ids) <= _SHORT else _merge_long)(ids, self._merges)

    def _check_length(self, text: str, tokens: int) -> None:
        if not self.truncate:
            raise ValueError(
                f"the text {text[:60]!r}… has {tokens} tokens with start and end, but model.text.length={self.length};"
                " shorten it, or pass truncate=True to have it cut"
            )


def clean(text: str) -> str:
    """Repair, unescape, collapse whitespace to single spaces and lower the case, as OpenAI does."""
    return repair(text).lower()


def repair(text: str) -> str:
    """Undo mojibake, unescape HTML twice, and collapse whitespace to single spaces."""
    # Printable ASCII without '&' is what ftfy and html leave alone, and its only whitespace is the space.
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())
    # ftfy's and html's work takes four times as long as all the rest.
    if not (_UNTOUCHED.fullmatch(text) and unicodedata.is_normalized("NFC", text) and not is_bad(text)):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = text.strip()
    # str.strip and \s disagree on U+001C to U+001F, so both are needed, in this order.
    return _WHITESPACE.sub(" ", text).strip()


_NONE = 1 << 30  # greater than any id


def _merge(ids: list[int], merges: Mapping[tuple[int, int], int]) -> list[int]:
    """Merge neighbours, the lowest new id first and from left to right, until no pair is in the table."""
    find = merges.get
    merged = [find(pair, _NONE) for pair in itertools.pairwise(ids)]  # what each place and the next would make
    while merged and (best := min(merged)) != _NONE:
        place = merged.index(best)
        ids[place : place + 2] = [best]
        del merged[place]
        if place:
            merged[place - 1] = find((ids[place - 1], best), _NONE)
        if place < len(merged):
            merged[place] = find((best, ids[place + 1]), _NONE)
    return ids


def _merge_long(ids: list[int], merges: Mapping[tuple[int, int], int]) -> Iterator[int]:
    """Do what `_merge` does, for words of any length: its n² steps are seconds for 10,000 characters without a space.

    A queue of the pairs gives the same ids, n·log n, because a pair is always of a higher id than its parts: no merge
    can make a pair that should have come before it.
    """
    count, queue = len(ids), []
    left, right = list(range(-1, count - 1)), list(range(1, count + 1))  # neighbours that are still there

    def offer(first: int, second: int) -> None:
        merged = merges.get((ids[first], ids[second]))
        if merged is not None:
            heapq.heappush(queue, (merged, first))

    for place in range(count - 1):
        offer(place, place + 1)
    while queue:
        merged, place = heapq.heappop(queue)
        gone = right[place]
        if gone == count or merges.get((ids[place], ids[gone])) != merged:
            continue  # one of the two has been merged with another since
        ids[place], ids[gone] = merged, _GONE
        right[place] = after = right[gone]
        if after < count:
            left[after] = place
            offer(place, after)
        if left[place] >= 0:
            offer(left[place], place)
    return (token for token in ids if token != _GONE)


def _byte_order() -> list[int]:
    """Return the bytes in the order of their ids: those that Latin-1 prints, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


_BYTE_ID = [_byte_order().index(byte) for byte in range(256)]
# How files write a byte: as Latin-1 prints it, and what it doesn't print as the characters from U+0100 on.
_CHARACTERS = [chr(byte if number < _PRINTABLE else 256 + number - _PRINTABLE) for byte, number in enumerate(_BYTE_ID)]
_GONE = -1
_SHORT = 64  # bytes; from there on the queue is faster


@dataclasses.dataclass(frozen=True)
class _Table:
    """A merge table in ids.

    pairs: the two ids that merge `i` joins to id 512 + i.
    symbols: the bytes that every id stands for, a space after a word's last.
    words: the ids of whole words of ASCII letters, for which nothing has to be merged. Only for CLIP's table, where a
      test merges each of them and sees it end as that one id; in a table of one's own that need not be so.
    """

    pairs: tuple[tuple[int, int], ...]
    symbols: tuple[bytes, ...]
    words: Mapping[str, int]


@functools.lru_cache(maxsize=4)
def _read_table(path: str | bytes) -> _Table:
    order = _byte_order()
    characters = [_CHARACTERS[byte] for byte in order]
    id_of = {c: i for i, c in enumerate(characters)} | {c + _WORD_END: 256 + i for i, c in enumerate(characters)}
    symbols = [bytes([byte]) for byte in order] + [bytes([byte]) + b" " for byte in order]
    pairs = []
    for number, line in _read_lines(path):
        parts = line.split()
        if len(parts) != 2 or not id_of.keys() >= set(parts) or "".join(parts) in id_of:
            raise ValueError(
                f"the tokenizer's merge table, line {number}: {line[:60]!r} is not a merge: expected two symbols, each"
                " a byte or made by a line above, that together are a new one, e.g. 'th e</w>'"
            )
        first, second = (id_of[part] for part in parts)
        id_of["".join(parts)] = len(symbols)
        pairs.append((first, second))
        symbols.append(symbols[first] + symbols[second])
    words = {symbol[:-1].decode("latin-1"): i for i, symbol in enumerate(symbols) if symbol.endswith(b" ")}
    known = {word: i for word, i in words.items() if word.isascii() and word.isalpha() and not path}
    return _Table(tuple(pairs), tuple(symbols), known)


def _read_lines(path: str | bytes) -> Iterator[tuple[int, str]]:
    """Yield the table's lines with their numbers, without a header ('#version: 0.2', with or without a name)."""
    content = path if isinstance(path, bytes) and path else _read_file(os.fsdecode(path))
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        if line and not (number == 1 and "#version:" in line):
            yield number, line


def _read_file(path: str) -> bytes:
    file = pathlib.Path(path).expanduser() if path else importlib.resources.files(__package__) / "clip_merges.txt.gz"
    if not file.is_file():
        raise ValueError(f"tokenizer.path={path!r}: there is no such file; leave it empty for CLIP's own merge table")
    return file.read_bytes()
