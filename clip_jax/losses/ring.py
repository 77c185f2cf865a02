"""Texts on their way past all devices, and what belongs to them on its way home.

Neighbours gather their texts into one block, as far as memory allows, and what goes round is every device's own: one
gather for a small batch on a large pod, where a ring would be hundreds of dependent hops, and a ring for a large batch,
whose messages overlap with the arithmetic on the block at hand. A block is gathered, and what belongs to it summed,
within a slice: over the data centre's network go a device's own texts, and sums. All of it runs inside
`jax.shard_map`, or on one device, where nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from clip_jax.typing import SLICE

Axis = str | tuple[str, ...] | None  # mesh axes that the batch is sharded over, in any order

# Of gathered texts. 32,768 texts of 512 float32 numbers, ViT-B at the paper's batch: one gather, no ring.
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
    group: int  # devices that gather their texts, all of one slice
    hops: int  # groups, so that so many blocks come by

    @classmethod
    def of(cls, axis: Axis, texts: Any) -> Ring:
        """Return the ring for a device's texts: one array of them, or a tree of arrays that travel together."""
        if axis is None:
            return cls(axis, 1, 1)
        devices = jax.lax.axis_size(axis)
        slices = jax.lax.axis_size(SLICE) if SLICE in axis else 1
        group = group_size(devices // slices, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(texts)))
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
        """Hand rows on to the same lane of the next group."""
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

    def walk(
        self,
        own: Any,
        block: Any,
        step: Callable[[Any, Any], tuple[Any, Any]],
        kept: Any,
        reduce: Callable[[Any], Any],
        nothing: Any,
        add: Callable[[Any, Any], Any],
    ) -> tuple[Any, Any]:
        """Call `step(block, kept) -> (kept, contribution)` on every block of the ring.

        During a step the next block is gathered, and what belongs to the one before is summed and handed on, so that
        all that is sent overlaps with arithmetic.

        Args:
          own: this device's rows. block: those of its group, gathered.
          reduce: sums a group's contributions to a block, for the own rows of every lane.
          nothing: of such a sum, the one that adds nothing. add: two of them.

        Returns:
          What is kept here, and the sum of all devices' contributions to this device's own rows.
        """
        if self.hops == 1:
            kept, contribution = step(block, kept)
            return kept, reduce(contribution)

        def hop(_: Any, carry: tuple) -> tuple:
            own, block, kept, contribution, travelling = carry
            own = self.shift(own)
            travelling = self.shift(add(travelling, reduce(contribution)))
            kept, contribution = step(block, kept)
            return own, self.gather(own), kept, contribution, travelling

        kept, contribution = step(block, kept)
        own = self.shift(own)
        carry = own, self.gather(own), kept, contribution, self.varying(nothing)
        _, block, kept, contribution, travelling = jax.lax.fori_loop(1, self.hops - 1, hop, carry)
        travelling = self.shift(add(travelling, reduce(contribution)))
        kept, contribution = step(block, kept)
        return kept, self.shift(add(travelling, reduce(contribution)))


def group_size(devices: int, bytes_per_device: int) -> int:
    """Return how many neighbours gather their texts: the most that divide the devices and fit `BLOCK_BYTES`."""
    fitting = (n for n in range(1, devices + 1) if devices % n == 0 and n * bytes_per_device <= BLOCK_BYTES)
    return max(fitting, default=1)
