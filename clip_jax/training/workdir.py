"""Files of a run next to its checkpoints: the resolved config and the versions, so that it can be repeated."""

from __future__ import annotations

import json

from etils import epath

from clip_jax.config import Config, differences, from_json, to_json
from clip_jax.paths import write_atomically
from clip_jax.provenance import versions

CONFIG_FILE = "config.json"
VERSIONS_FILE = "versions.json"


def to_path(path: str, flag: str) -> epath.Path:
    """Return a local path or a URL that epath supports. Raises ValueError with the flag's name for other URLs.

    >>> to_path("gs://bucket/runs", "--workdir").name
    'runs'
    """
    try:
        return epath.Path(path).expanduser()
    except KeyError as error:  # epath's, for an unknown scheme
        raise ValueError(f"{flag}={path}: expected a local path, gs:// or s3://, got {error.args[0]}") from error


def check_writable(directory: epath.Path, suffix: str = "") -> None:
    """Create a directory, write a small file in it and remove the file.

    Args:
      suffix: of the file's name, different for every process that checks at the same time.

    Raises:
      Exception: OSError, or TensorFlow's errors for an object store.
    """
    probe = directory / f".probe{suffix}"
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_text("clip_jax")
    probe.unlink()


def check_outputs(workdir: epath.Path, export: str | None) -> None:
    """Raise ValueError if --workdir or --export is not writable."""
    outputs = [("--workdir", workdir, workdir)]
    if export is not None:
        file = to_path(export, "--export")
        if not file.name or file.is_dir():
            raise ValueError(
                f"--export={export}: expected a file, got a directory; give e.g. {file / 'params.msgpack'}"
            )
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


def check_same_config(stored: Config, given: Config, workdir: epath.Path) -> None:
    """Raise ValueError with the differing keys if `workdir` belongs to a run with another config."""
    changed = differences(stored, given)
    if changed:
        listed = "; ".join(f"{key} is {old!r} there, {new!r} here" for key, (old, new) in list(changed.items())[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"{workdir} belongs to a run with another config: {listed}{more}. Use another --workdir, or omit --config"
            " to resume with the stored config"
        )


def write_config(workdir: epath.Path, config: Config) -> None:
    """Write the resolved config and the versions, each atomically."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / VERSIONS_FILE, json.dumps(versions(), indent=2) + "\n")
    write_atomically(workdir / CONFIG_FILE, to_json(config))
