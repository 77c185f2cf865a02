"""From a source to the host's batches: read, choose a caption, tokenize, decode, augment.

The only state is the number of the next step. Positions of the infinite sequence of examples go through
an order; Python reads and tokenizes records in chunks, and crops their JPEGs if `data.decode` is "fast"; TensorFlow
decodes the other images and augments chunks in parallel, in order. A bad record (wrong checksum, undecodable image, no
usable caption) becomes a blank row with `ok` False, which `_Repair` fills with another record, selected by a hash of
the bad record's index and prepared by the same functions.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from clip_jax.config import AugmentConfig, DataConfig
from clip_jax.data import images, order, philox, scaled_jpeg
from clip_jax.data.activity import Activity
from clip_jax.data.captions import caption_draws, choose_caption
from clip_jax.data.filters import FILTERS, Filters, by_name
from clip_jax.typing import BadRecord, Batch, DataSource, HostBatch, Record, Replaced, Tokenizer

log = logging.getLogger(__name__)

CHUNK = 64  # records that are read and decoded together
FETCH_CALLS = 2  # chunks that are read at the same time, in addition to those whose JPEGs are cropped
READ_THREADS = 16  # they wait for disk or network
MAX_ATTEMPTS = 100  # replacements that are tried for one bad record
MIN_READS = 100  # before the fraction of bad records is checked
UNSTABLE = "failed twice when it was read for the batch, although it was good when checked"

# Example ids int64[n], encoded images as objects [n], tokens int32[n L], ok bool[n], uniform draws of the augmentation
# float32[n images.DRAWS], records filtered by each filter int64[n f].
Fetched = tuple[np.ndarray, ...]
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
    activity: Activity | None = None,
) -> Iterator[HostBatch]:
    """Yield this host's rows of the global batches from `start_step` on, indefinitely.

    The global batch of a step is a function of (source, config, seed, step), independent of the number of hosts.

    >>> from clip_jax.data import make_source
    >>> from clip_jax.tokenizers import ClipBPE
    >>> config = DataConfig(source="synthetic", options={"examples": 100})
    >>> steps = batches(make_source(config), ClipBPE(length=16), config,
    ...                 image_size=32, batch_size=8, seed=0, start_step=0, rows=slice(0, 8))
    >>> batch = next(steps).batch
    >>> batch.image.shape, batch.text.shape
    ((8, 32, 32, 3), (8, 16))

    Args:
      image_size: height and width in pixels.
      batch_size: pairs in the global batch.
      rows: rows of the global batch that belong to this host, e.g. slice(0, batch_size).
      activity: collects the time of the stages.

    Raises:
      ValueError: if the rows are not within the batch, if no caption feature has a weight above 0, if more than
        `data.max_bad_fraction` of the records are bad, or if 100 replacements in turn are bad.
    """
    first, last, stride = rows.indices(batch_size)
    if last <= first or stride != 1 or (rows.stop is not None and rows.stop > batch_size):
        raise ValueError(f"rows={rows} are no range within the batch of {batch_size}; give e.g. slice(0, {batch_size})")
    if not any(weight > 0 for weight in config.captions.values()):
        raise ValueError(
            "data.captions names no feature with a weight above 0, so no record would have a caption;"
            " img2dataset's are {'txt': 1.0, 'caption': 1.0}"
        )
    activity = activity or Activity()
    activity.threads = min(_fetch_calls(config), _threads(config))
    fetch = functools.partial(_fetch, source, tokenizer, config, seed, activity)
    generator = _batches(
        source, tokenizer, config, fetch, image_size, batch_size, seed, start_step, first, last - first
    )
    # An open generator is closed before the interpreter shuts down, after which TensorFlow's threads would wait for the
    # GIL forever, and the iterator's destructor for them.
    reference = weakref.ref(generator)
    weakref.finalize(generator, lambda: (alive := reference()) and alive.close())
    return generator


def _batches(source, tokenizer, config, fetch, image_size, batch_size, seed, start_step, first_row, host_batch_size):
    errors: list[BaseException] = []
    with ThreadPoolExecutor(READ_THREADS, "clip_jax-read") as pool:
        ordered = source.order(seed, batch_size) if hasattr(source, "order") else order.RecordOrder(len(source), seed)
        fetch = functools.partial(fetch, pool, Filters(config, source, ordered))
        fetch = functools.partial(_fetch_crops, fetch, image_size, config)
        prepare = _prepare_function(image_size, tokenizer.length, config.augment, config.decode)
        prefetch = _Prefetch(source, ordered, slice(first_row, first_row + host_batch_size))

        def fetch_positions(positions: np.ndarray) -> tuple[np.ndarray, ...]:
            try:
                epochs, example_ids = ordered(positions)
                prefetch(int(positions[0]) // batch_size)
                example_ids, *fetched = fetch(example_ids, epochs)
                return example_ids, epochs, *fetched
            except BaseException as error:
                errors.append(error)  # TensorFlow propagates only its text
                raise

        dataset = _positions(start_step, batch_size, first_row, host_batch_size)
        dataset = dataset.map(
            _no_autograph(functools.partial(_fetch_op, fetch_positions, tokenizer.length, image_size)),
            num_parallel_calls=_fetch_calls(config),
        )
        dataset = dataset.map(
            _no_autograph(lambda *fetched: (*prepare(*fetched[:-1]), fetched[-1])), num_parallel_calls=_threads(config)
        )
        dataset = dataset.rebatch(host_batch_size).prefetch(config.prefetch_batches)
        repair = _Repair(source, ordered, config, fetch, prepare)
        iterator = dataset.with_options(_options(config)).as_numpy_iterator()
        try:
            while True:
                try:
                    arrays = next(iterator)
                except tf.errors.OpError:
                    if errors:
                        raise errors[0] from None
                    raise
                yield repair(*arrays)
        finally:
            del iterator  # ends TensorFlow's reads before the pool, which would refuse them with a traceback, ends


def _positions(start_step: int, batch_size: int, first_row: int, host_batch_size: int) -> tf.data.Dataset:
    """Return chunks of the host's positions in the infinite sequence of examples, int64[n]."""
    numbers = tf.data.Dataset.range(start_step * host_batch_size, 2**62)
    chunks = numbers.batch(min(CHUNK, host_batch_size))
    return chunks.map(_no_autograph(lambda n: n // host_batch_size * batch_size + first_row + n % host_batch_size))


def _options(config: DataConfig) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = _threads(config)
    options.threading.max_intra_op_parallelism = 1  # images are processed in parallel, one thread each
    # All sizes are given and no stages can be fused: the search for better ones only doubles the start-up time.
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


def _fetch_calls(config: DataConfig) -> int:
    """Return the number of chunks that are fetched at the same time, on `_threads` threads."""
    return FETCH_CALLS + (_threads(config) if config.decode == "fast" else 0)


def _threads(config: DataConfig) -> int:
    return config.decode_threads or os.cpu_count() or 1


def _no_autograph(function: Callable) -> Callable:
    """Exclude a function from AutoGraph: it has no Python control flow to convert."""
    return tf.autograph.experimental.do_not_convert(function)


def _fetch(
    source: DataSource,
    tokenizer: Tokenizer,
    config: DataConfig,
    seed: int,
    activity: Activity,
    pool: ThreadPoolExecutor,
    filters: Filters,
    example_ids: np.ndarray,
    epochs: np.ndarray,
) -> Fetched:
    """Read records, choose a caption for each and tokenize it; a bad record gets empty bytes and zero tokens."""
    with activity.stage("storage"):
        records, example_ids, filtered = filters.select(functools.partial(_read_all, source, pool), example_ids, epochs)
    draws = caption_draws(config.texts_per_caption, seed, epochs, example_ids)
    captions = [
        choose_caption(record, config.captions, *row) if record else None
        for record, row in zip(records, draws.tolist(), strict=True)
    ]
    ok = np.array([caption is not None for caption in captions])
    tokens = np.zeros((len(records), tokenizer.length), np.int32)
    if ok.any():
        with activity.stage("tokenizer"):
            tokens[ok] = tokenizer([caption for caption in captions if caption is not None])
    encoded = np.array([record.image if good else b"" for record, good in zip(records, ok, strict=True)], object)
    draws = philox.uniform(order.augmentation_seeds(seed, epochs, example_ids), images.DRAWS)
    return example_ids, encoded, tokens, ok, draws, filtered


def _fetch_crops(fetch: Fetch, size: int, config: DataConfig, example_ids: np.ndarray, epochs: np.ndarray) -> Fetched:
    """Add to the fetched arrays, before the last: crops uint8[n size size 3], and which images they show, bool[n].

    With `data.decode="exact"` these are none. TensorFlow gets only the bytes of the other images: two copies fewer.
    """
    *fetched, draws, filtered = fetch(example_ids, epochs)
    if config.decode == "exact":
        crops, cropped = np.zeros((0, size, size, 3), np.uint8), np.zeros(len(draws), bool)
    else:
        used = draws[:, [images.CROP_AREA, images.CROP_X, images.CROP_Y]]
        crops, cropped = scaled_jpeg.random_crops(
            fetched[1], used, size, config.augment.min_crop_area, images.MAX_PIXELS
        )
        fetched[1][cropped] = b""
    return *fetched, draws, crops, cropped, filtered


def _read_all(source: DataSource, pool: ThreadPoolExecutor, examples: Sequence[int]) -> list[Record | None]:
    if getattr(source, "in_memory", False):
        return [_read(source, example) for example in examples]
    each = -(-len(examples) // READ_THREADS)
    parts = [examples[first : first + each] for first in range(0, len(examples), each)]
    return list(itertools.chain.from_iterable(pool.map(lambda part: [_read(source, e) for e in part], parts)))


def _read(source: DataSource, example: int) -> Record | None:
    try:
        return source.read(example)
    except BadRecord:
        return None


class _Prefetch:
    """Lets a source that reads by blocks read those that the next steps need; at each first chunk of a step."""

    def __init__(self, source: DataSource, ordered: order.Order, rows: slice):
        self._source, self._blocks = source, getattr(ordered, "blocks", lambda step, rows: [])
        self._rows, self._step = rows, -1

    def __call__(self, step: int) -> None:
        if step > self._step:
            self._step = step
            if blocks := self._blocks(step, self._rows):
                self._source.prefetch(np.concatenate(blocks))


def _fetched_spec(length: int, size: int) -> list[tf.TensorSpec]:
    """Return shapes and dtypes of example ids, epochs, and the arrays of `_fetch_crops` but the last."""
    shapes = [], [], [], [length], [], [images.DRAWS], [size, size, 3], []
    dtypes = tf.int64, tf.int64, tf.string, tf.int32, tf.bool, tf.float32, tf.uint8, tf.bool
    return [tf.TensorSpec([None, *shape], dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def _fetch_op(fetch: Callable, length: int, size: int, positions: tf.Tensor) -> tuple[tf.Tensor, ...]:
    specs = [*_fetched_spec(length, size), tf.TensorSpec([None, len(FILTERS)], tf.int64)]
    fetched = tf.numpy_function(fetch, [positions], [spec.dtype for spec in specs], stateful=False)
    return tuple(tf.ensure_shape(tensor, spec.shape) for tensor, spec in zip(fetched, specs, strict=True))


@functools.lru_cache(maxsize=16)
def _prepare_function(size: int, length: int, config: AugmentConfig, decode: str) -> Callable:
    """Return `_decode_chunk` traced once: the dataset, replacements and later pipelines share the graph."""
    prepare = functools.partial(_decode_chunk, size=size, config=config, decode=decode)
    return tf.function(prepare, _fetched_spec(length, size), autograph=False).get_concrete_function()


def _decode_chunk(
    example_ids: tf.Tensor,
    epochs: tf.Tensor,
    encoded: tf.Tensor,
    tokens: tf.Tensor,
    ok: tf.Tensor,
    draws: tf.Tensor,
    crops: tf.Tensor,
    cropped: tf.Tensor,
    *,
    size: int,
    config: AugmentConfig,
    decode: str,
) -> tuple[tf.Tensor, ...]:
    """Return image uint8[n size size 3], tokens, ok, example ids, epochs; undecodable images are black, ok is False."""

    def exact(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _decode_rows(rows, encoded, draws, size, config)

    def others() -> tuple[tf.Tensor, tf.Tensor]:
        image, decodable = exact(tf.cast(tf.where(~cropped)[:, 0], tf.int32))
        return tf.where(cropped[:, None, None, None], adjusted, image), cropped | decodable

    if decode == "exact":
        image, decodable = exact(tf.range(tf.size(example_ids)))
    else:
        adjusted = images.adjust_crops(crops, draws, config)
        image, decodable = tf.cond(tf.reduce_all(cropped), lambda: (adjusted, cropped), others)
    return tf.ensure_shape(image, [None, size, size, 3]), tokens, ok & decodable, example_ids, epochs


def _decode_rows(
    rows: tf.Tensor, encoded: tf.Tensor, draws: tf.Tensor, size: int, config: AugmentConfig
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decode and augment rows of a chunk; return uint8[n size size 3] and bool[n] of the chunk, the others blank.

    `ignore_errors` needs a dataset, of one chunk; its start-up time, 0.4 ms, is shared by the images.
    """
    count = tf.size(encoded)

    def prepare(row: tf.Tensor, image: tf.Tensor, draws: tf.Tensor):
        return row, images.augment(images.decode(image), size, draws, config)

    chunk = tf.data.Dataset.from_tensor_slices((rows, tf.gather(encoded, rows), tf.gather(draws, rows)))
    decoded = chunk.map(_no_autograph(prepare)).ignore_errors(log_warning=False)
    # One blank row at the end, so that `batch` yields an element even if every row failed.
    blank = tf.data.Dataset.from_tensors((count, tf.zeros([size, size, 3], tf.uint8)))
    kept, pixels = decoded.concatenate(blank).batch(tf.cast(count, tf.int64) + 1).get_single_element()
    image = tf.scatter_nd(kept[:, None], pixels, tf.stack([count + 1, size, size, 3]))[:-1]
    return image, tf.scatter_nd(kept[:, None], tf.ones_like(kept), [count + 1])[:-1] > 0


class _Repair:
    """Replaces the bad rows of batches; counts and logs bad records, and raises if there are too many."""

    def __init__(self, source: DataSource, ordered: order.Order, config: DataConfig, fetch: Fetch, prepare: Callable):
        self._source, self._order, self._config = source, ordered, config
        self._fetch, self._prepare = fetch, prepare
        self._reasons: dict[str, str] = {}  # of the bad records found so far, by key
        self._read = self._bad = 0

    def __call__(self, image, tokens, ok, example_ids, epochs, filtered) -> HostBatch:
        self._read += len(ok)
        self._filtered = filtered.sum(axis=0)
        replaced = []
        if not ok.all():
            image, tokens, example_ids = image.copy(), tokens.copy(), example_ids.copy()
            bad = {}
            for row in np.flatnonzero(~ok):
                example, epoch = int(example_ids[row]), int(epochs[row])
                reason = self._bad_reason(example)
                prepared = None if reason else self._prepare_one(example, epoch)  # transient error: read it again
                if prepared:
                    example_ids[row], image[row], tokens[row] = prepared
                else:
                    bad[row] = reason or self._bad_reason(example) or self._log_bad(example, UNSTABLE)
            self._bad += len(bad)
            self._check_bad_fraction()
            for row, reason in bad.items():
                old = int(example_ids[row])
                new, image[row], tokens[row] = self._replacement(old, int(epochs[row]))
                example_ids[row] = new
                replaced.append(Replaced(self._source.key(old), reason, self._source.key(new)))
        return HostBatch(
            Batch(image, tokens, np.ones(len(ok), bool)), example_ids, tuple(replaced), by_name(self._filtered)
        )

    def _bad_reason(self, example: int) -> str | None:
        """Return the reason why a record is bad, or None if it is good now."""
        known = self._reasons.get(self._source.key(example))
        if known is None and (reason := _check_record(self._source, example, self._config)) is not None:
            return self._log_bad(example, reason)
        return known

    def _log_bad(self, example: int, reason: str) -> str:
        key = self._source.key(example)
        self._reasons[key] = reason
        log.warning("bad record %s: %s; it is replaced by another", key, reason)
        return reason

    def _check_bad_fraction(self) -> None:
        if self._read >= MIN_READS and self._bad > self._config.max_bad_fraction * self._read:
            raise ValueError(
                f"{self._bad} of {self._read} records read are bad, more than"
                f" data.max_bad_fraction={self._config.max_bad_fraction:g}: {self._first_reasons()}."
                " Repair the data, or allow more, e.g. --config.data.max_bad_fraction=0.1"
            )

    def _replacement(self, example: int, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the first good record that may replace a bad one: example id, image, tokens."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            candidate = int(self._order.replacement(np.array([example]), attempt)[0])
            if candidate == example:
                continue
            if prepared := self._prepare_one(candidate, epoch):
                return prepared
            self._bad_reason(candidate)  # logs it
        raise ValueError(
            f"none of {MAX_ATTEMPTS} records could replace {self._source.key(example)}: {self._first_reasons()}."
            f" The source has {len(self._source)} records; check data.files and data.captions"
        )

    def _prepare_one(self, example: int, epoch: int) -> tuple[int, np.ndarray, np.ndarray] | None:
        """Return example id, image and tokens of a record, or of another if it is filtered; None if that is bad."""
        epochs = np.array([epoch])
        ids, *fetched, filtered = self._fetch(np.array([example]), epochs)
        self._filtered += filtered[0]
        prepared = self._prepare(*(tf.constant(a) for a in (ids, epochs, *fetched)))
        image, tokens, ok, _, _ = (tensor.numpy() for tensor in prepared)
        return (int(ids[0]), image[0], tokens[0]) if ok[0] else None

    def _first_reasons(self) -> str:
        return ", ".join(f"{key} ({reason})" for key, reason in list(self._reasons.items())[:3])


def _check_record(source: DataSource, example: int, config: DataConfig) -> str | None:
    try:
        return record_problem(source.read(example), config)
    except BadRecord as error:
        return str(error) or "the source gives no reason"


def record_problem(record: Record, config: DataConfig) -> str | None:
    """Return the reason why a record is bad: it has no caption, or its image can't be decoded; None if it is good."""
    if choose_caption(record, config.captions) is None:
        expected, found = ", ".join(config.captions), ", ".join(record.captions) or "none"
        texts = [text for name in config.captions for text in record.captions.get(name, ())]
        if any(texts):
            return f"blank caption: {max(texts, key=len)[:40]!r}"
        return "empty caption" if texts else f"no caption: data.captions has {expected}; the record has {found}"
    return images.decoding_error(record.image)
