"""Where arrays live: the mesh, and the way from one host's rows to a global array.

The batch is sharded over the axis `data`; parameters and optimizer state are replicated.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.typing import Batch

BATCH_AXIS = "data"
BATCH = PartitionSpec(BATCH_AXIS)
REPLICATED = PartitionSpec()


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Return the mesh of all devices, ordered by host, so that a host's rows of the batch are consecutive."""
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), (BATCH_AXIS,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of everything whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of everything that each device holds whole."""
    return NamedSharding(mesh, REPLICATED)


def host_rows(mesh: Mesh, batch_size: int) -> slice:
    """Return the rows of a global batch that this host has to supply."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    spans = sorted(index[0].indices(batch_size)[:2] for index in indices.values())
    return slice(spans[0][0], spans[-1][1])


def to_global(batch: Batch, mesh: Mesh) -> Batch:
    """Assemble the hosts' rows into arrays over the whole mesh; copies to the devices without waiting."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def spread(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return an array that every host holds whole as one that is sharded over its first axis."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])
