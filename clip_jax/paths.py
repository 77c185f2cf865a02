"""Paths that may be URLs of an object store, and files that appear whole."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
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


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_not_pointer(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a Git LFS pointer, a text of three lines that a clone without git-lfs has for large files.

    Source: git-lfs `docs/spec.md`.

    >>> check_not_pointer("/dev/null")
    """
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{os.fspath(path)}: expected the file, got its Git LFS pointer; fetch it with git lfs pull, or the"
                " repository with hf download"
            )


_KINDS = {stat.S_ISREG: "a file", stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}


def path_kind(path: str | os.PathLike[str]) -> str:
    """Return 'a file', 'a directory', 'a FIFO', 'a socket' or 'a device'; '' if a local path does not exist.

    >>> path_kind("/dev/null"), path_kind("/dev"), path_kind("/dev/nothing")
    ('a device', 'a directory', '')
    """
    if not os.path.exists(path):
        return ""
    mode = os.stat(path).st_mode
    return next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "a device")


def check_output(name: str, path: str | os.PathLike[str], kinds: Sequence[str] = ("a file", "a directory")) -> None:
    """Raise ValueError for a local path where no output of these kinds can be written. A URL is not checked.

    >>> check_output("--out", "/tmp/new/report.json")
    """
    if is_url(path):
        return
    local = pathlib.Path(path).expanduser().absolute()
    if (found := path_kind(local)) and found not in kinds:
        raise ValueError(f"{name}={os.fspath(path)}: expected {' or '.join(kinds)} or a new path, got {found}")
    nearest = next(folder for folder in (local, *local.parents) if path_kind(folder))
    folder = nearest.parent if nearest == local and nearest.is_file() else nearest
    if not folder.is_dir():
        raise ValueError(
            f"{name}={os.fspath(path)}: expected a directory {folder}, got {path_kind(folder)}; give another"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={os.fspath(path)}: expected a directory with write permission, got {folder} without")


def error_sentence(error: Exception) -> str:
    """Return the message of an error; of the operating system's, with the path or the reason in front."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}; give another path, or make room or change permissions"
    if (reason := disk_error(error)) and not isinstance(error, ValueError):
        return f"{reason.lower()}; make room, or give another path: {str(error).splitlines()[0]}"
    return str(error)


# Errors of a full or read-only disk. TensorFlow and Orbax raise errors of their own with these texts.
_DISK = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)}


def disk_error(error: BaseException | None) -> str:
    """Return the reason of an error, or of one that it was raised from, if that is a full or read-only disk, else ''.

    >>> disk_error(OSError(errno.ENOSPC, "")), disk_error(ValueError("x"))
    ('No space left on device', '')
    """
    if error is None:
        return ""
    found = (text for code, text in _DISK.items() if getattr(error, "errno", None) == code or text in str(error))
    return next(found, "") or disk_error(error.__cause__)


@contextlib.contextmanager
def errors_naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in errors of the operating system, not a temporary file or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_atomically(path: str | os.PathLike[str], content: str | Callable[[BinaryIO], object]) -> None:
    """Write a file, of which readers and resumed runs see the old content or the new, never a part.

    A local file is written to a temporary file in its directory, synced to disk and renamed. An object store replaces
    an object as a whole.

    Args:
      path: a local path or a URL.
      content: text, or a function that writes to a binary file.

    Raises:
      ValueError: for a directory, a device or a FIFO, which a file would replace.
      OSError: with `path`, e.g. for a full disk or without permission.
    """
    path = epath.Path(path)
    write = content if callable(content) else lambda file: file.write(content.encode())
    if is_url(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        write(buffer)
        path.write_bytes(buffer.getvalue())
        return
    if (found := path_kind(path)) not in ("", "a file"):
        raise ValueError(f"{path}: expected a file or a new path, got {found}; give another path")
    with errors_naming(path):
        _replace(pathlib.Path(path).resolve(), write)  # the file that a symbolic link leads to, not the link


def _replace(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
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
    _fsync_directory(path.parent)


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
