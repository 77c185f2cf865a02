"""Training metrics: console progress line, TensorBoard (clu), JSON lines.

Only the main process writes. JSON lines are in `metrics.jsonl`; an object store cannot append, so a remote workdir has
one object per flush instead, `metrics/part-00000.jsonl` etc. A flush precedes every checkpoint, so a resumed run finds
the records of all steps before it.
"""

from __future__ import annotations

import collections
import datetime
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from etils import epath

from clip_jax.config import TrainConfig
from clip_jax.paths import errors_naming, is_url, write_atomically

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
METRICS_FOLDER = "metrics"
EVAL_SECONDS = "eval_seconds"  # every evaluation record has this key, and no training record
# Device metrics are read this many steps late, so that the device never waits for the host.
_LAG = 2
_LONG_WAIT = 0.05  # fraction of the time of waiting for data above which its reason is printed
_BUSY = 0.8  # fraction of their time above which the threads that read and tokenize limit the pipeline


class NonFiniteError(RuntimeError):
    """The loss or the gradient was not finite for `train.max_nonfinite_steps` consecutive steps."""


class TrainingLog:
    """Metrics of a run: means over the steps since the last record, rates, progress, evaluations."""

    def __init__(
        self,
        workdir: epath.Path,
        config: TrainConfig,
        schedule: optax.Schedule,
        *,
        first_step: int,
        total_steps: int,
        epoch_examples: int,
        pair_seconds: float = 0.0,
        saved: Mapping[str, Any] | None = None,
        data_rates: Callable[[], Mapping[str, float]] = dict,
        active: bool = True,
    ) -> None:
        """Open the log and drop the records after `first_step`, which a resumed run computes again.

        Args:
          schedule: learning rate by step.
          first_step: step of the state from which training continues.
          pair_seconds: seconds per image-text pair at the peak FLOP/s of all devices; 0 if unknown.
          saved: `state()` of the checkpoint from which the run is resumed.
          data_rates: returns rates of the input pipeline since its last call.
          active: False for every process but the main one, which then writes nothing.
        """
        saved = saved or {}
        self.writer = Writer(workdir, first_step=first_step, active=active)
        self._config, self._schedule, self._epoch_examples = config, schedule, epoch_examples
        self._total_steps, self._data_rates = total_steps, data_rates
        self._progress = Progress(total_steps, active=active)
        self._meter = Meter(config.batch_size, pair_seconds, saved.get("window"))
        self._replaced = int(saved.get("replaced_records", 0))
        self._filtered = collections.Counter(saved.get("filtered_records", {}))
        self._pending: collections.deque[Mapping[str, jax.Array]] = collections.deque()

    def wait(self, seconds: float) -> None:
        """Add time for which a step waited for its batch on the host."""
        self._meter.wait(seconds)

    def transfer(self, seconds: float) -> None:
        """Add the time in which a batch was copied to the devices, unless they computed the last step all along."""
        if all(array.is_ready() for array in jax.tree.leaves(list(self._pending)[-1:])):
            self._meter.wait(seconds, transfer=True)

    def add(
        self,
        step: int,
        outputs: Mapping[str, jax.Array],
        replaced_records: int,
        filtered_records: Mapping[str, int] | None = None,
    ) -> None:
        """Add the device metrics of one step; write a record every `train.log_every_steps` steps and at the last."""
        self._replaced += replaced_records
        self._filtered.update(filtered_records or {})
        self._pending.append(outputs)
        is_due = step % self._config.log_every_steps == 0 or step == self._total_steps
        self._read_pending(0 if is_due else _LAG)
        if is_due:
            examples_seen = step * self._config.batch_size
            record = (
                self._meter.flush()
                | dict(self._data_rates())
                | {
                    "learning_rate": float(self._schedule(step - 1)),
                    "examples_seen": float(examples_seen),
                    "epoch": examples_seen / self._epoch_examples,
                    "replaced_records": float(self._replaced),
                    **{f"filtered_records/{name}": float(count) for name, count in self._filtered.items()},
                }
            )
            self.writer.write(step, record)
            self._progress.show(step, record)

    def add_evaluation(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Write an evaluation record; its duration does not count as training time."""
        self.writer.write(step, {**metrics, EVAL_SECONDS: seconds})
        self.writer.flush()
        self._meter.pause(seconds)

    def state(self) -> dict[str, Any]:
        """Flush, and return the JSON state with which a resumed run writes the same records."""
        self._read_pending(0)
        self.writer.flush()
        return {"window": self._meter.window(), "replaced_records": self._replaced, "filtered_records": self._filtered}

    def close(self) -> None:
        self._progress.end()
        self.writer.close()

    def _read_pending(self, lag: int) -> None:
        while len(self._pending) > lag:
            values = {name: float(value) for name, value in jax.device_get(self._pending.popleft()).items()}
            _check_skipped_steps(values, self._config.max_nonfinite_steps)
            self._meter.add(values)


def _check_skipped_steps(values: Mapping[str, float], maximum: int) -> None:
    skipped = values.get("consecutive_skipped_steps", 0.0)
    if not skipped:
        return
    reason = f"loss {values.get('loss', math.nan)}, gradient norm {values.get('grad_norm', math.nan)}"
    log.warning("skipped a step that is not finite: %s", reason)
    if skipped >= maximum:
        raise NonFiniteError(
            f"{maximum} consecutive steps were not finite ({reason}) and were skipped. Lower optim.learning_rate or"
            " optim.b2 (0.95), or raise train.max_nonfinite_steps"
        )


class Writer:
    """Writes scalars by step to TensorBoard and as JSON lines."""

    def __init__(self, workdir: epath.Path, *, first_step: int, active: bool) -> None:
        self._active = active
        if not active:
            return
        from clu import metric_writers  # imports TensorFlow

        self._board = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir / "tensorboard")))
        self._workdir, self._remote = workdir, is_url(workdir)
        self._buffer: list[str] = []
        self._evaluated_steps: set[int] = set()
        for path in reversed(_files(workdir)):
            text = path.read_text()
            kept = [line for line in _parse(text) if line["step"] <= first_step]
            self._evaluated_steps |= {line["step"] for line in kept if EVAL_SECONDS in line}
            if (kept_text := "".join(json.dumps(line) + "\n" for line in kept)) != text:
                write_atomically(path, kept_text)
        self._next_part = len(_files(workdir))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._active:
            return
        self._board.write_scalars(step, dict(scalars))
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._buffer.append(json.dumps(line) + "\n")
        if not self._remote:
            self.flush()

    def flush(self) -> None:
        """Write the buffered records: appended to the local file, or as a new object of a remote workdir."""
        if not (self._active and self._buffer):
            return
        text, self._buffer = "".join(self._buffer), []
        if self._remote:
            folder = self._workdir / METRICS_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"part-{self._next_part:05d}.jsonl", text)
            self._next_part += 1
        else:
            path = self._workdir / METRICS_FILE
            with errors_naming(path), path.open("a") as file:
                file.write(text)

    def has_evaluation(self, step: int) -> bool:
        """Return whether the files had an evaluation record of this step when they were opened."""
        return self._active and step in self._evaluated_steps

    def close(self) -> None:
        if self._active:
            self.flush()
            self._board.close()


def read_lines(workdir: epath.Path) -> list[dict]:
    """Return the records of a run in the order of writing, without a last line that a kill truncated."""
    return [line for path in _files(workdir) for line in _parse(path.read_text())]


def _files(workdir: epath.Path) -> list[epath.Path]:
    """Return the JSON-lines files of a workdir, in the order of writing."""
    file, folder = workdir / METRICS_FILE, workdir / METRICS_FOLDER
    parts = sorted(path for path in folder.iterdir() if path.suffix == ".jsonl") if folder.exists() else []
    return ([file] if file.exists() else []) + parts


def _parse(text: str) -> list[dict]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Meter:
    """Means and rates of the steps since the last record."""

    def __init__(
        self, batch_size: int, pair_seconds: float = 0.0, window: Mapping[str, Sequence[float | int]] | None = None
    ) -> None:
        """Start the clock, with the `window()` of the checkpoint from which the run is resumed."""
        self._batch_size, self._pair_seconds = batch_size, pair_seconds
        self._reset()
        self._sums = {name: (float(total), int(steps)) for name, (total, steps) in (window or {}).items()}

    def _reset(self) -> None:
        self._start = time.monotonic()
        self._waited = self._transferred = 0.0
        self._steps = 0
        self._sums: dict[str, tuple[float, int]] = {}

    def wait(self, seconds: float, *, transfer: bool = False) -> None:
        """Add time for which a step waited for its batch, on the host or until it was on the devices."""
        self._waited += seconds
        self._transferred += seconds if transfer else 0.0

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one step; each metric is averaged over the steps that have it."""
        self._steps += 1
        for name, value in metrics.items():
            total, steps = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + float(value), steps + 1

    def window(self) -> dict[str, tuple[float, int]]:
        """Return the sum and the number of steps of every metric since the last record."""
        return dict(self._sums)

    def flush(self) -> dict[str, float]:
        """Return means, images_per_second and fractions of the time since the last call, and start again.

        data_wait is the fraction of waiting for batches, and data/transfer that of their copies to the devices, a part
        of it. mfu is model FLOPs utilization (Chowdhery et al. 2022, appendix B).
        """
        elapsed = max(time.monotonic() - self._start, 1e-9)
        record = {name: total / steps for name, (total, steps) in self._sums.items()}
        record["images_per_second"] = self._steps * self._batch_size / elapsed
        record["data_wait"] = min(1.0, self._waited / elapsed)
        record["data/transfer"] = min(1.0, self._transferred / elapsed)
        if self._pair_seconds:
            record["mfu"] = record["images_per_second"] * self._pair_seconds
        self._reset()
        return record

    def pause(self, seconds: float) -> None:
        """Exclude time that was not spent on training, such as an evaluation."""
        self._start += seconds


class Progress:
    """Progress on stderr: one line that is updated on a terminal, one line per record elsewhere."""

    def __init__(self, total_steps: int, *, active: bool) -> None:
        self._total, self._active = total_steps, active
        self._first: tuple[int, float] | None = None  # step and time of the first record: compilation is before it
        self._live = active and sys.stderr.isatty()

    def show(self, step: int, record: Mapping[str, float]) -> None:
        """Print a record's metrics and the remaining time, which includes evaluations and checkpoints.

        The first record has no remaining time: most of its time was compilation.
        """
        if not self._active:
            return
        now = time.monotonic()
        first_step, start = self._first = self._first or (step, now)
        columns = {
            "loss": "loss {:.4f}",
            "accuracy/image_to_text": "accuracy i2t {:.3f}",
            "accuracy/text_to_image": "t2i {:.3f}",
            "logit_scale": "scale {:.2f}",
            "learning_rate": "lr {:.2e}",
            "images_per_second": "{:,.0f} images/s",
            "mfu": "MFU {:.2f}",
            "data_wait": "data wait {:.0%}",
        }
        shown = [text.format(record[name]) for name, text in columns.items() if name in record]
        if record.get("data_wait", 0) > _LONG_WAIT and "data/storage" in record:
            shown[-1] += f" ({_limiting_stage(record)})"
        if step > first_step:
            remaining = (now - start) / (step - first_step) * (self._total - step)
            shown.append(f"left {datetime.timedelta(seconds=round(remaining))}")
        line = "  ".join([f"step {step:,}/{self._total:,}", *shown])
        before, after = ("\r\x1b[2K", "") if self._live else ("", "\n")
        print(before + line, end=after, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._live:
            print(file=sys.stderr)


def _limiting_stage(record: Mapping[str, float]) -> str:
    """Return the stage of the input pipeline for which steps wait."""
    if record["data/transfer"] > record["data_wait"] / 2:
        return "transfer"
    stages = {name: record[f"data/{name}"] for name in ("storage", "tokenizer")}
    return max(stages, key=stages.__getitem__) if sum(stages.values()) > _BUSY else "decode"
