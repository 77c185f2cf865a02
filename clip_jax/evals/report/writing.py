"""Writes `report.json` and `report.html`. The keys of report.json: `results.py`."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from clip_jax.config import flatten
from clip_jax.evals.report.html import render_page
from clip_jax.evals.report.panels import Panels
from clip_jax.paths import write_atomically
from clip_jax.typing import Number

# File names without information: the name of their directory is used instead.
GENERIC_NAMES = ("params", "model", "weights", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
SUFFIXES = (".msgpack", ".pt", ".pth", ".bin", ".safetensors", ".npz")


def write_report(
    workdir: str | os.PathLike[str],
    metrics: Mapping[str, Number | None],
    curves: Sequence[Mapping[str, Number | None]],
    panels: Sequence[Panels],
    run: Mapping[str, Any],
    plots: Mapping[str, str] | None = None,
) -> None:
    """Write `report.json` and `report.html` into `workdir`, each atomically.

    Args:
      metrics: metrics of evaluators and baselines, and `<metric>/threshold`; see `results.py`.
      curves: JSON-lines records of the run, each with `step`. Records with `loss` are training metrics (keys of
        `html.CURVES`); records with keys that begin with an evaluator's name are evaluations.
      run: properties by name. `name` is the title and `attribution` the footer. A mapping, such as `config` or
        `versions`, becomes a table; `skipped` and `failed` map datasets to reasons. report.json stores all of them
        below `run/`.
      plots: SVGs by title, which define their own colors for light and dark mode.
    """
    directory = epath.Path(workdir)
    run = {"name": directory.name, **run}
    flat = {key: _as_json(key, value) for key, value in metrics.items()}
    flat |= {f"run/{key}": _as_json(key, value) for key, value in flatten(run).items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "report.json", json.dumps(flat, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    write_atomically(directory / "report.html", render_page(metrics, curves, panels, run, plots))


def weights_name(weights: str) -> str:
    """Return a short name for weights: the name of their file, directory, run or model."""
    path = pathlib.Path(weights).expanduser()
    stem = path.stem if path.suffix in SUFFIXES else path.name
    return path.absolute().parent.name or stem if stem in GENERIC_NAMES else stem or path.resolve().name


def check_same_weights(directory: pathlib.Path, weights: str, fingerprint: str) -> None:
    """Raise ValueError if a directory holds the report of other weights.

    Weights are the same if either path or fingerprint matches: a file may have been trained further in place.
    """
    path = directory / "report.json"
    if not path.exists():
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("run/weights") != weights and report.get("run/fingerprint") != fingerprint:
        raise ValueError(
            f"{path} is the report of other weights, {report.get('run/weights')}: choose another directory, e.g."
            f" --out={directory}-2, or --out={directory} to overwrite it"
        )


def _as_json(key: str, value: Any) -> Number | str | None:
    """Return a JSON number or string: null for NaN and infinity, an integer for candidates."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            return None
        return int(value) if key.endswith("/candidates") else value
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
