"""The paper's nine configs on a slice of every kind, by the TPU's compiler: `make plan-all` writes docs/plans.md.

Each row is one compilation of minutes; rows that stand in the file are kept, so that a killed run goes on. The batch
stays the paper's 32,768: where a chip can't hold its part, it is embedded in micro-batches, a power of two of them: as
many as saved activations ask for, and more where the compiler finds no room; parameters are cut over the slice before a
device has too few pictures at once. Delete a row, or the file, to have it made again. Arguments choose configs and
slices: `plans.py rn50 v5e-256`.
"""

import dataclasses
import pathlib
import runpy
import sys
import time

from clip_jax.planner.topology import Topology, parse_topology, prepare_compiler

prepare_compiler()

from clip_jax.config import Config, from_config_dict  # noqa: E402
from clip_jax.devices import sharding  # noqa: E402
from clip_jax.planner import predict  # noqa: E402

CONFIGS = ("vit_b32", "vit_b16", "vit_l14", "vit_l14_336", "rn50", "rn101", "rn50x4", "rn50x16", "rn50x64")
SLICES = ("v4-512", "v5e-256", "v6e-256", "v5p-512", "v7x-128")
ROOT = pathlib.Path(__file__).parents[1]
TABLE = ROOT / "docs/plans.md"
COLUMNS = ("config", "slice", "chips", "fsdp", "micro-batches", "peak GB", "of GB", "TFLOP", "of trace")
COLUMNS += ("HBM GB", "sent GB", "bound by", "step ms", "MFU", "pairs/s/chip", "days", "compiled in s")
HEAD = """# Plans

Made by `make plan-all` (benchmarks/plans.py): the step of every config, batch 32,768, compiled for slices that nobody
booked. Figures are a chip's. Beside the program's flops stands how they compare with those of JAX's trace. Ranges go
from everything at once to one thing after another: bounds by datasheets, not times.

"""
ROOM, ROOM_CUT = 0.6, 0.75  # of the memory, for saved activations, where the first number of micro-batches is guessed
FEW = 8  # pictures on a device: of fewer, the compiler lays padded pieces side by side, and multiplies the padding too


def main(wanted: list[str]) -> None:
    """Make the rows that are missing, one after another; of other configs in another process if you like."""
    for name in CONFIGS:
        for sold in SLICES:
            chosen = not wanted or name in wanted or sold in wanted
            if wanted and set(wanted) & set(CONFIGS) and set(wanted) & set(SLICES):
                chosen = name in wanted and sold in wanted
            if chosen and (name, sold) not in _rows():
                row = _row(name, sold)
                _write(_rows() | {(name, sold): row})
                print(" | ".join(row), flush=True)


def _row(name: str, sold: str) -> list[str]:
    config = from_config_dict(runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]())
    where, began = parse_topology(sold), time.monotonic()
    fsdp, parts = 1, _first_guess(config, where, ROOM)
    while not (plan := predict.plan_step(_cut(config, fsdp, parts), where)).fits:
        parts *= 2
        if fsdp == 1 and config.train.batch_size // len(where.devices()) < FEW * parts:
            fsdp, parts = where.devices_per_slice, _first_guess(config, where, ROOM_CUT)
    ranges = (
        "{:.0f} to {:.0f}".format(*(1e3 * t for t in plan.step_seconds)),
        "{:.2f} to {:.2f}".format(*plan.mfu),
        "{:,.0f} to {:,.0f}".format(*plan.images_per_second),
        "{:.2f} to {:.2f}".format(*plan.days),
    )
    return [
        name,
        sold,
        str(where.chips),
        str(fsdp),
        str(parts),
        f"{plan.peak_bytes / 1e9:.4g}",
        f"{where.chip.hbm_bytes / 1e9:.4g}",
        f"{plan.flops / 1e12:.4g}",
        f"{plan.flops / plan.traced_flops:.2%}",
        f"{plan.hbm_bytes_padded / 1e9:.4g}",
        f"{(plan.link_bytes + plan.network_bytes) / 1e9:.3g}",
        plan.bound_by,
        *ranges,
        f"{time.monotonic() - began:.0f}",
    ]


def _first_guess(config: Config, where: Topology, room: float) -> int:
    mesh, parts = sharding.make_mesh(where.devices()), 1
    saved = predict.saved_bytes(config, mesh)
    while saved / parts > room * where.chip.hbm_bytes / where.chip.devices:
        parts *= 2
    return parts


def _cut(config: Config, fsdp: int, parts: int) -> Config:
    mesh = dataclasses.replace(config.mesh, fsdp=fsdp)
    return dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, micro_batches=parts))


def _rows() -> dict[tuple[str, ...], list[str]]:
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]
    return {tuple(row[:2]): row for row in cells if row[0] in CONFIGS}


def _write(rows: dict[tuple[str, ...], list[str]]) -> None:
    order = [rows[name, sold] for name in CONFIGS for sold in SLICES if (name, sold) in rows]
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *(f"| {' | '.join(row)} |" for row in order)]
    TABLE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
