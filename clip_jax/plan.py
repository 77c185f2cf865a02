"""Ask the compiler before a slice is booked: `python -m clip_jax.plan --config=configs/vit_l14.py --topology=v5e-256`.

The step of `clip_jax.main` is compiled for that slice, on any Linux machine with libtpu (`pip install 'jax[tpu]'`), and
one page says whether it fits and what it costs. Compiling takes minutes. Exit codes: 0, it fits; 3, it doesn't; 1, an
error, with its traceback; 2, wrong flags or config, with one sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags
from ml_collections import config_flags

from clip_jax import config as configs
from clip_jax.command import checked_config, parse_flags

if TYPE_CHECKING:
    from clip_jax.planner.predict import Plan
    from clip_jax.planner.topology import Topology

FITS, FAILED, REFUSED, TOO_LARGE = 0, 1, 2, 3
EVERY_SECONDS = 20  # a sign of life

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run, e.g. configs/vit_l14.py.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "As clouds sell it: v5e-256, v4-512 (cores), v4:4x8x8, h100-64 …")
_SLICES = flags.DEFINE_integer("slices", 1, "So many of them, joined by the data centre's network.", lower_bound=1)
_SEARCH = flags.DEFINE_bool("search", False, "The largest batch that fits, by remat policy and mesh: an hour or more.")
_LOSS_ONLY = flags.DEFINE_bool("loss_only", False, "Value and gradient of the loss alone, instead of --config.")
_LOSS = flags.DEFINE_string("loss", "softmax", "For --loss_only: which.")
_BATCH = flags.DEFINE_integer("global_batch", 32_768, "For --loss_only: pairs.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("embed_dim", 512, "For --loss_only: the embeddings' width.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "For --loss_only: the embeddings'.")
_DUMP = flags.DEFINE_string("dump_hlo", "", "Write the compiled program's text to this file.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of the page.")


def main(argv: list[str]) -> None:
    """Plan as the flags say, and leave with a documented exit code."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags begin with --")
        fits = _plan()
    except (ValueError, ModuleNotFoundError) as error:
        _leave(REFUSED, str(error))
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        _leave(FAILED, f"{type(error).__name__}: {error}")
    sys.exit(FITS if fits else TOO_LARGE)


def _plan() -> bool:
    from clip_jax.planner.topology import parse_topology

    if not _TOPOLOGY.value:
        raise ValueError("give --topology, e.g. --topology=v5e-256, v4-512 or h100-64")
    where = parse_topology(_TOPOLOGY.value, _SLICES.value)
    config = None if _LOSS_ONLY.value else _config()
    _check_flags(where)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it would look for a TPU, and say at length why not
    if _SEARCH.value:
        return _search(config, where)

    from clip_jax.planner.page import page

    plan = _plan_one(config, where)
    print(json.dumps(plan.as_json(), indent=2) if _JSON.value else page(plan))
    if _DUMP.value and plan.fits:
        pathlib.Path(_DUMP.value).write_text(plan.compiled_text, encoding="utf-8")
    elif _DUMP.value:
        print(f"{_DUMP.value} isn't written: the compiler gives no program that doesn't fit", file=sys.stderr)
    return plan.fits


def _check_flags(where: Topology) -> None:
    """Raise ValueError for flags that would do nothing."""
    if _LOSS_ONLY.value and _CONFIG.value is not None:
        raise ValueError("--loss_only has no --config; leave one of them out")
    if not _LOSS_ONLY.value:
        instead = {"loss": "config.loss.name", "global_batch": "config.train.batch_size", "dtype": "config.train.dtype"}
        for name in (*instead, "embed_dim"):
            if flags.FLAGS[name].present:
                other = f"; of a run say --{instead[name]}=…" if name in instead else ""
                raise ValueError(f"--{name} is for --loss_only{other}")
    if _DUMP.value and (_SEARCH.value or where.chip.kind != "tpu"):
        raise ValueError(
            f"--dump_hlo={_DUMP.value}: there is one program to write where one is compiled, of a TPU, without --search"
        )
    if _DUMP.value and not pathlib.Path(_DUMP.value).absolute().parent.is_dir():
        raise ValueError(f"--dump_hlo={_DUMP.value}: there is no such folder")


def _plan_one(config: configs.Config | None, where: Topology) -> Plan:
    from clip_jax.planner import predict

    if where.chip.kind != "tpu":
        if config is None:
            raise ValueError("--loss_only compiles, and only TPUs can be compiled for without the device")
        return predict.plan_by_datasheet(config, where)
    with _sign_of_life(f"compiling for {where.chips} chips of {where.chip.name}"):
        if config is None:
            return predict.plan_loss(_LOSS.value, _BATCH.value, _WIDTH.value, _DTYPE.value, where)
        return predict.plan_step(config, where)


def _search(config: configs.Config | None, where: Topology) -> bool:
    from clip_jax.planner.search import search, table

    if config is None or where.chip.kind != "tpu":
        raise ValueError("--search compiles steps: it needs --config and a TPU's --topology")
    found = []

    def plan(config: configs.Config, where: Topology) -> Plan:
        print(
            f"remat {config.train.remat}, fsdp {config.mesh.fsdp}, batch {config.train.batch_size:,}",
            file=sys.stderr,
        )
        return _plan_one(config, where)

    def tell() -> None:
        print(json.dumps([plan.as_json() for plan in found], indent=2) if _JSON.value else table(found))

    try:
        for best in search(config, where, plan):
            found.append(best)
            print(table([best]).splitlines()[-1], file=sys.stderr)
    except BaseException:
        if found:  # hours may have gone into them
            tell()
        raise
    tell()
    return bool(found)


def _config() -> configs.Config:
    from clip_jax.losses import LOSSES

    if _CONFIG.value is None:
        raise ValueError("give --config, e.g. --config=configs/vit_l14.py, or --loss_only")
    config = checked_config(_CONFIG.value)
    configs.check_name("loss.name", config.loss.name, LOSSES)
    return config


@contextlib.contextmanager
def _sign_of_life(what: str) -> Iterator[None]:
    """Say on stderr now and then that something is still going on."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(EVERY_SECONDS):
            print(f"{what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    print(f"{what}; this takes seconds to minutes", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _leave(code: int, message: str) -> NoReturn:
    print(message if code == REFUSED else f"FAILED: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: parse_flags(argv, lambda message: _leave(REFUSED, message)))
