"""Train a model, or resume its run: the same command continues after an interruption.

    clip-jax train --config=configs/emoji.py --workdir=runs/emoji --export=runs/emoji/params.msgpack
    clip-jax train --config=configs/vit_b32.py --workdir=runs/b32 --config.data.files='/data/cc3m/*.tfrecord'
    clip-jax train --config=configs/vit_b32.py --config.train.batch_size=4096 --dry_run

--config.KEY=VALUE replaces a value of the config file. `clip-jax train` is short for `python -m clip_jax.main`.

Exit codes: 0, finished, or stopped by SIGTERM with the state saved (the last line on stderr states which); 1, an error,
with its traceback; 2, a wrong flag, config or input, or a full disk, with one sentence.
"""

from __future__ import annotations

import os
import sys
import time

from absl import flags
from etils import epath
from ml_collections import config_flags

from clip_jax import command
from clip_jax import config as configs

_STARTED = time.monotonic()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A Python file with get_config(), e.g. configs/emoji.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory or gs:// URL of the run; runs/<name of the config> by default."
)
_EXPORT = flags.DEFINE_string("export", None, "Write the final weights to this msgpack file or gs:// URL.")
_EXTEND = flags.DEFINE_bool(
    "extend",
    False,
    "Continue the run of the workdir with more steps (train.total_*) or more training data (data.files).",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the config and its files, print a summary of the run and exit.")


def main(_: list[str]) -> int:
    """Train with the given flags. Returns the exit code."""
    finished = _run()
    if not _DRY_RUN.value:
        message = "finished" if finished else "stopped by SIGTERM, state saved: the same command resumes the run"
        print(message, file=sys.stderr)
    return command.FINISHED


def _run() -> bool:
    """Return whether the run is finished; False after preemption."""
    config, workdir = _config_and_workdir()
    if _DRY_RUN.value:
        from clip_jax.training.dry_run import describe

        print(describe(config, workdir))
        return True
    from clip_jax.devices import allocator, distributed

    allocator.keep_freed_memory()
    distributed.initialize()
    from clip_jax.training.loop import train
    from clip_jax.training.startup import keep_programs

    keep_programs(workdir)
    return train(config, str(workdir), _EXPORT.value, extend=_EXTEND.value, started=_STARTED)


def _config_and_workdir() -> tuple[configs.Config, epath.Path]:
    """Return the checked config and the workdir; without --config the config that is stored in the workdir."""
    if _CONFIG.value is None and _WORKDIR.value is None:
        raise ValueError("give --config, e.g. --config=configs/emoji.py, or the --workdir of a run to resume")
    from clip_jax.training.workdir import check_same_config, stored_config, to_path

    if _CONFIG.value is None:
        workdir = to_path(_WORKDIR.value, "--workdir")
        stored = stored_config(workdir)
        if stored is None:
            raise ValueError(f"{workdir} has no run to resume; give --config, e.g. --config=configs/emoji.py")
        return stored, workdir
    given = command.checked_config(_CONFIG.value)
    name = os.path.basename(flags.FLAGS["config"].config_filename).split(":")[0].removesuffix(".py")
    workdir = to_path(_WORKDIR.value or f"runs/{name}", "--workdir")
    stored = stored_config(workdir)
    _check_names(given)
    configs.check_local_paths(given)
    if stored is not None:
        check_same_config(stored, given, workdir, extend=_EXTEND.value)
    elif _EXTEND.value:
        raise ValueError(f"--extend: {workdir} has no run to extend; give the --workdir of a run, or omit --extend")
    return given, workdir


def _check_names(config: configs.Config) -> None:
    """Raise ValueError for a name that is not in its registry."""
    from clip_jax.data import SOURCES
    from clip_jax.evals import EVALUATORS
    from clip_jax.evals.load import find

    configs.check_name("data.source", config.data.source, ["", *SOURCES])
    for name, task in config.eval.tasks.items():
        configs.check_name(f"eval.tasks.{name}.evaluator", task.evaluator, EVALUATORS)
        find(task.dataset, f"eval.tasks.{name}.dataset")
    if config.eval.baselines_dataset:
        find(config.eval.baselines_dataset, "eval.baselines_dataset")


if __name__ == "__main__":
    command.run(main, refused=(ValueError, PermissionError, NotADirectoryError, IsADirectoryError), leave=os._exit)
