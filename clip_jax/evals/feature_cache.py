"""Features on disk: computed once for a checkpoint and a split, whoever asks for them next."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Callable

import numpy as np

from clip_jax.devices import distributed

log = logging.getLogger(__name__)

# A writer at work touches its file more often; one that was killed never again. Clocks of shared disks may be off.
ABANDONED_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """A directory of `.npy` files for one model. With directory '' nothing is kept.

    model: what the features depend on besides pictures: a fingerprint of weights, architecture and preprocessing.
    """

    directory: str
    model: str

    def get(self, key: str, rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what was kept under a key, or compute and keep it. To be called on all hosts.

        A file that can't be read, or holds another number of rows, counts as missing: it is written anew. Features
        that aren't finite are not kept, for a later version may do better.
        """
        if not self.directory:
            return compute()
        name = hashlib.sha256(f"{self.model}/{key}".encode()).hexdigest()[:32]
        path = pathlib.Path(self.directory).expanduser() / f"{name}.npy"
        found = _read(path, rows)
        if distributed.all_true(found is not None):  # else some hosts would compute and wait for the others
            return found
        computed = compute()
        if distributed.is_main_process() and np.isfinite(computed).all():
            try:
                _write(path, computed)
            except OSError as error:  # a full disk or a home that is read-only costs time, not the evaluation
                log.warning("features are not kept: %s", error)
        return computed


def _read(path: pathlib.Path, rows: int) -> np.ndarray | None:
    try:
        found = np.load(path, allow_pickle=False)
    except Exception:  # noqa: BLE001 (damaged headers raise tokenize's errors too)
        return None
    return found if isinstance(found, np.ndarray) and found.ndim == 2 and len(found) == rows else None


def _write(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    new = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.new")
    with open(new, "wb") as file:
        np.save(file, array)
    os.replace(new, path)


def _remove_abandoned(directory: pathlib.Path) -> None:
    """Remove what killed writers left; others' files of that ending have other names."""
    for path in directory.glob(f"{'[0-9a-f]' * 32}.{'[0-9a-f]' * 32}.new"):
        with contextlib.suppress(OSError):  # its writer was alive, or another has removed it
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
