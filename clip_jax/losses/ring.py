"""Collectives of the tiled losses: a ring sends texts to all devices and reduces their statistics and gradients.

Devices form groups of neighbors. A group gathers its texts into one block, as far as `BLOCK_BYTES` allows, and the
groups form a ring of `ppermute` over which every device sends its own texts. A small batch on a large pod is therefore
one all-gather instead of hundreds of dependent permutes; a large batch is a ring whose messages overlap with the
computation on the current block. Groups never span TPU slices: over the data center network a device sends only its own
texts and their summed gradients. Everything runs inside `jax.shard_map`, or on one device without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from clip_jax.typing import SLICE

Axis = str | tuple[str, ...] | None  # mesh axes that the batch is sharded over, in any order; None: one device

# Maximum size of a gathered block of texts. 32,768 float32 texts of width 512 (ViT-B at the paper's batch size) fit:
# one all-gather, no ring.
BLOCK_BYTES = 64 * 2**20


def in_mesh_order(axis: Axis) -> Axis:
    """Return the axes in the order of the mesh.

    `ppermute` numbers devices in mesh order whatever order of axes it is given (jax 0.10); the other collectives use
    the given order. The losses do not depend on the order of the devices, so mesh order is used for all of them.
    """
    if axis is None or isinstance(axis, str):
        return axis
    return tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name in axis)


class Ring(NamedTuple):
    """A ring of device groups. The rank of a device is its position in its group."""

    axis: Axis
    group: int  # devices per group, all of one slice
    groups: int  # number of groups, which is the number of blocks that every device processes

    @classmethod
    def create(cls, axis: Axis, texts: Any) -> Ring:
        """Return the ring for the texts of one device: an array, or a pytree of arrays that are sent together."""
        if axis is None:
            return cls(axis, 1, 1)
        devices = jax.lax.axis_size(axis)
        slices = jax.lax.axis_size(SLICE) if SLICE in axis else 1
        group = group_size(devices // slices, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(texts)))
        return cls(axis, group, devices // group)

    @property
    def index_groups(self) -> list[list[int]] | None:
        """Device indices of every group, in the form that JAX's collectives take; None for a single group."""
        if self.groups == 1:
            return None
        return [list(range(first, first + self.group)) for first in range(0, self.group * self.groups, self.group)]

    def gather(self, tree: Any) -> Any:
        """Return the concatenated rows of all devices of the group, in order of rank."""
        if self.group == 1:
            return tree
        return jax.lax.all_gather(tree, self.axis, axis_index_groups=self.index_groups, tiled=True)

    def shift(self, tree: Any) -> Any:
        """Send rows to the device of the same rank in the next group."""
        devices = self.group * self.groups
        permutation = [(device, (device + self.group) % devices) for device in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, permutation), tree)

    def exchange(self, x: Array) -> Float[Array, "ranks b ..."]:
        """Send each device of the group its rows of a block; return the parts of all ranks for this device's rows."""
        parts = x.reshape(self.group, -1, *x.shape[1:])
        if self.group == 1:
            return parts
        return jax.lax.all_to_all(parts, self.axis, 0, 0, axis_index_groups=self.index_groups)

    def varying(self, tree: Any) -> Any:
        """Mark constants as varying over the devices, which `shard_map` requires of the initial carry of a loop."""
        if self.axis is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.pcast(x, self.axis, to="varying"), tree)

    def scan(
        self,
        rows: Any,
        block: Any,
        step: Callable[[Any, Any], tuple[Any, Any]],
        carry: Any,
        reduce: Callable[[Any], Any],
        zero: Any,
        add: Callable[[Any, Any], Any],
    ) -> tuple[Any, Any]:
        """Call `step(block, carry) -> (carry, contribution)` for every block of the ring.

        During a step the next block is gathered, and the contributions to the previous one are reduced and sent on, so
        that communication overlaps with computation.

        Args:
          rows: rows of this device. block: gathered rows of its group.
          carry: initial value of the carry.
          reduce: reduces a group's contributions to a block, to the rows of each device of the group.
          zero: the neutral element of `add`, which combines two reduced contributions.

        Returns:
          The final carry, and the combined contributions of all devices to the rows of this device.
        """
        if self.groups == 1:
            carry, contribution = step(block, carry)
            return carry, reduce(contribution)

        def body(_: Any, state: tuple) -> tuple:
            rows, block, carry, contribution, in_flight = state
            rows = self.shift(rows)
            in_flight = self.shift(add(in_flight, reduce(contribution)))
            carry, contribution = step(block, carry)
            return rows, self.gather(rows), carry, contribution, in_flight

        carry, contribution = step(block, carry)
        rows = self.shift(rows)
        state = rows, self.gather(rows), carry, contribution, self.varying(zero)
        _, block, carry, contribution, in_flight = jax.lax.fori_loop(1, self.groups - 1, body, state)
        in_flight = self.shift(add(in_flight, reduce(contribution)))
        carry, contribution = step(block, carry)
        return carry, self.shift(add(in_flight, reduce(contribution)))


def group_size(devices: int, bytes_per_device: int) -> int:
    """Return the largest divisor of `devices` whose gathered texts fit `BLOCK_BYTES`, at least 1."""
    fitting = (n for n in range(1, devices + 1) if devices % n == 0 and n * bytes_per_device <= BLOCK_BYTES)
    return max(fitting, default=1)
