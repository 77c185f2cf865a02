"""Where arrays live: the mesh, which axis cuts which parameter, and the way from a host's rows to a global array.

The mesh has four axes. `slice`, `data` and `fsdp` share the batch. Between the parts of `slice` lies the data centre's
network: gradients cross it, and the loss's embeddings. `fsdp` cuts parameters and optimizer state too, and a layer is
gathered when it is used (Zhao et al. 2023, arXiv:2304.11277); `tensor` cuts the heads and the perceptrons inside a
layer (Shoeybi et al. 2019, arXiv:1909.08053). Shardings are named with their mesh wherever they are used, so no context
has to be entered: a plain `with mesh:` would be ignored in silence.
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

from clip_jax.typing import SLICE, Params

AXES = (SLICE, "data", "fsdp", "tensor")
BATCH_AXES = AXES[:3]
BATCH = PartitionSpec(BATCH_AXES)
REPLICATED = PartitionSpec()
AnyMesh = Mesh | AbstractMesh  # what is said of shapes needs no devices

# (parameter paths, what cuts their last axes); axes further left, such as that of stacked layers, stay whole.
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]
RULES: Rules = (
    (r".*/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r".*/(query|key|value)/bias", ("tensor", None)),
    (r".*/(attention|pool)/out/kernel", ("tensor", None, "fsdp")),
    (r".*/mlp/in/kernel", ("fsdp", "tensor")),
    (r".*/mlp/in/bias", ("tensor",)),
    (r".*/mlp/out/kernel", ("tensor", "fsdp")),
    (r"image/(projection|embedding|layer\d+|pool/projection)(/kernel)?|text/projection", ("fsdp", None)),
    # By width: XLA sums the scattered gradients of a cut vocabulary wrongly in a loop (openxla/xla#49143).
    (r"text/token_embedding/embedding|image/patch_embedding", ("fsdp",)),
    (r"image/(.*conv\d?|stem)/kernel", ("fsdp",)),  # output channels
    # What is small is whole everywhere.
    (r".*/(attention|pool)/out/bias|.*/mlp/out/bias|image/(conv|layer)\d+/bias|image/embedding/bias", ()),
    (r".*norm[^/]*/(scale|bias)|.*/layer_scale\d", ()),
    (r".*/(positional_embedding|class_embedding|probe)|image/pool/projection/bias", ()),
    (r"image/patch_bias|text/projection_bias|logit_(scale|bias)", ()),
)


def make_mesh(devices: list[jax.Device] | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Return the mesh of all devices, ordered by host, so that a host's rows of the batch are consecutive.

    Args:
      fsdp, tensor: sizes of these axes, neighbours first; `data` has what remains of a slice. GPUs are one slice.

    Raises:
      ValueError: if they don't divide the devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({_slice(device) for device in devices})
    of_slice = len(devices) // slices
    if of_slice % (fsdp * tensor):
        where = f"{of_slice} devices" + (f" of each of {slices} slices" if slices > 1 else "")
        raise ValueError(f"mesh.fsdp={fsdp} times mesh.tensor={tensor} does not divide {where}")
    ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(slices, -1, fsdp, tensor), AXES)


def _slice(device: jax.Device) -> int:
    """Return the number of a TPU's slice, which a single one may lack; of GPUs every host has one, and is no slice."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def batch_shards(mesh: Mesh) -> int:
    """Return into how many parts the batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of everything whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Return the sharding of everything that each device holds whole."""
    return NamedSharding(mesh, REPLICATED)


# ------------------------------------------------------------------------------------------------ the train state


def param_specs(params: Params, mesh: AnyMesh, rules: Rules = RULES) -> PyTree:
    """Return a PartitionSpec for every parameter, by the one rule whose pattern is its whole path.

    A dimension that `fsdp` does not divide stays whole: such parameters are small.

    Raises:
      ValueError: for a parameter that no rule or two rules fit, or heads or perceptrons that `tensor` does not divide.
    """

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        name = "/".join(str(key.key) for key in path)
        fitting = [(pattern, cuts) for pattern, cuts in rules if re.fullmatch(pattern, name)]
        if len(fitting) != 1:
            found = " and ".join(repr(pattern) for pattern, _ in fitting) or "none"
            raise ValueError(
                f"parameter {name} {leaf.shape} needs one rule of clip_jax.devices.sharding.RULES, and {found} fits"
            )
        cuts = fitting[0][1]
        cuts = [None] * (len(leaf.shape) - len(cuts)) + list(cuts)
        for dimension, (axis, size) in enumerate(zip(cuts, leaf.shape, strict=True)):
            if axis is None or (mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0):
                continue
            if axis == "tensor" and size % mesh.shape[axis]:
                raise ValueError(
                    f"mesh.tensor={mesh.shape[axis]} does not divide {size}, an axis of parameter {name} {leaf.shape};"
                    f" use {math.gcd(mesh.shape[axis], size)}"
                )
            cuts[dimension] = None
        return _spec(cuts)

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(params: Params, mesh: Mesh) -> PyTree:
    """Return the sharding of every parameter; running averages of batch norm are whole everywhere."""
    trained = {name: value for name, value in params.items() if name != "batch_stats"}
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(trained, mesh))
    rest = {name: value for name, value in params.items() if name == "batch_stats"}
    return placed | jax.tree.map(lambda _: replicated(mesh), rest)


def state_shardings(state: Any, mesh: AnyMesh, *, shard_moments: bool = False) -> Any:
    """Return the sharding of every array of a train state, whose `params` name the parameters.

    What mirrors a parameter (its moments, its average) lies where the parameter does; all else is whole.

    Args:
      state: a dataclass of arrays or shapes.
      shard_moments: cut the optimizer's copies along the batch's axes within a slice too, as far as these divide them:
        ZeRO's first stage (Rajbhandari et al. 2020, arXiv:1910.02054).
    """
    specs = jax.tree_util.tree_leaves_with_path(param_specs(state.params, mesh))
    shapes = jax.tree.leaves(state.params)
    by_path = {path: (leaf.shape, spec) for (path, spec), leaf in zip(specs, shapes, strict=True)}
    longest = max(map(len, by_path))

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        suffixes = (path[-length:] for length in range(min(longest, len(path)), 0, -1))
        shape, spec = next((by_path[suffix] for suffix in suffixes if suffix in by_path), ((), REPLICATED))
        if shape != leaf.shape:
            return replicated(mesh)
        if shard_moments and path[0].name == "opt_state":
            spec = _cut_further(spec, shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def _cut_further(spec: PartitionSpec, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Give the batch's axes that a spec leaves out to the longest dimension that they divide."""
    cuts = [*spec, *[None] * (len(shape) - len(spec))]
    free = [axis for axis in BATCH_AXES if axis not in (*cuts, SLICE)]
    for dimension in sorted(range(len(shape)), key=lambda d: -shape[d]):
        axes = tuple(axis for axis in (cuts[dimension], *free) if axis)
        if shape[dimension] % math.prod(mesh.shape[axis] for axis in axes) == 0:
            cuts[dimension] = axes
            break
    return _spec(cuts)


def _spec(cuts: Any) -> PartitionSpec:
    """Return the spec without what it ends in that says nothing, so that equal ones are equal."""
    cuts = list(cuts)
    while cuts and cuts[-1] is None:
        cuts.pop()
    return PartitionSpec(*cuts)


def shard_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return sum(sizes)


# ------------------------------------------------------------------------------------------------------ the batch


def host_rows(mesh: Mesh, batch_size: int) -> slice:
    """Return the rows of a global batch that this host has to supply."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    spans = sorted(index[0].indices(batch_size)[:2] for index in indices.values())
    return slice(spans[0][0], spans[-1][1])


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Assemble the hosts' rows of a batch into arrays over the whole mesh; copies to the devices without waiting."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def gather(tree: Any, mesh: Mesh) -> Any:
    """Return a tree of arrays as every device holds them whole; to be called on all hosts."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def micro_batches(mesh: Mesh, count: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return two functions: a batch [B …] as [count B/count …], and back to [B …]; nothing crosses devices.

    Every micro-batch has rows of every device, as many of each.
    """
    shards = batch_shards(mesh)
    cut = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(count, -1, *x.shape[3:]), cut)

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(count, shards, -1, *x.shape[2:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(-1, *x.shape[3:]), batch_sharding(mesh))

    return lambda tree: jax.tree.map(split, tree), lambda tree: jax.tree.map(join, tree)
