"""Start of a run: compiled programs are kept in the workdir, and the log has the seconds of each phase.

XLA compiles a step in seconds to minutes. A restarted run has the same programs and reads them instead. They are kept
in the workdir because all hosts see it: JAX writes them on the first host only, and machines that replace preempted
ones have empty disks.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import jax
from etils import epath

log = logging.getLogger(__name__)

PROGRAMS = "programs"  # directory in the workdir
_COMPILED = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"


def keep_programs(workdir: epath.Path) -> None:
    """Keep compiled programs in the workdir, unless the user has set JAX_COMPILATION_CACHE_DIR.

    Call it before JAX compiles. JAX warns of a program that it cannot read, and compiles it.
    JAX_ENABLE_COMPILATION_CACHE=false turns this off.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / PROGRAMS))


class StartUp:
    """Seconds of the phases up to the end of the first step, and how much of them was compilation.

    >>> import time
    >>> with StartUp(time.monotonic()) as start_up:
    ...     start_up.phase("data")
    ...     start_up.finish("first step", ())  # logs: first step 0.0 s after the start: imports 0.0 s, data 0.0 s, …
    """

    def __init__(self, started: float):
        """Begin with the phase "imports", which ends now.

        Args:
          started: time.monotonic() at the start of the process.
        """
        self._started = self._last = started
        self._phases: list[str] = []
        self._programs, self._read, self._seconds = 0, 0, 0.0
        self._finished = False
        self.phase("imports")

    def __enter__(self) -> StartUp:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def phase(self, name: str) -> None:
        """End a phase. Nothing after `finish`."""
        if not self._finished:
            now = time.monotonic()
            self._phases.append(f"{name} {now - self._last:.1f} s")
            self._last = now

    def finish(self, name: str, outputs: Any) -> None:
        """Wait for the arrays of the last phase, and log all phases. Nothing but the first time."""
        if self._finished:
            return
        jax.block_until_ready(outputs)
        self.phase(name)
        self._finished = True
        if jax.process_index() == 0:
            log.info(
                "first step %.1f s after the start: %s; %.1f s of it for %d programs, %d of them compiled before",
                self._last - self._started,
                ", ".join(self._phases),
                self._seconds,
                self._programs,
                self._read,
            )

    def _on_duration(self, event: str, seconds: float, **_: object) -> None:
        if event == _COMPILED:
            self._programs += 1
            self._seconds += seconds

    def _on_event(self, event: str, **_: object) -> None:
        self._read += event == _READ
