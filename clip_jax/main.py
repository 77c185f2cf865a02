"""`python -m clip_jax.main --config=configs/emoji.py`: train, evaluate, report, export. The same command resumes.

Exit codes: 0, finished, or stopped by SIGTERM with the state saved (the last line says which); 1, an error, with its
traceback; 2, a wrong flag, config or input, with one sentence.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import NoReturn

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from clip_jax import config as configs
from clip_jax.command import given_config, parse_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(), e.g. configs/emoji.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/<name of the config> by default.")
_EXPORT = flags.DEFINE_string("export", None, "Write the trained weights to this msgpack file at the end.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the run would do, and end.")

FINISHED, FAILED, REFUSED = 0, 1, 2


def main(argv: list[str]) -> None:
    """Run as the flags say, and leave with a documented exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for chatty in ("absl", "jax", "orbax", "tensorflow", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if len(argv) > 1:
        _leave(REFUSED, f"unexpected argument {argv[1]!r}; flags begin with --")
    try:
        finished = _run()
    except ValueError as error:
        _leave(REFUSED, str(error), traceback_too=bool(os.environ.get("CLIP_JAX_TRACEBACK")))
    except Exception as error:  # noqa: BLE001
        _leave(FAILED, f"{type(error).__name__}: {error}", traceback_too=True)
    if not _DRY_RUN.value:
        print("finished" if finished else "stopped by SIGTERM, state saved: the same command goes on", file=sys.stderr)
    sys.exit(FINISHED)


def _run() -> bool:
    config, workdir = _config_and_workdir()
    if _DRY_RUN.value:
        from clip_jax.training.dry_run import describe

        print(describe(config, workdir))
        return True
    from clip_jax.devices import allocator, distributed

    allocator.keep_freed_memory()
    distributed.initialize()
    from clip_jax.training.loop import train

    return train(config, str(workdir), _EXPORT.value)


def _config_and_workdir() -> tuple[configs.Config, epath.Path]:
    """Return the checked config and the workdir: given, or stored by the run that is to go on."""
    if _CONFIG.value is None and _WORKDIR.value is None:
        raise ValueError("give --config, e.g. --config=configs/emoji.py, or the --workdir of a run that is to go on")
    name = os.path.basename(flags.FLAGS["config"].config_filename or "").split(":")[0].removesuffix(".py")
    workdir = epath.Path(_WORKDIR.value or f"runs/{name}").expanduser()

    from clip_jax.training.workdir import check_same_run, stored_config

    stored = stored_config(workdir)
    if _CONFIG.value is None:
        if stored is None:
            raise ValueError(f"{workdir} holds no run to go on with; give --config, e.g. --config=configs/emoji.py")
        return stored, workdir
    given = given_config(_CONFIG.value)
    _check_names(given)
    if stored is not None:
        check_same_run(stored, given, workdir)
    return given, workdir


def _check_names(config: configs.Config) -> None:
    """Raise ValueError for a name that no registry knows."""
    from clip_jax.data import SOURCES
    from clip_jax.evals import EVALUATORS
    from clip_jax.evals.datasets import LOADERS
    from clip_jax.evals.datasets.registry import DATASETS
    from clip_jax.evals.suite import REGISTRY

    configs.check_name("data.source", config.data.source, SOURCES)
    for name, task in config.eval.tasks.items():
        configs.check_name(f"eval.tasks.{name}.evaluator", task.evaluator, EVALUATORS)
        configs.check_name(f"eval.tasks.{name}.source", task.source, [*LOADERS, REGISTRY])
        if task.source == REGISTRY:
            configs.check_name(f"eval.tasks.{name}.split", task.split, DATASETS)


def _leave(code: int, message: str, *, traceback_too: bool = False) -> NoReturn:
    """Say why and end at once.

    `os._exit`, because an ordinary exit would wait in JAX's shutdown barrier for the other hosts, which wait for us,
    while this host's heartbeat tells them that all is well: five minutes in which nothing is said.
    """
    if traceback_too:
        traceback.print_exc()
    print(f"clip_jax: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: parse_flags(argv, lambda message: _leave(REFUSED, message)))
