"""What a run tells: a live line on the console, TensorBoard by clu's writers, and a file of JSON lines.

Only the first process writes. A resumed run drops the lines of steps that it is going to take again.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Mapping

from etils import epath

METRICS_FILE = "metrics.jsonl"


class Writer:
    """Scalars by step, to TensorBoard and to `metrics.jsonl`."""

    def __init__(self, workdir: epath.Path, *, first_step: int, active: bool) -> None:
        """Open the files; `active=False` writes nothing, for all but one process."""
        self._active = active
        if not active:
            return
        from clu import metric_writers  # brings TensorFlow, so not before it is needed

        self._board = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir / "tensorboard")))
        self._path = workdir / METRICS_FILE
        kept = [line for line in read_lines(workdir) if line["step"] <= first_step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one record; values that are not finite become null in JSON."""
        if not self._active:
            return
        self._board.write_scalars(step, dict(scalars))
        line = {"step": step} | {name: value if abs(value) < float("inf") else None for name, value in scalars.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Flush."""
        if self._active:
            self._board.close()


def read_lines(workdir: epath.Path) -> list[dict]:
    """Return the records of a run; a last line that a kill cut short is left out."""
    path = workdir / METRICS_FILE
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Meter:
    """Means and rates of the steps since the last record."""

    def __init__(self, batch_size: int, pair_seconds: float = 0.0) -> None:
        """Begin. pair_seconds: what a pair takes on all devices at their peak, for `mfu`; 0: not known."""
        self._batch_size, self._pair_seconds = batch_size, pair_seconds
        self._reset()

    def _reset(self) -> None:
        self._began = time.monotonic()
        self._waited = 0.0
        self._steps = 0
        self._sums: dict[str, float] = {}

    def wait(self, seconds: float) -> None:
        """Count time in which the step waited for data."""
        self._waited += seconds

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count one step."""
        self._steps += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def flush(self) -> dict[str, float]:
        """Return means of the metrics, images_per_second, data_wait and mfu (fractions); begin anew.

        mfu, model flops utilisation (Chowdhery et al. 2022), is there where `pair_seconds` is known.
        """
        elapsed = max(time.monotonic() - self._began, 1e-9)
        steps = max(self._steps, 1)
        record = {name: total / steps for name, total in self._sums.items()}
        record["images_per_second"] = self._steps * self._batch_size / elapsed
        record["data_wait"] = min(1.0, self._waited / elapsed)
        if self._pair_seconds:
            record["mfu"] = record["images_per_second"] * self._pair_seconds
        self._reset()
        return record

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training, e.g. an evaluation."""
        self._began += seconds


class Progress:
    """The line that lives at the bottom of a terminal, or one line a record where there is none."""

    def __init__(self, first_step: int, total_steps: int, *, active: bool) -> None:
        self._first, self._total, self._active = first_step, total_steps, active
        self._began = time.monotonic()
        self._live = active and sys.stderr.isatty()

    def show(self, step: int, record: Mapping[str, float]) -> None:
        """Show a record; the time left counts all that happens between steps, evaluations too."""
        if not self._active:
            return
        rate = (time.monotonic() - self._began) / max(step - self._first, 1)
        left = datetime.timedelta(seconds=round(rate * (self._total - step)))
        mfu = f"  MFU {record['mfu']:.2f}" if "mfu" in record else ""
        line = (
            f"step {step:,}/{self._total:,}  loss {record['loss']:.4f}"
            f"  accuracy {record['accuracy/image_to_text']:.3f} {record['accuracy/text_to_image']:.3f}"
            f"  scale {record['logit_scale']:.2f}  rate {record['learning_rate']:.2e}"
            f"  {record['images_per_second']:,.0f} images/s{mfu}  data wait {record['data_wait']:.0%}  left {left}"
        )
        if self._live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the live line behind."""
        if self._live:
            print(file=sys.stderr)
