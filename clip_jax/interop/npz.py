"""NumPy archives: clip_jax's, which contain the configuration, and big_vision's.

clip_jax archives contain the parameters by path (`image/transformer/blocks/norm1/scale`), `config.json` as bytes and,
if the tokenizer has a file, `tokenizer` as bytes. Source of big_vision's layout: `big_vision/utils.py`
(`load_checkpoint_np`, `save_checkpoint`).
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from clip_jax.config import WeightsConfig
from clip_jax.interop.conversion import flat, nested
from clip_jax.interop.msgpack import config_from_json, config_json, tokenizer_content
from clip_jax.paths import write_atomically
from clip_jax.typing import Params

_CONFIG, _TOKENIZER = "config.json", "tokenizer"
# Weights hardly compress: an archive with a larger ratio is a decompression bomb.
_MAX_COMPRESSION_RATIO = 50
_STACKED = re.compile(r"^(.*/encoderblock)(/.*)$")


def write(path: str | os.PathLike[str], params: Params, config: WeightsConfig) -> None:
    """Write an archive atomically. Raises ValueError if the tokenizer file is missing."""
    content = tokenizer_content(config)
    arrays = {name: np.asarray(value) for name, value in flat(params).items()}
    extra = {_CONFIG: np.frombuffer(config_json(config).encode(), np.uint8)}
    extra |= {_TOKENIZER: np.frombuffer(content, np.uint8)} if content else {}
    write_atomically(epath.Path(path).expanduser(), lambda file: np.savez(file, **arrays, **extra))


def detect(path: pathlib.Path, head: bytes) -> bool:
    """Return whether a file is a zip archive of arrays alone."""
    if head[:2] != b"PK" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    return bool(members) and all(name.endswith(".npy") for name in members)


def read(path: str | os.PathLike[str]) -> tuple[Params, WeightsConfig | None]:
    """Return parameters and configuration of a clip_jax archive; of another, arrays by name and None.

    Raises ValueError for a damaged archive, one with Python objects, or a decompression bomb.
    """
    arrays = _arrays(pathlib.Path(path))
    if _CONFIG not in arrays:
        return _with_class_position(_unstacked(arrays)), None
    text, content = bytes(arrays.pop(_CONFIG)), bytes(arrays.pop(_TOKENIZER, b""))
    return nested(arrays), config_from_json(text, content)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > _MAX_COMPRESSION_RATIO * path.stat().st_size + (1 << 20):
            raise ValueError(f"{path.stat().st_size:,} bytes that decompress to {unpacked:,}")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a zip archive with other members than arrays")
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise ValueError(f"{path}: expected a NumPy archive (npz) of weights, got {error}") from error
    # NumPy saves bfloat16 as void.
    return {name: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a for name, a in arrays.items()}


def _unstacked(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Split arrays that big_vision stacked over layers (`scan=True`) into one per layer."""
    result: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if match := _STACKED.match(name):
            result |= {f"{match[1]}_{layer}{match[2]}": row for layer, row in enumerate(array)}
        else:
            result[name] = array
    return result


def _with_class_position(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the class token's position embedding: zero, as big_vision adds none; older files contain one."""
    for prefix in ("img", "params/img"):
        old, new = f"{prefix}/Transformer/posembed_input/pos_embedding", f"{prefix}/pos_embedding"
        if old in arrays:
            arrays[new] = arrays.pop(old)
        if f"{prefix}/cls" in arrays and new in arrays:
            positions = arrays[new]
            if math.isqrt(positions.shape[-2]) ** 2 == positions.shape[-2]:
                arrays[new] = np.concatenate([np.zeros_like(positions[..., :1, :]), positions], axis=-2)
    return arrays
