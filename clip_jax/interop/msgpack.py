"""clip_jax weight files: parameters with model, tokenizer and preprocessing configuration.

A file is Flax msgpack of one mapping:

    format     'clip_jax'
    version    1
    config     JSON of WeightsConfig: model, tokenizer, preprocess, source
    tokenizer  content of the file `tokenizer.path`, b'' without one
    params     nested mappings of arrays
    sha256     hex, over the above

The checksum is verified before anything is used: no other check finds a flipped bit in a weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import msgpack as packer
import numpy as np
from etils import epath
from flax import serialization

from clip_jax.config import WeightsConfig, build
from clip_jax.interop.conversion import flat
from clip_jax.paths import check_local, write_atomically
from clip_jax.tokenizers.base import read_file

FORMAT, VERSION = "clip_jax", 1
_KEYS = {"config", "format", "params", "sha256", "tokenizer", "version"}
# The first key in msgpack, after one byte with the number of keys: identifies a file even if it is truncated.
_FIRST_KEY = b"\xa6config"


def write(path: str | os.PathLike[str], params: Mapping[str, Any], config: WeightsConfig) -> None:
    """Write a weight file atomically, to a local path or a URL, with the content of the file `config.tokenizer.path`.

    Raises:
      ValueError: if the tokenizer file is missing.

    >>> import tempfile, numpy as np
    >>> from clip_jax.config import WeightsConfig
    >>> path = tempfile.mkdtemp() + "/params.msgpack"
    >>> write(path, {"text": {"projection": np.ones((2, 3), np.float32)}}, WeightsConfig(source="example"))
    >>> params, config = read(path)
    >>> params["text"]["projection"].shape, config.source
    ((2, 3), 'example')
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": config_json(config),
        "tokenizer": tokenizer_content(config),
        "params": jax.tree.map(np.asarray, params),
    }
    content["sha256"] = _checksum(content)
    write_atomically(epath.Path(path).expanduser(), lambda file: file.writelines(_packed(content)))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], WeightsConfig]:
    """Return parameters, nested dicts of NumPy arrays, and configuration. Example: `write`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file has another format, is truncated or damaged, or needs a newer clip_jax.
    """
    check_local("weights", path)
    file = pathlib.Path(path).expanduser()
    with file.open("rb") as stream:
        head = stream.read(12)
    if not detect(file, head):
        raise ValueError(f"{path}: expected a clip_jax weight file, got a file that starts with {head!r}")
    try:
        content = restore(file)
    # A damaged byte can make the parser and Flax's decoder raise any exception.
    except Exception as error:
        if "incomplete input" in str(error):
            found = f"a truncated file of {file.stat().st_size:,} bytes"
        else:
            found = f"a damaged file, which is not msgpack ({error})"
        raise ValueError(f"{path}: expected a clip_jax weight file, got {found}; copy or export it again") from error
    try:
        version = content["version"]
        is_newer = isinstance(version, int) and version > VERSION
        is_known = (content["format"], version, content.keys()) == (FORMAT, VERSION, _KEYS)
        is_valid = is_known and content["sha256"] == _checksum(content)
    # A damaged byte can turn any value into one of another type.
    except (AttributeError, LookupError, TypeError, ValueError):
        is_newer = is_valid = False
    if is_newer:
        raise ValueError(f"{path}: expected version {VERSION}, got {version}; install a newer clip_jax")
    if not is_valid:
        raise ValueError(f"{path}: damaged, the checksum does not match the content; copy or export it again")
    return content["params"], config_from_json(content["config"], content["tokenizer"])


def detect(path: pathlib.Path, head: bytes) -> bool:
    """Return whether the first bytes are those of a file that `write` wrote."""
    return head.startswith(_FIRST_KEY, 1)


def restore(path: pathlib.Path) -> Any:
    """Return the content of a Flax msgpack file."""
    return serialization.msgpack_restore(np.memmap(path, np.uint8, "r").data)


def config_json(config: WeightsConfig) -> str:
    """Return a configuration as JSON, without the content of the tokenizer file."""
    fields = dataclasses.asdict(dataclasses.replace(config, tokenizer_file=b""))
    del fields["tokenizer_file"]
    return json.dumps(fields)


def config_from_json(text: str | bytes, tokenizer: bytes) -> WeightsConfig:
    """Return the configuration of `config_json`, with the content of the tokenizer file."""
    return build(WeightsConfig, {**json.loads(text), "tokenizer_file": tokenizer})


def tokenizer_content(config: WeightsConfig) -> bytes:
    """Return the content of the tokenizer file, b'' without one. Raises ValueError if the file is missing."""
    if config.tokenizer_file or not config.tokenizer.path:
        return config.tokenizer_file
    return read_file(config.tokenizer.path)


_MAX_PIECE = 1 << 30  # bytes; Flax splits longer arrays, because msgpack has no objects above 4 GiB


def _packed(value: Any) -> Iterator[bytes | memoryview]:
    """Yield the bytes of `flax.serialization.msgpack_serialize` in pieces, without a copy of the arrays.

    An array is an extension of type 1 that contains a list: shape, name of the dtype, data.
    """
    if isinstance(value, Mapping):
        yield packer.Packer().pack_map_header(len(value))
        for key in sorted(value):
            yield packer.packb(key)
            yield from _packed(value[key])
    elif not isinstance(value, np.ndarray):
        yield packer.packb(value)
    elif value.nbytes > _MAX_PIECE:
        values, step = value.reshape(-1), _MAX_PIECE // value.itemsize
        pieces = {str(i): values[start : start + step] for i, start in enumerate(range(0, value.size, step))}
        shape = {str(axis): side for axis, side in enumerate(value.shape)}
        yield from _packed({"__msgpack_chunked_array__": True, "chunks": pieces, "shape": shape})
    else:
        dtype, size = packer.packb(value.dtype.name), struct.pack(">BI", 0xC6, value.nbytes)
        head = b"\x93" + packer.packb(value.shape) + dtype + size
        yield struct.pack(">BIb", 0xC9, len(head) + value.nbytes, 1) + head
        yield np.ascontiguousarray(value).view(np.uint8).data


def _checksum(content: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(content["config"].encode())
    digest.update(b"\0" + content["tokenizer"])
    for name, array in flat(content["params"]).items():
        digest.update(f"\0/{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
