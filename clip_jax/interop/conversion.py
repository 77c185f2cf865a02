"""Parameters from the tensors of a file, and back, by a table of names (name_tables.py).

What is read is copied once, into memory that JAX takes as it is; what is written is made tensor by tensor.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from clip_jax.config import Architecture
from clip_jax.interop.name_tables import Place, Table
from clip_jax.models import make_model
from clip_jax.typing import Params

# Ends of names that files have beside parameters: counters, masks and the like, which follow from the shapes.
IGNORED = ("position_ids", "num_batches_tracked", "attn_mask", "input_resolution", "context_length", "vocab_size")


def params_from_tensors(
    model: Architecture, tensors: Mapping[str, np.ndarray], table: Table, where: str, *, tower: str = ""
) -> Params:
    """Return our parameters, float32, from a file's tensors.

    Args:
      where: the file's name, for errors.
      tower: 'image' or 'text' for the parameters of that tower alone; other tensors are left where they are.

    Raises:
      ValueError: naming file and tensor, what was expected and what was found; for tensors that are left over too.
    """
    used: set[str] = set()

    def take(path: str, shape: tuple[int, ...], layer: int | None) -> np.ndarray:
        place = table[path]
        name = place.name if layer is None else place.name.format(layer + place.first)
        if name not in tensors:
            raise ValueError(f"{where} has no tensor {name!r}, which the model's {path} comes from")
        tensor, expected = tensors[name], tensor_shape(path, shape, place)
        if _squeezed(tensor.shape) != _squeezed(expected) and _squeezed(tensor.shape) != _squeezed(shape):
            raise ValueError(f"{where}: the tensor {name} has shape {tensor.shape}, expected {expected} for {path}")
        if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise ValueError(f"{where}: the tensor {name} is {tensor.dtype}, expected floating point for {path}")
        used.add(name)
        number, parts = place.part
        rows = len(tensor) // parts if parts > 1 else 0
        return _to_ours(tensor[number * rows : (number + 1) * rows] if parts > 1 else tensor, shape, place)

    def parameter(path: str, shape: tuple[int, ...], layers: int) -> np.ndarray:
        if path not in table:
            raise ValueError(f"{where}: this format has no place for {path}")
        array = _empty((layers, *shape) if layers else shape)
        for layer in range(layers) if layers else (None,):
            _copy(array if layer is None else array[layer], take(path, shape, layer))
        return array

    shapes = {path: shape for path, shape in parameter_shapes(model).items() if not tower or tower in path.split("/")}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy copies without the interpreter's lock
        arrays = pool.map(lambda path: parameter(path, *shapes[path]), shapes)
        params = nested(dict(zip(shapes, arrays, strict=True)))
    left = sorted(name for name in tensors if name not in used and not name.endswith(IGNORED))
    if left and not tower:
        raise ValueError(f"{where} has {len(left)} tensors that the model has no place for: {', '.join(left[:5])}")
    return params


class LazyTensors(Mapping[str, np.ndarray]):
    """A format's tensors, float32, each made from our parameters when it is asked for: all together are never held.

    Raises ValueError where the format has no place for one of the model's parameters.
    """

    def __init__(self, model: Architecture, params: Params, table: Table):
        self._leaves, self._table = flat(params), table
        self._parts: dict[str, list[tuple[str, int | None]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, (shape, layers) in parameter_shapes(model).items():
            if path not in table:
                raise ValueError(f"this format has no place for the model's {path}")
            place = table[path]
            for layer in range(layers) if layers else (None,):
                name = place.name if layer is None else place.name.format(layer + place.first)
                self._parts.setdefault(name, []).append((path, layer))
                self.shapes[name] = tensor_shape(path, shape, place)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.empty(self.shapes[name], np.float32)
        for path, layer in self._parts[name]:
            place = self._table[path]
            number, parts = place.part
            rows = len(tensor) // parts if parts > 1 else 0
            target = tensor[number * rows : (number + 1) * rows] if parts > 1 else tensor
            leaf = np.asarray(self._leaves[path] if layer is None else self._leaves[path][layer])
            _copy(target, _to_theirs(leaf, target.shape, place))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@functools.cache
def parameter_shapes(model: Architecture) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return the model's parameters by path: the shape of one layer, and how many are stacked, 0 for none."""
    shapes = jax.eval_shape(lambda: make_model(model).init(jax.random.key(0)))
    found = {}
    for path, leaf in flat(shapes).items():
        stacked = "/blocks/" in path or "_rest/" in path
        found[path] = (leaf.shape[1:], leaf.shape[0]) if stacked else (leaf.shape, 0)
    return found


def tensor_shape(path: str, shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """Return the shape in a file of the tensor that our parameter of `shape`, one layer of it, lies in."""
    if place.transposed and len(shape) == 4:
        height, width, inner, outer = shape
        shape = (outer, inner, height, width)
    elif place.transposed or (place.merged and len(shape) == 3):
        # Only the projection behind attention has its heads on the inner side.
        inner = len(shape) - 1 if path.endswith("out/kernel") else 1
        shape = (math.prod(shape[:inner]), math.prod(shape[inner:]))
        shape = shape[::-1] if place.transposed else shape
    elif len(shape) > 1 and path.endswith("/bias"):
        shape = (math.prod(shape),)
    if place.part[1] > 1:
        shape = (shape[0] * place.part[1], *shape[1:])
    return (1,) * place.leading + shape


def _to_ours(tensor: np.ndarray, shape: tuple[int, ...], place: Place) -> np.ndarray:
    if place.transposed:
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return tensor.reshape(shape)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 at a multiple of 64 bytes: JAX takes such an array on a CPU as it is, any other it copies."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


_LINE = 16  # numbers of float32 in 64 bytes


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy in strips as wide as a line of the cache: a transposed matrix takes a third of NumPy's own time so."""
    if target.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, target.shape[-1], _LINE):
        target[..., start : start + _LINE] = source[..., start : start + _LINE]


def _to_theirs(array: np.ndarray, shape: tuple[int, ...], place: Place) -> np.ndarray:
    if not place.transposed:
        return array.reshape(shape)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.reshape(shape[::-1]).T


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def flat(tree: Params) -> dict:
    """Return a nested tree's leaves by path, e.g. `text/projection`."""
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[str, np.ndarray]) -> Params:
    """Return the tree of leaves by path: `flat` the other way."""
    tree: dict = {}
    for path, value in leaves.items():
        _insert(tree, path, value)
    return tree


def _insert(tree: dict, path: str, value: np.ndarray) -> None:
    *parents, leaf = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value
