"""Blocks of texts on their way past all devices, and what belongs to them on its way home.

Neighbours gather their blocks into one, as far as memory allows, and those go round: one gather for a small batch on a
large pod, where a ring would be hundreds of dependent hops, and a ring for a large batch, whose hops overlap with the
arithmetic on the block at hand. All of it runs inside `jax.shard_map`, or on one device, where nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

Axis = str | tuple[str, ...] | None  # mesh axes that the batch is sharded over, in any order

# Of gathered texts. 32,768 texts of 768 bfloat16 numbers, the paper's batch, are 48 MiB: one gather, no ring.
BLOCK_BYTES = 64 * 2**20


def in_mesh_order(axis: Axis) -> Axis:
    """Return the axes in the order of the mesh.

    A loss over all pairs gives the same for any order of its devices, but `ppermute` numbers them in the mesh's order,
    whatever it is given (jax 0.10), and the other collectives in the order that they are given.
    """
    if axis is None or isinstance(axis, str):
        return axis
    return tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name in axis)


class Ring(NamedTuple):
    """Groups of neighbours, one after another in a ring; a device's lane is its place in its group."""

    axis: Axis
    group: int  # devices that gather their texts
    hops: int  # groups, so that so many blocks come by

    @classmethod
    def of(cls, axis: Axis, texts: Any) -> Ring:
        """Return the ring for a device's texts: one array of them, or a tree of arrays that travel together."""
        devices = 1 if axis is None else jax.lax.axis_size(axis)
        group = group_size(devices, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(texts)))
        return cls(axis, group, devices // group)

    @property
    def groups(self) -> list[list[int]] | None:
        if self.hops == 1:
            return None
        return [list(range(first, first + self.group)) for first in range(0, self.group * self.hops, self.group)]

    def gather(self, tree: Any) -> Any:
        """Return the rows of the whole group, in the order of its lanes."""
        if self.group == 1:
            return tree
        return jax.lax.all_gather(tree, self.axis, axis_index_groups=self.groups, tiled=True)

    def shift(self, tree: Any) -> Any:
        """Hand a block on to the same lane of the next group."""
        devices = self.group * self.hops
        steps = [(device, (device + self.group) % devices) for device in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, steps), tree)

    def exchange(self, x: Array) -> Float[Array, "lanes b ..."]:
        """Send every lane its own rows of a block; return what all lanes have for this one."""
        lanes = x.reshape(self.group, -1, *x.shape[1:])
        if self.group == 1:
            return lanes
        return jax.lax.all_to_all(lanes, self.axis, 0, 0, axis_index_groups=self.groups)

    def varying(self, tree: Any) -> Any:
        """Mark constants as differing between devices, as the carry of a loop has to be from the start."""
        if self.axis is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.pcast(x, self.axis, to="varying"), tree)

    def walk(self, block: Any, step: Callable[[Any, Any], tuple[Any, Any]], kept: Any, added: Callable) -> Any:
        """Call `step(block, kept) -> (kept, contribution)` on every block of the ring.

        added: joins two contributions to the same block. What belongs to a block travels one hop behind it, so that
        both hops overlap with the arithmetic of a step.

        Returns:
          What is kept here, and all contributions to this group's own block.
        """
        if self.hops == 1:
            return step(block, kept)

        def hop(_: Any, carry: tuple) -> tuple:
            block, kept, travelling = carry
            following, arrived = self.shift((block, travelling))
            kept, contribution = step(block, kept)
            return following, kept, added(arrived, contribution)

        kept, contribution = step(block, kept)
        carry = self.shift(block), kept, contribution
        _, kept, travelling = jax.lax.fori_loop(1, self.hops, hop, carry)
        return kept, self.shift(travelling)


def group_size(devices: int, bytes_per_device: int) -> int:
    """Return how many neighbours gather their texts: the most that divide the devices and fit `BLOCK_BYTES`."""
    fitting = (n for n in range(1, devices + 1) if devices % n == 0 and n * bytes_per_device <= BLOCK_BYTES)
    return max(fitting, default=1)
