"""Pickles of torch files, read without running them: tensors, containers, and placeholders for other harmless values.

A pickle is a program. This reader implements the few functions that rebuild tensors. Values that training scripts save
alongside the weights (NumPy scalars, paths, dates, arguments) become placeholders, and every other name is refused
before it is imported.

Source of the formats: pytorch `torch/_utils.py`, `torch/csrc/jit/serialization/pickler.h`; numpy
`core/src/multiarray/methods.c` (`array_reduce`).
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_STORAGES = {
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
    "UntypedStorage": np.uint8,  # bytes; the tensor has the dtype
}
_DTYPES = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")},
    **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64", "bool", "complex64", "complex128")},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", *FLOAT8)},
}

# Values that training scripts save alongside the weights, by module. They become placeholders.
_BUILTINS = ("builtins", "__builtin__")  # in Python 3 and, in pickle protocol 2, in Python 2
_NUMPY = ("scalar", "_reconstruct", "dtype", "ndarray")
_VALUES = {
    **dict.fromkeys(
        _BUILTINS,
        (
            "int",
            "float",
            "str",
            "bool",
            "bytes",
            "list",
            "dict",
            "tuple",
            "slice",
            "range",
            "xrange",
            "complex",
            "bytearray",
        ),
    ),
    **dict.fromkeys(("numpy", "numpy.core.multiarray", "numpy._core.multiarray"), _NUMPY),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "collections": ("Counter", "deque"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "typing": ("Any",),
    "torch.serialization": ("_get_layout",),
    "torch": ("device", "layout", "memory_format", "strided", "contiguous_format"),
}
# Packages of random states, configurations and trainers whose objects become placeholders.
_VALUE_PACKAGES = (
    "numpy.random",
    "omegaconf",
    "yacs",
    "easydict",
    "ml_collections",
    "addict",
    "lightning",
    "pytorch_lightning",
)


class Refused(ValueError):
    """The file is damaged or contains something that this reader does not support."""


class Module:
    """A TorchScript object: its attributes without its code."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


class Placeholder:
    """A value that is neither a tensor nor a container of tensors. Its content is discarded."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


class _StorageType:
    """torch.HalfStorage and the like. Not the dtype itself, because a pickle can modify its objects."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class TensorUnpickler(pickle.Unpickler):
    """Pickle reader restricted to tensors, containers and placeholders.

    Args:
      stream: the pickle.
      storage: (dtype, key, number of elements) -> array of the elements; None if their place is not yet known.
    """

    def __init__(self, stream: io.BufferedIOBase, storage: Callable[[np.dtype, str, int], np.ndarray | None]):
        super().__init__(stream, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(np.dtype(_STORAGES[name]))
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if module.split(".")[0] == "__torch__":
            return Module
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if name in _VALUES.get(module, ()) or any(
            f"{module}.".startswith(f"{package}.") for package in _VALUE_PACKAGES
        ):
            return Placeholder
        raise Refused(
            f"expected a pickle of tensors alone, got {module}.{name}, which could run any program. If you trust the"
            " file, load it with torch (weights_only=False) and save its state dict alone: torch.save(state_dict, NEW);"
            " of a whole module, .state_dict()"
        )

    def persistent_load(self, pid: Any) -> np.ndarray | None:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise Refused(f"expected a tensor storage, got {reprlib.repr(pid)}")
        _, kind, key, _device, count = pid[:5]
        if not isinstance(count, int) or count < 0 or not isinstance(key, (str, int)):
            raise Refused(f"tensor storage {reprlib.repr(key)}: expected a size, got {reprlib.repr(count)}")
        return self._storage(kind.dtype, str(key), count)


def _tensor(storage: np.ndarray | None, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray | None:
    """Return a view of a storage after a bounds check: the file's strides could point outside it."""
    if storage is None:
        return None
    numbers, shape = (offset, *size, *stride), reprlib.repr(size)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        found = f"{reprlib.repr(stride)} at offset {reprlib.repr(offset)}"
        raise Refused(f"a tensor of shape {shape}: expected one stride per axis, none negative, got {found}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and (last >= len(storage) or math.prod(size) > len(storage)):
        raise Refused(
            f"a tensor of shape {shape}: expected a storage that contains it, got one of {len(storage)} elements"
        )
    view = storage[offset : last + 1] if math.prod(size) else storage[:0]
    steps = [step * storage.itemsize for step in stride]
    return np.ndarray(size, storage.dtype, view.view(np.uint8), strides=steps)  # as_strided raises for float8


def _tensor_of_bytes(
    storage: np.ndarray | None, offset: int, size: tuple, stride: tuple, _grad: Any, _hooks: Any, kind: Any, *_: Any
) -> np.ndarray | None:
    """Return a tensor whose storage is bytes: dtypes newer than torch 2.0, such as float8."""
    if not isinstance(kind, _StorageType):
        raise Refused(f"a tensor of shape {reprlib.repr(size)}: expected a dtype, got {reprlib.repr(kind)}")
    if storage is not None:
        storage = storage[: len(storage) // kind.dtype.itemsize * kind.dtype.itemsize].view(kind.dtype)
    return _tensor(storage, offset, size, stride)


def _latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that pickle protocol 2 writes as text."""
    if encoding != "latin1" or not isinstance(text, str):
        raise Refused(f"expected bytes as latin1, got {reprlib.repr(encoding)}")
    return text.encode("latin1")


def _first(value: Any, *_: Any) -> Any:
    return value


_FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_bytes,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): tuple,
    ("_codecs", "encode"): _latin1,
    **{(module, name): kind for module in _BUILTINS for name, kind in (("set", set), ("frozenset", frozenset))},
    # TorchScript annotates its lists with types.
    **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _first,
}
