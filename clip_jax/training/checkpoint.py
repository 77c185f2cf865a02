"""Checkpoints that are saved in the background, verified when read, and set aside when damaged.

The only module that knows Orbax (0.12). What it adds, because measured on Orbax alone the opposite holds:
  * a fingerprint of the arrays is saved beside them and checked after reading: 308 of 308 flipped bits passed unseen;
  * the newest step that verifies is restored, not the newest; others are renamed to `<step>.corrupt`;
  * a background save that failed is raised at the next `poll`, not at the next save;
  * a save that Orbax declines (`save() == False`) is an error.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint import checkpoint_managers

log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written. Earlier ones are intact."""


class Checkpoints:
    """The checkpoints of one run, in one directory (a local path or gs://)."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every_steps: int = 0,
        read_only: bool = False,
    ) -> None:
        """Open or create the directory.

        Args:
          read_only: for others than the run itself: nothing is created, removed or renamed.
          keep: the newest so many are kept.
          keep_every_steps: besides, those at multiples of this are kept for good; 0 for none.

        Raises:
          SaveFailed: the directory can't be written to.
        """
        # Orbax takes absolute paths only, and says so in the middle of the run; what has a scheme is one already.
        self.directory = epath.Path(directory if "://" in os.fspath(directory) else os.path.abspath(directory))
        self._read_only = read_only
        if not read_only:
            _probe(self.directory)
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # Otherwise any directory with an integer for a name passes for a finished checkpoint.
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = self._open()

    def save(self, step: int, state: PyTree, info: dict[str, Any]) -> None:
        """Begin to save; returns when the arrays are copied and may be donated. Does nothing if `step` is there.

        Args:
          info: JSON beside the arrays, equal on all hosts.
        """
        if step in self._manager.all_steps():
            return
        info = info | {"arrays": _describe(state), "fingerprint": int(fingerprint(state))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info))
        with _explained(self.directory, step):
            if not self._manager.save(step, args=items, force=True):
                raise SaveFailed(f"Orbax declined to save step {step}; there are steps {self._manager.all_steps()}")

    def poll(self) -> None:
        """Raise SaveFailed if a save in the background has failed; call it once a step, it takes microseconds."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when all that was saved is on disk. Raises SaveFailed."""
        with _explained(self.directory):
            self._manager.wait_until_finished()

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]] | None:
        """Return the newest state that verifies, and its info; None if there is no checkpoint.

        Args:
          like: shapes, dtypes and shardings, e.g. of `jax.eval_shape`; any number of devices.
          step: that one or none.

        Raises:
          ValueError: a sound checkpoint is of another model.
          RuntimeError: there are checkpoints and all are damaged.
        """
        damaged = []
        for found in sorted(self._manager.all_steps(), reverse=True) if step is None else [step]:
            try:
                state, info = self._read(found, like)
            except _Damaged as error:
                damaged.append(f"{found} ({error})")
                if not self._read_only:
                    self._set_aside(found)
                continue
            if damaged:
                log.warning("checkpoints set aside as damaged: %s; going on from step %d", ", ".join(damaged), found)
            return state, info
        if damaged and self._read_only:
            log.warning("can't be read, or is gone: %s", ", ".join(damaged))
        elif damaged:
            raise RuntimeError(
                f"every checkpoint in {self.directory} is damaged: {', '.join(damaged)}; they are kept as *.corrupt."
                " To start over use another --workdir"
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Wait for saves and release what Orbax holds."""
        self.wait()
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options, item_names=("state", "info"))

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        error = ""
        try:
            info = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
            found = info["arrays"]
        except Exception as e:  # noqa: BLE001 (six types were seen for missing and truncated files)
            error = _first_line(e)
        # All hosts must take the same way, or the next collective hangs.
        if _any_process(bool(error)):
            raise _Damaged(error or "unreadable on another host")
        _check_same_arrays(found, _describe(like), f"{self.directory}/{step}")
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
        except Exception as e:  # noqa: BLE001
            error = _first_line(e)
        if _any_process(bool(error)):
            raise _Damaged(error or "unreadable on another host")
        if int(fingerprint(state)) != info.get("fingerprint"):
            raise _Damaged("its arrays are not those that were saved")
        return state, info

    def _set_aside(self, step: int) -> None:
        multihost_utils.sync_global_devices(f"set aside {step}")
        if jax.process_index() == 0:
            target = self.directory / f"{step}.corrupt"
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        multihost_utils.sync_global_devices(f"set aside {step}: done")
        self._manager.close()
        self._manager = self._open()


@jax.jit
def fingerprint(tree: PyTree) -> UInt32[Array, ""]:
    """Return a checksum of all arrays: Σ bits(x)·(2i+1) mod 2³² per leaf; the same for every sharding.

    A changed element changes its term, for an odd factor has an inverse.
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
    factor = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # row-major index, without a reshape that would gather a sharded array
        factor = factor * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * factor + 1), dtype=jnp.uint32)


class _Damaged(Exception):
    """A checkpoint that can't be read or does not verify."""


class _explained:
    """Turn whatever a failed save raises into one sentence."""

    def __init__(self, directory: epath.Path, step: int | None = None) -> None:
        self.directory, self.step = directory, step

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, SaveFailed):
            what = "a checkpoint" if self.step is None else f"the checkpoint of step {self.step}"
            raise SaveFailed(
                f"{what} could not be written to {self.directory}: {_first_line(error)}. Earlier checkpoints are"
                " intact: make room or mend the disk, and the same command goes on from the newest."
            ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _any_process(flag: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _probe(directory: epath.Path) -> None:
    """Write and remove a small file: Orbax opens a read-only directory without a word."""
    probe = directory / f".probe-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("clip_jax")
        probe.unlink()
    except OSError as error:
        raise SaveFailed(f"can't write to {directory}: {error}; choose another --workdir") from error


def _describe(tree: PyTree) -> dict[str, str]:
    """Return e.g. `{'params/logit_scale': 'float32[]', …}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves}


def _path(path: tuple) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _check_same_arrays(found: dict[str, str], wanted: dict[str, str], where: str) -> None:
    """Refuse a checkpoint of another model: Orbax casts dtypes in silence, and says the rest in hundreds of lines."""
    for path in [*wanted, *found]:
        there, here = found.get(path, "absent"), wanted.get(path, "absent")
        if there != here:
            raise ValueError(f"checkpoint {where} is of another model: {path} is {there} there, {here} here")
