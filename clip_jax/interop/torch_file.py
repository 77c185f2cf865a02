"""torch files, read and written without torch: zip archives, including TorchScript, and the format before torch 1.6.

Tensors are views of the mapped file and are read on first use. Pickles: `torch_pickle.py`. Source of the formats:
pytorch `torch/serialization.py`.
"""

from __future__ import annotations

import io
import os
import pathlib
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.interop.torch_pickle import Module, Refused, TensorUnpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_CODE = 1 << 24  # bytes; the published archives have about 100 kB
# A pickle can contain itself, or one object in two places at each of many levels.
_MAX_DEPTH, _MAX_VALUES = 64, 1 << 20
_LOCAL_HEADER = 30  # bytes before the name of a zip member


def detect(path: pathlib.Path, head: bytes) -> bool:
    """Return whether a file starts like a zip archive or a pickle."""
    return head[:2] == b"PK" or head[:1] == b"\x80"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], None]:
    """Return read-only tensors by name, from a state dict, a training checkpoint or a TorchScript archive.

    Names of nested containers are joined by dots: `state_dict.visual.proj`. Raises ValueError for a truncated or
    damaged file, or a pickle with other values than those of `torch_pickle.TensorUnpickler`.
    """
    file = pathlib.Path(path)
    try:
        if zipfile.is_zipfile(file):
            content = _read_zip(file)
        elif file.open("rb").read(2) == b"PK":
            raise Refused("truncated: expected a zip directory at its end, got none; copy it again")
        else:
            content = _read_legacy(file)
        return _named_tensors(content), None
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    # A damaged byte can make pickle and zipfile raise any exception.
    except Exception as error:
        raise ValueError(f"{path}: damaged torch file: {type(error).__name__}: {error}; copy it again") from error


def torchscript_code(path: str | os.PathLike[str]) -> str:
    """Return the source code in a TorchScript archive, '' for other files. It is searched, never executed."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if "/code/" in info.filename and info.filename.endswith(".py")]
        return "\n".join(archive.read(i).decode("utf-8", "replace") for i in files if i.file_size < _MAX_CODE)


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a float32 state dict in the format of torch 1.6 and later, for `torch.load` and `clip.load`.

    The pickle is written as opcodes, because the names in it are torch's: protocol 2, a dict of
    `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.
    """
    pickled = [b"\x80\x02}("]
    with zipfile.ZipFile(path, "w") as archive:  # not compressed
        for key, (name, tensor) in enumerate(tensors.items()):
            array = np.asarray(tensor, "<f4", order="C")
            with archive.open(f"model/data/{key}", "w", force_zip64=True) as member:
                member.write(array.data)
            strides = [step // array.itemsize for step in array.strides]
            storage = [_text("storage"), b"ctorch\nFloatStorage\n", _text(str(key)), _text("cpu"), _integer(array.size)]
            pickled += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", *storage, b"tQ", _integer(0)]
            pickled += [_integers(array.shape), _integers(strides), b"\x89ccollections\nOrderedDict\n)RtR"]
        archive.writestr("model/data.pkl", b"".join([*pickled, b"u."]))
        archive.writestr("model/byteorder", "little")
        archive.writestr("model/version", "3\n")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def _integers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


def _read_zip(file: pathlib.Path) -> Any:
    mapped = np.memmap(file, np.uint8, "r")
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise Refused(f"expected a torch zip archive with one data.pkl, got {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise Refused("expected little-endian tensors, got big-endian; save it again on a little-endian machine")

        def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
            info = members.get(f"{root}data/{key}")
            if info is None:
                raise Refused(f"tensor storage {key!r}: expected its data in the archive, got none; copy it again")
            if info.file_size < count * dtype.itemsize:
                raise Refused(f"tensor storage {key!r}: expected {count} {dtype}, got {info.file_size} bytes")
            if info.compress_type != zipfile.ZIP_STORED:
                return np.frombuffer(archive.read(info), dtype, count)
            # The extra field of a local header may be longer than that in the zip directory.
            header = mapped[info.header_offset : info.header_offset + _LOCAL_HEADER].tobytes()
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
            return mapped[start : start + count * dtype.itemsize].view(dtype)

        return TensorUnpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _read_legacy(file: pathlib.Path) -> Any:
    """Read the format before torch 1.6: five pickles, the fourth is the object, then each storage with its size."""
    sizes: dict[str, tuple[np.dtype, int]] = {}
    data: dict[str, np.ndarray] = {}

    def record_size(dtype: np.dtype, key: str, count: int) -> None:
        sizes[key] = dtype, count

    with file.open("rb") as stream:
        if (head := stream.read(12))[:1] != b"\x80":
            raise Refused(f"expected a torch file, got a file that starts with {head!r}")
        stream.seek(0)
        if any(TensorUnpickler(stream, record_size).load() != number for number in (_LEGACY_MAGIC, _LEGACY_PROTOCOL)):
            raise Refused("expected a torch file, got another pickle")
        TensorUnpickler(stream, record_size).load()  # sizes of C types on the machine that wrote the file
        start_of_object = stream.tell()
        TensorUnpickler(stream, record_size).load()  # the object, for the sizes of its storages, which follow it
        keys = TensorUnpickler(stream, record_size).load()
        mapped, end = np.memmap(file, np.uint8, "r"), stream.tell()
        for key in keys:
            dtype, count = sizes[key]
            head, start, end = end, end + 8, end + 8 + count * dtype.itemsize
            if end > len(mapped) or struct.unpack("<q", mapped[head:start].tobytes()) != (count,):
                raise Refused(
                    f"truncated: expected the data of tensor storage {key!r}, got a part of it; copy it again"
                )
            data[key] = mapped[start:end].view(dtype)
        stream.seek(start_of_object)
        return TensorUnpickler(stream, lambda dtype, key, count: data[key]).load()


def _named_tensors(content: Any) -> dict[str, np.ndarray]:
    """Return the tensors of nested containers; their names are joined by dots."""
    tensors, pending, visited = {}, [("", content, 0)], 0
    while pending:
        prefix, value, depth = pending.pop()
        visited += 1
        if depth > _MAX_DEPTH or visited + len(pending) > _MAX_VALUES:
            raise Refused(f"expected at most {_MAX_VALUES:,} values in {_MAX_DEPTH} nested containers, got more")
        value = vars(value) if isinstance(value, Module) else value
        value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(value, np.ndarray):
            tensors[prefix] = value
        elif isinstance(value, Mapping):
            dot = "." if prefix else ""
            pending += [(f"{prefix}{dot}{name}", inner, depth + 1) for name, inner in reversed(value.items())]
    if not tensors:
        raise Refused("expected a state dict, a checkpoint or a TorchScript archive, got no tensors")
    return tensors
