"""Slices by the names under which clouds sell them, as devices that the TPU's compiler compiles for, without a TPU.

`v4-512` counts cores, 256 chips; so do v2, v3 and v5p. `v5e-256`, `v6e-256` and `v7x-128` count chips; `h100-64` GPUs.
`v4:4x4x8` is a shape. Source: docs.cloud.google.com/tpu/docs, "configurations" of every generation.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from clip_jax.chips import CHIPS, Chip

CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2}  # a chip's, in names that count them
FLAT = {"v2", "v3", "v5e", "v6e"}  # a torus of two dimensions
ALIASES = {"v5litepod": "v5e", "tpu7x": "v7x", "v7": "v7x", "a100-80gb": "a100"}
COMPILER_NAMES = {"v7x": "tpu7x"}  # where libtpu's differs
LARGEST = {"v2": 256, "v3": 1024, "v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "v7x": 9216}  # chips
SHAPES = {  # chips by shape, where the nearest to a cube isn't the one that is sold
    4: (2, 2, 1),
    3072: (12, 16, 16),
    6144: (16, 16, 24),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some slices of one kind of chip.

    shape: chips of a slice in every direction of the torus; empty for GPUs.
    """

    name: str
    chip: Chip
    chips_per_slice: int
    slices: int
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Return how many chips there are."""
        return self.chips_per_slice * self.slices

    @property
    def devices_per_slice(self) -> int:
        """Return how many devices JAX shows of a slice."""
        return self.chips_per_slice * self.chip.devices

    def devices(self) -> list[Any]:
        """Return the devices, in the order of their hosts.

        Raises:
          ValueError: for GPUs, which have no compiler here.
          ModuleNotFoundError: without libtpu.
        """
        if self.chip.kind != "tpu":
            raise ValueError(f"{self.name}: only TPUs can be compiled for without the device")
        prepare_compiler()
        from jax.experimental import topologies  # it looks for libtpu when imported

        options: dict[str, Any] = {}
        name = COMPILER_NAMES.get(self.chip.name, self.chip.name)
        if self.chip.name in ("v4", "v5p"):  # one device a chip, as JAX shows them
            options = {"chip_config_name": "megacore"}
        if self.slices > 1:
            options["num_slices"] = self.slices
        bounds = {4: (2, 2, 1), 8: (2, 4, 1)}[self.chip.chips_per_host]
        shape = (*self.shape, 1, 1)[:3]
        options["chips_per_host_bounds"] = tuple(min(a, b) for a, b in zip(bounds, shape, strict=True))
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(map(str, self.shape))}", **options
        )
        return list(described.devices)


def prepare_compiler() -> None:
    """Set what the TPU's compiler needs on a machine without one; before JAX looks for devices.

    Raises:
      ModuleNotFoundError: without libtpu.
    """
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask which TPU this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several at once
    }
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")  # any: without one it warns, and doesn't use it
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "the TPU's compiler isn't installed, and it compiles for a slice without any TPU: pip install 'jax[tpu]'"
        )


def topology(name: str, slices: int = 1) -> Topology:
    """Return the slices of a name such as v4-512, v5e-256, v4:4x4x8 or h100-64.

    Raises:
      ValueError: if there is no such chip or slice.
    """
    found = re.fullmatch(r"([a-z0-9\-]+?)(?:-(\d+)|:(\d+(?:x\d+)*))", name.lower())
    if not found:
        raise ValueError(f"topology {name!r}: expected a chip and a size, such as v5e-256, v4-512, v4:4x8x8 or h100-64")
    kind = ALIASES.get(found[1], found[1])
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"topology {name!r}: no chip {found[1]!r}{meant} There are {', '.join(CHIPS)}")
    if slices < 1:
        raise ValueError(f"slices={slices}: expected 1 or more")
    chip = CHIPS[kind]
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
        if chip.kind != "tpu":
            raise ValueError(f"topology {name!r}: GPUs have no shape; say {kind}-{math.prod(shape)}")
        return Topology(name, chip, math.prod(shape), slices, shape)
    count, per_chip = int(found[2]), CORES.get(kind, 1)
    chips = count // per_chip
    if count < 1 or count % per_chip:
        raise ValueError(
            f"topology {name!r}: {kind} counts cores, {per_chip} a chip; say {kind}-{max(1, chips) * per_chip}"
        )
    if chip.kind != "tpu":
        return Topology(name, chip, chips, slices, ())
    return Topology(name, chip, chips, slices, _shape(name, kind, chips))


def _shape(name: str, kind: str, chips: int) -> tuple[int, ...]:
    """Return the shape that is sold for a number of chips."""
    per_chip = CORES.get(kind, 1)
    if chips > LARGEST[kind]:
        raise ValueError(
            f"topology {name!r}: the largest slice of {kind} is {kind}-{LARGEST[kind] * per_chip}; several: --slices=2"
        )
    if kind in FLAT:
        side = 2 ** int(math.log2(chips) // 2)
        shape: tuple[int, ...] = (side, chips // side)
    elif chips in SHAPES:
        shape = SHAPES[chips]
    else:
        exponent = int(math.log2(chips))
        shape = tuple(2 ** ((exponent + i) // 3) for i in range(3))
    if math.prod(shape) != chips or (kind not in FLAT and chips < 4):
        below = max(4 if kind not in FLAT else 1, 2 ** int(math.log2(chips)))
        raise ValueError(
            f"topology {name!r}: no slice of {chips} chips is sold; use {kind}-{below * per_chip}, or a shape"
        )
    return shape
