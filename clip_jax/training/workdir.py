"""What a run leaves beside its checkpoints so that it can be repeated: its config, versions and git commit."""

from __future__ import annotations

import json

from etils import epath

from clip_jax.config import Config, differences, from_json, to_json
from clip_jax.provenance import versions

CONFIG_FILE = "config.json"
VERSIONS_FILE = "versions.json"


def stored_config(workdir: epath.Path) -> Config | None:
    """Return the config of the run that `workdir` belongs to; None if it is new."""
    path = workdir / CONFIG_FILE
    return from_json(path.read_text()) if path.exists() else None


def check_same_run(stored: Config, given: Config, workdir: epath.Path) -> None:
    """Raise ValueError if `workdir` belongs to a run with another config, naming what differs."""
    changed = differences(stored, given)
    if changed:
        listed = "; ".join(f"{key} is {old!r} there, {new!r} here" for key, (old, new) in list(changed.items())[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"{workdir} belongs to a run with another config: {listed}{more}. Use another --workdir, or leave --config"
            " out to go on with the stored one"
        )


def describe(workdir: epath.Path, config: Config) -> None:
    """Write the resolved config and the versions, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    _write(workdir / VERSIONS_FILE, json.dumps(versions(), indent=2) + "\n")
    _write(workdir / CONFIG_FILE, to_json(config))


def _write(path: epath.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
