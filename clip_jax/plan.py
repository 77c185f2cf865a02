"""Plan a training run without its TPUs: whether it fits, its cost, and bounds of its speed.

    clip-jax plan --config=configs/vit_l14.py --topology=v4-512
    clip-jax plan --config=configs/vit_l14.py --topology=v4-512 --config.mesh.fsdp=256
    clip-jax plan --loss_only --global_batch=131072 --embed_dim=768 --dtype=bfloat16 --topology=v5e-256 --slices=2

The step of `clip-jax train` is compiled for that topology on any Linux machine with libtpu
(`pip install 'jax[tpu]'`), which takes minutes. Exit codes: 0, it fits; 3, it does not fit; 2, invalid flags or config,
with one line on stderr; 1, another error, with its traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from clip_jax import command
from clip_jax import config as configs

if TYPE_CHECKING:
    from clip_jax.planner.predict import Plan
    from clip_jax.planner.topology import Topology

DOES_NOT_FIT = 3
HEARTBEAT_SECONDS = 20

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run, e.g. configs/vit_l14.py.", lock_config=True)
_OPTIONS = (
    flags.DEFINE_string("topology", None, "Cloud name: v5e-256, v4-512 (cores), v4:4x8x8, h100-64 …"),
    flags.DEFINE_integer("slices", 1, "TPU slices of this size, joined by the data center network.", lower_bound=1),
    flags.DEFINE_bool("search", False, "Find the largest batch that fits, by remat policy and mesh: an hour or more."),
    flags.DEFINE_bool("loss_only", False, "Plan value and gradient of the loss alone, instead of --config."),
    flags.DEFINE_string("loss", "softmax", "For --loss_only: name of the loss."),
    flags.DEFINE_integer("global_batch", 32_768, "For --loss_only: pairs.", lower_bound=1),
    flags.DEFINE_integer("embed_dim", 512, "For --loss_only: width of the embeddings.", lower_bound=1),
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "For --loss_only: dtype of the embeddings."),
    flags.DEFINE_string("dump_hlo", "", "Write the text of the compiled program to this file."),
    flags.DEFINE_bool("json", False, "Print one JSON object instead of the report."),
)
_LOSS_FLAGS = {  # and the config key with the same meaning
    "loss": "config.loss.name",
    "global_batch": "config.train.batch_size",
    "dtype": "config.train.dtype",
    "embed_dim": "",
}


def main(_: list[str]) -> int:
    """Plan by the flags, print, and return the exit code."""
    from clip_jax.planner.topology import parse_topology

    options = types.SimpleNamespace(config=_CONFIG.value, **{flag.name: flag.value for flag in _OPTIONS})
    if not options.topology:
        raise ValueError("give --topology, e.g. --topology=v5e-256, v4-512 or h100-64")
    if options.config is None and not options.loss_only:
        raise ValueError("give --config, e.g. --config=configs/vit_l14.py, or --loss_only")
    topology = parse_topology(options.topology, options.slices)
    config = None if options.loss_only else command.checked_config(options.config)
    _check_options(options, topology)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it would look for a TPU and log errors
    fits = _search(options, config, topology) if options.search else _print_plan(options, config, topology)
    return command.FINISHED if fits else DOES_NOT_FIT


def _print_plan(options: types.SimpleNamespace, config: configs.Config | None, topology: Topology) -> bool:
    """Print a plan, and return whether it fits."""
    from clip_jax.planner.page import render_page

    plan = _plan_one(options, config, topology)
    print(json.dumps(plan.as_json(), indent=2) if options.json else render_page(plan))
    if options.dump_hlo and plan.fits:
        pathlib.Path(options.dump_hlo).write_text(plan.compiled_text, encoding="utf-8")
    elif options.dump_hlo:
        print(f"{options.dump_hlo} is not written: the compiler returns no program that does not fit", file=sys.stderr)
    return plan.fits


def _check_options(options: types.SimpleNamespace, topology: Topology) -> None:
    """Raise ValueError for flags without effect."""
    if options.loss_only and options.config is not None:
        raise ValueError("--loss_only has no --config; remove one of them")
    if not options.loss_only:
        for name in (name for name in _LOSS_FLAGS if flags.FLAGS[name].present):
            instead = f"; for a run use --{_LOSS_FLAGS[name]}=…" if _LOSS_FLAGS[name] else ""
            raise ValueError(f"--{name} is for --loss_only{instead}")
    if options.dump_hlo and (options.search or topology.chip.kind != "tpu"):
        raise ValueError(f"--dump_hlo={options.dump_hlo}: expected one compiled program, of a TPU, without --search")
    if options.dump_hlo and not pathlib.Path(options.dump_hlo).absolute().parent.is_dir():
        raise ValueError(f"--dump_hlo={options.dump_hlo}: there is no such folder")
    if options.dump_hlo and pathlib.Path(options.dump_hlo).is_dir():
        raise ValueError(f"--dump_hlo={options.dump_hlo}: expected a file, got a directory")


def _plan_one(options: types.SimpleNamespace, config: configs.Config | None, topology: Topology) -> Plan:
    from clip_jax.planner import predict

    if topology.chip.kind != "tpu":
        if config is None:
            raise ValueError("--loss_only compiles, and only TPUs can be compiled for without the device")
        return predict.plan_by_datasheet(config, topology)
    with _heartbeat(f"compiling for {topology.chips} chips of {topology.chip.name}"):
        if config is None:
            return predict.plan_loss(options.loss, options.global_batch, options.embed_dim, options.dtype, topology)
        return predict.plan_step(config, topology)


def _search(options: types.SimpleNamespace, config: configs.Config | None, topology: Topology) -> bool:
    from clip_jax.planner.search import search, table

    if config is None or topology.chip.kind != "tpu":
        raise ValueError("--search compiles steps: it needs --config and a TPU --topology")
    found = []

    def plan(config: configs.Config, topology: Topology) -> Plan:
        candidate = f"remat {config.train.remat}, fsdp {config.mesh.fsdp}, batch {config.train.batch_size:,}"
        print(candidate, file=sys.stderr)
        return _plan_one(options, config, topology)

    try:
        for best in search(config, topology, plan):
            found.append(best)
            print(table([best]).splitlines()[-1], file=sys.stderr)
    finally:
        if found or not sys.exc_info()[0]:  # after an interrupt, too: the rows may have taken hours
            print(json.dumps([plan.as_json() for plan in found], indent=2) if options.json else table(found))
    return bool(found)


@contextlib.contextmanager
def _heartbeat(task: str) -> Iterator[None]:
    """Print the elapsed time to stderr every HEARTBEAT_SECONDS."""
    done, start = threading.Event(), time.monotonic()

    def run() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            print(f"{task}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    print(f"{task}; this takes seconds to minutes", file=sys.stderr, flush=True)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    command.run(main, refused=(ValueError, ModuleNotFoundError, OSError))
