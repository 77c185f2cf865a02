"""The largest batch that fits, under every remat policy and over several meshes, with the speed that it has there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from clip_jax.chips import Number
from clip_jax.config import Config, resolve
from clip_jax.planner.predict import Plan
from clip_jax.planner.topology import Topology

POLICIES = ("none", "dots", "names", "full")
TRIES = 5  # compilations for one row of the table
HEADROOM = 0.98  # of the memory: what the line through two compilations is trusted with


def search(config: Config, where: Topology, plan: Callable[[Config, Topology], Plan]) -> Iterator[Plan]:
    """Yield the plan with the largest batch that fits, for every policy and mesh that has one.

    Peaks grow almost linearly with the batch, so two compilations tell where to look, and the next ones see whether it
    fits there. All have the config's number of steps, whatever their batch, one micro-batch, and no `mesh.tensor`.

    Raises:
      ValueError: if the config's length in steps isn't known.
    """
    devices = where.chips * where.chip.devices
    length = {"total_steps": resolve(config, devices=devices).total_steps, "total_epochs": 0.0, "total_examples": 0}
    whole = devices // where.slices
    for fsdp in dict.fromkeys((1, min(16, whole), whole)):
        for policy in POLICIES:
            changed = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, remat=policy, micro_batches=1, **length),
                mesh=dataclasses.replace(config.mesh, fsdp=fsdp, tensor=1),
            )
            best = _largest(changed, where, devices, plan)
            if best is not None:
                yield best


def _largest(config: Config, where: Topology, devices: int, plan: Callable[[Config, Topology], Plan]) -> Plan | None:
    rows = max(1, config.train.batch_size // devices)
    needed: dict[int, Number] = {}  # bytes by rows on a device
    best, smallest_failure = None, 0
    for _ in range(TRIES):
        made = plan(_with_rows(config, rows * devices), where)
        needed[rows] = made.peak_bytes if made.fits else made.needed_bytes
        if made.fits and (best is None or made.global_batch > best.global_batch):
            best = made
        if not made.fits and (not smallest_failure or rows < smallest_failure):
            smallest_failure = rows
        rows = _next(needed, rows, made.fits, where.chip.hbm_bytes)
        if smallest_failure and rows >= smallest_failure:
            rows = _round(smallest_failure * 0.9)
        if rows < 1 or rows in needed:
            break
    return best


def _next(needed: dict[int, Number], rows: int, fits: bool, room: Number) -> int:
    """Return how many rows to try after these."""
    if len(needed) == 1:
        return _round(rows * 2 if fits else rows / 2)
    (a, a_bytes), (b, b_bytes) = sorted(needed.items(), key=lambda item: abs(item[1] - room))[:2]
    a_row = (b_bytes - a_bytes) / (b - a)
    if a_row <= 0:
        return _round(rows * 2 if fits else rows / 2)
    return _round(a + (HEADROOM * room - a_bytes) / a_row)


def _round(rows: Number) -> int:
    """Return a number of rows that makes whole tiles."""
    return int(rows) // 8 * 8 if rows >= 8 else int(rows)


def _with_rows(config: Config, batch: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))


def table(plans: Sequence[Plan]) -> str:
    """Return the rows as text; a star marks what no other beats in both batch and speed."""
    lines = ["    remat  fsdp      batch  a chip     peak  pairs/s/chip, at once .. in turn      MFU  bound by"]
    for made in plans:
        fast, slow = made.images_per_second
        beaten = any(
            other.global_batch >= made.global_batch
            and other.images_per_second[0] >= fast
            and (other.global_batch, other.images_per_second[0]) != (made.global_batch, fast)
            for other in plans
        )
        lines.append(
            f"{' ' if beaten else '*'} {made.config.train.remat:>7} {made.config.mesh.fsdp:>5} {made.global_batch:>10,}"
            f" {made.global_batch // made.topology.chips:>7,} {made.peak_bytes / 1e9:>5.1f} GB"
            f" {fast:>19,.0f} .. {slow:<9,.0f} {made.mfu[0]:>8.2f}  {made.bound_by}"
        )
    return "\n".join(lines)
