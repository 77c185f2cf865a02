"""Tensors of torch's files, read without torch: zip archives, TorchScript's too, and the format before torch 1.6.

A pickle is a program. This reader knows the handful of names that rebuild tensors and refuses every other by its name,
before anything of it runs. Tensors are views of the mapped file: nothing is read until it is used.

Source of the formats: pytorch `torch/serialization.py`, `torch/_utils.py`, `torch/csrc/jit/serialization/pickler.h`.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DTYPES = {
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
}
_MAX_CODE = 1 << 24  # bytes; the published archives have some 100 kB
_LOCAL_HEADER = 30  # bytes, before a zip member's name


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict, a training checkpoint or a TorchScript archive, by name, read-only.

    Raises:
      ValueError: naming the file: cut short, damaged, or asking for more than tensors.
    """
    file = pathlib.Path(path)
    try:
        if zipfile.is_zipfile(file):
            content = _read_zip(file)
        elif file.open("rb").read(2) == b"PK":
            raise ValueError("truncated: the list of its contents, at the end of a zip file, is missing")
        else:
            content = _read_legacy(file)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    # What pickle and zipfile are known to raise for damaged files; a damaged byte may name anything.
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, KeyError, IndexError),
        *(TypeError, AttributeError, struct.error, UnicodeDecodeError, OverflowError, NotImplementedError),
    ) as error:
        raise ValueError(f"{path} can't be read as a file of torch: {type(error).__name__}: {error}") from error
    tensors = dict(_tensors(_state_dict(content)))
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected a state dict, a checkpoint or a TorchScript archive")
    return tensors


def torchscript_code(path: str | os.PathLike[str]) -> str:
    """Return the code that a TorchScript archive carries, '' for other files: to look at, never to run."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if "/code/" in info.filename and info.filename.endswith(".py")]
        return "\n".join(archive.read(i).decode("utf-8", "replace") for i in files if i.file_size < _MAX_CODE)


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as torch does since 1.6, float32: what `torch.load` and `clip.load` read.

    The pickle is written by its opcodes, since the names in it are torch's: protocol 2, a dict of
    `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.
    """
    pickled = [b"\x80\x02}("]
    with zipfile.ZipFile(path, "w") as archive:  # stored, not compressed
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


class _Refused(ValueError):
    """What a file asks for is not done."""


# ------------------------------------------------------------------------------------------------------ containers


def _read_zip(file: pathlib.Path) -> Any:
    mapped = np.memmap(file, np.uint8, "r")
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _Refused(f"this is a zip file, but not one of torch: it has {len(pickles)} members data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("its numbers are big-endian; save it again on a little-endian machine")

        def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
            info = members.get(f"{root}data/{key}")
            if info is None:
                raise _Refused(f"the data of tensor storage {key!r} is missing")
            if info.file_size < count * dtype.itemsize:
                raise _Refused(
                    f"tensor storage {key!r} has {info.file_size} bytes, which are fewer than {count} {dtype}"
                )
            if info.compress_type != zipfile.ZIP_STORED:
                return np.frombuffer(archive.read(info), dtype, count)
            # A member's local header may have other extra bytes than the list at the end says.
            header = mapped[info.header_offset : info.header_offset + _LOCAL_HEADER].tobytes()
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
            return mapped[start : start + count * dtype.itemsize].view(dtype)

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _read_legacy(file: pathlib.Path) -> Any:
    """Read what torch wrote before 1.6: five pickles, the fourth the object, then the storages, each with its size."""
    mapped = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
    sizes: dict[str, tuple[np.dtype, int]] = {}
    data: dict[str, np.ndarray] = {}

    def size(dtype: np.dtype, key: str, count: int) -> None:
        sizes[key] = dtype, count

    with file.open("rb") as stream:
        if stream.read(2)[:1] != b"\x80":
            raise _Refused(f"this is not a file of torch: it begins with {bytes(mapped[:12])!r}")
        stream.seek(0)
        if _Unpickler(stream, size).load() != _LEGACY_MAGIC or _Unpickler(stream, size).load() != _LEGACY_PROTOCOL:
            raise _Refused("this is a pickle, but not one of torch")
        _Unpickler(stream, size).load()  # sizes of C's types on the machine that wrote it
        begin = stream.tell()
        _Unpickler(stream, size).load()  # the object, for the sizes of its storages: they lie behind it
        keys = _Unpickler(stream, size).load()
        end = stream.tell()
        for key in keys:
            dtype, count = sizes[key]
            at, start, end = end, end + 8, end + 8 + count * dtype.itemsize
            if end > len(mapped) or struct.unpack("<q", mapped[at:start].tobytes()) != (count,):
                raise _Refused(f"truncated: the data of tensor storage {key!r} is not whole")
            data[key] = mapped[start:end].view(dtype)
        stream.seek(begin)
        return _Unpickler(stream, lambda dtype, key, count: data[key]).load()


# --------------------------------------------------------------------------------------------------------- pickles

# Returns the numbers of a storage: (dtype, key, count).
Storage = Callable[[np.dtype, str, int], np.ndarray | None]


class _Module:
    """A TorchScript object: its attributes, none of its code."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


@dataclasses.dataclass
class _StorageType:
    """What torch.HalfStorage and its like stand for. Not the dtype itself: a pickle may change what it is given."""

    dtype: np.dtype


class _Unpickler(pickle.Unpickler):
    """A pickle reader that knows tensors and containers, and nothing else."""

    def __init__(self, stream: io.BufferedIOBase, storage: Storage):
        super().__init__(stream, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _StorageType(np.dtype(_DTYPES[name]))
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) not in _KNOWN:
            raise _Refused(
                f"its pickle asks for {module}.{name}, and only tensors are read: a pickle can run any program."
                " If you trust the file, save its state dict alone with torch, or as .safetensors"
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray | None:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise _Refused(f"its pickle refers to {str(pid)[:80]}, which is no tensor storage")
        _, kind, key, _device, count = pid[:5]
        if not isinstance(count, int) or count < 0:
            raise _Refused(f"the tensor storage {key!r} has {count!r} numbers")
        return self._storage(kind.dtype, str(key), count)


def _tensor(storage: np.ndarray | None, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray | None:
    """Return the view of a storage, after a look at its bounds: strides from a file may point anywhere."""
    if storage is None:
        return None
    whole = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in whole):
        raise _Refused(f"a tensor of shape {size} has the strides {stride} at {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and (last >= len(storage) or math.prod(size) > len(storage)):
        raise _Refused(f"a tensor of shape {size} reaches beyond its storage of {len(storage)} numbers")
    view = storage[offset : last + 1] if math.prod(size) else storage[:0]
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(view, size, steps, writeable=False)


_KNOWN: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *_: None,
    # TorchScript's lists carry their types.
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "build_doublelist"): list,
    ("torch.jit._pickle", "build_boollist"): list,
    ("torch.jit._pickle", "build_tensorlist"): list,
    ("torch.jit._pickle", "restore_type_tag"): lambda value, _type: value,
}


# ------------------------------------------------------------------------------------------------------- state dicts


def _state_dict(content: Any) -> Any:
    """Return what holds the model in a checkpoint: open_clip's and Lightning's have it under `state_dict`."""
    while isinstance(content, Mapping) and not any(isinstance(value, np.ndarray) for value in content.values()):
        inner = next((content[key] for key in ("state_dict", "model", "module") if key in content), None)
        if inner is None:
            return content
        content = inner
    return content


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(content, _Module):
        content = vars(content)
    if isinstance(content, np.ndarray):
        yield prefix, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _tensors(value, f"{prefix}.{name}" if prefix else str(name))
