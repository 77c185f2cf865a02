"""Registry of weight formats: `FORMATS`.

A format is `detect`, `read` and, unless it is read-only, `write`, and one line in `FORMATS`; from outside the package:
`FORMATS["mine"] = Format(detect, read, write)`. `clip_jax.load`, `clip_jax.convert` and a run's `init.weights` use the
registry; `tests/contracts/test_formats.py` tests every entry.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_jax.config import WeightsConfig
from clip_jax.interop import directory, msgpack, npz, safetensors, torch_file
from clip_jax.interop.conversion import flat
from clip_jax.paths import check_local, check_not_pointer, check_output
from clip_jax.typing import Params

_HEAD = 16  # bytes
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # with the variant, e.g. model.safetensors.index.fp16.json


@dataclasses.dataclass(frozen=True)
class Format:
    """A weight format.

    Attributes:
      detect: (path, first 16 bytes, empty for a directory) -> whether the path has this format.
      read: path -> (parameters, config); or (tensors by the names of the library that wrote them, None) for formats
        without a clip_jax config. Raises ValueError, `<file>: …`, for a damaged or unsafe file.
      write: (path, parameters, config) -> None, or by library the call that loads the result, and by topic its
        differences. None: read-only.
      writes_urls: whether the path of `write` may be a URL of an object store.
    """

    detect: Callable[[pathlib.Path, bytes], bool]
    read: Callable[[pathlib.Path], tuple[Mapping[str, Any], WeightsConfig | None]]
    write: Callable[[str | os.PathLike[str], Params, WeightsConfig], Mapping[str, str] | None] | None = None
    writes_urls: bool = False


def detect(path: pathlib.Path) -> str:
    """Return the format of a path: the last entry of `FORMATS` that detects it. Raises ValueError without one."""
    head = b""
    if path.is_file():
        check_not_pointer(path)
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
        if not head:
            raise ValueError(f"{path}: expected a weight file, got an empty file; copy or export it again")
    for name in reversed(FORMATS):
        if FORMATS[name].detect(path, head):
            return name
    if path.is_dir():
        directory.weight_file(path)  # raises
    raise ValueError(f"{path}: expected one of the formats {', '.join(FORMATS)}, got a file that starts with {head!r}")


def read(path: pathlib.Path) -> tuple[Mapping[str, Any], WeightsConfig | None]:
    """Read a path with the format that detects it. See `Format.read`."""
    return FORMATS[detect(path)].read(path)


def writer(
    name: str, target: str | os.PathLike[str]
) -> Callable[[str | os.PathLike[str], Params, WeightsConfig], Mapping[str, str] | None]:
    """Return a format's `write`. Raises ValueError for an unknown or read-only format, or a path it cannot write."""
    writable = [key for key, entry in FORMATS.items() if entry.write]
    if name not in writable:
        reason = "which is read-only" if name in FORMATS else "which is not registered"
        raise ValueError(f"--to: expected one of {', '.join(writable)}, got {name!r}, {reason}")
    if not FORMATS[name].writes_urls:
        check_local("target", target)
    check_output("target", target)
    return FORMATS[name].write


def _read_flax(path: pathlib.Path) -> tuple[dict[str, np.ndarray], None]:
    """Read Hugging Face's `flax_model.msgpack`: arrays by their nested names, joined by dots."""
    try:
        arrays = flat(msgpack.restore(path))
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it contains values that are not arrays")
    # A damaged byte can make the parser and Flax's decoder raise any exception.
    except Exception as error:
        raise ValueError(f"{path}: expected Flax msgpack, got a truncated or damaged file ({error})") from error
    return {name.replace("/", "."): array for name, array in arrays.items()}, None


def _read_shards(index: pathlib.Path) -> tuple[dict[str, Any], None]:
    """Read the files that a Hugging Face index lists in its `weight_map` from tensor to file."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map from tensors to files, got {error!r}") from error
    tensors: dict[str, Any] = {}
    for name in shards:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or _INDEX.search(name):
            raise ValueError(f"{index}: expected weight files of the same directory, got {name!r}")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index}: expected the shard {name}, got no such file; copy it to {index.parent}")
        tensors |= read(index.parent / name)[0]
    return tensors, None


# Tried from the last to the first, so a format registered later has precedence.
FORMATS: dict[str, Format] = {
    # A msgpack mapping. 0x80, the empty mapping, starts a pickle.
    "flax": Format(lambda path, head: head[:1] > b"\x80", _read_flax),
    "torch": Format(torch_file.detect, torch_file.read),
    "safetensors": Format(safetensors.detect, safetensors.read),
    "shards": Format(lambda path, head: bool(_INDEX.search(path.name)), _read_shards),
    "directory": Format(directory.detect, lambda path: read(directory.weight_file(path)), directory.write),
    "npz": Format(npz.detect, npz.read, npz.write, writes_urls=True),
    "msgpack": Format(msgpack.detect, msgpack.read, msgpack.write, writes_urls=True),
}
