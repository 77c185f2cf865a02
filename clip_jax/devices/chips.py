"""Datasheet figures of accelerators: FLOP/s, memory, bandwidth.

Sources: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x} as of 2026; NVIDIA's datasheets of A100, H100,
H200, B200 and L4, dense bfloat16. HBM of TPUs is the amount that the compiler allots to a program, from its error
message. Links count one direction, half of the "bidirectional" figure where only that is published.
"""

from __future__ import annotations

import dataclasses

from clip_jax.typing import Number

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip."""

    name: str
    flops_per_second: float  # dense bfloat16
    hbm_bytes: int  # available to one program
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # ICI or NVLink, sum of all links, one direction
    network_bytes_per_second: float  # share of the data center network
    chips_per_host: int
    devices: int = 1  # JAX devices per chip
    kind: str = "tpu"


def _tpu(
    name: str, tera: Number, gib: Number, hbm: Number, link: Number, gigabits: Number, host: int, devices: int
) -> Chip:
    return Chip(name, tera * 1e12, int(gib * GIB), hbm * 1e9, link * 1e9, gigabits / 8 * 1e9, host, devices)


def _gpu(name: str, tera: Number, gigabytes: Number, hbm: Number, link: Number, gigabits: Number) -> Chip:
    return Chip(
        name, tera * 1e12, int(gigabytes * 1e9), hbm * 1e9, link * 1e9, gigabits / 8 * 1e9, chips_per_host=8, kind="gpu"
    )


# TFLOP/s, GiB, GB/s of HBM, GB/s of links, Gbit/s of network, chips per host, devices per chip
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
        # TFLOP/s, GB, GB/s of HBM, GB/s of NVLink (PCIe for L4), Gbit/s of network
        _gpu("a100-40gb", 312, 40, 1555, 300, 200),
        _gpu("a100", 312, 80, 2039, 300, 200),
        _gpu("h100", 989, 80, 3350, 450, 400),
        _gpu("h200", 989, 141, 4800, 450, 400),
        _gpu("b200", 2250, 180, 8000, 900, 400),
        _gpu("l4", 121, 24, 300, 32, 100),
    )
}

# Names by JAX's `device.device_kind`.
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
    """Return the chip with this `device.device_kind`, or None if its figures are unknown.

    Example:
      >>> chip_of("TPU v4").name
      'v4'
    """
    return CHIPS.get(KINDS.get(device_kind, ""))
