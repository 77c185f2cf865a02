"""safetensors files: tensors are views of the mapped file, and are written one at a time.

The safetensors library only validates the header: its reader copies every tensor, its writer needs all of them at once.

Source of the format: huggingface/safetensors `README.md`: the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct

import ml_dtypes
import numpy as np
import safetensors

from clip_jax.interop.conversion import LazyTensors

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def detect(path: pathlib.Path, head: bytes) -> bool:
    """Return whether a file has a JSON header after its eight bytes of length."""
    return head[8:9] == b"{"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], None]:
    """Return read-only tensors by name. Raises ValueError for a truncated or damaged file or an unsupported dtype."""
    try:
        with safetensors.safe_open(path, framework="numpy"):  # validates the header against the file size
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected safetensors, got a truncated or damaged file ({error})") from error
    mapped = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", mapped[:8].tobytes())
    header, data = json.loads(mapped[8 : 8 + length].tobytes()), mapped[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: tensor {name}: expected dtype {', '.join(_DTYPES)}, got {entry['dtype']}")
        start, end = entry["data_offsets"]
        tensors[name] = data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, None


def write(path: str | os.PathLike[str], tensors: LazyTensors) -> None:
    """Write float32 tensors in the layout of `safetensors.torch.save_file`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4.57 requires it
    end = 0
    for name, shape in tensors.shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with pathlib.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.astype("<f4", copy=False).data)
