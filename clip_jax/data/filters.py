"""Filters of training data, `data.filters`: records that are good but not wanted.

A filtered record is no bad record. Its row of the batch gets another one, drawn by a hash of the record, its epoch and
the number of the attempt: before captions are tokenized and images decoded, and independently of the number of hosts.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import regex
from jaxtyping import Int64
from PIL import Image

from clip_jax.config import DataConfig, FilterConfig
from clip_jax.data import order
from clip_jax.data.captions import clean
from clip_jax.typing import DataSource, Record

log = logging.getLogger(__name__)

FILTERS = tuple(field.name for field in dataclasses.fields(FilterConfig))
MAX_ATTEMPTS = 10_000  # records that are drawn for one row
MIN_READS = 1000  # records that are read before filters that none has passed are refused

Records = list[Record | None]  # None: a bad record
Failed = tuple[str, str]  # filter and reason


class Criteria:
    """Which records and captions pass `data.filters`."""

    def __init__(self, config: DataConfig):
        self._config, self._weights = config.filters, config.captions
        self._letters_of_scripts = _letters(config.filters.caption_scripts)

    def __call__(self, record: Record) -> tuple[Record, Failed | None]:
        """Return the record with the captions that pass, and the failure of a record that does not pass."""
        if failed := self._image_failure(record.image):
            return record, failed
        return self._with_captions(record)

    def _image_failure(self, encoded: bytes) -> Failed | None:
        config = self._config
        if not (config.min_image_size or config.max_aspect_ratio) or not (size := image_size(encoded)):
            return None
        short, long = sorted(size)
        reason = f"an image of {size[0]} × {size[1]} pixels"
        if short < config.min_image_size:
            return "min_image_size", reason
        if config.max_aspect_ratio and long > config.max_aspect_ratio * short:
            return "max_aspect_ratio", reason
        return None

    def _with_captions(self, record: Record) -> tuple[Record, Failed | None]:
        """Return the record with the captions that pass, and the first one's failure if none does."""
        kept: dict[str, tuple[str, ...]] = {}
        failures = []
        for name, weight in self._weights.items():
            texts = [text for text in map(clean, record.captions.get(name, ())) if text and weight > 0]
            problems = [self._caption_failure(text) for text in texts]
            kept[name] = tuple(text for text, problem in zip(texts, problems, strict=True) if not problem)
            failures += [problem for problem in problems if problem]
        if any(kept.values()) or not failures:  # without any caption it is a bad record
            return dataclasses.replace(record, captions=kept), None
        return record, failures[0]

    def _caption_failure(self, text: str) -> Failed | None:
        config = self._config
        reason = f"the caption {text[:40]!r} of {len(text)} characters"
        if len(text) < config.min_caption_characters:
            return "min_caption_characters", reason
        if config.max_caption_characters and len(text) > config.max_caption_characters:
            return "max_caption_characters", reason
        if config.caption_scripts:
            letters = len(LETTERS.findall(text))
            if 2 * len(self._letters_of_scripts.findall(text)) <= letters:
                return "caption_scripts", reason
        return None


class Filters:
    """The filters of a run. Thread-safe."""

    def __init__(self, config: DataConfig, source: DataSource, ordered: order.Order):
        self._config, self._key, self._order = config.filters, source.key, ordered
        self._active = config.filters != FilterConfig()
        self._criteria = Criteria(config)
        self._failed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._any_passed = False

    def select(
        self,
        read: Callable[[Sequence[int]], Records],
        example_ids: Int64[np.ndarray, "n"],
        epochs: Int64[np.ndarray, "n"],
    ) -> tuple[Records, Int64[np.ndarray, "n"], Int64[np.ndarray, "n f"]]:
        """Read records, and others in place of filtered ones, until every row has one.

        Args:
          read: reads records by their example ids.

        Returns:
          The records, with the captions that pass; their example ids; and how many were filtered for each row by each
          of FILTERS. Bad records are not replaced here.

        Raises:
          ValueError: if no record passes.
        """
        records, found = read(example_ids.tolist()), example_ids.copy()
        counts = np.zeros((len(records), len(FILTERS)), np.int64)
        if not self._active:
            return records, found, counts
        rows, attempt = np.arange(len(records)), 0
        while True:
            rows = np.array([row for row in rows.tolist() if not self._pass(records, row, found, counts)], np.int64)
            if not len(rows):
                return records, found, counts
            attempt += 1
            self._check_passing(attempt, int(example_ids[rows[0]]))
            found[rows] = self._order.replacement(example_ids[rows], attempt, epochs[rows])
            for row, record in zip(rows.tolist(), read(found[rows].tolist()), strict=True):
                records[row] = record

    def _pass(self, records: Records, row: int, found: np.ndarray, counts: np.ndarray) -> bool:
        """Return whether a row's record passes, then with the captions that do; count it otherwise."""
        record, failed = records[row], None
        if record:
            records[row], failed = self._criteria(record)
        if failed:
            counts[row, FILTERS.index(failed[0])] += 1
            self._count(*failed, int(found[row]))
        self._any_passed |= bool(record and not failed)
        return not failed

    def _count(self, name: str, reason: str, example: int) -> None:
        with self._lock:
            self._failed[name] += 1
            first = self._failed[name] == 1
        if first:
            log.info(
                "record %s has %s: data.filters.%s=%s; records like it are counted as filtered_records/%s",
                *(self._key(example), reason, name, getattr(self._config, name), name),
            )

    def _check_passing(self, attempt: int, example: int) -> None:
        failed = self._failed.total()
        if attempt > MAX_ATTEMPTS or (not self._any_passed and failed >= MIN_READS):
            none = f"none of {attempt} records in place of {self._key(example)}" if self._any_passed else "no record"
            counts = ", ".join(f"{name}={getattr(self._config, name)}: {n:,}" for name, n in self._failed.most_common())
            raise ValueError(f"data.filters: {none} passes; of {failed:,} filtered, by {counts}. Widen the filters")


LETTERS = regex.compile(r"\p{L}")


def _letters(scripts: Sequence[str]) -> regex.Pattern[str]:
    """Return the pattern of a letter of one of the scripts."""
    listed = "".join(rf"\p{{Script={name}}}" for name in scripts)
    return regex.compile(rf"(?V1)[\p{{L}}&&[{listed}]]" if scripts else "")


def image_size(encoded: bytes) -> tuple[int, int] | None:
    """Return an image's width and height from its header; None if that is damaged or of no known format."""
    import simplejpeg  # 0.1 s

    try:
        if encoded[:3] == b"\xff\xd8\xff":
            height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
            return width, height
        with Image.open(io.BytesIO(encoded)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return None


def by_name(counts: Int64[np.ndarray, "n"]) -> Mapping[str, int]:
    """Return the counts above 0 by filter."""
    return {name: int(count) for name, count in zip(FILTERS, counts, strict=True) if count}
