"""Conversion between clip_jax parameters and the tensors of a file, by a name table (name_tables.py).

Reading copies each tensor once, into memory that JAX uses without another copy; writing makes one tensor at a time.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping

import jax
import ml_dtypes
import numpy as np

from clip_jax.config import Architecture
from clip_jax.interop.name_tables import Table, Tensor
from clip_jax.interop.torch_pickle import FLOAT8
from clip_jax.models import make_model, tree_path
from clip_jax.typing import Params

# Suffixes of tensors that are no parameters and follow from the shapes.
_IGNORED = ("position_ids", "num_batches_tracked", "attn_mask", "input_resolution", "context_length", "vocab_size")
_FLOATING = ("float16", "bfloat16", "float32", "float64", *FLOAT8)


def params_from_tensors(
    model: Architecture,
    tensors: Mapping[str, np.ndarray],
    table: Table,
    file: str,
    *,
    tower: str = "",
    ignore_others: bool = False,
    dtype: str = "float32",
) -> Params:
    """Return parameters of a dtype from a file's tensors: of both towers, or of `tower`, 'image' or 'text', alone.

    Raises ValueError for a missing or unusable tensor and, unless `ignore_others`, for an additional one.
    """
    used: set[str] = set()

    def convert(path: str, shape: tuple[int, ...], layer: int | None) -> np.ndarray:
        source = table[path]
        name = source.of_layer(layer)
        if name not in tensors:
            raise ValueError(f"{file}: expected a tensor {name!r} for {path}, got none")
        tensor, expected = tensors[name], tensor_shape(path, shape, source)
        if _squeezed(tensor.shape) != _squeezed(expected) and _squeezed(tensor.shape) != _squeezed(shape):
            raise ValueError(f"{file}: tensor {name}: expected shape {expected} for {path}, got {tensor.shape}")
        if tensor.dtype.name not in _FLOATING:
            raise ValueError(f"{file}: tensor {name}: expected floating point for {path}, got {tensor.dtype}")
        used.add(name)
        tensor = _chunk(tensor, source)
        if source.transposed:
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        return tensor.reshape(shape)

    def parameter(path: str, shape: tuple[int, ...], layers: int) -> np.ndarray:
        if path not in table:
            raise ValueError(f"{file}: expected a format that stores the parameter {path}, got another; use msgpack")
        array = _aligned_empty((layers, *shape) if layers else shape, stored_dtype(dtype, shape))
        for layer in range(layers) if layers else (None,):
            _copy(array if layer is None else array[layer], convert(path, shape, layer))
        return array

    shapes = {path: shape for path, shape in parameter_shapes(model).items() if not tower or tower in path.split("/")}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy releases the GIL while it copies
        arrays = pool.map(lambda path: parameter(path, *shapes[path]), shapes)
        params = nested(dict(zip(shapes, arrays, strict=True)))
    scalars = {table[path].name for path in ("logit_scale", "logit_bias") if tower}
    unused = sorted(name for name in tensors if name not in used | scalars and not name.endswith(_IGNORED))
    if unused and not ignore_others:
        raise ValueError(f"{file}: expected no other tensors, got {len(unused)} unused: {', '.join(unused[:5])}")
    return params


class LazyTensors(Mapping[str, np.ndarray]):
    """The float32 tensors of a format; each is converted from the parameters on access, to save memory.

    Raises ValueError if the format cannot store one of the model's parameters.
    """

    def __init__(self, model: Architecture, params: Params, table: Table):
        self._leaves, self._table = flat(params), table
        self._sources: dict[str, list[tuple[str, int | None]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, (shape, layers) in parameter_shapes(model).items():
            if path not in table:
                raise ValueError(f"expected a format that stores the parameter {path}, got another; use msgpack")
            source = table[path]
            for layer in range(layers) if layers else (None,):
                name = source.of_layer(layer)
                self._sources.setdefault(name, []).append((path, layer))
                self.shapes[name] = tensor_shape(path, shape, source)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.empty(self.shapes[name], np.float32)
        for path, layer in self._sources[name]:
            source = self._table[path]
            target = _chunk(tensor, source)
            array = np.asarray(self._leaves[path] if layer is None else self._leaves[path][layer])
            if not source.transposed:
                array = array.reshape(target.shape)
            elif array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
            else:
                array = array.reshape(target.shape[::-1]).T
            _copy(target, array)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@functools.cache
def parameter_shapes(model: Architecture) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return for each parameter's path its shape per layer and the number of stacked layers, 0 if not stacked."""
    shapes = jax.eval_shape(lambda: make_model(model).init(jax.random.key(0)))
    found = {}
    for path, leaf in flat(shapes).items():
        name, _, rest = path.removeprefix("batch_stats/").partition("/")
        stacked = name in ("image", "text") and re.fullmatch(getattr(model, name).stacked, rest)
        found[path] = (leaf.shape[1:], leaf.shape[0]) if stacked else (leaf.shape, 0)
    return found


def tensor_shape(path: str, shape: tuple[int, ...], source: Tensor) -> tuple[int, ...]:
    """Return the shape of the tensor that stores a parameter of `shape` (per layer)."""
    if source.transposed and len(shape) == 4:
        height, width, inputs, outputs = shape
        shape = (outputs, inputs, height, width)
    elif source.transposed or (source.merged_heads and len(shape) == 3):
        # Only the output projection of attention has its heads on the input side.
        inputs = len(shape) - 1 if path.endswith("out/kernel") else 1
        shape = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
        shape = shape[::-1] if source.transposed else shape
    elif len(shape) > 1 and path.endswith("/bias"):
        shape = (math.prod(shape),)
    if source.chunk[1] > 1:
        shape = (shape[0] * source.chunk[1], *shape[1:])
    return (1,) * source.leading_axes + shape


def _chunk(tensor: np.ndarray, source: Tensor) -> np.ndarray:
    number, chunks = source.chunk
    return np.split(tensor, chunks)[number] if chunks > 1 else tensor


def stored_dtype(dtype: str, shape: tuple[int, ...]) -> np.dtype:
    """Return the dtype of a parameter in a model of a dtype: scalars, the logit scale and bias, are always float32."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" and shape else np.float32)


def cast(params: Params, dtype: str) -> Params:
    """Return parameters with the dtypes of `stored_dtype`; unchanged for the dtype ''."""
    if not dtype:
        return params
    return jax.tree.map(lambda x: np.asarray(x).astype(stored_dtype(dtype, np.shape(x)), copy=False), params)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array aligned to 64 bytes, which JAX uses on CPU without a copy."""
    size = dtype.itemsize * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


_CACHE_LINE = 16  # float32 values in 64 bytes


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy in strips of a cache line: for a transposed matrix it takes a third of the time of NumPy's copy."""
    if target.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, target.shape[-1], _CACHE_LINE):
        target[..., start : start + _CACHE_LINE] = source[..., start : start + _CACHE_LINE]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def flat(tree: Params) -> dict:
    """Return the leaves of a nested tree by path, e.g. `text/projection`."""
    return {tree_path(p): leaf for p, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[str, np.ndarray]) -> Params:
    """Return the nested tree of leaves by path, the inverse of `flat`."""
    tree: dict = {}
    for path, value in leaves.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
