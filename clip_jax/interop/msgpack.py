"""Our own weight files: parameters together with all that gives them meaning.

A file is flax's msgpack of one mapping:

    format     'clip_jax'
    version    1
    config     JSON of WeightsConfig: model, tokenizer, preprocess, source
    tokenizer  what `tokenizer.path` contained, b'' without one
    params     nested mappings of arrays
    sha256     hex, over the above

The checksum is compared before anything is believed: a flipped bit in a weight changes results, not shapes, and nothing
else would notice it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import msgpack as packer
import numpy as np
from flax import serialization

from clip_jax.config import WeightsConfig, build

FORMAT, VERSION = "clip_jax", 1
_KEYS = {"config", "format", "params", "sha256", "tokenizer", "version"}
# msgpack's own bytes for the first key, after one byte that tells the number of keys: they tell our files from others
# even where the rest is missing.
_FIRST_KEY = b"\xa6config"


def write(path: str | os.PathLike[str], params: Mapping[str, Any], config: WeightsConfig) -> None:
    """Write a file that is there in full or not at all: the old one stays until the new one is on the disk.

    Where `config.tokenizer.path` names a file and `config.tokenizer_file` is empty, the file is read and goes in too.

    Raises:
      ValueError: if the path isn't a local one, or the tokenizer's file is missing.
    """
    target = _local(path)
    tokenizer = tokenizer_content(config)
    fields = dataclasses.asdict(dataclasses.replace(config, tokenizer_file=b""))
    del fields["tokenizer_file"]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(fields),
        "tokenizer": tokenizer,
        "params": _as_numpy(params),
    }
    content["sha256"] = _checksum(content)
    write_atomically(target, lambda file: file.writelines(_packed(content)))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], WeightsConfig]:
    """Return the parameters, nested dicts of NumPy arrays, and what they mean.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not ours, cut short, damaged, or of a version that is newer than this code.
    """
    file = _local(path)
    if not file.stat().st_size:
        raise ValueError(f"{path} is empty: whatever wrote it did not finish")
    data = np.memmap(file, np.uint8, "r")
    if not is_ours(file):
        raise ValueError(f"{path} is not a weight file of clip_jax: it begins with {data[:12].tobytes()!r}")
    try:
        content = serialization.msgpack_restore(data.data)
    # Any byte may be wrong, so the parser and flax's decoder may raise anything: they are asked once, here.
    except Exception as error:
        if "incomplete input" in str(error):
            reason = f"truncated: its {len(data):,} bytes end before its content does"
        else:
            reason = f"damaged: it can't be read as msgpack ({error})"
        raise ValueError(f"{path} is {reason}; copy or export it again") from error
    content = content if isinstance(content, dict) else {}
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(f"{path} is of version {version}, this clip_jax reads up to {VERSION}: install a newer one")
    known = (content.get("format"), version, content.keys()) == (FORMAT, VERSION, _KEYS)
    if not known or content["sha256"] != _checksum_or_none(content):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content; copy or export it again")
    fields = json.loads(content["config"])
    return content["params"], build(WeightsConfig, {**fields, "tokenizer_file": content["tokenizer"]})


def is_ours(path: pathlib.Path) -> bool:
    """Tell whether a file begins as those that `write` writes."""
    with path.open("rb") as file:
        return file.read(1 + len(_FIRST_KEY)).startswith(_FIRST_KEY, 1)


def read_foreign(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of another's flax msgpack, nested names joined by dots. Raises ValueError if it is none."""
    try:
        content = serialization.msgpack_restore(np.memmap(path, np.uint8, "r").data)
        leaves = dict(_leaves(content))
        if not all(isinstance(leaf, np.ndarray) for leaf in leaves.values()):
            raise ValueError("it holds more than arrays")
    # As in `read`: any byte may be wrong.
    except Exception as error:
        raise ValueError(f"{path} is truncated or damaged: it can't be read as flax's msgpack ({error})") from error
    return {name.removeprefix("/").replace("/", "."): leaf for name, leaf in leaves.items()}


def _local(path: str | os.PathLike[str]) -> pathlib.Path:
    if "://" in os.fspath(path):
        raise ValueError(f"{path} is not a local path; use one and copy, e.g. gcloud storage cp params.msgpack gs://…")
    return pathlib.Path(path).expanduser()


def tokenizer_content(config: WeightsConfig) -> bytes:
    """Return what the tokenizer's file contains, b'' where it has none. Raises ValueError if it is missing."""
    if config.tokenizer_file or not config.tokenizer.path:
        return config.tokenizer_file
    file = pathlib.Path(config.tokenizer.path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"tokenizer.path={config.tokenizer.path!r}: there is no such file, but the weights mean nothing without it"
        )
    return file.read_bytes()


def _as_numpy(tree: Any) -> Any:
    return {key: _as_numpy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)


_MAX_PIECE = 1 << 30  # bytes; flax writes longer arrays in pieces, since msgpack has no more than 4 GiB in one


def _packed(value: Any) -> Iterator[bytes | memoryview]:
    """Yield what `flax.serialization.msgpack_serialize` returns, piece by piece and the numbers as they lie in memory.

    For it an array is an extension of type 1 that holds a list: shape, dtype's name, numbers.
    """
    if isinstance(value, Mapping):
        yield packer.Packer().pack_map_header(len(value))
        for key in sorted(value):
            yield packer.packb(key)
            yield from _packed(value[key])
    elif not isinstance(value, np.ndarray):
        yield packer.packb(value)
    elif value.nbytes > _MAX_PIECE:
        numbers, step = value.reshape(-1), _MAX_PIECE // value.itemsize
        pieces = {str(i): numbers[at : at + step] for i, at in enumerate(range(0, value.size, step))}
        shape = {str(axis): side for axis, side in enumerate(value.shape)}
        yield from _packed({"__msgpack_chunked_array__": True, "chunks": pieces, "shape": shape})
    else:
        head = (
            b"\x93"
            + packer.packb(value.shape)
            + packer.packb(value.dtype.name)
            + struct.pack(">BI", 0xC6, value.nbytes)
        )
        yield struct.pack(">BIb", 0xC9, len(head) + value.nbytes, 1) + head
        yield np.ascontiguousarray(value).view(np.uint8).data


def _checksum(content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(content["config"].encode())
    digest.update(b"\0" + content["tokenizer"])
    for name, array in _leaves(content["params"]):
        digest.update(f"\0{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _checksum_or_none(content: Mapping[str, Any]) -> str | None:
    # A damaged byte may turn an array or a text into something else that msgpack knows.
    try:
        return _checksum(content)
    except (AttributeError, TypeError, ValueError):
        return None


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key in sorted(tree):
        yield from _leaves(tree[key], f"{path}/{key}")


def write_atomically(target: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that takes the target's name when all of it is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder: a rename is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def _umask() -> int:
    # mkstemp's files are for their owner alone; the mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: pathlib.Path) -> None:
    """Put the new name on the disk too, as the content is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
