"""Provenance of results: package versions and the git commit, stored with every run and every report."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from clip_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of clip_jax, Python, the platform and the numerical packages, and the git commit."""
    return {
        "clip_jax": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def git_commit() -> str:
    """Return the commit of this code, with the suffix '+changes' for a modified tree; 'unknown' outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may be inside the repository of another project: this file must be tracked.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
