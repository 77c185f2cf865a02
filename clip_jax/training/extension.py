"""Extension of a run (--extend): more steps or more training data, and the changes of schedule and data order."""

from __future__ import annotations

from typing import Any

from clip_jax.config import Config
from clip_jax.training import optim


def run_info(fingerprint: str, examples: int, total_steps: int) -> dict[str, Any]:
    """Return the values of a checkpoint's info that a resumed run is compared with."""
    return {"training_data": fingerprint, "training_examples": examples, "total_steps": total_steps}


def check(info: dict[str, Any], now: dict[str, Any], step: int, *, workdir: str, extend: bool) -> None:
    """Raise ValueError if the training data is another one without --extend, or if the run would become shorter.

    Args:
      info: of the restored checkpoint; before --extend existed, it had no number of examples and steps.
      now: `run_info` of the resumed run.
      step: of the checkpoint.
    """
    if info["training_data"] != now["training_data"] and not extend:
        raise ValueError(
            f"the training data is not the data of the run in {workdir}: {_changes(info, now)}. Restore the data (copy"
            " folders with their modification times: cp -p, rsync -a), add --extend if data was added, or use another"
            " --workdir"
        )
    for key, unit in (("training_examples", "examples"), ("total_steps", "steps")):
        if now[key] < (before := info.get(key, step if key == "total_steps" else 0)):
            raise ValueError(
                f"{workdir} has a run of {before:,} {unit}: --extend expected at least as many, got {now[key]:,}."
                " Use another --workdir"
            )


def _changes(info: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the parts of the fingerprint that differ, and the number of examples if it does.

    >>> _changes(run_info("names=a contents=b", 9, 1), run_info("names=a contents=c", 9, 1))
    'expected contents=b, got contents=c'
    """
    before, after = info["training_data"].split(), now["training_data"].split()
    differing = [pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
    found = "expected {}, got {}".format(*map(" ".join, zip(*differing, strict=True)))
    counts = info.get("training_examples", now["training_examples"]), now["training_examples"]
    return found + (f", and {counts[1]:,} examples instead of {counts[0]:,}" if counts[0] != counts[1] else "")


def notes(config: Config, info: dict[str, Any], now: dict[str, Any], step: int) -> list[str]:
    """Return the changes after `step` of a run that was extended since its checkpoint; nothing for others.

    >>> from clip_jax.config import Config, OptimConfig, TrainConfig
    >>> config = Config(optim=OptimConfig(learning_rate=1e-3, warmup_steps=10), train=TrainConfig(batch_size=10))
    >>> before = run_info("a", 100, 100)
    >>> for note in notes(config, before, run_info("a", 100, 200), step=99):
    ...     print(note)
    extended from 100 to 200 steps: the cosine ends at step 200; learning rate of step 100: 0.00055, was 3.05e-07
    """
    found = []
    old, new = info.get("total_steps", now["total_steps"]), now["total_steps"]
    if old != new:
        rates = [float(optim.make_schedule(config.optim, steps)(step)) for steps in (new, old)]
        found.append(
            f"extended from {old:,} to {new:,} steps: the cosine ends at step {new:,}; learning rate of step"
            f" {step + 1:,}: {rates[0]:.3g}, was {rates[1]:.3g}"
        )
    if info["training_data"] != now["training_data"]:
        before, after = info.get("training_examples", now["training_examples"]), now["training_examples"]
        seen = step * config.train.batch_size
        found.append(
            f"training data extended from {before:,} to {after:,} pairs, in a new order: step {step + 1:,} is at pair"
            f" {seen % after:,} of epoch {seen // after} of the new data (pair {seen % before:,} of epoch"
            f" {seen // before} of the old). In this epoch some pairs repeat and others are skipped; from the next on"
            " each occurs once"
        )
    return found
