"""Paths that may be URLs of an object store, and files that appear whole."""

from __future__ import annotations

import io
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import BinaryIO

from etils import epath


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL: an object store replaces objects as a whole and cannot append to them."""
    return "://" in os.fspath(path)


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a URL where only a local path is supported; `gs://…` would become a local folder `gs:`.

    >>> check_local("--data_dir", "/data")
    """
    if is_url(path):
        raise ValueError(
            f"{name}={os.fspath(path)}: expected a local path, got a URL; copy it to a local disk, e.g. gcloud storage"
            f" cp -r {os.fspath(path)} /data/, or mount the bucket with gcsfuse"
        )


def write_atomically(path: str | os.PathLike[str], content: str | Callable[[BinaryIO], object]) -> None:
    """Write a file, of which readers and resumed runs see the old content or the new, never a part.

    A local file is written to a temporary file in its directory, synced to disk and renamed. An object store replaces
    an object as a whole.

    Args:
      path: a local path or a URL.
      content: text, or a function that writes to a binary file.
    """
    path = epath.Path(path)
    write = content if callable(content) else lambda file: file.write(content.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_url(path):
        buffer = io.BytesIO()
        write(buffer)
        path.write_bytes(buffer.getvalue())
        return
    # A rename needs the same file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _fsync_directory(pathlib.Path(path.parent))


def _umask() -> int:
    # mkstemp creates files with mode 0600. The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(folder: pathlib.Path) -> None:
    """Make the rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
