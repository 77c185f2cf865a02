"""Datasheet figures of accelerators: FLOP/s, memory, bandwidth.

Sources: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x} as of 2026; NVIDIA's datasheets of A100, H100,
H200, B200 (SXM) and L4, without sparsity. HBM of TPUs is the amount that the compiler allots to a program, from its
error message. Links count one direction, half of the "bidirectional" figure where only that is published.
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
    float32_flops_per_second: float  # TPUs: six bfloat16 passes; GPUs: without tensor cores and TF32
    hbm_bytes: int  # available to one program
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # ICI or NVLink, sum of all links, one direction
    network_bytes_per_second: float  # share of the data center network
    chips_per_host: int
    devices: int = 1  # JAX devices per chip
    kind: str = "tpu"


def _chip(
    name: str,
    tera: Number,
    memory: Number,
    hbm: Number,
    link: Number,
    gigabits: Number,
    host: int = 8,
    devices: int = 0,
) -> Chip:
    """Return a TPU, with the number of its JAX devices and its memory in GiB, or a GPU, with its memory in GB."""
    kind, unit = ("tpu", GIB) if devices else ("gpu", 10**9)
    float32 = _GPU_FLOAT32.get(name, tera / 6)
    rates = tera * 1e12, float32 * 1e12, int(memory * unit), hbm * 1e9, link * 1e9, gigabits / 8 * 1e9
    return Chip(name, *rates, host, devices or 1, kind)


# JAX's `device.device_kind`, name, TFLOP/s, GiB (GPUs: GB), GB/s of HBM, GB/s of links, Gbit/s of network, chips per
# host (GPUs: 8), devices per chip (GPUs: 1)
_TABLE = (
    ("TPU v2", "v2", 46, 14.96, 700, 248, 25, 4, 2),
    ("TPU v3", "v3", 123, 30.96, 900, 328, 25, 4, 2),
    ("TPU v4", "v4", 275, 30.75, 1228, 300, 25, 4, 1),
    ("TPU v5 lite", "v5e", 197, 15.75, 819, 200, 25, 8, 1),
    ("TPU v5p", "v5p", 459, 95.74, 2765, 600, 50, 4, 1),
    ("TPU v6 lite", "v6e", 918, 31.25, 1638, 400, 100, 8, 1),
    ("TPU7x", "v7x", 2307, 189.5, 7380, 600, 100, 4, 2),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312, 40, 1555, 300, 200),
    ("NVIDIA A100-SXM4-80GB", "a100", 312, 80, 2039, 300, 200),
    ("NVIDIA H100 80GB HBM3", "h100", 989, 80, 3350, 450, 400),
    ("NVIDIA H200", "h200", 989, 141, 4800, 450, 400),
    ("NVIDIA B200", "b200", 2250, 180, 8000, 900, 400),
    ("NVIDIA L4", "l4", 121, 24, 300, 32, 100),  # links: PCIe
)
_GPU_FLOAT32 = {"a100-40gb": 19.5, "a100": 19.5, "h100": 67, "h200": 67, "b200": 75, "l4": 30.3}  # TFLOP/s
CHIPS: dict[str, Chip] = {row[1]: _chip(*row[1:]) for row in _TABLE}
KINDS = {row[0]: row[1] for row in _TABLE} | {"TPU v5": "v5p"}  # names by `device.device_kind`


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with this `device.device_kind`, or None if its figures are unknown."""
    return CHIPS.get(KINDS.get(device_kind, ""))
