"""Search for the largest global batch that fits, for each remat policy and several fsdp sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from clip_jax.config import Config, resolve
from clip_jax.planner.predict import Plan
from clip_jax.planner.topology import Topology
from clip_jax.typing import Number

POLICIES = ("none", "dots", "names", "full")
MAX_COMPILATIONS = 6  # for one row of the table
HEADROOM = 0.98  # fraction of HBM that the linear extrapolation aims at
MAX_GROWTH = 16  # times the largest batch that fits: small batches stay in VMEM and predict little about larger ones
MIN_GROWTH = 1.02  # a smaller gain is not worth a compilation


def search(config: Config, topology: Topology, plan: Callable[[Config, Topology], Plan]) -> Iterator[Plan]:
    """Yield the plan with the largest batch that fits, for every policy and mesh with such a batch.

    Peak memory grows almost linearly with the batch. The next batch size comes from a line through two compilations:
    the largest that fits and the smallest that does not, as soon as both exist. All plans use the config's number of
    steps, one micro-batch, and `mesh.tensor=1`.

    Args:
      plan: the function that compiles, e.g. `predict.plan_step`.

    Raises:
      ValueError: if the config's length in steps is unknown.
    """
    devices = topology.chips * topology.chip.devices
    length = {"total_steps": resolve(config, devices=devices).total_steps, "total_epochs": 0.0, "total_examples": 0}
    slice_devices = devices // topology.slices
    for fsdp in dict.fromkeys((1, min(16, slice_devices), slice_devices)):
        for policy in POLICIES:
            candidate = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, remat=policy, micro_batches=1, **length),
                mesh=dataclasses.replace(config.mesh, fsdp=fsdp, tensor=1),
            )
            best = _largest_plan(candidate, topology, devices, plan)
            if best is not None:
                yield best


def _largest_plan(
    config: Config, topology: Topology, devices: int, plan: Callable[[Config, Topology], Plan]
) -> Plan | None:
    rows: Number = max(1, config.train.batch_size // devices)
    best, fits, fails = None, {}, {}  # bytes by rows per device
    for _ in range(MAX_COMPILATIONS):
        result = plan(_with_batch_size(config, rows * devices), topology)
        if result.fits:
            fits[rows] = result.peak_bytes
            best = result if rows == max(fits) else best
        else:
            fails[rows] = result.needed_bytes
        rows = _round_rows(_next_rows(fits, fails, topology.chip.hbm_bytes))
        if rows < 1 or rows in fails or rows <= MIN_GROWTH * max(fits, default=0):
            break
    return best


def _next_rows(fits: dict[int, Number], fails: dict[int, Number], capacity: Number) -> Number:
    """Return the rows per device to compile next."""
    low, high, peaks, target = max(fits, default=0), min(fails, default=0), fits | fails, HEADROOM * capacity

    def bytes_per_row(a: int, b: int) -> Number:
        return (peaks[b] - peaks[a]) / (b - a)

    if len(peaks) == 1:
        ratio = target / max(peaks[low or high], 1)
        return low * min(MAX_GROWTH, max(2, ratio)) if fits else high * min(0.5, ratio)
    if not fails:
        # Near the limit the compiler saves memory, and more rows may take less: use the steeper of two lines.
        steeper = max(bytes_per_row(min(fits), low), bytes_per_row(sorted(fits)[-2], low))
        return min(low + (target - peaks[low]) / steeper, MAX_GROWTH * low) if steeper > 0 else MAX_GROWTH * low
    gradient = bytes_per_row(low or sorted(fails)[1], high)
    rows = high + (target - peaks[high]) / gradient if gradient > 0 else 0
    return rows if 0 < rows < high else math.sqrt(max(low, 1) * high)


def _round_rows(rows: Number) -> int:
    """Round down to whole tiles of 8 rows."""
    return int(rows) // 8 * 8 if rows >= 8 else int(rows)


def _with_batch_size(config: Config, batch_size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))


def table(plans: Sequence[Plan]) -> str:
    """Return the plans as a text table; a star marks the Pareto front of batch size and speed."""
    lines = ["    remat  fsdp      batch  per chip     peak  images/s/chip, overlap .. none     MFU  bound by"]
    for plan in plans:
        fast, slow = plan.images_per_second
        dominated = any(
            other.global_batch >= plan.global_batch
            and other.images_per_second[0] >= fast
            and (other.global_batch, other.images_per_second[0]) != (plan.global_batch, fast)
            for other in plans
        )
        lines.append(
            f"{' ' if dominated else '*'} {plan.config.train.remat:>7} {plan.config.mesh.fsdp:>5}"
            f" {plan.global_batch:>10,} {plan.global_batch // plan.topology.chips:>9,} {plan.peak_bytes / 1e9:>5.1f} GB"
            f" {fast:>19,.0f} .. {slow:<9,.0f} {plan.mfu[0]:>6.2f}  {plan.bound_by}"
        )
    return "\n".join(lines)
