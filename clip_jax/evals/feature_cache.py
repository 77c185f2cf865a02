"""Embeddings and features on disk: computed once per model and dataset split."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.devices import distributed
from clip_jax.evals.embed import features_of
from clip_jax.typing import Embedder

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600  # age of a temporary file whose writer was killed; allows for clock skew of shared disks


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
                _write(path, computed)
            except OSError as error:  # disk full or read-only: the evaluation goes on without the cache
                log.warning("%s: features not cached: %s", path, error)
        return computed


@dataclasses.dataclass(frozen=True)
class DiskCachedEmbedder:
    """Embedder that stores the embeddings and features of images with a fingerprint in a `FeatureCache`."""

    embedder: Embedder
    cache: FeatureCache

    def image(self, images: Sequence[bytes]) -> np.ndarray:
        """Return unit vectors float[n E]."""
        return self._get("embeddings", self.embedder.image, images)

    def text(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit vectors float[m E], which are not cached."""
        return self.embedder.text(texts)

    def features(self, images: Sequence[bytes]) -> np.ndarray:
        """Return features float[n D]. Raises Unavailable if the embedder has none."""
        return self._get("features", lambda images: features_of(self.embedder, images), images)

    def _get(self, kind: str, compute: Callable[[Sequence[bytes]], np.ndarray], images: Sequence[bytes]) -> np.ndarray:
        fingerprint = getattr(images, "fingerprint", "")
        if not fingerprint:
            return compute(images)
        return self.cache.get(f"{kind}-{fingerprint}", len(images), lambda: compute(images))


def _read(path: pathlib.Path, rows: int) -> np.ndarray | None:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception:  # noqa: BLE001 (damaged headers raise tokenize's errors too)
        return None
    return array if isinstance(array, np.ndarray) and array.ndim == 2 and len(array) == rows else None


def _write(path: pathlib.Path, array: np.ndarray) -> None:
    """Write a file atomically, and remove temporary files of killed writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f"{'[0-9a-f]' * 32}.{'[0-9a-f]' * 32}.new"):  # no file of other programs
        with contextlib.suppress(OSError):  # renamed or removed meanwhile
            if time.time() - abandoned.stat().st_mtime > ABANDONED_SECONDS:
                abandoned.unlink()
    new = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.new")
    with open(new, "wb") as file:
        np.save(file, array)
    os.replace(new, path)
