"""Plan the paper's nine configs on five kinds of TPU slices by the TPU compiler: `make plan-all` writes docs/plans.md.

Each row takes one compilation of minutes; existing rows are kept, so an interrupted run continues. The global batch is
the paper's 32,768. Where it does not fit, it is divided into micro-batches, a power of two: at first by the size of the
saved activations, then doubled until the compiler finds room. Before a micro-batch has fewer than 8 images per device,
parameters are sharded over the slice. Delete a row, or the file, to plan it again. Arguments select configs and slices:
`plans.py rn50 v5e-256`.
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
COLUMNS = (
    "config",
    "topology",
    "chips",
    "fsdp",
    "micro-batches",
    "peak GB",
    "HBM capacity GB",
    "TFLOP",
    "TFLOP / trace",
)
COLUMNS += ("HBM traffic GB", "sent GB", "bound by", "step ms", "MFU", "images/s/chip", "days", "compile s")
HEAD = """# Plans

Made by `make plan-all` (benchmarks/plans.py): the training step of every config at global batch 32,768, compiled ahead
of time for TPU slices. Figures are per chip and step. `TFLOP / trace` compares the program's FLOPs with JAX's trace.
Ranges go from full overlap of compute, HBM and interconnect to no overlap: roofline bounds by datasheets, not measured
times.

"""
# Fraction of the memory for saved activations in the first guess: replicated parameters, sharded parameters.
ACTIVATIONS, ACTIVATIONS_FSDP = 0.6, 0.75
MIN_ROWS = 8  # images per device and micro-batch; for fewer, the compiler pads small pieces and computes on the padding


def main(selected: list[str]) -> None:
    """Make the missing rows of the selected configs and slices."""
    for name in CONFIGS:
        for slice_name in SLICES:
            included = not selected or name in selected or slice_name in selected
            if selected and set(selected) & set(CONFIGS) and set(selected) & set(SLICES):
                included = name in selected and slice_name in selected
            if included and (name, slice_name) not in _read_rows():
                row = _plan_row(name, slice_name)
                _write_rows(_read_rows() | {(name, slice_name): row})
                print(" | ".join(row), flush=True)


def _plan_row(name: str, slice_name: str) -> list[str]:
    config = from_config_dict(runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]())
    topology, start = parse_topology(slice_name), time.monotonic()
    fsdp, micro_batches = 1, _first_micro_batches(config, topology, ACTIVATIONS)
    while not (plan := predict.plan_step(_with_sharding(config, fsdp, micro_batches), topology)).fits:
        micro_batches *= 2
        if fsdp == 1 and config.train.batch_size // len(topology.devices()) < MIN_ROWS * micro_batches:
            fsdp = topology.devices_per_slice
            micro_batches = _first_micro_batches(config, topology, ACTIVATIONS_FSDP)
    return [
        name,
        slice_name,
        str(topology.chips),
        str(fsdp),
        str(micro_batches),
        f"{plan.peak_bytes / 1e9:.4g}",
        f"{topology.chip.hbm_bytes / 1e9:.4g}",
        f"{plan.flops / 1e12:.4g}",
        f"{plan.flops / plan.traced_flops:.2%}",
        f"{plan.hbm_bytes_padded / 1e9:.4g}",
        f"{(plan.interconnect_bytes + plan.network_bytes) / 1e9:.3g}",
        plan.bound_by,
        "{:.0f} to {:.0f}".format(*(1e3 * t for t in plan.step_seconds)),
        "{:.2f} to {:.2f}".format(*plan.mfu),
        "{:,.0f} to {:,.0f}".format(*plan.images_per_second),
        "{:.2f} to {:.2f}".format(*plan.days),
        f"{time.monotonic() - start:.0f}",
    ]


def _first_micro_batches(config: Config, topology: Topology, fraction: float) -> int:
    mesh, micro_batches = sharding.make_mesh(topology.devices()), 1
    saved = predict.saved_bytes(config, mesh)
    while saved / micro_batches > fraction * topology.chip.hbm_bytes / topology.chip.devices:
        micro_batches *= 2
    return micro_batches


def _with_sharding(config: Config, fsdp: int, micro_batches: int) -> Config:
    mesh = dataclasses.replace(config.mesh, fsdp=fsdp)
    return dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, micro_batches=micro_batches))


def _read_rows() -> dict[tuple[str, ...], list[str]]:
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]
    return {tuple(row[:2]): row for row in cells if row[0] in CONFIGS}


def _write_rows(rows: dict[tuple[str, ...], list[str]]) -> None:
    order = [rows[name, slice_name] for name in CONFIGS for slice_name in SLICES if (name, slice_name) in rows]
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *(f"| {' | '.join(row)} |" for row in order)]
    TABLE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
