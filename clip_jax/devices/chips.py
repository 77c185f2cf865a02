"""Accelerators by their datasheets: what one chip computes, moves and holds.

Sources: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x} as of 2026; NVIDIA's datasheets of A100, H100,
H200, B200 and L4, dense bfloat16. HBM of TPUs is what the compiler lets a program have, by its own error. Links count
one direction, half of the "bidirectional" figure where only that is given.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30
Number = int | float


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip as clouds sell it.

    flops_per_second: dense bfloat16. hbm_bytes: for one program. hbm_bytes_per_second. link_bytes_per_second: to
    neighbours, ICI or NVLink, all links together, one way. network_bytes_per_second: its share of the data centre's
    network. devices: that JAX shows for it. chips_per_host.
    """

    name: str
    flops_per_second: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    chips_per_host: int
    devices: int = 1
    kind: str = "tpu"


def _tpu(
    name: str, tera: Number, gib: Number, hbm: Number, link: Number, gigabits: Number, host: int, devices: int
) -> Chip:
    return Chip(name, tera * 1e12, int(gib * GIB), hbm * 1e9, link * 1e9, gigabits / 8 * 1e9, host, devices)


def _gpu(name: str, tera: Number, gigabytes: Number, hbm: Number, link: Number, gigabits: Number) -> Chip:
    return Chip(
        name, tera * 1e12, int(gigabytes * 1e9), hbm * 1e9, link * 1e9, gigabits / 8 * 1e9, chips_per_host=8, kind="gpu"
    )


# TFLOP/s, GiB, GB/s, GB/s, Gbit/s, chips of a host, devices of a chip.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v2", 46, 14.96, 700, 248, 25, 4, 2),
        _tpu("v3", 123, 30.96, 900, 328, 25, 4, 2),
        _tpu("v4", 275, 30.75, 1228, 300, 25, 4, 1),
        _tpu("v5e", 197, 15.75, 819, 200, 25, 8, 1),
        _tpu("v5p", 459, 95.74, 2765, 600, 50, 4, 1),
        _tpu("v6e", 918, 31.25, 1638, 400, 100, 8, 1),
        _tpu("v7x", 2307, 189.5, 7380, 600, 100, 4, 2),
        # TFLOP/s, GB, GB/s, GB/s of NVLink (PCIe for L4), Gbit/s
        _gpu("a100-40gb", 312, 40, 1555, 300, 200),
        _gpu("a100", 312, 80, 2039, 300, 200),
        _gpu("h100", 989, 80, 3350, 450, 400),
        _gpu("h200", 989, 141, 4800, 450, 400),
        _gpu("b200", 2250, 180, 8000, 900, 400),
        _gpu("l4", 121, 24, 300, 32, 100),
    )
}

# What JAX calls them: `device.device_kind`.
KINDS = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "v7x",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls so; None where its figures aren't known."""
    return CHIPS.get(KINDS.get(device_kind, ""))
