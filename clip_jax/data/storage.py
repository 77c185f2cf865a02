"""Listings and byte ranges of files: local paths, `gs://`, `s3://`, `az://`, `https://` and `hf://`.

Object stores are read by obstore (https://developmentseed.org/obstore), with the credentials that each store's own
tools use: application default credentials, AWS_* variables, instance metadata, `hf auth login`. Its `GOOGLE_BASE_URL`
and `AWS_ENDPOINT_URL` name another server, e.g. an emulator. A store that does not answer is waited for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import functools
import glob
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from clip_jax.paths import is_url

log = logging.getLogger(__name__)

THREADS = 16  # requests of a listing at the same time
HEADS = 16  # names of one folder, above which the folder is listed
REQUEST_SECONDS = 120  # for one range, of 64 MB or so
RETRIES = {"max_retries": 3}  # of obstore, at once; then this module waits
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENOTCONN}  # network mounts
EXAMPLES = "'/data/cc3m/*.tfrecord', 'gs://bucket/cc3m/{00000..00331}.tar' or 'a.tfrecord,b.tfrecord'"

Result = TypeVar("Result")


class StorageError(OSError):
    """A store could not be read for longer than the limit, or refused."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file or object. `version` changes with its content: an ETag, or a local modification time."""

    path: str
    size: int  # bytes
    version: str
    records: int | None = None  # as an index of wids has it

    def name_and_path(self) -> tuple[str, str]:
        """Return the key by which the files of a source are sorted."""
        return os.path.basename(self.path), self.path


@dataclasses.dataclass
class Counters:
    """Requests of this process to files and stores so far."""

    requests: int = 0
    bytes: int = 0
    failures: int = 0  # failed requests, which were tried again


counters = Counters()
_lock = threading.Lock()
_listings: dict[tuple[str, bool], list[File]] | None = None  # of folders, within `listed_once`


def read_range(path: str, start: int, stop: int, max_stall_seconds: float = 600.0) -> bytes:
    """Return the bytes [start, stop) of a file; fewer if it ends earlier. Thread-safe, without the GIL.

    Args:
      max_stall_seconds: how long a failing store is tried again, with growing pauses.

    Raises:
      FileNotFoundError: if the file does not exist.
      StorageError: if the store refuses, or fails for longer than `max_stall_seconds`.

    >>> read_range("/dev/zero", 0, 4)
    b'\\x00\\x00\\x00\\x00'
    """
    if stop <= start:
        return b""
    data = _persistently(lambda: _read_range(path, start, stop), path, max_stall_seconds)
    with _lock:
        counters.requests += 1
        counters.bytes += len(data)
    return data


def _read_range(path: str, start: int, stop: int) -> bytes:
    if not is_url(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # `open` takes twice the time
        try:
            parts = []
            while start < stop and (part := os.pread(file, stop - start, start)):
                parts.append(part)
                start += len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(file)
    import obstore  # 0.1 s, for URLs only

    store, key = _store_and_key(path)
    return bytes(obstore.get_range(store, key, start=start, end=stop))


def read_file(path: str, max_stall_seconds: float = 600.0) -> bytes:
    """Return the content of a file. Raises as `read_range`."""
    return read_range(path, 0, stat(path, max_stall_seconds).size, max_stall_seconds)


def write_file(url: str, content: bytes) -> None:
    """Write an object of a store. Raises as `read_range`."""
    import obstore

    store, key = _store_and_key(url)
    _persistently(lambda: obstore.put(store, key, content, use_multipart=False), url, 600.0)


def stat(path: str, max_stall_seconds: float = 600.0) -> File:
    """Return size and version of a file. Raises as `read_range`."""
    return _persistently(lambda: _stat(path), path, max_stall_seconds)


def _stat(path: str) -> File:
    if not is_url(path):
        status = os.stat(path)
        return File(path, status.st_size, str(status.st_mtime_ns))
    import obstore

    store, key = _store_and_key(path)
    with _lock:
        counters.requests += 1
    return _file(path, obstore.head(store, key))


def list_files(files: str) -> list[File]:
    """Return the files of a path, a glob, a brace range or a comma-separated list of these, in the order of the list.

    A `.json` file is an index of webdataset's wids, whose shards are returned. A folder of an object store is listed
    once, 1,000 names per request, whatever the number of names in a range.

    Raises:
      ValueError: if a pattern matches no file, or names one that does not exist.
      StorageError: as `read_range`.

    >>> [file.path == __file__ for file in list_files(__file__)]
    [True]
    """
    if not files.strip():
        raise ValueError(f"data.files is empty; give files such as {EXAMPLES}")
    if files.lower().endswith(".json") and not glob.has_magic(files):
        return _wids_shards(os.path.expanduser(files))
    if not is_url(files) and os.path.isfile(os.path.expanduser(files)):  # a name with a comma or brackets
        return [stat(os.path.expanduser(files))]
    found: list[File] = []
    for pattern in files.split(","):
        paths = expand_braces(os.path.expanduser(pattern.strip()))
        listed = list(_matches(paths))
        if missing := [path for path, matches in zip(paths, listed, strict=True) if not matches]:
            problem = "matches no file" if glob.has_magic(missing[0]) else "does not exist"
            more = f", nor do {len(missing) - 1} others of {len(paths)}" if len(missing) > 1 else ""
            raise ValueError(f"data.files={files!r}: {missing[0]!r} {problem}{more}. Give files such as {EXAMPLES}")
        found += (file for matches in listed for file in matches)
    return found


def _wids_shards(path: str) -> list[File]:
    """Return the shards of an index of webdataset's wids (`widsindex create`), relative to its base or its folder."""
    try:
        index = json.loads(read_file(path))
        shards = [(str(shard["url"]), shard.get("nsamples")) for shard in index["shardlist"]]
        base = str(index.get("base_path") or os.path.dirname(path))
    except FileNotFoundError as error:
        raise ValueError(f"data.files={path!r} does not exist. Give files such as {EXAMPLES}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data.files={path!r}: expected an index of wids, with a 'shardlist' of 'url' and 'nsamples', got"
            f" {type(error).__name__}: {error}. Give files such as {EXAMPLES}"
        ) from error
    paths = [url if is_url(url) else os.path.join(base, url) for url, _ in shards]
    found = list(_matches([glob.escape(path) if not is_url(path) else path for path in paths]))
    if missing := [path for path, matches in zip(paths, found, strict=True) if not matches]:
        raise ValueError(f"data.files={path!r}: {len(missing)} of its {len(paths)} shards do not exist: {missing[0]}")
    return [dataclasses.replace(file, records=count) for (file,), (_, count) in zip(found, shards, strict=True)]


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """Within the block, list each folder of a store once: its format, files and counts are of the same listing."""
    global _listings
    before = _listings
    _listings = {} if before is None else before
    try:
        yield
    finally:
        _listings = before


def expand_braces(pattern: str) -> list[str]:
    """Expand each '{00..12}' of a pattern, keeping leading zeros.

    >>> expand_braces("{08..10}.tar")
    ['08.tar', '09.tar', '10.tar']
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        if "{" in pattern:
            raise ValueError(f"data.files: {pattern!r} has a brace that is no range such as {{00000..00331}}")
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"data.files: {pattern!r} counts down; write {{{last}..{first}}}")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    numbers = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    return [path for n in numbers for path in expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _matches(paths: Sequence[str]) -> Iterator[list[File]]:
    """Yield the files of each path or glob."""
    folders: dict[str, dict[str, File]] = {}
    for folder in {os.path.dirname(path) for path in paths if is_url(path)}:
        names = [path for path in paths if os.path.dirname(path) == folder]
        if len(names) > HEADS and not folder.startswith(("http:", "https:")):  # a web server has no listing
            folders[folder] = {file.path: file for file in _list_url(folder)}
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda path: _match(path, folders.get(os.path.dirname(path))), paths)


def _match(path: str, folder: dict[str, File] | None) -> list[File]:
    """Return the file of a path, or those of a glob without hidden ones, such as macOS's `._00000.tfrecord`."""
    if folder is not None and not glob.has_magic(path):
        return [folder[path]] if path in folder else []
    if is_url(path):
        if not glob.has_magic(path):
            with contextlib.suppress(FileNotFoundError):
                return [stat(path)]
            return []
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
        candidates = _list_url(fixed.rpartition("/")[0], recursive="/" in path[len(fixed) :])
        pattern = re.compile(_translate(path))
        hidden = os.path.basename(path).startswith(".")
        found = [file for file in candidates if pattern.match(file.path)]
        return sorted(
            (file for file in found if hidden or not os.path.basename(file.path).startswith(".")),
            key=lambda file: file.path,
        )
    if glob.has_magic(path) and not os.path.exists(path):
        return [stat(found) for found in sorted(glob.glob(path, recursive=True)) if os.path.isfile(found)]
    return [stat(path)] if os.path.isfile(path) else []


def _translate(pattern: str) -> str:
    """Return a regular expression in which `*` and `?` end at a slash, and `**/` doesn't."""
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    special = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(special.get(part) or fnmatch.translate(part)[4:-3] for part in parts) + r"\Z"


def _list_url(folder: str, recursive: bool = False) -> list[File]:
    """Return the objects of a folder of a store."""
    listings = _listings
    if listings is None:
        return _list_store(folder, recursive)
    if (folder, recursive) not in listings:
        listings[folder, recursive] = _list_store(folder, recursive)
    return listings[folder, recursive]


def _list_store(folder: str, recursive: bool) -> list[File]:
    import obstore

    if folder.startswith("hf://"):
        return _list_hugging_face(folder)
    store, prefix = _store_and_key(folder)
    root = folder[: len(folder) - len(prefix)].rstrip("/")

    def objects() -> list[Any]:
        if recursive:
            return [entry for chunk in obstore.list(store, prefix or None) for entry in chunk]
        return list(obstore.list_with_delimiter(store, prefix or None)["objects"])

    found = _persistently(objects, folder, 600.0)
    with _lock:
        counters.requests += 1 + len(found) // 1000
    return [_file(f"{root}/{entry['path']}", entry) for entry in found]


def _file(path: str, entry: Any) -> File:
    return File(path, entry["size"], entry.get("e_tag") or str(entry["last_modified"]))


def _persistently(request: Callable[[], Result], path: str, max_stall_seconds: float) -> Result:
    """Return the request's result; a transient failure is tried again, with growing pauses and a log line."""
    began, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            return request()
        except Exception as error:
            if not is_transient(error):
                if problem := _certificate_problem(error):
                    raise StorageError(
                        f"{path}: its TLS certificate is not trusted: {problem}; expected one of a known issuer, or"
                        " the environment variable SSL_CERT_FILE with the PEM file of its issuer"
                    ) from error
                if type(error).__module__.startswith("obstore"):
                    raise StorageError(f"{path}: {_first_line(error)}; check address and credentials") from error
                raise
            stalled = time.monotonic() - began
            if stalled + wait > max_stall_seconds:
                raise StorageError(
                    f"{path}: unreadable for {stalled:.0f} s, data.max_stall_seconds={max_stall_seconds:g}:"
                    f" {_first_line(error)}"
                ) from error
            with _lock:
                counters.failures += 1
            if wait > FIRST_WAIT:  # not the first failure, which is common
                log.warning("%s: waiting for the storage, %.0f s so far: %s", path, stalled, _first_line(error))
        time.sleep(wait * random.uniform(0.5, 1))  # hosts that failed together don't return together
        wait = min(2 * wait, LONGEST_WAIT)


def is_transient(error: Exception) -> bool:
    """Return whether an error may pass: no answer of a store, or 408, 429, 500, 502 to 504; an error of a mount."""
    if isinstance(error, OSError):
        return error.errno in TRANSIENT
    if type(error).__name__ != "GenericError":  # obstore's others: permissions, names, preconditions
        return False
    if _certificate_problem(error):
        return False
    status = re.search(r"status code: (\d{3})", str(error))
    return not status or status[1] in ("408", "429", "500", "502", "503", "504")


def _certificate_problem(error: Exception) -> str:
    """Return why obstore's client refused a server's certificate, such as 'UnknownIssuer' or 'Expired'; else ''."""
    found = re.search(r"InvalidCertificate\(\s*(\w+)", str(error))
    return found[1] if found else ""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _store_and_key(url: str) -> tuple[Any, str]:
    """Return the obstore client of a URL, and the name of its object in the store."""
    if url.startswith("hf://"):
        url = _hugging_face_url(url)
    parts = urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}"
    return _store(root), url[len(root) :].lstrip("/")


@functools.lru_cache(maxsize=64)
def _store(root: str) -> Any:
    from obstore.store import from_url

    endpoints = root, os.environ.get("GOOGLE_BASE_URL", "")
    client: dict[str, Any] = {"timeout": f"{REQUEST_SECONDS} s", "connect_timeout": "10 s"}
    client["allow_http"] = any(endpoint.startswith("http:") for endpoint in endpoints)
    if root.startswith("http") and (token := _hugging_face_token(root)):
        client["default_headers"] = {"Authorization": f"Bearer {token}"}
    return from_url(root, client_options=client, retry_config=RETRIES)


def _hugging_face_url(url: str) -> str:
    """Return the address of `hf://datasets/<owner>/<name>[@<revision>]/<path>`."""
    from huggingface_hub import constants

    match = re.fullmatch(r"hf://(datasets/|spaces/)?([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if not match:
        raise ValueError(f"{url}: expected hf://datasets/<owner>/<name>[@<revision>]/<path>")
    kind, name, revision, path = match.groups()
    return f"{constants.ENDPOINT}/{kind or ''}{name}/resolve/{revision or 'main'}/{path}"


def _hugging_face_token(root: str) -> str | None:
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return None
    return get_token() if constants.ENDPOINT.startswith(root) else None


def _list_hugging_face(folder: str) -> list[File]:
    from huggingface_hub import HfFileSystem

    entries = HfFileSystem().find(folder, detail=True)
    return [
        File(f"hf://{path}", entry["size"], str(entry.get("blob_id") or entry["size"]))
        for path, entry in entries.items()
    ]
