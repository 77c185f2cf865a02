"""Where the time of the input pipeline goes, and its requests to files and stores: rates for the training log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from clip_jax.data import storage


class Activity:
    """Seconds of the stages of one pipeline. Thread-safe."""

    def __init__(self) -> None:
        self.threads = 1  # that the pipeline runs at the same time for these stages
        self._lock = threading.Lock()
        self._start_again(storage.counters.bytes, storage.counters.requests)

    def _start_again(self, read: int, requests: int) -> None:
        self._seconds = {"storage": 0.0, "tokenizer": 0.0}
        self._start, self._read, self._requests = time.monotonic(), read, requests

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block as that of a stage, 'storage' or 'tokenizer'."""
        start = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += time.monotonic() - start

    def rates(self) -> dict[str, float]:
        """Return rates and fractions of time since the last call.

        `data/storage` and `data/tokenizer` are fractions of the time of the threads that read and tokenize; for the
        rest, these threads decode or wait for the decoding.
        """
        with self._lock:
            elapsed, counters = max(time.monotonic() - self._start, 1e-9), storage.counters
            rates = {f"data/{name}": seconds / elapsed / self.threads for name, seconds in self._seconds.items()}
            rates["data/megabytes_per_second"] = (counters.bytes - self._read) / elapsed / 1e6
            rates["data/requests_per_second"] = (counters.requests - self._requests) / elapsed
            rates["data/failed_requests"] = float(counters.failures)
            self._start_again(counters.bytes, counters.requests)
        return rates
