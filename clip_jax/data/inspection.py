"""Statistics of a sample of training data, and the pairs of it that the model would see."""

from __future__ import annotations

import io
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.data import images, order, pipeline
from clip_jax.data.captions import clean
from clip_jax.data.filters import Criteria
from clip_jax.typing import BadRecord, Batch, DataSource, Number, Record, Tokenizer

PERCENTILES = {"min": 0, "5 %": 5, "median": 50, "95 %": 95, "max": 100}
RUNS = 8  # of neighbors that are read from an object store, where a record costs a block
CHUNK = 256  # records that are read before they are examined
BATCH = 32  # pairs
MIN_BATCHES = 8  # for a rate
LISTED = 5  # reasons and duplicates


class Inspection(NamedTuple):
    """The result of `inspect`."""

    statistics: dict[str, Any]  # JSON
    batch: Batch | None  # the first pairs of the sample as training's input; None without a good record


class Examined(NamedTuple):
    """A record without its pixels."""

    key: str
    problem: str | None = None  # reason why it is bad
    filtered: str | None = None  # the filter of `data.filters` that it does not pass
    image: tuple[str, int, int, int] | None = None  # format, width, height, bytes
    captions: tuple[tuple[str, str], ...] = ()  # feature and text


class _Sampled:
    """A source whose order is the sample: every example has the draws that it has in the first epoch of training."""

    def __init__(self, source: DataSource, examples: Int64[np.ndarray, "n"]):
        self._source, self._examples = source, examples
        self.in_memory = getattr(source, "in_memory", False)
        self.read, self.key, self.fingerprint = source.read, source.key, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def order(self, seed: int, batch_size: int) -> order.RecordOrder:
        examples = self._examples

        class SampleOrder(order.RecordOrder):
            def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                return np.zeros_like(positions), examples[positions % len(examples)]

        return SampleOrder(len(self), seed)


def inspect(
    source: DataSource,
    tokenizer: Tokenizer,
    count_tokens: Callable[[Sequence[str]], Int64[np.ndarray, "n"]],
    config: DataConfig,
    *,
    image_size: int,
    sample: int = 1000,
    seed: int = 0,
) -> Inspection:
    """Read a random sample of a source, and prepare the good records that pass `data.filters` as training does.

    Args:
      tokenizer: of the model.
      count_tokens: returns the number of tokens of texts, with special tokens and without truncation.
      image_size: of the model, in pixels.
      sample: number of records; the whole source if it has fewer.
      seed: of the choice, and of augmentation and choice of captions.
    """
    examples = sampled_examples(source, sample, seed)
    examined, read_seconds = _examine(source, examples, config)
    good = examples[[one.problem is None and one.filtered is None for one in examined]]
    batch, rate = _prepare(_Sampled(source, good), tokenizer, config, image_size, seed) if len(good) else (None, None)
    statistics = {
        "records": len(source),
        "sample": len(examples),
        "seed": seed,
        "bad": _bad(examined),
        "filtered": _filtered(examined, config),
        "images": _images([one.image for one in examined if one.image]),
        "captions": _captions([one.captions for one in examined if one.captions], tokenizer.length, count_tokens),
        "records_per_second": {"read": round(len(examples) / read_seconds, 1), "decoded": rate},
    }
    return Inspection(statistics, batch)


def sampled_examples(source: DataSource, sample: int, seed: int) -> Int64[np.ndarray, "n"]:
    """Return the examples of a sample: the first of `RecordOrder`, or runs of neighbors of a source that has blocks."""
    total, count = len(source), min(sample, len(source))
    by_blocks = hasattr(source, "order") and isinstance(source.order(seed, BATCH), order.BlockOrder)
    run = -(-count // RUNS) if by_blocks and count < total else 1
    _, starts = order.RecordOrder(total // run, seed)(np.arange(count // run))
    return (starts[:, None] * run + np.arange(run)).ravel()


def _examine(source: DataSource, examples: Int64[np.ndarray, "n"], config: DataConfig) -> tuple[list[Examined], float]:
    """Return the examined records, and the seconds of reading them."""

    def read(example: int) -> Record | str:
        try:
            return source.read(example)
        except BadRecord as error:
            return str(error)

    examined, seconds, criteria = [], 0.0, Criteria(config)
    images.decoding_error(b"")  # traces the graph once, not in every thread
    with ThreadPoolExecutor(pipeline.READ_THREADS) as pool:
        for start in range(0, len(examples), CHUNK):
            chunk, begin = examples[start : start + CHUNK].tolist(), time.monotonic()
            records = list(pool.map(read, chunk))
            seconds += time.monotonic() - begin
            keys = map(source.key, chunk)
            examined += pool.map(lambda record, key: _examined(record, key, config, criteria), records, keys)
    return examined, seconds


def _examined(record: Record | str, key: str, config: DataConfig, criteria: Criteria) -> Examined:
    if isinstance(record, str):
        return Examined(key, record)
    captions = dict.fromkeys(
        (name, text)
        for name, weight in config.captions.items()
        if weight > 0
        for text in map(clean, record.captions.get(name, ()))
        if text
    )
    try:
        with Image.open(io.BytesIO(record.image)) as image:  # reads the header
            found = str(image.format), *image.size, len(record.image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        found = None  # the problem is that of `record_problem`
    _, failed = criteria(record)  # before decoding, as in training: a filtered record is not bad
    problem = None if failed else pipeline.record_problem(record, config)
    return Examined(key, problem, failed[0] if failed else None, found, tuple(captions))


def _prepare(
    source: _Sampled, tokenizer: Tokenizer, config: DataConfig, image_size: int, seed: int
) -> tuple[Batch, float | None]:
    """Return the first batch, and records per second of the input pipeline; None for too few records."""
    good = len(source._examples)
    size = min(BATCH, good)
    steps = pipeline.batches(
        source, tokenizer, config, image_size=image_size, batch_size=size, seed=seed, start_step=0, rows=slice(0, size)
    )
    first, start = next(steps).batch, time.monotonic()
    count = good // size
    for _ in range(1, count):
        next(steps)
    rate = (count - 1) * size / (time.monotonic() - start)
    steps.close()
    return first, round(rate, 1) if count >= MIN_BATCHES else None


def _bad(examined: Sequence[Examined]) -> dict[str, Any]:
    bad = [one for one in examined if one.problem is not None]
    reasons = Counter(one.problem for one in bad)
    first = {one.problem: one.key for one in reversed(bad)}
    return {
        "records": len(bad),
        "reasons": [{"reason": r, "records": n, "first": first[r]} for r, n in reasons.most_common(LISTED)],
    }


def _filtered(examined: Sequence[Examined], config: DataConfig) -> dict[str, Any]:
    found = [one for one in examined if one.filtered]
    first = {one.filtered: one.key for one in reversed(found)}
    counts = Counter(one.filtered for one in found).most_common()
    return {
        "records": len(found),
        "filters": [
            {"filter": name, "value": getattr(config.filters, name), "records": n, "first": first[name]}
            for name, n in counts
        ],
    }


def _images(found: Sequence[tuple[str, int, int, int]]) -> dict[str, Any]:
    formats, widths, heights, sizes = zip(*found, strict=True) if found else ((),) * 4
    ratios = [width / max(1, height) for width, height in zip(widths, heights, strict=True)]
    values = {"width": widths, "height": heights, "aspect": ratios, "bytes": sizes}
    return {
        "formats": _fractions(formats),
        **{name: percentiles(value) for name, value in values.items()},
    }


def _captions(
    captions: Sequence[tuple[tuple[str, str], ...]], length: int, count_tokens: Callable[[Sequence[str]], np.ndarray]
) -> dict[str, Any]:
    """Return statistics of the distinct texts of every record. Duplicates are texts that several records have."""
    texts = [text for record in captions for text in dict.fromkeys(text for _, text in record)]
    tokens = np.asarray(count_tokens(texts)) if texts else np.zeros(0, np.int64)
    records_of = Counter(texts)
    shared = [(text, records) for text, records in records_of.most_common() if records > 1]
    return {
        "texts": len(texts),
        "features": dict(Counter(name for record in captions for name, _ in record)),
        "characters": percentiles([len(text) for text in texts]),
        "tokens": percentiles(tokens),
        "context_length": length,
        "truncated": float(np.mean(tokens > length)) if texts else 0.0,
        "scripts": _fractions(map(script, texts)),
        "duplicates": sum(records for _, records in shared) / max(1, len(texts)),
        "most_common": [{"text": text, "records": records} for text, records in shared[:LISTED]],
    }


def script(text: str) -> str:
    """Return the script of most letters of a text by their Unicode names, 'none' without letters.

    >>> script("a dog, собака и кошка"), script("犬"), script("2026")
    ('CYRILLIC', 'CJK', 'none')
    """
    letters = Counter(unicodedata.name(letter, "none").split()[0] for letter in text if letter.isalpha())
    return letters.most_common(1)[0][0] if letters else "none"


def percentiles(values: Sequence[Number] | np.ndarray) -> dict[str, float]:
    """Return PERCENTILES of the values, {} without values."""
    found = np.percentile(values, list(PERCENTILES.values())) if len(values) else []
    return {name: round(float(value), 3) for name, value in zip(PERCENTILES, found, strict=False)}


def _fractions(values: Any) -> dict[str, float]:
    counts = Counter(values)
    return {value: count / counts.total() for value, count in counts.most_common()}


def report(statistics: dict[str, Any]) -> str:
    """Return the statistics as text."""
    records, sample, bad, filtered = (statistics[key] for key in ("records", "sample", "bad", "filtered"))
    pixels, captions, rates = statistics["images"], statistics["captions"], statistics["records_per_second"]
    whole = "all records" if sample == records else f"{sample:,} of {records:,} records, seed {statistics['seed']}"
    reasons = "; ".join(f"{one['records']:,} × {one['reason']} ({one['first']})" for one in bad["reasons"])
    failed = "; ".join(
        f"{one['records']:,} × {one['filter']}={one['value']} ({one['first']})" for one in filtered["filters"]
    )
    common = ", ".join(f"{one['records']:,} × {one['text'][:40]!r}" for one in captions["most_common"])
    decoded = f"{rates['decoded']:,.0f} records/s, read, tokenized and augmented" if rates["decoded"] else ""
    rows = {
        "sample": whole,
        "bad records": _counted(bad["records"], sample, reasons),
        "filtered": _counted(filtered["records"], sample, failed),
        "image formats": _percent(pixels["formats"]),
        "captions": ", ".join(f"{count:,} {name}" for name, count in captions["features"].items()) or "none",
        "scripts": _percent(captions["scripts"]),
        "truncated": f"{captions['truncated']:.1%} have more than {captions['context_length']} tokens",
        "duplicates": f"{captions['duplicates']:.1%} are those of other records too{': ' if common else ''}{common}",
        "read": f"{rates['read']:,.0f} records/s, {pipeline.READ_THREADS} threads",
        "decoded": decoded or f"expected {MIN_BATCHES * BATCH} good records for a rate",
    }
    sizes = {"width, px": pixels["width"], "height, px": pixels["height"], "width / height": pixels["aspect"]}
    sizes |= {"bytes": pixels["bytes"], "characters": captions["characters"], "tokens": captions["tokens"]}
    table = [f"{'':<16}" + "".join(f"{name:>12}" for name in PERCENTILES)]
    table += [f"{name:<16}" + "".join(f"{value:>12,.6g}" for value in row.values()) for name, row in sizes.items()]
    return "\n".join([*(f"{name:<16}{value}" for name, value in rows.items()), "", *table])


def _counted(records: int, sample: int, listed: str) -> str:
    return f"{records:,} ({records / max(1, sample):.1%}){': ' if listed else ''}{listed}"


def _percent(fractions: dict[str, float]) -> str:
    return ", ".join(f"{name} {fraction:.1%}" for name, fraction in fractions.items()) or "none"
