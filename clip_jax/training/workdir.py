"""What a run leaves beside its checkpoints so that it can be repeated: its config, versions and git commit."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from etils import epath

from clip_jax import __version__
from clip_jax.config import Config, differences, from_json, to_json

CONFIG_FILE = "config.json"
VERSIONS_FILE = "versions.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "numpy", "pillow")


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


def versions() -> dict[str, str]:
    """Return the versions of all that decides a run's numbers, and the git commit of the code if it has one."""
    return {
        "clip_jax": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _git_commit() -> str:
    """Return the commit, with '+changes' behind it if the tree is not clean; 'unknown' outside a checkout."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A package in somebody's site-packages may lie inside a repository that is not ours.
        git("ls-files", "--error-unmatch", "workdir.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _write(path: epath.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
