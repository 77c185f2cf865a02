"""From a source to the host's batches: read, choose a caption, tokenize, decode, augment.

The only state is the number of the next step. Positions of the endless sequence go through `order.indices`; Python
fetches records by chunks (bytes and tokens); TensorFlow decodes and augments chunks in parallel, in order.

A record that can't be used (checksum, undecodable picture, no usable caption) leaves a blank row with `ok` False;
rows never shift, so hosts stay in step. Here such rows are then filled with other records, chosen by a hash of the
damaged one's index and sent through the same functions, and reported in `HostBatch.replaced`. Above
`data.max_bad_fraction` the run ends.

Blanks come from `ignore_errors` on a data set of one chunk inside the graph: 32 pictures share the cost of one
(0.4 ms), which a data set for each picture would pay every time.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from clip_jax.config import AugmentConfig, DataConfig
from clip_jax.data import images, order
from clip_jax.typing import BadRecord, Batch, DataSource, HostBatch, Record, Replaced, Tokenizer

logger = logging.getLogger(__name__)

CHUNK = 32  # records that are fetched and decoded together
READ_THREADS = 16  # waiting for disk or network, not computing
ATTEMPTS = 100  # replacements that are tried for one damaged record
MIN_READS = 100  # before the fraction of bad records means anything
MAX_CAPTION_CHARACTERS = 8192  # a caption may have megabytes; a few hundred characters fill every tokenizer's row

# Encoded images as objects [n], tokens int32[n L], readable bool[n], seeds of the augmentation int64[n 2].
Fetched = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Fetch = Callable[[np.ndarray, np.ndarray], Fetched]  # of example ids int64[n] and epochs int64[n]


def batches(
    source: DataSource,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: slice,
) -> Iterator[HostBatch]:
    """Yield this host's rows of the global batches from `start_step` on, without end.

    The global batch of a step is a function of (source, config, seed, step), whatever the hosts.

    Args:
      image_size: of the pictures, in pixels.
      batch_size: pairs in the global batch.
      rows: of the global batch that this host reads, e.g. slice(0, batch_size).

    Raises:
      ValueError: if the rows don't lie in the batch, if no caption feature is named, if more than
        `data.max_bad_fraction` of the records are bad, or if none of 100 replacements is good.
    """
    first, last, stride = rows.indices(batch_size)
    if last <= first or stride != 1 or (rows.stop is not None and rows.stop > batch_size):
        raise ValueError(f"rows={rows} are no range within the batch of {batch_size}; give e.g. slice(0, {batch_size})")
    if not any(weight > 0 for weight in config.captions.values()):
        raise ValueError(
            "data.captions names no feature with a weight above 0, so no record would have a caption;"
            " img2dataset's are {'txt': 1.0, 'caption': 1.0}"
        )
    return _batches(source, tokenizer, config, image_size, batch_size, seed, start_step, first, last - first)


def _batches(source, tokenizer, config, image_size, batch_size, seed, start_step, first_row, host_batch_size):
    errors: list[BaseException] = []
    with ThreadPoolExecutor(READ_THREADS, "clip_jax-read") as pool:
        fetch = _remember_errors(functools.partial(_fetch, source, tokenizer, config, seed, pool), errors)
        prepare = _preparation(image_size, tokenizer.length, config.augment)
        dataset = _positions(start_step, batch_size, first_row, host_batch_size)
        dataset = dataset.map(_untransformed(lambda p: (order.indices(p, len(source), seed), p // len(source))))
        dataset = dataset.map(
            _untransformed(functools.partial(_fetch_op, fetch, tokenizer.length)), num_parallel_calls=2
        )
        dataset = dataset.map(_untransformed(prepare), num_parallel_calls=_threads(config))
        dataset = dataset.rebatch(host_batch_size).prefetch(config.prefetch_batches)
        repair = _Repair(source, config, fetch, prepare)
        iterator = dataset.with_options(_options(config)).as_numpy_iterator()
        while True:
            try:
                arrays = next(iterator)
            except tf.errors.OpError:
                if errors:  # what Python raised, not TensorFlow's account of it
                    raise errors[0] from None
                raise
            yield repair(*arrays)


def _positions(start_step: int, batch_size: int, first_row: int, host_batch_size: int) -> tf.data.Dataset:
    """Return chunks of the host's positions in the endless sequence of examples, int64[n]."""
    numbers = tf.data.Dataset.range(start_step * host_batch_size, 2**62)
    chunks = numbers.batch(min(CHUNK, host_batch_size))
    return chunks.map(_untransformed(lambda n: n // host_batch_size * batch_size + first_row + n % host_batch_size))


def _options(config: DataConfig) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = _threads(config)
    options.threading.max_intra_op_parallelism = 1  # pictures in parallel, not within one
    # Every number is given and every stage is its own: looking for better ones only doubles the time to start.
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


def _threads(config: DataConfig) -> int:
    return config.decode_threads or os.cpu_count() or 1


def _untransformed(function: Callable) -> Callable:
    """Keep AutoGraph away: there is no Python control flow to translate."""
    return tf.autograph.experimental.do_not_convert(function)


# ----------------------------------------------------------------------------------------------- read and tokenize


def _fetch(
    source: DataSource,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    pool: ThreadPoolExecutor,
    example_ids: np.ndarray,
    epochs: np.ndarray,
) -> Fetched:
    """Read records, choose a caption of each and tokenize them; a bad record has empty bytes and no tokens."""
    records = list(pool.map(functools.partial(_read, source), example_ids.tolist()))
    draws = _caption_draws(config.texts_per_caption, seed, epochs, example_ids)
    captions = [
        choose_caption(record, config.captions, *row.tolist()) if record else None
        for record, row in zip(records, draws, strict=True)
    ]
    ok = np.array([caption is not None for caption in captions])
    tokens = np.zeros((len(records), tokenizer.length), np.int32)
    if ok.any():
        tokens[ok] = tokenizer([caption for caption in captions if caption is not None])
    encoded = np.array([record.image if good else b"" for record, good in zip(records, ok, strict=True)], object)
    return encoded, tokens, ok, order.augmentation_seeds(seed, epochs, example_ids)


def _read(source: DataSource, example: int) -> Record | None:
    try:
        return source.read(example)
    except BadRecord:
        return None


def _caption_draws(texts: int, seed: int, epochs: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Return float64[n, 3, texts] in [0, 1): what decides how many texts, of which features, and which ones."""
    purposes = np.array([order.COUNT, order.FEATURE, order.VALUE])[None, :, None]
    words = epochs[:, None, None], example_ids[:, None, None], np.arange(texts)[None, None]
    return order.fraction(order.draw(purposes, seed, *words))


def choose_caption(
    record: Record,
    weights: Mapping[str, float],
    by_count: Sequence[float] = (0.0,),
    by_feature: Sequence[float] = (0.0,),
    by_value: Sequence[float] = (0.0,),
) -> str | None:
    """Join up to as many texts as there are draws, none twice; None if the record has no usable text.

    Args:
      by_count: in [0, 1); the first decides how many texts, from 1 on.
      by_feature, by_value: in [0, 1); each pair decides a feature, by weight, and one of its texts.
    """
    usable = {
        name: texts
        for name, weight in weights.items()
        if weight > 0 and (texts := [t for text in record.captions.get(name, ()) if (t := _clean(text))])
    }
    chosen = []
    count = 1 + int(by_count[0] * len(by_count))
    for u, v in zip(by_feature[:count], by_value[:count], strict=True):
        if not usable:
            break
        names = list(usable)
        edges = np.cumsum([weights[name] for name in names])
        name = names[int(np.searchsorted(edges[:-1], u * edges[-1], side="right"))]
        chosen.append(usable[name].pop(int(v * len(usable[name]))))
        if not usable[name]:
            del usable[name]
    return ", ".join(chosen) or None


def _clean(text: str) -> str:
    return text[:MAX_CAPTION_CHARACTERS].replace("\0", "").strip()


def _remember_errors(fetch: Fetch, errors: list[BaseException]) -> Fetch:
    """Keep what `fetch` raises: TensorFlow passes on the text of an exception only."""

    def fetch_and_remember(example_ids: np.ndarray, epochs: np.ndarray):
        try:
            return fetch(example_ids, epochs)
        except BaseException as error:
            errors.append(error)
            raise

    return fetch_and_remember


def _fetch_op(fetch: Fetch, length: int, example_ids: tf.Tensor, epochs: tf.Tensor) -> tuple[tf.Tensor, ...]:
    types = (tf.string, tf.int32, tf.bool, tf.int64)
    shapes = ([None], [None, length], [None], [None, 2])
    fetched = tf.numpy_function(fetch, [example_ids, epochs], types, stateful=False)
    return example_ids, epochs, *map(tf.ensure_shape, fetched, shapes)


# ----------------------------------------------------------------------------------------------- decode and augment


@functools.lru_cache(maxsize=16)
def _preparation(size: int, length: int, config: AugmentConfig) -> Callable:
    """Trace `_decode_chunk` once: the data set, the replacements and later pipelines share the graph."""
    chunk = {"example_ids": tf.int64, "epochs": tf.int64, "encoded": tf.string}
    signature = [tf.TensorSpec([None], dtype, name) for name, dtype in chunk.items()]
    signature += [tf.TensorSpec([None, length], tf.int32), tf.TensorSpec([None], tf.bool)]
    signature += [tf.TensorSpec([None, 2], tf.int64)]
    prepare = functools.partial(_decode_chunk, size=size, config=config)
    return tf.function(prepare, signature, autograph=False).get_concrete_function()


def _decode_chunk(
    example_ids: tf.Tensor,
    epochs: tf.Tensor,
    encoded: tf.Tensor,
    tokens: tf.Tensor,
    ok: tf.Tensor,
    seeds: tf.Tensor,
    *,
    size: int,
    config: AugmentConfig,
) -> tuple[tf.Tensor, ...]:
    """Return image uint8[n size size 3], tokens, ok, example ids, epochs; blank where the picture can't be decoded."""
    count = tf.size(example_ids)

    def prepare(row: tf.Tensor, image: tf.Tensor, key: tf.Tensor):
        return row, images.augment(images.decode(image), size, key, config)

    rows = tf.data.Dataset.from_tensor_slices((tf.range(count), encoded, seeds))
    decoded = rows.map(_untransformed(prepare)).ignore_errors(log_warning=False)
    # One blank at the end, so that `batch` has something to yield when every row failed.
    blank = tf.data.Dataset.from_tensors((count, tf.zeros([size, size, 3], tf.uint8)))
    kept, pixels = decoded.concatenate(blank).batch(tf.cast(count, tf.int64) + 1).get_single_element()
    image = tf.scatter_nd(kept[:, None], pixels, tf.stack([count + 1, size, size, 3]))[:-1]
    decodable = tf.scatter_nd(kept[:, None], tf.ones_like(kept), [count + 1])[:-1] > 0
    return tf.ensure_shape(image, [None, size, size, 3]), tokens, ok & decodable, example_ids, epochs


# ------------------------------------------------------------------------------------------------- replace and tell


class _Repair:
    """Fills bad rows with other records; counts, names and, when there are too many, refuses them."""

    def __init__(self, source: DataSource, config: DataConfig, fetch: Fetch, prepare: Callable):
        self._source, self._config, self._fetch, self._prepare = source, config, fetch, prepare
        self._reasons: dict[str, str] = {}  # of the bad records seen so far, by key
        self._read = self._bad = 0

    def __call__(self, image, tokens, ok, example_ids, epochs) -> HostBatch:
        self._read += len(ok)
        replaced = []
        if not ok.all():
            image, tokens, example_ids = image.copy(), tokens.copy(), example_ids.copy()
            rows = np.flatnonzero(~ok)
            reasons = [self._name(int(example_ids[row])) for row in rows]
            self._bad += sum(reason is not None for reason in reasons)
            self._refuse_too_many()
            for row, reason in zip(rows, reasons, strict=True):
                old, epoch = int(example_ids[row]), int(epochs[row])
                new, image[row], tokens[row] = self._prepare_one(old, epoch, reason is None)
                if new != old:
                    example_ids[row] = new
                    replaced.append(Replaced(self._source.key(old), reason, self._source.key(new)))
        return HostBatch(Batch(image, tokens, np.ones(len(ok), bool)), example_ids, tuple(replaced))

    def _name(self, example: int) -> str | None:
        """Return why a record is bad, and say it in the log the first time; None if it is good now (a hiccup)."""
        key = self._source.key(example)
        if key not in self._reasons:
            reason = _why_bad(self._source, example, self._config)
            if reason is None:
                return None
            self._reasons[key] = reason
            logger.warning("bad record %s: %s; another takes its place", key, reason)
        return self._reasons[key]

    def _refuse_too_many(self) -> None:
        if self._read >= MIN_READS and self._bad > self._config.max_bad_fraction * self._read:
            raise ValueError(
                f"{self._bad} of {self._read} records read are bad, more than"
                f" data.max_bad_fraction={self._config.max_bad_fraction:g}: {_first(self._reasons)}."
                " Repair the data, or allow more, e.g. --config.data.max_bad_fraction=0.1"
            )

    def _prepare_one(self, example: int, epoch: int, is_good: bool) -> tuple[int, np.ndarray, np.ndarray]:
        """Return a record, or the first good one that may replace it, with its picture and tokens."""
        for attempt in range(0 if is_good else 1, ATTEMPTS + 1):
            candidate = order.replacement(example, attempt, len(self._source)) if attempt else example
            ids, epochs = np.array([candidate]), np.array([epoch])
            prepared = self._prepare(*(tf.constant(a) for a in (ids, epochs, *self._fetch(ids, epochs))))
            image, tokens, ok, _, _ = (tensor.numpy() for tensor in prepared)
            if ok[0]:
                return candidate, image[0], tokens[0]
            self._name(candidate)
        raise ValueError(
            f"none of {ATTEMPTS} records could take the place of {self._source.key(example)}: {_first(self._reasons)}."
            f" The source has {len(self._source)} records; look at data.files and data.captions"
        )


def _first(reasons: dict[str, str]) -> str:
    """Name three of the bad records."""
    named: Sequence[tuple[str, str]] = list(reasons.items())[:3]
    return ", ".join(f"{key} ({reason})" for key, reason in named)


def _why_bad(source: DataSource, example: int, config: DataConfig) -> str | None:
    try:
        record = source.read(example)
    except BadRecord as error:
        return str(error)
    if choose_caption(record, config.captions) is None:
        wanted, found = ", ".join(config.captions), ", ".join(record.captions) or "none"
        texts = [text for name in config.captions for text in record.captions.get(name, ())]
        if any(texts):
            return f"blank caption: {max(texts, key=len)[:40]!r}"
        return f"no caption: data.captions wants {wanted}; the record has {found}" if not texts else "empty caption"
    return images.why_undecodable(record.image)
