"""The report as one HTML page without scripts or external resources. Images and charts are inline."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clip_jax.config import flatten
from clip_jax.evals.report.charts import SERIES, Points, line_chart
from clip_jax.evals.report.panels import Panels
from clip_jax.evals.report.results import (
    Result,
    finite_or_none,
    format_count,
    format_fraction,
    format_key,
    language,
    or_nan,
    results,
)
from clip_jax.typing import Number

NOTES = ("failed", "skipped")  # keys of `run` that map datasets without a result to the reason
CURVES = {
    "loss": "Loss",
    "accuracy/image_to_text": "Contrastive accuracy in the batch",
    "logit_scale": "Logit scale",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
}
LANGUAGE_METRICS = tuple(f"{way}/recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5))


def render_page(
    metrics: Mapping[str, Number | None],
    curves: Sequence[Mapping[str, Number | None]],
    panels: Sequence[Panels],
    run: Mapping[str, Any],
    plots: Mapping[str, str] | None = None,
) -> str:
    """Return the page as HTML. Arguments: see `writing.write_report`."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "words": format_key,
        "fraction": format_fraction,
        "count": format_count,
        "percent": _css_percent,
    }
    template = importlib.resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    rows, languages = results(metrics), _languages(metrics)
    return environment.from_string(template).render(
        title=run.get("name", "clip_jax run"),
        attribution=run.get("attribution", ""),
        properties={k: v for k, v in run.items() if not isinstance(v, Mapping) and k not in ("name", "attribution")},
        sections={k: flatten(v) for k, v in run.items() if isinstance(v, Mapping) and k not in NOTES},
        notes={state: run.get(state, {}) for state in NOTES},
        headlines=[r for r in rows if r.threshold is not None] or [r for r in rows if r.baseline is not None][:4],
        groups=_by_dataset(r for r in rows if r.dataset not in {row["dataset"] for row in languages}),
        languages=languages,
        charts=[(title, names, markupsafe.Markup(svg)) for title, names, svg in _charts(curves)],
        panels=panels,
        plots={title: markupsafe.Markup(svg) for title, svg in (plots or {}).items()},
    )


def _by_dataset(rows: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(row.dataset, []).append(row)
    return groups


def _languages(metrics: Mapping[str, Number | None]) -> list[dict[str, Any]]:
    """Return a row for every retrieval dataset whose name ends in a language code, best first."""
    rows = []
    for name in dict.fromkeys(key.split("/")[1] for key in metrics if key.startswith("retrieval/")):
        if language(name):
            values = [finite_or_none(metrics.get(f"retrieval/{name}/{metric}")) for metric in LANGUAGE_METRICS]
            chance = finite_or_none(metrics.get(f"retrieval/{name}/image_to_text/recall_at_5/chance"))
            rows.append({"dataset": name, "language": language(name), "values": values, "chance": chance})
    return sorted(rows, key=lambda row: -(row["values"][1] or 0))


def _charts(curves: Sequence[Mapping[str, Number | None]]) -> list[tuple[str, list[str], str]]:
    """Return (title, legend, SVG) of each training curve and of the evaluations by step."""
    charts = []
    for key, title in CURVES.items():
        points: Points = [(r["step"], or_nan(r[key])) for r in curves if key in r and "loss" in r]
        charts.append((title, [], line_chart({title: points}, title)))
    evaluations = [r for r in curves if "loss" not in r]
    for metric in ("image_to_text/recall_at_5", "top1"):
        keys = dict.fromkeys(k for r in evaluations for k in r if k.endswith(f"/{metric}"))
        series = {
            format_key(k.split("/")[1]): [(r["step"], or_nan(r[k])) for r in evaluations if k in r]
            for k in keys
            if not language(k.split("/")[1])
        }
        series = dict(list(series.items())[:SERIES])
        title = f"{format_key(metric)}, held out"
        charts.append((title[0].upper() + title[1:], list(series), line_chart(series, title)))
    return [chart for chart in charts if chart[2]]


def _css_percent(value: Number | None) -> str:
    """Return a fraction as a CSS length."""
    return f"{100 * min(max(value, 0), 1):.1f}%" if value is not None and math.isfinite(value) else "0%"
