"""Registry of weight formats: `FORMATS`.

A format is one file with `detect`, `read` and, unless it is read-only, `write`, and one line in `FORMATS`.
`clip_jax.load`, `clip_jax.convert` and a run's `init.weights` use the registry; `tests/contracts/test_formats.py` tests
every entry. From outside the package:

    FORMATS["mine"] = Format(detect, read, write)
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from clip_jax.config import WeightsConfig
from clip_jax.interop import directory, flax_msgpack, msgpack, npz, safetensors, torch_file
from clip_jax.typing import Params

_HEAD = 16  # bytes
_INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Format:
    """A weight format.

    detect: (path, first 16 bytes, empty for a directory) -> whether the path has this format.
    read: path -> (parameters, config); or (tensors by the names of the library that wrote them, None) for formats
      without a clip_jax config. Raises ValueError, `<file>: …`, for a damaged or unsafe file.
    write: (path, parameters, config) -> None, or by library the call that loads the result. None: read-only.
    """

    detect: Callable[[pathlib.Path, bytes], bool]
    read: Callable[[pathlib.Path], tuple[Mapping[str, Any], WeightsConfig | None]]
    write: Callable[[str | os.PathLike[str], Params, WeightsConfig], Mapping[str, str] | None] | None = None


def detect(path: pathlib.Path) -> str:
    """Return the name of a path's format: the last entry of `FORMATS` that detects it.

    Raises:
      ValueError: if the file is empty or no format detects it.
    """
    head = b""
    if path.is_file():
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
        if not head:
            raise ValueError(f"{path}: expected a weight file, got an empty file; copy or export it again")
    for name in reversed(FORMATS):
        if FORMATS[name].detect(path, head):
            return name
    found = f"a file that starts with {head!r}" if head else f"a directory without {', '.join(directory.WEIGHT_FILES)}"
    raise ValueError(f"{path}: expected one of the formats {', '.join(FORMATS)}, got {found}")


def read(path: pathlib.Path) -> tuple[Mapping[str, Any], WeightsConfig | None]:
    """Read a path with the format that detects it. See `Format.read`."""
    return FORMATS[detect(path)].read(path)


def writer(name: str) -> Callable[[str | os.PathLike[str], Params, WeightsConfig], Mapping[str, str] | None]:
    """Return a format's `write`. Raises ValueError for an unknown or read-only format."""
    writable = [key for key, entry in FORMATS.items() if entry.write]
    if name not in writable:
        reason = "which is read-only" if name in FORMATS else "which is not registered"
        raise ValueError(f"--to: expected one of {', '.join(writable)}, got {name!r}, {reason}")
    return FORMATS[name].write


def _read_directory(folder: pathlib.Path) -> tuple[Mapping[str, Any], WeightsConfig | None]:
    return read(directory.weight_file(folder))


def _detect_shards(path: pathlib.Path, head: bytes) -> bool:
    return path.name.endswith(_INDEX)


def _read_shards(index: pathlib.Path) -> tuple[dict[str, Any], None]:
    """Read the files that a Hugging Face index lists in its `weight_map` from tensor to file."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map from tensors to files, got {error!r}") from error
    tensors: dict[str, Any] = {}
    for name in shards:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or name.endswith(_INDEX):
            raise ValueError(f"{index}: expected weight files of the same directory, got {name!r}")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index}: the shard {name} is missing; copy it to {index.parent}")
        tensors |= read(index.parent / name)[0]
    return tensors, None


# Tried from the last to the first, so a format registered later has precedence.
FORMATS: dict[str, Format] = {
    "flax": Format(flax_msgpack.detect, flax_msgpack.read),
    "torch": Format(torch_file.detect, torch_file.read),
    "safetensors": Format(safetensors.detect, safetensors.read),
    "shards": Format(_detect_shards, _read_shards),
    "directory": Format(directory.detect, _read_directory, directory.write),
    "npz": Format(npz.detect, npz.read, npz.write),
    "msgpack": Format(msgpack.detect, msgpack.read, msgpack.write),
}
