"""TPU slices and GPUs by their cloud names, as devices that the TPU compiler targets on a machine without TPUs.

`v4-512` counts cores (256 chips); so do v2, v3 and v5p. `v5e-256`, `v6e-256` and `v7x-128` count chips; `h100-64`
counts GPUs. `v4:4x4x8` is a shape. Source: docs.cloud.google.com/tpu/docs, "configurations" of every generation.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from clip_jax.config import did_you_mean
from clip_jax.devices.chips import CHIPS, Chip

CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2}  # cores per chip, for chips whose slice names count cores
FLAT = {"v2", "v3", "v5e", "v6e"}  # chips in a 2D torus; the others form a 3D torus
ALIASES = {"v5litepod": "v5e", "tpu7x": "v7x", "v7": "v7x", "a100-80gb": "a100"}
COMPILER_NAMES = {"v7x": "tpu7x"}  # where libtpu uses another name
LARGEST = {"v2": 256, "v3": 1024, "v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "v7x": 9216}  # chips
SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}  # 3D shapes; larger ones consist of 4x4x4 cubes


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of one kind of chip."""

    name: str
    chip: Chip
    chips_per_slice: int
    slices: int
    shape: tuple[int, ...]  # chips of a slice along each torus axis; empty for GPUs

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return self.chips_per_slice * self.slices

    @property
    def devices_per_slice(self) -> int:
        """Number of JAX devices of one slice."""
        return self.chips_per_slice * self.chip.devices

    def devices(self) -> list[Any]:
        """Return the compile-only devices, ordered by host.

        Raises:
          ValueError: for GPUs, which have no compiler without the device.
          ModuleNotFoundError: without libtpu.
        """
        if self.chip.kind != "tpu":
            raise ValueError(f"{self.name}: only TPUs can be compiled for without the device")
        prepare_compiler()
        import jax
        from jax.experimental import topologies  # the import looks for libtpu

        options: dict[str, Any] = {}
        name = COMPILER_NAMES.get(self.chip.name, self.chip.name)
        if self.chip.name in ("v4", "v5p"):  # one device per chip, as JAX shows them
            options = {"chip_config_name": "megacore"}
        if self.slices > 1:
            options["num_slices"] = self.slices
        bounds = {4: (2, 2, 1), 8: (2, 4, 1)}[self.chip.chips_per_host]
        shape = (*self.shape, 1, 1)[:3]
        options["chips_per_host_bounds"] = tuple(min(a, b) for a, b in zip(bounds, shape, strict=True))
        compiler_name = f"{name}:{'x'.join(map(str, self.shape))}"
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=compiler_name, **options).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"topology {self.name!r}: libtpu refuses {compiler_name}: {error}") from error


def prepare_compiler() -> None:
    """Set the environment variables of libtpu, if it is installed, before JAX looks for devices."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes at once
    }
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")  # unused, but libtpu warns without it
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "libtpu is not installed; it contains the TPU compiler, which needs no TPU: pip install 'jax[tpu]'"
        )


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Return the topology of a cloud name such as v4-512, v5e-256, v4:4x4x8 or h100-64.

    Args:
      slices: number of TPU slices of this size, joined by the data center network.

    Raises:
      ValueError: for an unknown chip, or a size that is not sold.

    >>> topology = parse_topology("v4-512")  # 512 cores
    >>> topology.chips, topology.shape
    (256, (4, 8, 8))
    """
    found = re.fullmatch(r"([a-z0-9\-]+?)(?:-(\d+)|:(\d+(?:x\d+)*))", name.lower())
    if not found:
        raise ValueError(f"topology {name!r}: expected a chip and a size, such as v5e-256, v4-512, v4:4x8x8 or h100-64")
    kind = ALIASES.get(found[1], found[1])
    if kind not in CHIPS:
        suggestion = did_you_mean(kind, CHIPS)
        raise ValueError(f"topology {name!r}: {found[1]!r} is none of {', '.join(CHIPS)}{suggestion}")
    if slices < 1:
        raise ValueError(f"slices={slices}: expected 1 or more")
    chip = CHIPS[kind]
    if chip.kind != "tpu" and slices > 1:
        raise ValueError(f"slices={slices}: GPUs have no slices; give their total number, as in {kind}-16")
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
        if chip.kind != "tpu":
            raise ValueError(f"topology {name!r}: GPUs have no shape; use {kind}-{max(1, math.prod(shape))}")
        _check_shape(name, kind, shape)
        return Topology(name, chip, math.prod(shape), slices, shape)
    count, per_chip = int(found[2]), CORES.get(kind, 1)
    chips = count // per_chip
    if count < 1:
        raise ValueError(f"topology {name!r}: expected 1 chip or more, as in {kind}-8")
    if count % per_chip:
        raise ValueError(
            f"topology {name!r}: {kind} counts cores, {per_chip} per chip; use {kind}-{max(1, chips) * per_chip}"
        )
    if chip.kind != "tpu":
        return Topology(name, chip, chips, slices, ())
    return Topology(name, chip, chips, slices, _default_shape(name, kind, chips))


def _check_shape(name: str, kind: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a shape that would abort the process inside the compiler."""
    axes = 2 if kind in FLAT else 3
    good = all(side in (1, 2) or side % 4 == 0 for side in shape) and 0 < math.prod(shape) <= LARGEST[kind]
    if len(shape) != axes or not good:
        example = "4x8" if kind in FLAT else "4x4x8"
        raise ValueError(
            f"topology {name!r}: a slice of {kind} has {axes} sides of 1, 2 or a multiple of 4,"
            f" and at most {LARGEST[kind]} chips; e.g. {kind}:{example}"
        )


def _default_shape(name: str, kind: str, chips: int) -> tuple[int, ...]:
    """Return the shape that clouds sell for a number of chips."""
    per_chip = CORES.get(kind, 1)
    if chips > LARGEST[kind]:
        largest = f"{kind}-{LARGEST[kind] * per_chip}"
        raise ValueError(f"topology {name!r}: the largest slice of {kind} is {largest}; for several use --slices=2")
    power = 2 ** int(math.log2(chips))
    if kind in FLAT:
        side = 2 ** int(math.log2(chips) // 2)
        if chips == power:
            return side, chips // side
    elif chips in SMALL:
        return SMALL[chips]
    elif chips % 64 == 0:
        cubes = chips // 64
        factors = ((a, b, cubes // a // b) for a in range(1, cubes + 1) for b in range(a, cubes + 1) if a * b <= cubes)
        sides = min((f for f in factors if math.prod(f) == cubes), key=lambda f: max(f) - min(f))
        return tuple(4 * side for side in sorted(sides))
    below = power if kind in FLAT else max(4, chips // 64 * 64 or power)
    raise ValueError(f"topology {name!r}: no slice of {chips} chips is sold; use {kind}-{below * per_chip}, or a shape")
