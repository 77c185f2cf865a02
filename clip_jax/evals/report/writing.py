"""Writes `report.json` (keys: `tables.py`) and `report.html`, a page without scripts or external resources."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from clip_jax.config import flatten
from clip_jax.evals.report import tables
from clip_jax.evals.report.charts import SERIES, Points, line_chart
from clip_jax.evals.report.panels import Panels
from clip_jax.paths import write_atomically
from clip_jax.typing import Number

# File names without information: the name of their directory is used instead.
GENERIC_NAMES = ("params", "model", "weights", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
SUFFIXES = (".msgpack", ".pt", ".pth", ".bin", ".safetensors", ".npz")

NOTES = ("failed", "skipped")  # keys of `run` that map datasets without a result to the reason
CURVES = {
    "loss": "Loss",
    "accuracy/image_to_text": "Contrastive accuracy in the batch",
    "logit_scale": "Logit scale",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
}
LANGUAGE_METRICS = tuple(f"{way}/recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5))


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
      metrics: see `tables.py`.
      curves: JSON-lines records of the run, each with `step`. Records with `loss` are training metrics (keys of
        CURVES); records with keys that begin with an evaluator's name are evaluations.
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
    """Return a short name for weights: of their file, directory, run or model; for a checkpoint '<run>-<step>'."""
    path = pathlib.Path(weights).expanduser()
    if path.absolute().parent.name == "checkpoints":
        return f"{path.absolute().parents[1].name}-{path.name}"
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
    """Return a JSON number or string: null for NaN and infinity, an integer for candidates and ties."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            return None
        return int(value) if key.endswith(("/candidates", "/ties")) else value
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def render_page(
    metrics: Mapping[str, Number | None],
    curves: Sequence[Mapping[str, Number | None]],
    panels: Sequence[Panels],
    run: Mapping[str, Any],
    plots: Mapping[str, str] | None = None,
) -> str:
    """Return the page as HTML. Arguments: see `write_report`."""
    import markupsafe

    rows, languages = tables.results(metrics), _languages(metrics)
    groups = {row.dataset: [r for r in rows if r.dataset == row.dataset] for row in rows}
    for language in languages:  # in a table of their own
        del groups[language["dataset"]]
    return tables.render(
        "report.html.jinja",
        percent=_css_percent,
        title=run.get("name", "clip_jax run"),
        attribution=run.get("attribution", ""),
        properties={k: v for k, v in run.items() if not isinstance(v, Mapping) and k not in ("name", "attribution")},
        sections={k: flatten(v) for k, v in run.items() if isinstance(v, Mapping) and k not in NOTES},
        notes={state: run.get(state, {}) for state in NOTES},
        headlines=[r for r in rows if r.threshold is not None] or [r for r in rows if r.baseline is not None][:4],
        groups=groups,
        languages=languages,
        charts=[(title, names, markupsafe.Markup(svg)) for title, names, svg in _charts(curves)],
        panels=panels,
        plots={title: markupsafe.Markup(svg) for title, svg in (plots or {}).items()},
    )


def _languages(metrics: Mapping[str, Number | None]) -> list[dict[str, Any]]:
    """Return a row for every retrieval dataset whose name ends in a language code, best first."""
    rows = []
    for name in dict.fromkeys(key.split("/")[1] for key in metrics if key.startswith("retrieval/")):
        if tables.language(name):
            values = [tables.finite_or_none(metrics.get(f"retrieval/{name}/{metric}")) for metric in LANGUAGE_METRICS]
            chance = tables.finite_or_none(metrics.get(f"retrieval/{name}/image_to_text/recall_at_5/chance"))
            rows.append({"dataset": name, "language": tables.language(name), "values": values, "chance": chance})
    return sorted(rows, key=lambda row: -(row["values"][1] or 0))


def _charts(curves: Sequence[Mapping[str, Number | None]]) -> list[tuple[str, list[str], str]]:
    """Return (title, legend, SVG) of each training curve and of the evaluations by step."""
    charts = []
    for key, title in CURVES.items():
        points: Points = [(r["step"], tables.or_nan(r[key])) for r in curves if key in r and "loss" in r]
        charts.append((title, [], line_chart({title: points}, title)))
    evaluations = [r for r in curves if "loss" not in r]
    for metric in ("loss", "image_to_text/recall_at_5", "top1"):
        keys = dict.fromkeys(k for r in evaluations for k in r if k.endswith(f"/{metric}"))
        series = {
            tables.format_key(k.split("/")[1]): [(r["step"], tables.or_nan(r[k])) for r in evaluations if k in r]
            for k in keys
            if not tables.language(k.split("/")[1])
        }
        series = dict(list(series.items())[:SERIES])
        title = f"{tables.format_key(metric)}, held out"
        charts.append((title[0].upper() + title[1:], list(series), line_chart(series, title)))
    return [chart for chart in charts if chart[2]]


def _css_percent(value: Number | None) -> str:
    """Return a fraction as a CSS length."""
    return f"{100 * min(max(value, 0), 1):.1f}%" if value is not None and math.isfinite(value) else "0%"
