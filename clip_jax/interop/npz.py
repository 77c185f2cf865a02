"""NumPy's archives: ours, with the configuration inside, and big_vision's.

Ours hold the parameters by their paths (`image/transformer/blocks/norm1/scale`), `config.json` as bytes and, where the
tokenizer has a file, `tokenizer` as bytes: any language that reads NumPy's format reads them, without clip_jax.

Source of big_vision's: `big_vision/utils.py` (`load_checkpoint_np`, `save_checkpoint`); its bfloat16 are NumPy's void.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.config import WeightsConfig, build
from clip_jax.interop.conversion import flat, nested
from clip_jax.interop.msgpack import tokenizer_content, write_atomically
from clip_jax.typing import Params

_CONFIG, _TOKENIZER = "config.json", "tokenizer"
# Weights hardly shrink when they are compressed. An archive that grows more than this is made to fill a memory.
_MAX_GROWTH = 50
_STACKED = re.compile(r"^(.*/encoderblock)(/.*)$")


def write(path: str | os.PathLike[str], params: Params, config: WeightsConfig) -> None:
    """Write a file that is there in full or not at all. Raises ValueError if the tokenizer's file is missing."""
    content = tokenizer_content(config)
    fields = dataclasses.asdict(config)
    del fields["tokenizer_file"]
    arrays = {name: np.asarray(value) for name, value in flat(params).items()}
    extra = {_CONFIG: np.frombuffer(json.dumps(fields).encode(), np.uint8)}
    extra |= {_TOKENIZER: np.frombuffer(content, np.uint8)} if content else {}
    write_atomically(pathlib.Path(path).expanduser(), lambda file: np.savez(file, **arrays, **extra))


def is_ours(path: pathlib.Path) -> bool:
    """Tell whether a file is an archive that `write` wrote."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return f"{_CONFIG}.npy" in archive.namelist()


def read(path: str | os.PathLike[str]) -> tuple[Params, WeightsConfig]:
    """Return the parameters and what they mean. Raises ValueError for a damaged file, naming what is wrong."""
    arrays = read_tensors(pathlib.Path(path))
    config = json.loads(bytes(arrays.pop(_CONFIG)))
    content = bytes(arrays.pop(_TOKENIZER, b""))
    return nested(arrays), build(WeightsConfig, {**config, "tokenizer_file": content})


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return all arrays of an archive; big_vision's stacked layers one by one, its bfloat16 as such.

    Raises:
      ValueError: for a damaged archive, one with Python objects in it, or one that unpacks to many times its size.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > _MAX_GROWTH * path.stat().st_size + (1 << 20):
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes that unpack to {unpacked:,} are no weights")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: _numbers(archive[name]) for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise ValueError(f"{path} can't be read as NumPy's npz: {error}") from error
    return _with_class_position(_unstacked(arrays))


def _numbers(array: np.ndarray) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _unstacked(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return big_vision's scanned layers, one array for all, under the names of single layers."""
    result: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if match := _STACKED.match(name):
            result |= {f"{match[1]}_{layer}{match[2]}": row for layer, row in enumerate(array)}
        else:
            result[name] = array
    return result


def _with_class_position(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the class token of big_vision's ViTs the position that ours has: zero, or what older files have there."""
    for prefix in ("img", "params/img"):
        old, new = f"{prefix}/Transformer/posembed_input/pos_embedding", f"{prefix}/pos_embedding"
        if old in arrays:
            arrays[new] = arrays.pop(old)
        if f"{prefix}/cls" in arrays and new in arrays:
            positions = arrays[new]
            if math.isqrt(positions.shape[-2]) ** 2 == positions.shape[-2]:
                arrays[new] = np.concatenate([np.zeros_like(positions[..., :1, :]), positions], axis=-2)
    return arrays
