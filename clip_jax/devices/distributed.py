"""Several processes as one program: start, stop together, agree.

`jax.distributed` is initialised for a single process too: it is what turns SIGTERM into a notice that can be polled,
and without it SIGTERM kills before anything is saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

# What is raised for data that are damaged or gone; what else is raised is a mistake of the program.
DATA_ERRORS = (ValueError, OSError, IndexError, KeyError)
_SAID_BYTES = 2048  # of an error, sent to the other hosts


class Preempted(Exception):
    """The machine asked this job to leave (SIGTERM on any host); raised on all hosts at the same poll."""


def initialize() -> None:
    """Initialise `jax.distributed`; does nothing the second time.

    TPU pods, SLURM and Open MPI are recognised by JAX. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who we are; without them we are alone.
    """
    if jax.distributed.is_initialized():
        return
    timeouts = {
        # Limits of silence in seconds: a dead host ends the job after the first, at most.
        "heartbeat_timeout_seconds": int(os.environ.get("CLIP_JAX_HEARTBEAT_SECONDS", 60)),
        "shutdown_timeout_seconds": int(os.environ.get("CLIP_JAX_SHUTDOWN_SECONDS", 30)),
        "initialization_timeout": int(os.environ.get("CLIP_JAX_START_SECONDS", 600)),
    }
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if all(given):
        address, processes, process = given
        jax.distributed.initialize(address, int(processes), int(process), **timeouts)
        return
    if any(given):
        missing = [name for name, value in zip(names, given, strict=True) if not value]
        raise ValueError(
            f"{', '.join(missing)} not set; several processes need all of {', '.join(names)},"
            " e.g. JAX_COORDINATOR_ADDRESS=10.0.0.2:8476 JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=0"
        )
    with contextlib.suppress(ValueError):  # raised where JAX recognises no cluster
        jax.distributed.initialize(**timeouts)
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", 1, 0, coordinator_bind_address=f"localhost:{port}", **timeouts)


class PreemptionMonitor:
    """Asks, on all hosts at the same points of the program, whether to leave.

    JAX needs a number that grows with every question. It is our own and not the training step, so that evaluation
    and start-up can ask too.
    """

    def __init__(self) -> None:
        self._polls = 0

    def check(self) -> None:
        """Raise Preempted, on every host at the same poll, some polls after SIGTERM reached one of them."""
        self._polls += 1
        if multihost_utils.reached_preemption_sync_point(self._polls):
            raise Preempted


def is_main_process() -> bool:
    """Return whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(point: str) -> None:
    """Return when every process has come to this point of the program."""
    multihost_utils.sync_global_devices(point)


def all_true(flag: bool) -> bool:
    """Return whether a flag is set on every process; to be called on all of them."""
    return bool(multihost_utils.process_allgather(np.array(flag)).all())


@contextlib.contextmanager
def synchronized_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Go on after a block on all processes or on none; to be entered on all of them.

    Where the block raises one of `kinds` on any process, it is raised on every one, with the words of the first: else
    the others would wait for it in the next computation that they share. Errors of other kinds go straight through, end
    their process, and with it the job.
    """
    mine = None
    try:
        yield
    except kinds as error:
        mine = error
    if jax.process_count() == 1:
        if mine:
            raise mine
        return
    kind = next((number for number, kind in enumerate(kinds, 1) if isinstance(mine, kind)), 0)
    said = bytes([kind]) + (format_error(mine).encode() if mine else b"")[: _SAID_BYTES - 1]
    everyone = multihost_utils.process_allgather(np.frombuffer(said.ljust(_SAID_BYTES, b"\0"), np.uint8))
    failed = np.flatnonzero(everyone[:, 0])
    if not failed.size:
        return
    first = int(failed[0])
    if first == jax.process_index():
        raise mine
    words = everyone[first, 1:].tobytes().rstrip(b"\0").decode(errors="ignore")
    raise kinds[everyone[first, 0] - 1](f"process {first}: {words}") from mine


def format_error(error: Exception) -> str:
    """Return an error's words in one line, after its kind where they don't stand alone: KeyError's are a key."""
    words = " ".join(str(error).split())
    return words if words and isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {words}"


def check_equal_on_all_processes(facts: Mapping[str, str]) -> None:
    """Stop all hosts if they differ in a fact, e.g. `{'config': …, 'training data': …}`.

    Raises:
      RuntimeError: on every host, naming the facts and the processes that differ from process 0.
    """
    digests = [hashlib.sha256(f"{name}={value}".encode()).digest()[:8] for name, value in facts.items()]
    mine = np.frombuffer(b"".join(digests), np.uint32).reshape(len(facts), 2)
    everyone = multihost_utils.process_allgather(mine).reshape(jax.process_count(), len(facts), 2)
    wrong = []
    for column, name in enumerate(facts):
        others = np.flatnonzero((everyone[:, column] != everyone[0, column]).any(axis=-1))
        if others.size:
            wrong.append(f"{name} (processes {', '.join(map(str, others))})")
    if wrong:
        raise RuntimeError(
            f"hosts disagree with process 0 in: {'; '.join(wrong)}. Here, in process {jax.process_index()}: "
            + ", ".join(f"{name}={value}" for name, value in facts.items() if any(w.startswith(name) for w in wrong))
        )
