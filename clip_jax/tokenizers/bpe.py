"""CLIP's byte-level byte-pair encoding (BPE), with the ids of OpenAI's tokenizer on any text.

A cleaned text is split into words by a regular expression, and the UTF-8 bytes of each word are merged pair by pair,
the earliest merge of the table first. Sources: https://github.com/openai/CLIP/blob/2558ec83f8fdfd5b500bf0c7255d1f53b5dbf588/clip/simple_tokenizer.py,
Sennrich et al. 2016 (arXiv:1508.07909). The table `clip_merges.txt.gz` is OpenAI's (clip_merges.LICENSE): its header
and the 48,894 merges that CLIP uses. Two properties of OpenAI's tokenizer are kept because weights depend on them: the
string `<|endoftext|>` in a text becomes the end token, and padding is id 0, which is also the token '!'. open_clip
renamed the special tokens and encodes that string as ordinary characters.

Deviation: a `vocab_size` below 49,408 keeps only the first merges, and the two special tokens are the last two ids.
Any text can still be encoded, in more tokens. This is for small models with a small embedding table.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import heapq
import importlib.resources
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import regex

from clip_jax.tokenizers.base import RowTokenizer, read_file
from clip_jax.tokenizers.cleaning import clean

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_VOCAB_SIZE = 49_408  # of the published table: 512 bytes, 48,894 merges, start and end
_BYTE_SYMBOLS = 512  # every byte inside a word, then every byte at a word's end
_PRINTABLE = 188  # bytes that Latin-1 prints
_WORD_END = "</w>"
_SPLIT = regex.compile(
    rf"{regex.escape(START)}|{regex.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
# The 65,536 most recent words cover nearly all words of a corpus. Words above 64 characters (URLs, text without spaces)
# rarely repeat and are not cached, which bounds the cache to about 100 MB.
_CACHED_WORDS = 65_536
_CACHED_LENGTH = 64  # characters


class ClipBPE(RowTokenizer):
    """CLIP's tokenizer. A row of ids is: start token, text tokens, end token, padding.

    `pad_id` is 0, which is also the token '!': locate the end of a text by `eos_id`, the greatest id, not by padding.

    >>> tokenizer = ClipBPE(length=8)
    >>> rows = tokenizer(["A happy Dog", "dog"])
    >>> rows.tolist()
    [[49406, 320, 900, 1929, 49407, 0, 0, 0], [49406, 1929, 49407, 0, 0, 0, 0, 0]]
    >>> tokenizer.decode(rows[0])  # in lower case, with a space after each word
    'a happy dog'
    """

    pad_id: int = 0

    def __init__(
        self, length: int = 77, vocab_size: int = MAX_VOCAB_SIZE, truncate: bool = True, merges_path: str | bytes = ""
    ):
        """Read the merge table.

        Args:
          length: ids per row, including start and end token.
          vocab_size: 512 bytes, the first merges, and 2 special tokens; 515 to 49,408 for CLIP's table.
          truncate: truncate texts that are too long, keeping the end token; False raises ValueError.
          merges_path: path or content of another merge table, plain or gzip, one merge per line, the most frequent
            first; empty for CLIP's.

        Raises:
          ValueError: if a size is out of range, or the file is no merge table.
        """
        super().__init__(length, truncate)
        self._arguments = (length, vocab_size, truncate, merges_path)
        table = _read_table(merges_path)
        largest = len(table.symbols) + 2
        if not _BYTE_SYMBOLS + 3 <= vocab_size <= largest:
            raise ValueError(
                f"model.text.vocab_size: expected {_BYTE_SYMBOLS + 3} to {largest} with clip_bpe (512 bytes, 1 to"
                f" {len(table.pairs)} merges and 2 special tokens), got {vocab_size}; use e.g. {largest}"
            )
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, vocab_size - 2, vocab_size - 1
        self._symbols = table.symbols[: vocab_size - 2]
        pairs = table.pairs[: vocab_size - 2 - _BYTE_SYMBOLS]
        self._merges = {pair: merged for merged, pair in enumerate(pairs, start=_BYTE_SYMBOLS)}
        self._words = table.words
        self._recent = functools.lru_cache(_CACHED_WORDS)(self._encode_chunk)

    def __reduce__(self) -> tuple[type[ClipBPE], tuple[Any, ...]]:
        """Pickle the arguments: the cache of words can't be pickled."""
        return type(self), self._arguments

    def _encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        return ([self.bos_id, *self.encode(text), self.eos_id] for text in texts)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of any length, without start and end token."""
        ids: list[int] = []
        for chunk in clean(text).split(" "):
            # No word contains a space, so the ids of a chunk do not depend on the rest of the text.
            ids += self._recent(chunk) if len(chunk) <= _CACHED_LENGTH else self._encode_chunk(chunk)
        return ids

    def _decode(self, ids: list[int]) -> str:
        text = b"".join(self._symbols[token] for token in ids if token != self.bos_id)
        return text.decode("utf-8", errors="replace").strip()

    def as_huggingface(self) -> tuple[dict[str, int], list[str]]:
        """Return the content of Hugging Face's `vocab.json` and `merges.txt`: ids by token, merges in order."""
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


_NONE = 1 << 30  # greater than any id


def _merge(ids: list[int], merges: Mapping[tuple[int, int], int]) -> list[int]:
    """Merge neighbors, the lowest new id first and from left to right, until no pair is in the table."""
    find = merges.get
    merged = [find(pair, _NONE) for pair in itertools.pairwise(ids)]  # new id of each id and its right neighbor
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
    """Return the result of `_merge` in n·log n steps; its n² steps take seconds for 10,000 characters without a space.

    A priority queue of pairs gives the same ids because a merged pair has a higher id than its two members: no merge
    creates a pair that should have been merged earlier.
    """
    count, queue = len(ids), []
    left, right = list(range(-1, count - 1)), list(range(1, count + 1))  # indices of the remaining neighbors

    def push(first: int, second: int) -> None:
        merged = merges.get((ids[first], ids[second]))
        if merged is not None:
            heapq.heappush(queue, (merged, first))

    for place in range(count - 1):
        push(place, place + 1)
    while queue:
        merged, place = heapq.heappop(queue)
        removed = right[place]
        if removed == count or merges.get((ids[place], ids[removed])) != merged:
            continue  # one of the two was merged with another neighbor
        ids[place], ids[removed] = merged, _REMOVED
        right[place] = after = right[removed]
        if after < count:
            left[after] = place
            push(place, after)
        if left[place] >= 0:
            push(left[place], place)
    return (token for token in ids if token != _REMOVED)


def _byte_order() -> list[int]:
    """Return the bytes in the order of their ids: the printable ones of Latin-1, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


_BYTE_ID = [_byte_order().index(byte) for byte in range(256)]
# Characters that represent the bytes in files: Latin-1 where it is printable, otherwise from U+0100 on.
_CHARACTERS = [chr(byte if number < _PRINTABLE else 256 + number - _PRINTABLE) for byte, number in enumerate(_BYTE_ID)]
_REMOVED = -1
_SHORT = 64  # bytes; above, the priority queue is faster


@dataclasses.dataclass(frozen=True)
class _Table:
    """A merge table as ids."""

    pairs: tuple[tuple[int, int], ...]  # the two ids that merge `i` joins to id 512 + i
    symbols: tuple[bytes, ...]  # the bytes of every id, with a space at a word's end
    # Ids of complete words of ASCII letters, which need no merges. Only of CLIP's table, where a test checks that the
    # merges of each word end in its id; other tables need not have this property.
    words: Mapping[str, int]


@functools.lru_cache(maxsize=4)
def _read_table(path: str | bytes) -> _Table:
    order = _byte_order()
    characters = [_CHARACTERS[byte] for byte in order]
    id_of = {c: i for i, c in enumerate(characters)} | {c + _WORD_END: 256 + i for i, c in enumerate(characters)}
    symbols = [bytes([byte]) for byte in order] + [bytes([byte]) + b" " for byte in order]
    pairs = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line or (number == 1 and "#version:" in line):  # '#version: 0.2', with or without a name
            continue
        parts = line.split()
        if len(parts) != 2 or not id_of.keys() >= set(parts) or "".join(parts) in id_of:
            raise ValueError(
                f"the tokenizer's merge table, line {number}: expected two symbols, each a byte or the result of an"
                f" earlier line, that form a new one, e.g. 'th e</w>', got {line[:60]!r}; give another file"
            )
        first, second = (id_of[part] for part in parts)
        id_of["".join(parts)] = len(symbols)
        pairs.append((first, second))
        symbols.append(symbols[first] + symbols[second])
    words = {symbol[:-1].decode("latin-1"): i for i, symbol in enumerate(symbols) if symbol.endswith(b" ")}
    known = {word: i for word, i in words.items() if word.isascii() and word.isalpha() and not path}
    return _Table(tuple(pairs), tuple(symbols), known)


def _read_text(path: str | bytes) -> str:
    if not path:
        content = (importlib.resources.files(__package__) / "clip_merges.txt.gz").read_bytes()
    else:
        content = path if isinstance(path, bytes) else read_file(path, "/data/merges.txt")
    return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8")
