"""Mesh, sharding of parameters and optimizer state, and assembly of global batches.

The mesh has four axes. The batch is sharded over `slice`, `data` and `fsdp`. `slice` spans the data center network,
which carries gradients and the loss's embeddings. `fsdp` also shards parameters and optimizer state, and each layer is
gathered when it is used (Zhao et al. 2023, arXiv:2304.11277). `tensor` shards attention heads and MLP width within a
layer (Shoeybi et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from clip_jax.models.architecture import Architecture
from clip_jax.models.layers import Rules
from clip_jax.models.params import split_batch_stats, tree_path
from clip_jax.typing import SLICE, Params

AXES = (SLICE, "data", "fsdp", "tensor")
BATCH_AXES = AXES[:3]
BATCH = PartitionSpec(BATCH_AXES)
REPLICATED = PartitionSpec()
AnyMesh = Mesh | AbstractMesh  # functions of shapes need no devices


def make_mesh(devices: list[jax.Device] | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Return the mesh of devices, by default all, ordered by host, so each host's rows of the batch are contiguous.

    `fsdp` and `tensor` are sizes of these axes, over adjacent devices; `data` has the remaining devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({_slice_index(device) for device in devices})
    per_slice = len(devices) // slices
    if per_slice % (fsdp * tensor):
        where = f"{per_slice} devices" + (f" of each of {slices} slices" if slices > 1 else "")
        raise ValueError(f"mesh.fsdp={fsdp} times mesh.tensor={tensor} does not divide {where}")
    ordered = sorted(devices, key=lambda device: (_slice_index(device), device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(slices, -1, fsdp, tensor), AXES)


def _slice_index(device: jax.Device) -> int:
    """Return the index of a TPU's slice; 0 if there is one slice, and for GPUs, where JAX numbers hosts instead."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def batch_shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, REPLICATED)


def sharding_rules(architecture: Architecture) -> Rules:
    """Return the rules for all parameters of a model: those of its towers and of the logit scale and bias."""
    towers = {"image": architecture.image, "text": architecture.text}
    rules = [(f"{name}/(?:{path})", axes) for name, tower in towers.items() for path, axes in tower.sharding_rules]
    return (*rules, (r"logit_(scale|bias)", ()))


def param_specs(params: Params, mesh: AnyMesh, rules: Rules) -> PyTree:
    """Return a PartitionSpec for every parameter, an array or a shape.

    A dimension that `fsdp` does not divide is replicated, because such parameters are small. Raises ValueError if not
    exactly one rule matches a parameter, or `tensor` does not divide its heads or MLP width.
    """

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        name = tree_path(path)
        matches = [(pattern, axes) for pattern, axes in rules if re.fullmatch(pattern, name)]
        if len(matches) != 1:
            found = " and ".join(repr(pattern) for pattern, _ in matches) or "none"
            raise ValueError(
                f"parameter {name} {leaf.shape}: expected one matching sharding rule, got {found};"
                " see the tower's sharding_rules"
            )
        axes = [None] * (len(leaf.shape) - len(matches[0][1])) + list(matches[0][1])
        for dimension, (axis, size) in enumerate(zip(axes, leaf.shape, strict=True)):
            if axis is None or (mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0):
                continue
            if axis == "tensor" and size % mesh.shape[axis]:
                raise ValueError(
                    f"mesh.tensor={mesh.shape[axis]} does not divide {size}, an axis of parameter {name} {leaf.shape};"
                    f" use {math.gcd(mesh.shape[axis], size)}"
                )
            axes[dimension] = None
        return _canonical_spec(axes)

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(params: Params, mesh: Mesh, architecture: Architecture) -> PyTree:
    """Return the sharding of every parameter; batch statistics are replicated."""
    trained, _ = split_batch_stats(params)
    specs = param_specs(trained, mesh, sharding_rules(architecture))
    replicated_specs = jax.tree.map(lambda _: REPLICATED, params)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), replicated_specs | specs)


def state_shardings(state: Any, mesh: AnyMesh, architecture: Architecture, *, shard_moments: bool = False) -> Any:
    """Return the sharding of every array of a train state, or of its shapes.

    Arrays with a parameter's path and shape, such as its moments and EMA, are sharded as the parameter; all others
    are replicated. `shard_moments` also shards the optimizer state over the batch axes within a slice, where these
    divide it: stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    specs = jax.tree_util.tree_leaves_with_path(param_specs(state.params, mesh, sharding_rules(architecture)))
    shapes = jax.tree.leaves(state.params)
    by_path = {path: (leaf.shape, spec) for (path, spec), leaf in zip(specs, shapes, strict=True)}
    longest = max(map(len, by_path))

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        suffixes = (path[-length:] for length in range(min(longest, len(path)), 0, -1))
        shape, spec = next((by_path[suffix] for suffix in suffixes if suffix in by_path), ((), REPLICATED))
        if shape != leaf.shape:
            return replicated(mesh)
        if shard_moments and path[0].name == "opt_state":
            spec = _with_batch_axes(spec, shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def _with_batch_axes(spec: PartitionSpec, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Add the unused batch axes within a slice to the largest dimension that they divide."""
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    unused = [axis for axis in BATCH_AXES if axis not in (*axes, SLICE)]
    for dimension in sorted(range(len(shape)), key=lambda d: -shape[d]):
        combined = tuple(axis for axis in (axes[dimension], *unused) if axis)
        if shape[dimension] % math.prod(mesh.shape[axis] for axis in combined) == 0:
            axes[dimension] = combined
            break
    return _canonical_spec(axes)


def _canonical_spec(axes: list) -> PartitionSpec:
    """Return a PartitionSpec without trailing None, so that equal specs compare equal."""
    length = max((dimension for dimension, axis in enumerate(axes, 1) if axis is not None), default=0)
    return PartitionSpec(*axes[:length])


def shard_bytes(tree: Any) -> int:
    """Return the bytes per device of a tree of sharded arrays, or of shapes with shardings."""
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return sum(sizes)


def host_rows(mesh: Mesh, batch_size: int) -> slice:
    """Return the rows of a global batch that this host supplies."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    spans = sorted(index[0].indices(batch_size)[:2] for index in indices.values())
    return slice(spans[0][0], spans[-1][1])


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Assemble global arrays from this host's rows of a batch. The copy to the devices is asynchronous."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def gather(tree: Any, mesh: Mesh) -> Any:
    """Replicate a tree of arrays on all devices; all hosts must call it."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def micro_batches(mesh: Mesh, count: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return functions that split a batch [B, …] into micro-batches [count, B/count, …] and join them again.

    Each micro-batch takes an equal share of each device's rows, so there is no communication.
    """
    shards = batch_shards(mesh)
    split_sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(count, -1, *x.shape[3:]), split_sharding)

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(count, shards, -1, *x.shape[2:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(-1, *x.shape[3:]), batch_sharding(mesh))

    return lambda tree: jax.tree.map(split, tree), lambda tree: jax.tree.map(join, tree)
