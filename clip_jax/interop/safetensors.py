"""LazyTensors of .safetensors files, read as views of the mapped file, and written one by one: none is held twice.

The library checks what a file says of itself; it would copy each tensor when reading, and want all of them to write.

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
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return a file's tensors by name, read-only. Raises ValueError if it is cut short, damaged or of unknown types."""
    try:
        with safetensors.safe_open(path, framework="numpy"):  # compares the header with the file's length
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: it can't be read as safetensors ({error})") from error
    mapped = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", mapped[:8].tobytes())
    header, data = json.loads(mapped[8 : 8 + length].tobytes()), mapped[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: the tensor {name} is {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        start, end = entry["data_offsets"]
        tensors[name] = data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write(path: str | os.PathLike[str], tensors: LazyTensors) -> None:
    """Write a file as `safetensors.torch.save_file` would; float32."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4.57 refuses files without it
    end = 0
    for name, shape in tensors.shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every number lies at a multiple of its size
    with pathlib.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.astype("<f4", copy=False).data)
