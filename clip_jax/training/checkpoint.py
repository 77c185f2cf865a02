"""Checkpoints: asynchronous saves with Orbax (0.12), verified when restored.

Guarantees that Orbax alone does not give, as measured:
  * A fingerprint of the arrays is stored with them and verified after reading. Orbax restored 308 of 308 checkpoints
    with a flipped bit without an error.
  * The newest intact step is restored; damaged steps are renamed to `<step>.corrupt`.
  * A failed asynchronous save is raised at the next `poll`, not at the next save.
  * A save that Orbax declines (`save() == False`) is an error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint import checkpoint_managers

from clip_jax.devices import distributed
from clip_jax.models import tree_path
from clip_jax.paths import is_url
from clip_jax.training.rounding import element_index, mix
from clip_jax.training.workdir import check_writable

log = logging.getLogger(__name__)

VERSION = 2  # of a checkpoint; 1 had another fingerprint


class SaveFailed(RuntimeError):
    """A checkpoint could not be written. Earlier ones are intact."""


class Checkpoints:
    """The checkpoints of one run, in one directory (a local path or gs://)."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = None,
        keep_every_steps: int = 0,
        read_only: bool = False,
    ) -> None:
        """Open or create the directory.

        Args:
          keep, keep_every_steps: see `CheckpointConfig`; keep=None keeps all.
          read_only: nothing is created, removed or renamed.

        Raises:
          SaveFailed: the directory is not writable.
          PermissionError: a checkpoint may not be read by this user.
        """
        # Orbax accepts absolute paths only, and raises for others at the first save; URLs are absolute.
        self.directory = epath.Path(directory if is_url(directory) else os.path.abspath(directory))
        self._read_only = read_only
        if not read_only:
            try:
                check_writable(self.directory, suffix=f"-{jax.process_index()}")
            except Exception as error:
                raise SaveFailed(f"cannot write to {self.directory}: {error}; choose another --workdir") from error
        _check_readable(self.directory, "[0-9]*")  # Orbax ignores a directory whose files it can't see, or removes it
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # In other modes every directory whose name is an integer counts as a complete checkpoint.
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = self._open()

    def save(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
        """Start a save and return when the arrays are copied and may be donated. An existing step is not saved again.

        `info` is JSON that the main process stores with the arrays.
        """
        if step in self._manager.all_steps():
            return
        info = info | {"arrays": _describe(state), "fingerprint": int(fingerprint(state)), "version": VERSION}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info))
        with _save_errors(self.directory, f"the checkpoint of step {step}"):
            if not self._manager.save(step, args=items, force=True):
                raise SaveFailed(f"Orbax declined to save step {step}; there are steps {self._manager.all_steps()}")

    def poll(self) -> None:
        """Raise SaveFailed if an asynchronous save has failed. It takes microseconds; call it every step."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for asynchronous saves. Raises SaveFailed."""
        with _save_errors(self.directory, "a checkpoint"):
            self._manager.wait_until_finished()

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]] | None:
        """Return the newest intact state and its info; None without a checkpoint.

        Args:
          abstract_state: `jax.ShapeDtypeStruct` leaves with shardings, over any number of devices.
          step: restore this step only.

        Raises:
          ValueError: an intact checkpoint belongs to another model.
          PermissionError: a file of a checkpoint may not be read by this user.
          RuntimeError: every checkpoint is damaged.
        """
        damaged = []
        for found in sorted(self._manager.all_steps(), reverse=True) if step is None else [step]:
            try:
                state, info = self._read(found, abstract_state)
            except _Damaged as error:
                _check_readable(self.directory, f"{found}/**/*")
                damaged.append(f"{found} ({error})")
                if not self._read_only:
                    self._rename_damaged(found)
                continue
            if damaged:
                log.warning("damaged checkpoints: %s; falling back to step %d", ", ".join(damaged), found)
            return state, info
        if damaged and self._read_only:
            log.warning("damaged or removed checkpoints: %s", ", ".join(damaged))
        elif damaged:
            raise RuntimeError(
                f"every checkpoint in {self.directory} is damaged: {', '.join(damaged)}; they are renamed to"
                " *.corrupt. To start from the beginning, use another --workdir"
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options, item_names=("state", "info"))

    def _read(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        with _read_errors():
            info = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
            found = info["arrays"]
        where = f"{self.directory}/{step}"
        if (version := info.get("version", 1)) != VERSION:
            raise ValueError(
                f"{where}: expected a checkpoint of version {VERSION}, got {version}; finish the run with the"
                " clip_jax that wrote it, or start another from its weights (init.weights)"
            )
        _check_same_arrays(found, _describe(abstract_state), where)
        with _read_errors():
            items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            state = self._manager.restore(step, args=items).state
        if int(fingerprint(state)) != info.get("fingerprint"):
            raise _Damaged("the fingerprint of its arrays differs")
        return state, info

    def _rename_damaged(self, step: int) -> None:
        distributed.barrier(f"rename {step}")
        if distributed.is_main_process():
            target = self.directory / f"{step}.corrupt"
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        distributed.barrier(f"renamed {step}")
        self._manager.close()
        self._manager = self._open()


@jax.jit
def fingerprint(tree: PyTree) -> UInt32[Array, ""]:
    """Return a checksum of all arrays, Σ mix(bits(x_i) + 0x9E3779B9·i) mod 2³² per leaf, independent of the sharding.

    `mix` and odd factors are invertible modulo 2³², so a change of one element always changes the checksum. Any other
    change is missed with probability 2⁻³²: sums that are linear in the bits missed swaps of neighbors x and −x.
    """
    total = jnp.uint32(0)
    for position, leaf in enumerate(jax.tree.leaves(tree)):
        total += (2 * position + 1) * _leaf_fingerprint(leaf)
    return total


def _leaf_fingerprint(x: Array) -> UInt32[Array, ""]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    return jnp.sum(mix(bits + element_index(bits.shape) * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


class _Damaged(Exception):
    """A checkpoint that cannot be read, or whose fingerprint differs."""


def _check_readable(directory: epath.Path, pattern: str) -> None:
    """Raise PermissionError for a local file or directory that this user may not read: it is not damaged."""
    if is_url(directory):
        return
    for path in sorted(pathlib.Path(directory).glob(pattern)):  # a directory precedes its files
        readable = os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)
        # Existence is tested last: another host may just remove the remains of an interrupted save.
        if not readable and os.path.exists(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextlib.contextmanager
def _read_errors() -> Iterator[None]:
    """Raise _Damaged on all hosts for an error of one: they must take the same branch, or the next collective hangs."""
    error = ""
    try:
        yield
    except Exception as e:  # noqa: BLE001 (Orbax raised six types for missing and truncated files)
        error = _first_line(e)
    if not distributed.all_true(not error):
        raise _Damaged(error or "unreadable on another host")


@contextlib.contextmanager
def _save_errors(directory: epath.Path, name: str) -> Iterator[None]:
    """Raise SaveFailed for an error of a save."""
    try:
        yield
    except SaveFailed:
        raise
    except Exception as error:
        raise SaveFailed(
            f"{name} could not be written to {directory}: {_first_line(error)}. Earlier checkpoints are"
            " intact: free or repair the disk; the same command resumes from the newest."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _describe(tree: PyTree) -> dict[str, str]:
    """Return e.g. `{'params/logit_scale': 'float32[]', …}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tree_path(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves}


def _check_same_arrays(found: dict[str, str], wanted: dict[str, str], where: str) -> None:
    """Raise ValueError for the first array that differs: Orbax casts dtypes silently and has errors of many lines."""
    for path in [*wanted, *found]:
        expected, stored = wanted.get(path, "absent"), found.get(path, "absent")
        if stored != expected:
            raise ValueError(f"checkpoint {where} belongs to another model: {path}: expected {expected}, got {stored}")
