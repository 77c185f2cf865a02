"""Multi-process JAX: initialization, preemption, and errors and checks synchronized over all processes.

`jax.distributed` is initialized for a single process too: it installs the SIGTERM handler behind
`multihost_utils.reached_preemption_sync_point`. Without it SIGTERM ends the process before the state is saved.
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

DATA_ERRORS = (ValueError, OSError, IndexError, KeyError)  # raised for damaged or missing data
_MESSAGE_BYTES = 2048  # of an error, sent to the other processes


class Preempted(Exception):
    """SIGTERM reached a process of this job. Raised on all processes at the same check."""


def initialize() -> None:
    """Initialize `jax.distributed`; does nothing if it is initialized already.

    JAX detects TPU pods, SLURM and Open MPI. Elsewhere the environment variables JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID identify the processes; without them there is one process.

    Raises:
      ValueError: some of the three variables are set, but not all.
    """
    if jax.distributed.is_initialized():
        return
    timeouts = {  # seconds
        "heartbeat_timeout_seconds": int(os.environ.get("CLIP_JAX_HEARTBEAT_SECONDS", 60)),
        "shutdown_timeout_seconds": int(os.environ.get("CLIP_JAX_SHUTDOWN_SECONDS", 30)),
        "initialization_timeout": int(os.environ.get("CLIP_JAX_START_SECONDS", 600)),
    }
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if all(values):
        address, processes, process = values
        jax.distributed.initialize(address, int(processes), int(process), **timeouts)
        return
    if any(values):
        missing = [name for name, value in zip(names, values, strict=True) if not value]
        raise ValueError(
            f"{', '.join(missing)} not set; several processes need all of {', '.join(names)},"
            " e.g. JAX_COORDINATOR_ADDRESS=10.0.0.2:8476 JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=0"
        )
    with contextlib.suppress(ValueError):  # raised where JAX detects no cluster
        jax.distributed.initialize(**timeouts)
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", 1, 0, coordinator_bind_address=f"localhost:{port}", **timeouts)


class PreemptionMonitor:
    """Checks for preemption on all processes at the same points of the program."""

    def __init__(self) -> None:
        self._checks = 0  # `reached_preemption_sync_point` needs a counter that increases with every call

    def check(self) -> None:
        """Raise Preempted on all processes at the same check, once SIGTERM has reached one of them."""
        self._checks += 1
        if multihost_utils.reached_preemption_sync_point(self._checks):
            raise Preempted


def is_main_process() -> bool:
    """Return whether this process writes metrics, reports and exports."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    multihost_utils.sync_global_devices(name)


def all_true(flag: bool) -> bool:
    """Return whether `flag` is true on every process. Call it on all processes."""
    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def from_main_process(*values: int) -> tuple[int, ...]:
    """Return the integers of the main process (int32). Call it on all processes with the same number of values."""
    return tuple(int(x) for x in multihost_utils.broadcast_one_to_all(np.array(values, np.int32)))


@contextlib.contextmanager
def synchronized_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Raise an error of one of `kinds` in the block on all processes, with the message of the first that has one.

    Otherwise they would wait for each other in the next collective. Enter the block on all processes. An error of
    another kind propagates on its process alone and ends the job.
    """
    own_error = None
    try:
        yield
    except kinds as error:
        own_error = error
    if jax.process_count() == 1:
        if own_error:
            raise own_error
        return
    kind = next((number for number, kind in enumerate(kinds, 1) if isinstance(own_error, kind)), 0)
    message = bytes([kind]) + (format_error(own_error).encode() if own_error else b"")[: _MESSAGE_BYTES - 1]
    messages = multihost_utils.process_allgather(np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8))
    failed = np.flatnonzero(messages[:, 0])
    if not failed.size:
        return
    first = int(failed[0])
    if first == jax.process_index():
        raise own_error
    text = messages[first, 1:].tobytes().rstrip(b"\0").decode(errors="ignore")
    raise kinds[messages[first, 0] - 1](f"process {first}: {text}") from own_error


def format_error(error: Exception) -> str:
    """Return an error's message on one line, with the name of its type unless it is a ValueError or RuntimeError."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {text}"


def check_equal_on_all_processes(values: Mapping[str, str], kind: type[Exception] = RuntimeError) -> None:
    """Raise an error of `kind` on every process, with the names of the values that differ from those of process 0."""
    digests = [hashlib.sha256(f"{name}={value}".encode()).digest()[:8] for name, value in values.items()]
    local = np.frombuffer(b"".join(digests), np.uint32).reshape(len(values), 2)
    gathered = multihost_utils.process_allgather(local).reshape(jax.process_count(), len(values), 2)
    differing = {}
    for column, name in enumerate(values):
        processes = np.flatnonzero((gathered[:, column] != gathered[0, column]).any(axis=-1))
        if processes.size:
            differing[name] = ", ".join(map(str, processes))
    if differing:
        raise kind(
            "hosts disagree with process 0 in: "
            + "; ".join(f"{name} (processes {processes})" for name, processes in differing.items())
            + f". Here, in process {jax.process_index()}: "
            + ", ".join(f"{name}={values[name]}" for name in differing)
        )
