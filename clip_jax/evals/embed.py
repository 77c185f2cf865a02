"""Embedders: from encoded images and texts to unit vectors on the host.

The embedding of a class with several prompts is the normalized mean of their unit embeddings (Radford et al. 2021,
section 3.1.4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals.datasets.files import LazySequence
from clip_jax.evals.ranking import unit
from clip_jax.typing import Embedder, EvalDataset, Params, Tokenizer, Unavailable


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
        """Return a unit vector for each text; NaN if the model's output is zero or not finite."""
        return unit(self._embed(self.encode_text, self.tokenizer, texts, "text"))

    def features(self, images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
        """Return the image features before the projection, not normalized."""
        return self._embed(self.image_features, self.preprocess, images, "image")

    def _batches(self, prepare: Callable[..., np.ndarray], items: Sequence[Any]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield this process's rows of every batch, and the number of rows of the global batch without padding."""
        first, stop, _ = (self.rows or slice(None)).indices(self.batch_size)
        for start in range(0, len(items), self.batch_size):
            # The encoder is a collective: without synchronization, a decoding error would block the other processes.
            with distributed.synchronized_errors(*DATA_ERRORS) if self.rows is not None else contextlib.nullcontext():
                rows = prepare(items[start + first : start + stop] or items[-1:])
            padding = [(0, stop - first - len(rows))] + [(0, 0)] * (rows.ndim - 1)
            yield np.pad(rows, padding, mode="edge"), min(self.batch_size, len(items) - start)

    def _embed(
        self, encode: Callable[..., jax.Array], prepare: Callable[..., np.ndarray], items: Sequence[Any], kind: str
    ) -> Float[np.ndarray, "n E"]:
        if not len(items):
            raise ValueError(f"{kind}s: expected at least one, got none")
        jitted = jax.jit(encode, out_shardings=self.out_sharding)
        outputs: list[np.ndarray] = []
        pending: tuple[jax.Array, int] | None = None
        for rows, count in self._batches(prepare, items):
            started = jitted(self.params, self.put(rows)), count
            if pending:  # fetched one batch later, so that the host decodes while the device computes
                outputs.append(_fetch(*pending))
            pending = started
            if self.on_batch:
                self.on_batch()
        return np.concatenate([*outputs, _fetch(*pending)])


def _fetch(output: jax.Array, count: int) -> np.ndarray:
    return np.asarray(output)[:count].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class CachedEmbedder:
    """Embedder that keeps embeddings in memory: every image and text is embedded once."""

    embedder: Embedder
    _images: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)
    _texts: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        """Return the image embeddings; only new images are passed to the embedder."""
        return _embed_new(self.embedder.image, self._images, images)

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]:
        """Return the text embeddings; only new texts are passed to the embedder."""
        return _embed_new(self.embedder.text, self._texts, texts)

    def features(self, images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
        """Return the features, which are not cached."""
        return features_of(self.embedder, images)


def features_of(embedder: Embedder, images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
    """Return the embedder's features. Raises Unavailable if it has none."""
    if not hasattr(embedder, "features"):
        raise Unavailable("probes need an embedder with `features`; this one has `image` and `text` only")
    return embedder.features(images)


def _embed_new(
    embed: Callable[[Sequence[Any]], np.ndarray], cache: dict[bytes, np.ndarray], items: Sequence[Any]
) -> np.ndarray:
    encoded = (item if isinstance(item, bytes) else item.encode() for item in items)
    keys = [hashlib.blake2b(item, digest_size=16).digest() for item in encoded]  # the cache does not hold the images
    new: dict[bytes, int] = {}  # the first index of each key
    for index, key in enumerate(keys):
        if key not in cache:
            new.setdefault(key, index)
    if new:
        indices = list(new.values())
        embedded = embed(LazySequence(len(indices), lambda i: items[indices[i]]))
        cache.update(zip(new, embedded, strict=True))
    return np.stack([cache[key] for key in keys])


def embed_dataset(
    embedder: Embedder, dataset: EvalDataset
) -> tuple[Float[np.ndarray, "n E"], Float[np.ndarray, "M E"]]:
    """Return the embeddings of the images and of the texts, averaged over the prompts of each text.

    Raises:
      Unavailable: if the dataset has no texts for a known reason, e.g. missing class names.
      ValueError: for an inconsistent dataset (see `check_dataset`), or a wrong number of rows from the embedder.
    """
    if dataset.missing_texts:
        raise Unavailable(dataset.missing_texts)
    check_dataset(dataset)
    image_nE = embedder.image(dataset.images)
    prompts_TE = embedder.text([prompt for prompts in dataset.texts for prompt in prompts])
    counts_M = np.array([len(prompts) for prompts in dataset.texts])
    for kind, got, expected in (
        ("images", len(image_nE), len(dataset.images)),
        ("prompts", len(prompts_TE), counts_M.sum()),
    ):
        if got != expected:
            raise ValueError(f"{dataset.name}: expected {expected} embeddings of {kind}, got {got}")
    return image_nE, average_prompts(prompts_TE, counts_M)


def average_prompts(
    prompts_TE: Float[np.ndarray, "T E"], counts_M: Integer[np.ndarray, "M"]
) -> Float[np.ndarray, "M E"]:
    """Return the normalized mean of each text's unit prompt embeddings.

    Args:
      prompts_TE: prompt embeddings of the first text, then of the second, …
      counts_M: number of prompts of each text, at least 1.

    >>> average_prompts(np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), np.array([1, 2]))
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
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
    empty = [index for index, prompts in enumerate(texts) if not prompts]
    if empty:
        raise ValueError(
            f"{name}: expected a prompt for every text, got none for text {empty[0]} ({len(empty)} in all)"
        )
