"""Embedders: from encoded images and texts to unit vectors on the host; caches in memory and on disk.

The embedding of a class with several prompts is the normalized mean of their unit embeddings (Radford et al. 2021,
section 3.1.4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from clip_jax.config import WeightsConfig
from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals.datasets.files import LazySequence
from clip_jax.evals.ranking import unique_rows, unit
from clip_jax.paths import write_atomically
from clip_jax.typing import Embedder, EvalDataset, Params, Tokenizer, Unavailable

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600  # age of a temporary file whose writer was killed; allows for clock skew of shared disks


@dataclasses.dataclass(frozen=True)
class ModelEmbedder:
    """Embed in batches of constant size, so that each encoder compiles once.

    Reuse the same encoder functions: JAX caches compilations by function. With several processes, each process passes
    all inputs, prepares its own rows of every batch and gets all outputs; an error in one process is raised on all.
    """

    encode_image: Callable[[Params, jax.Array], jax.Array]  # (params, uint8[B H W 3]) -> float[B E], pure
    encode_text: Callable[[Params, jax.Array], jax.Array]  # (params, int32[B L]) -> float[B E], pure
    params: Any
    tokenizer: Tokenizer
    preprocess: Callable[[Sequence[bytes]], np.ndarray]  # encoded images -> uint8[n H W 3]
    batch_size: int = 256  # rows per batch, over all processes; a multiple of the number of devices
    rows: slice | None = None  # rows of a batch that this process prepares; None: all
    put: Callable[[np.ndarray], jax.Array] = jnp.asarray  # this process's rows -> global array
    out_sharding: jax.sharding.Sharding | None = None  # of the outputs; with a mesh: replicated
    on_batch: Callable[[], None] | None = None  # called after each batch, e.g. to check for preemption
    image_features: Callable[[Params, jax.Array], jax.Array] | None = None  # (params, images) -> float[B D]

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        """Return a unit vector for each encoded image; NaN if the model's output is zero or not finite."""
        return unit(self._embed(self.encode_image, self.preprocess, images, "image"))

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]:
        """Return a unit vector for each text; NaN if the model's output is zero or not finite.

        Texts of equal token ids have equal embeddings: the last bits of an output may depend on its row in the batch.
        """
        with self._synchronized():
            tokens_nL, index_m = unique_rows(self.tokenizer(texts))
        return unit(self._embed(self.encode_text, np.stack, list(tokens_nL), "text"))[index_m]

    def features(self, images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
        """Return the image features before the projection, not normalized."""
        return self._embed(self.image_features, self.preprocess, images, "image")

    def _synchronized(self) -> contextlib.AbstractContextManager:
        # The encoder is a collective: without synchronization, an error in the data would block the other processes.
        return distributed.synchronized_errors(*DATA_ERRORS) if self.rows is not None else contextlib.nullcontext()

    def _embed(
        self, encode: Callable[..., jax.Array], prepare: Callable[..., np.ndarray], items: Sequence[Any], kind: str
    ) -> Float[np.ndarray, "n E"]:
        if not len(items):
            raise ValueError(f"{kind}s: expected at least one, got none")
        jitted = jax.jit(encode, out_shardings=self.out_sharding)
        first, stop, _ = (self.rows or slice(None)).indices(self.batch_size)
        outputs: list[jax.Array | np.ndarray] = []
        for start in range(0, len(items), self.batch_size):
            with self._synchronized():
                part = items[start + first : start + stop]
                try:
                    rows = prepare(part or items[-1:])
                except ValueError as error:
                    raise _located(error, prepare, items, range(start + first, start + first + len(part))) from error
            padding = [(0, stop - first - len(rows))] + [(0, 0)] * (rows.ndim - 1)
            started = jitted(self.params, self.put(np.pad(rows, padding, mode="edge")))
            if outputs:  # fetched one batch later, so that the host decodes while the device computes
                outputs[-1] = np.asarray(outputs[-1])
            outputs.append(started)
            if self.on_batch:
                self.on_batch()
        return np.concatenate(outputs)[: len(items)].astype(np.float32)


def _located(
    error: ValueError, prepare: Callable[..., np.ndarray], items: Sequence[Any], indices: Sequence[int]
) -> ValueError:
    """Return an error of a batch with the position and the name of the first item that can't be prepared."""
    name_of = getattr(items, "name_of", None)
    for index in indices:
        try:
            prepare([items[index]])
        except ValueError as one:
            name = f" ({name_of(index)})" if name_of else ""
            return ValueError(f"image {index}{name}: {one.__cause__ or one}")
    return error


@dataclasses.dataclass(frozen=True)
class CachedEmbedder:
    """Embedder that keeps embeddings, not features, in memory: every image and text is embedded once."""

    embedder: Embedder
    _images: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)
    _texts: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        return _embed_new(self.embedder.image, self._images, images)

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]:
        return _embed_new(self.embedder.text, self._texts, texts)

    def features(self, images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
        return features_of(self.embedder, images)


def features_of(embedder: Embedder, images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
    """Return the embedder's features. Raises Unavailable if it has none."""
    if not hasattr(embedder, "features"):
        raise Unavailable("probes need an embedder with `features`; this one has `image` and `text` only")
    return embedder.features(images)


def _embed_new(
    embed: Callable[[Sequence[Any]], np.ndarray], cache: dict[bytes, np.ndarray], items: Sequence[Any]
) -> np.ndarray:
    digests, first_of = _digests(items)
    if new := {digest: index for digest, index in first_of.items() if digest not in cache}:
        cache.update(zip(new, embed(_select(items, list(new.values()))), strict=True))
    return np.stack([cache[digest] for digest in digests])


def _digests(items: Sequence[bytes] | Sequence[str]) -> tuple[list[bytes], dict[bytes, int]]:
    """Return the hash of each item, which replaces it in memory, and the index of the first item of each hash."""
    digests: list[bytes] = []
    first_of: dict[bytes, int] = {}
    for index in range(len(items)):  # not `for item in items`, which would end at an IndexError of reading one
        item = items[index]
        digests.append(hashlib.blake2b(item if isinstance(item, bytes) else item.encode(), digest_size=16).digest())
        first_of.setdefault(digests[-1], index)
    return digests, first_of


def _select(items: Sequence[Any], indices: Sequence[int]) -> LazySequence:
    """Return some of the items, read on access, with their names in messages."""
    name_of = getattr(items, "name_of", str)
    return LazySequence(len(indices), lambda i: items[indices[i]], lambda i: name_of(indices[i]))


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """A directory of `.npy` files; with directory '' nothing is stored."""

    directory: str
    model: str  # fingerprint of weights, architecture and preprocessing

    def get(self, key: str, rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the stored array, or compute and store it. A collective: call it on all processes.

        An unreadable file, or one with another number of rows, counts as missing and is overwritten. Arrays with
        values that are not finite are not stored.
        """
        if not self.directory:
            return compute()
        name = hashlib.sha256(f"{self.model}/{key}".encode()).hexdigest()[:32]
        path = pathlib.Path(self.directory).expanduser() / f"{name}.npy"
        stored = _read(path, rows)
        if distributed.all_true(stored is not None):  # `compute` is a collective: all processes or none
            return stored
        computed = compute()
        if distributed.is_main_process() and np.isfinite(computed).all():
            try:
                _remove_abandoned(path.parent)
                write_atomically(path, lambda file: np.save(file, computed))
            except (OSError, ValueError) as error:  # disk full or read-only; a folder of that name
                log.warning("%s: features not cached: %s", path, error)
        return computed


@dataclasses.dataclass(frozen=True)
class DiskCachedEmbedder:
    """Embedder that stores embeddings and features of images, by their content, not of texts, in a `FeatureCache`.

    Equal images are embedded once, also without a cache: the last bits of an output may depend on its row in the batch,
    and copies of an image must be tied. Therefore all images are read and hashed first, on all processes.
    """

    embedder: Embedder
    cache: FeatureCache

    def image(self, images: Sequence[bytes]) -> np.ndarray:
        return self._get("embeddings", self.embedder.image, images)

    def text(self, texts: Sequence[str]) -> np.ndarray:
        return self.embedder.text(texts)

    def features(self, images: Sequence[bytes]) -> np.ndarray:
        return self._get("features", lambda images: features_of(self.embedder, images), images)

    def _get(self, kind: str, compute: Callable[[Sequence[bytes]], np.ndarray], images: Sequence[bytes]) -> np.ndarray:
        with distributed.synchronized_errors(*DATA_ERRORS):  # the images are read here; `compute` is a collective
            digests, first_of = _digests(images)
        content = hashlib.sha256(b"".join(digests)).hexdigest()
        # With other images on one process, the numbers of batches may differ: a deadlock.
        distributed.check_equal_on_all_processes({"images": content}, ValueError)
        distinct, row_of = _select(images, list(first_of.values())), {key: row for row, key in enumerate(first_of)}
        found = self.cache.get(f"{kind}-{content}", len(distinct), lambda: compute(distinct))
        return found[[row_of[digest] for digest in digests]]


def _read(path: pathlib.Path, rows: int) -> np.ndarray | None:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 (damaged headers raise tokenize's errors too)
        log.warning("%s: damaged, computed again: %s", path, error)
        return None
    if isinstance(array, np.ndarray) and array.ndim == 2 and len(array) == rows:
        return array
    log.warning("%s: expected an array of %d rows, got %s; computed again", path, rows, np.shape(array))
    return None


def _remove_abandoned(directory: pathlib.Path) -> None:
    """Remove temporary files of killed writers (see `paths.write_atomically`), and no file of other programs."""
    for path in directory.glob(f".{'[0-9a-f]' * 32}.npy.*"):
        with contextlib.suppress(OSError):  # renamed or removed meanwhile
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def weights_fingerprint(config: WeightsConfig, params: Params, dtype: str) -> str:
    """Return a hash of the architecture, preprocessing, dtype and parameters: of all that embeddings depend on."""
    found = hashlib.sha256(repr((config.model, config.preprocess, dtype)).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for name, array in sorted((jax.tree_util.keystr(path), array) for path, array in leaves):
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).view(np.uint8))
    return found.hexdigest()


def embed_dataset(
    embedder: Embedder, dataset: EvalDataset
) -> tuple[Float[np.ndarray, "n E"], Float[np.ndarray, "M E"]]:
    """Return the embeddings of the images and of the texts, averaged over the prompts of each text.

    Raises Unavailable if the dataset has no texts for a known reason, e.g. missing class names; ValueError for an
    inconsistent dataset, or a wrong number of rows from the embedder.
    """
    if dataset.missing_texts:
        raise Unavailable(dataset.missing_texts)
    check_dataset(dataset)
    image_nE = embedder.image(dataset.images)
    if len(image_nE) != len(dataset.images):
        raise ValueError(f"{dataset.name}: expected {len(dataset.images)} embeddings of images, got {len(image_nE)}")
    return image_nE, embed_texts(embedder, dataset)


def embed_texts(embedder: Embedder, dataset: EvalDataset) -> Float[np.ndarray, "M E"]:
    """Return the embeddings of the texts, averaged over the prompts of each text."""
    prompts_TE = embedder.text([prompt for prompts in dataset.texts for prompt in prompts])
    counts_M = np.array([len(prompts) for prompts in dataset.texts])
    if len(prompts_TE) != counts_M.sum():
        raise ValueError(f"{dataset.name}: expected {counts_M.sum()} embeddings of prompts, got {len(prompts_TE)}")
    return average_prompts(prompts_TE, counts_M)


def average_prompts(
    prompts_TE: Float[np.ndarray, "T E"], counts_M: Integer[np.ndarray, "M"]
) -> Float[np.ndarray, "M E"]:
    """Return the normalized mean of each text's unit prompt embeddings; `counts_M` are its numbers of prompts."""
    starts_M = np.concatenate([[0], np.cumsum(counts_M)[:-1]])
    return unit(np.add.reduceat(unit(prompts_TE), starts_M, axis=0))


def check_dataset(dataset: EvalDataset) -> None:
    """Raise ValueError unless there are images and texts, a target for each image, and a prompt for each text."""
    name, images, texts, targets = dataset.name, dataset.images, dataset.texts, dataset.targets
    if not len(images) or not len(texts):
        raise ValueError(f"{name}: expected images and texts, got {len(images)} images and {len(texts)} texts")
    if len(targets) != len(images):
        raise ValueError(f"{name}: expected one target per image, got {len(targets)} for {len(images)} images")
    if targets.ndim == 2 and targets.shape[1] != len(texts):
        raise ValueError(f"{name}: expected targets[n, {len(texts)}], one column per text, got {targets.shape[1]}")
    if targets.ndim == 1 and (targets.min() < 0 or targets.max() >= len(texts)):
        raise ValueError(f"{name}: expected targets from 0 to {len(texts) - 1}, got {targets.min()} to {targets.max()}")
    if empty := [index for index, prompts in enumerate(texts) if not prompts]:
        raise ValueError(f"{name}: expected a prompt per text, got none for text {empty[0]} ({len(empty)} in all)")
