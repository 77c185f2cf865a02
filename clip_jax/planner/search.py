"""The largest batch that fits, under every remat policy and over several meshes, with the speed that it has there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from clip_jax.config import Config, resolve
from clip_jax.devices.chips import Number
from clip_jax.planner.predict import Plan
from clip_jax.planner.topology import Topology

POLICIES = ("none", "dots", "names", "full")
TRIES = 6  # compilations for one row of the table
HEADROOM = 0.98  # of the memory: what the line through two compilations is trusted with
GROWTH = 16  # times the largest batch that has fitted: small batches lie in VMEM, and tell little of larger ones
CLOSE = 1.02  # times as large a batch isn't worth a compilation


def search(config: Config, where: Topology, plan: Callable[[Config, Topology], Plan]) -> Iterator[Plan]:
    """Yield the plan with the largest batch that fits, for every policy and mesh that has one.

    Peaks grow almost linearly with the batch: a line through two compilations, of the largest batch that fits and the
    smallest that doesn't as soon as there are both, tells where to look next. All have the config's number of steps,
    whatever their batch, one micro-batch, and no `mesh.tensor`.

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
    rows: Number = max(1, config.train.batch_size // devices)
    best, fits, fails = None, {}, {}  # bytes by rows on a device
    for _ in range(TRIES):
        made = plan(_with_rows(config, rows * devices), where)
        if made.fits:
            fits[rows] = made.peak_bytes
            best = made if rows == max(fits) else best
        else:
            fails[rows] = made.needed_bytes
        rows = _round(_next(fits, fails, where.chip.hbm_bytes))
        if rows < 1 or rows in fails or rows <= CLOSE * max(fits, default=0):
            break
    return best


def _next(fits: dict[int, Number], fails: dict[int, Number], room: Number) -> Number:
    """Return how many rows to try after those that fit and those that fail."""
    low, high, known, aim = max(fits, default=0), min(fails, default=0), fits | fails, HEADROOM * room

    def a_row(a: int, b: int) -> Number:
        return (known[b] - known[a]) / (b - a)

    if len(known) == 1:
        share = aim / max(known[low or high], 1)
        return low * min(GROWTH, max(2, share)) if fits else high * min(0.5, share)
    if not fails:
        # Where room gets scarce the compiler takes pains, and more rows may take less: the steeper line is the truer.
        steeper = max(a_row(min(fits), low), a_row(sorted(fits)[-2], low))
        return min(low + (aim - known[low]) / steeper, GROWTH * low) if steeper > 0 else GROWTH * low
    slope = a_row(low or sorted(fails)[1], high)
    rows = high + (aim - known[high]) / slope if slope > 0 else 0
    return rows if 0 < rows < high else math.sqrt(max(low, 1) * high)


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
