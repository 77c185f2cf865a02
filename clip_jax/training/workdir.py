"""Files of a run next to its checkpoints: the resolved config and the versions, so that it can be repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from clip_jax.config import Config, differences, from_json, to_json
from clip_jax.paths import check_output, write_atomically
from clip_jax.provenance import versions

CONFIG_FILE = "config.json"
VERSIONS_FILE = "versions.json"
CHECKPOINTS = "checkpoints"  # directory in the workdir, with one directory per step
EXTENDABLE = ("train.total_steps", "train.total_epochs", "train.total_examples", "data.files")  # by --extend


def to_path(path: str, flag: str) -> epath.Path:
    """Return a local path or a URL that epath supports. Raises ValueError with the flag's name for other URLs."""
    try:
        return epath.Path(path).expanduser()
    except KeyError as error:  # epath's, for an unknown scheme
        raise ValueError(f"{flag}={path}: expected a local path, gs:// or s3://, got {error.args[0]}") from error


def check_writable(directory: epath.Path, suffix: str = "") -> None:
    """Create a directory, write a small file in it and remove the file. Raises OSError, or an object store's errors."""
    probe = directory / f".probe{suffix}"  # the suffix is another one in every process that checks at the same time
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_text("clip_jax")
    probe.unlink()


def check_outputs(workdir: epath.Path, export: str | None) -> None:
    """Raise ValueError if --workdir or --export is not writable."""
    outputs = [("--workdir", workdir, workdir), ("--workdir", workdir, workdir / CHECKPOINTS)]
    if export is not None:
        file = to_path(export, "--export")
        if not file.name or file.is_dir():
            raise ValueError(
                f"--export={export}: expected a file, got a directory; give e.g. {file / 'params.msgpack'}"
            )
        check_output("--export", file, ("a file",))
        outputs.append(("--export", file, file.parent))
    for flag, path, directory in outputs:
        try:
            check_writable(directory)
        except Exception as error:
            message = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{flag}={path}: cannot write to {directory} ({type(error).__name__}: {message}); choose another {flag}"
            ) from error


def stored_config(workdir: epath.Path) -> Config | None:
    """Return the config of the run in `workdir`; None for a new directory."""
    path = workdir / CONFIG_FILE
    return from_json(path.read_text()) if path.exists() else None


def check_same_config(stored: Config, given: Config, workdir: epath.Path, *, extend: bool = False) -> None:
    """Raise ValueError with the differing keys if `workdir` belongs to a run with another config.

    Args:
      extend: the keys of EXTENDABLE may differ.
    """
    allowed = EXTENDABLE if extend else ()
    changed = {key: values for key, values in differences(stored, given).items() if key not in allowed}
    if changed:
        hint = "" if set(changed) - set(EXTENDABLE) else ", add --extend to extend that run"
        raise ValueError(
            f"{workdir} belongs to a run with another config: {_listed(changed)}. Use another --workdir{hint}, or omit"
            " --config to resume with the stored config"
        )


def format_differences(stored: Config, given: Config) -> str:
    """Return e.g. 'train.seed: expected 0, got 1' for the first five differing keys; '' for equal configs."""
    return _listed(differences(stored, given))


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    more = [f"and {len(changed) - 5} more"] if len(changed) > 5 else []
    return "; ".join([f"{key}: expected {old!r}, got {new!r}" for key, (old, new) in [*changed.items()][:5]] + more)


def write_config(workdir: epath.Path, config: Config) -> None:
    """Write the resolved config and the versions, each atomically."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / VERSIONS_FILE, json.dumps(versions(), indent=2) + "\n")
    write_atomically(workdir / CONFIG_FILE, to_json(config))
